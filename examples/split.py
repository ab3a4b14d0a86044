"""Convert a dense model into a mixture of experts: plan, convert, measure.

    python examples/split.py MODEL OUT --calibration texts/ --evaluation held-out/

MODEL is a folder, a .gguf file, or a repository on the Hub; texts are .txt, .jsonl or .parquet files, or folders of them.
"""

from __future__ import annotations

import argparse

import llamamoe


def main() -> None:
    """Plan, convert, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of the calibration text (default: 8192)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a sequence (default: 512)")
    args = parser.parse_args()

    # A recipe holds every decision. What is not given is chosen: the method, the shape of the experts, the architecture of the output.
    recipe = llamamoe.load_recipe(
        given={
            "calibration": args.calibration,
            "calibration_tokens": args.tokens,
            "calibration_length": args.window,
            # "num_experts": 8, "top_k": 4, "shared": 0.25, "target": "qwen2_moe", ...
        }
    )

    # The plan reads headers only, writes nothing, and refuses what cannot be converted: look at it before you wait.
    plan = llamamoe.plan_conversion(args.model, recipe)
    shape = plan.layout
    print(f"{plan.target.name}: {shape.top_k} of {shape.num_experts} experts, {shape.num_shared} shared neurons")
    print(f"{plan.cost.total_parameters:,} parameters, of which a token uses {plan.cost.active_parameters:,}")
    for warning in plan.warnings:
        print("warning:", warning)

    # OUT appears when all of it is written and verified, or not at all. After a crash, `resume=True` ends with the same bytes.
    result = llamamoe.split(args.model, args.out, recipe)
    print(f"written to {result.out}: transformers loads it like any other model")

    # Both models read the same tokens of text that the conversion did not see.
    scores = llamamoe.evaluate(result.out, args.evaluation, against=args.model, context_length=args.window)
    assert scores.against is not None
    for name, score in (("dense", scores.against.overall), ("converted", scores.model.overall)):
        print(f"{name:9}  perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main()
