"""How fast shapes of conversions run: measured beside their dense parent and static pruning, on a model of real size."""
