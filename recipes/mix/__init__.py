"""Recipes for ``llamamoe mix``."""
