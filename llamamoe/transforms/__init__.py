"""From one MoE checkpoint to another one, to a dense one or to a GGUF file."""
