"""Training a mixture of experts: losses, gates, distillation, and the Trainer that puts them together."""
