"""Instruction tuning of converted models with TRL and peft."""
