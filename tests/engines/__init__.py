"""Training engines that read our checkpoints, in environments of their own."""
