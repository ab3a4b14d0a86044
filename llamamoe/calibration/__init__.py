"""Calibration data for the methods: the text, and the inputs of every FFN on it."""
