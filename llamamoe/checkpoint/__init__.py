"""Read and write checkpoints: headers, tensors, shards, ledger."""
