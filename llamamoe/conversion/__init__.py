"""Convert a dense checkpoint into a mixture of experts: plan, split, verify."""
