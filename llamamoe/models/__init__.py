"""Load models of transformers, stream them layer by layer, and run their experts."""
