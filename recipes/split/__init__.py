"""Recipes for ``llamamoe split``."""
