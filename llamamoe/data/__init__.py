"""Read text and token data."""
