"""``python -m llamamoe_cli``."""

from . import run

run()
