"""Collect a report while models read a text, and render it as one page."""
