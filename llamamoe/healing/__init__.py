"""Layer-wise healing: each converted FFN and its router distilled from the parent's, one layer at a time."""
