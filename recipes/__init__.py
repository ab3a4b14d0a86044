"""Recipes shipped with llamamoe, as YAML files."""
