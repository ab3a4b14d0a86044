"""Reading text and token data."""
