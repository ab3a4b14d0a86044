"""Measure several ways of halving the FFN of your model beside their controls, on your text.

    python examples/compare.py MODEL OUT --calibration texts/ --evaluation held-out/

Nothing is written but numbers. Stop it whenever you like: started again, it measures what is missing.
"""

from __future__ import annotations

import argparse

import llamamoe

# A name, and keys of a recipe for split. The number of selected experts follows from the budget: how much of the FFN a token may use.
METHODS = [
    {"name": "token_clusters", "num_experts": 24, "repair": {"name": "least_squares", "ridge": "auto"}},
    {"name": "cluster_shared", "num_experts": 8, "repair": "none"},  # needs no text: its router is made from weights
]


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True, help="other documents than the calibration text")
    parser.add_argument("--tokens", type=int, default=8192, help="of the calibration text (default: 8192)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a sequence (default: 512)")
    args = parser.parse_args()

    recipe = llamamoe.load_compare_recipe(
        given={
            "methods": METHODS,
            "budgets": [0.5],
            "seeds": [0],  # several seeds show what is chance
            "calibration": args.calibration,
            "calibration_tokens": args.tokens,
            "calibration_length": args.window,
            "evaluation": args.evaluation,
            "context_length": args.window,
        }
    )

    # Controls come by themselves: the dense model, random experts, static pruning (the same neurons for every token) with the same repair,
    # and every method with an oracle in the place of its router, which shows how much of the loss is the router's.
    found = llamamoe.compare(args.model, args.out, recipe)
    print(found.protocol)
    print(f"{'':45} {'FFN':>5} {'perplexity':>12} {'x dense':>8}")
    for row in found.rows:
        print(f"{row.method:45} {row.share:5.0%} {row.perplexity:12.2f} {row.ratio:8.2f}")
    for label, reason in found.failed:
        print(f"failed: {label}: {reason}")


if __name__ == "__main__":
    main()
