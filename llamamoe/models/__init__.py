"""Models of transformers: load them, stream them layer by layer, run their experts."""
