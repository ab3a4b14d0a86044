"""Recipes for ``llamamoe resplit``."""
