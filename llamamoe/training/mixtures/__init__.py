"""Which domain the next training sequence comes from."""
