"""What a report shows: collected while models read a text, and made into one page."""
