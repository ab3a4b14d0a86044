"""Recipes for ``llamamoe compare``."""
