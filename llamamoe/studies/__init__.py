"""Studies: many conversions of one model, measured alike and side by side."""
