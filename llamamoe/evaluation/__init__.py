"""Perplexity, tasks and speed of models."""
