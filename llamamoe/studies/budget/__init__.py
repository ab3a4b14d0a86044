"""How many neurons each layer may use, for a given number of active parameters."""
