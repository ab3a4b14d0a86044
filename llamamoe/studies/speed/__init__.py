"""Measure the speed of conversions' shapes beside their dense parent and static pruning, on a model of real size."""
