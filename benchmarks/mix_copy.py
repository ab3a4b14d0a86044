"""Time of ``llamamoe mix`` of two copies of a model, beside a copy of the files that it writes.

    python benchmarks/mix_copy.py MODEL --work /big/disk [--repeat 3]

Both sides end with their files synced to disk and take turns; the best of each counts. ``mix`` is called in this process, after
the first call, and does not verify.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from conversion import copy

import llamamoe


def mix(model: Path, out: Path) -> float:
    """``llamamoe.mix`` of two copies of a model: seconds."""
    shutil.rmtree(out, ignore_errors=True)
    recipe = llamamoe.load_mix_recipe(given={"experts": [str(model)] * 2, "top_k": 1})
    began = time.perf_counter()
    llamamoe.mix(model, out, recipe, verify=False, force=True)
    return time.perf_counter() - began


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="A dense model; a folder.")
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/work"), help="A folder with room for two results."
    )
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    out, copied = options.work / "mix", options.work / "mix-copy"
    mix(options.model, out)
    seconds: dict[str, list[float]] = {"mix": [], "copy": []}
    for _ in range(options.repeat):
        seconds["mix"].append(mix(options.model, out))
        shutil.rmtree(copied, ignore_errors=True)
        seconds["copy"].append(copy(out, copied)[0])
        print({name: round(each[-1], 2) for name, each in seconds.items()}, flush=True)
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    print(f"{nbytes / 1e6:.0f} MB: {min(seconds['mix']) / min(seconds['copy']):.2f} x the copy")
    for folder in (out, copied):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
