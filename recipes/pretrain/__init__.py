"""Recipes for ``llamamoe pretrain``."""
