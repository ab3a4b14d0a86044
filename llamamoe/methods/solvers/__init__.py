"""Optimisation that several methods share."""
