"""Finds the packages, of which two are installed under other names; everything else stands in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["llamamoe", "llamamoe.*"]),
        "llamamoe_cli",
        "llamamoe_recipes",
        *(f"llamamoe_recipes.{name}" for name in find_packages("recipes")),
    ]
)
