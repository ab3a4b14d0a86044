"""Places of files in the repository and of their pages on the site."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "recipes/README.md": "reference/shipped-recipes.md",
    "recipes/split/README.md": "how-to/choose-a-method.md",
    "recipes/launch/README.md": "how-to/many-gpus.md",
    "recipes/tokenize/README.md": "how-to/data.md",
    "benchmarks/results/compare-smollm2/comparison.md": "benchmarks-smollm2.md",
}
"""Files of the repository that the site shows as pages."""


def anchor(recipe: str) -> str:
    """Return the anchor of a shipped recipe, such as ``split/calibrated.yaml``."""
    return recipe.removesuffix(".yaml").replace("/", "-")
