"""Memory, disk and time of conversions of a 7B model, as ``llamamoe split --dry-run`` works them out.

    python benchmarks/conversions_on_paper.py

The parent's headers are written to a temporary folder (sparse files, no weights), and the plan is the dry run's own. The
time is operations over `REFERENCE_FLOPS`, the rate that plans assume.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llamamoe
from llamamoe.calibration.compute import REFERENCE_FLOPS
from llamamoe.conversion.plan import SplitPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.synthetic import LLAMA_2_7B, make

TEXT_BYTES = 2**20
"""Size of the calibration text: enough for all tokens of the cases. A plan does not read it."""
CASES: dict[str, dict[str, Any] | None] = {
    "without text": None,
    "`--calibration-tokens 8192`": {"calibration_tokens": 8192},
    "65,536 tokens, the default": {},
    "the same, `--repair none`": {"repair": "none"},
}


def plans(folder: Path) -> Iterator[tuple[str, SplitPlan]]:
    """Yield the plan of every case; ``folder`` receives the headers and the text."""
    parent, text = folder / "parent", folder / "text.txt"
    make(parent, LLAMA_2_7B, num_shards=4, sparse=True)
    text.write_text("a" * TEXT_BYTES)
    for name, given in CASES.items():
        recipe = {} if given is None else {"calibration": [str(text)], **given}
        yield name, llamamoe.plan_conversion(parent, llamamoe.load_recipe(given=recipe))


def main() -> None:
    """Print a table in Markdown."""
    print(
        "| conversion | peak memory | temporary files | output | calibration at "
        f"{REFERENCE_FLOPS / 1e9:.0f} billion operations a second |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans(Path(folder)):
            needed = plan.calibration
            disk = f"{needed.disk_bytes / 1e9:.1f} GB" if needed else "none"
            time = f"{needed.seconds() / 3600:.1f} h" if needed else "none"
            print(f"| {name} | {plan.peak_bytes / 1e9:.1f} GB | {disk} | {plan.cost.nbytes / 1e9:.1f} GB | {time} |")


if __name__ == "__main__":
    main()
