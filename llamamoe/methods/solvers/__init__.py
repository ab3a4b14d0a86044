"""Optimisation algorithms that several methods share."""
