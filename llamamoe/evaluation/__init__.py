"""Measure perplexity, task scores and speed of models."""
