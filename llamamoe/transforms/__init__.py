"""Transform an MoE checkpoint into another one, a dense one or a GGUF file."""
