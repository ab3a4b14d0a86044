"""``python -m llamamoe_cli``."""

from .main import main

main()
