"""Recipes for ``llamamoe heal``."""
