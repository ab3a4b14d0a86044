"""Preference tuning of converted models by TRL."""
