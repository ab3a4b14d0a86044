"""Train a mixture of experts: losses, gates, distillation, and the Trainer that combines them."""
