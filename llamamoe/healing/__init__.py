"""Layer-wise healing: distil each converted FFN and its router from the parent's, one layer at a time."""
