"""Measure the gain of aligning all layers jointly, with controls: perplexity over dense at equal active neurons.

    python benchmarks/alignment.py SOURCE --text PATH --evaluation PATH --json FILE
        [--experts 8 --top-k 4 --shared 12] [--tokens 147456] [--length 128] [--seeds 1] [--arms NAME ...]

Every arm is a conversion of SOURCE by `llamamoe.split` and is measured by `llamamoe.evaluate`; the static arms keep as many
neurons as a token of the others uses. All see the same text: the same calibration tokens, and the arms that learn the same
tokens for alignment. An arm that is in FILE already is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llamamoe
from llamamoe.checkpoint.files import write_text
from llamamoe.checkpoint.out_folder import RECEIPT_FILE

ROUTED: dict[str, Any] = {"method": "token_clusters", "router": "ridge"}
STATIC: dict[str, Any] = {"method": "static"}
DISTILLED: dict[str, Any] = {"repair": {"name": "distill", "epochs": 5}}
FROZEN: dict[str, Any] = {"weights": "frozen"}
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "static, as it is": (STATIC | {"repair": "none"}, None),
    "static, repaired": (STATIC | {"repair": "least_squares"}, None),
    "static, distilled": (STATIC | DISTILLED, None),
    "static, mask learned": (STATIC | {"repair": "none"}, FROZEN),
    "static, all learned": (STATIC | {"repair": "least_squares"}, {}),
    "experts, as they are": (ROUTED | {"repair": "none"}, None),
    "experts, repaired": (ROUTED | {"repair": "least_squares"}, None),
    "experts, distilled": (ROUTED | DISTILLED, None),
    "router learned": (ROUTED | {"repair": "none"}, FROZEN | {"lr_assignment": 0}),
    "assignment learned": (ROUTED | {"repair": "none"}, FROZEN | {"lr_router": 0}),
    "router and assignment learned": (ROUTED | {"repair": "none"}, FROZEN),
    "the same, then repaired": (ROUTED | {"repair": "least_squares"}, FROZEN),
    "router, assignment, factors learned": (ROUTED | {"repair": "none"}, {"weights": "scales"}),
    "repaired, then router and weights learned": (ROUTED | {"repair": "least_squares"}, {"lr_assignment": 0}),
    "repaired, then all learned": (ROUTED | {"repair": "least_squares"}, {}),
    "distilled, then router and weights learned": (ROUTED | DISTILLED, {"lr_assignment": 0}),
    "static, distilled, then all learned": (STATIC | DISTILLED, {}),
    "random experts, repaired, then all learned": (
        {"method": "random", "shared_by": "power", "router": "ridge", "repair": "least_squares"},
        {},
    ),
}
"""Recipe of each arm, and its alignment beside the common tokens and length; None for none."""


def recipe(options: argparse.Namespace, name: str, seed: int) -> llamamoe.SplitRecipe:
    """An arm's recipe at the common sizes."""
    keys, align = ARMS[name]
    given: dict[str, Any] = {
        "num_experts": options.experts, "top_k": options.top_k, "shared": options.shared, "seed": seed, "card": False,
        "compute_dtype": options.compute_dtype, "calibration": [str(options.text)], "calibration_tokens": options.calibration_tokens, "target": "auto",
    } | keys  # fmt: skip
    if keys["method"] == "static":
        given["shared"] = options.active
    if align is not None:
        common = {key: json.loads(value) for key, value in options.set}
        given["align"] = {"tokens": options.tokens, "length": options.length} | common | align
    return llamamoe.load_recipe(given=given)


def measure(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One arm: its perplexity over the parent's, and how it came about."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if options.work is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = options.work / f"{re.sub('[^a-z]+', '-', name)}-{seed}"
        out = folder / "out"
        if not out.exists():
            folder.mkdir(parents=True, exist_ok=True)
            llamamoe.split(options.source, out, recipe(options, name, seed), verify=False, resume=True)
        seconds = time.monotonic() - began
        found = llamamoe.evaluate(
            out,
            [options.evaluation],
            against=options.source,
            max_tokens=options.evaluation_tokens,
            context_length=options.context,
            dtype="float32",
        )
        assert found.against is not None
        ratio = math.exp(found.model.mean_over_domains.loss - found.against.mean_over_domains.loss)
        alignment = json.loads((out / RECEIPT_FILE).read_text())["alignment"]
    kept = {key: alignment[key] for key in ("held_out_kl", "kept_step", "tokens")} if alignment else {}
    if alignment:
        moved = alignment["moved_neurons"].values()
        kept["moved"] = sum(moved) / len(moved)
    return {"arm": name, "seed": seed, "perplexity_over_dense": ratio, "seconds": seconds} | kept


def main() -> None:
    """Make, measure, write after each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="keeps conversions, so that a stopped one goes on")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--shared", type=int, default=12, help="neurons")
    parser.add_argument(
        "--active", type=int, default=92, help="neurons that a token uses, and that static pruning keeps"
    )
    parser.add_argument("--tokens", type=int, default=147456)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--evaluation-tokens", type=int, default=40000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        type=lambda text: text.split("="),
        metavar="KEY=VALUE",
        help="of alignment, in all arms that do not say otherwise",
    )
    options = parser.parse_args()
    sizes = {key: str(value) for key, value in vars(options).items() if key not in ("json", "work", "arms", "seeds")}
    if options.compute_dtype == "float32":
        del sizes["compute_dtype"]  # older results do not name it
    known = json.loads(options.json.read_text()) if options.json.exists() else {"sizes": sizes, "arms": []}
    if known["sizes"] != sizes:
        sys.exit(f"{options.json} was measured at other sizes: {known['sizes']}")
    for seed in range(options.seeds):
        for name in options.arms:
            if any(each["arm"] == name and each["seed"] == seed for each in known["arms"]):
                continue
            known["arms"].append(measure(options, name, seed))
            print({key: value for key, value in known["arms"][-1].items() if key != "held_out_kl"}, flush=True)
            write_text(options.json, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
