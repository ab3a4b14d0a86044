"""Names and configuration keys of dense families and of MoE architectures; no tensors are computed here."""
