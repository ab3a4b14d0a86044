"""Recipes of ``llamamoe tokenize``."""
