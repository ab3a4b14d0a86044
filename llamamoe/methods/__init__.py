"""The mathematics of one layer: methods to partition an FFN, route, select and repair."""
