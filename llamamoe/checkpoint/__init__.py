"""Reading and writing checkpoints: headers, tensors, shards, ledger."""
