"""Choose the number of neurons per layer for a given number of active parameters."""
