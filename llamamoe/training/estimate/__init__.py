"""Estimate time and memory of a training run, from sizes alone."""
