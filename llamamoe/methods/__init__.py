"""One layer's mathematics: ways to split an FFN, to route, to select, to repair."""
