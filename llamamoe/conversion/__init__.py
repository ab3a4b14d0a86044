"""From a dense checkpoint to a mixture of experts: plan, split, verify."""
