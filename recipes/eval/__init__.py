"""Benchmark tasks, by lm-evaluation-harness."""
