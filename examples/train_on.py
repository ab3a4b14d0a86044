"""Continue pretraining a converted model, with its dense parent as teacher.

    python examples/train_on.py MOE PARENT RUN --text texts/ --held-out held-out/

RUN/model is the trained checkpoint. A run that was stopped goes on with `resume=True`, to the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llamamoe


def main() -> None:
    """Tokenize both texts once, train, and say what it brought."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moe", help="what split wrote")
    parser.add_argument("parent", help="the dense model that it was made from")
    parser.add_argument("run")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--window", type=int, default=512, help="tokens of a sequence (default: 512)")
    args = parser.parse_args()

    # Training reads folders of tokens, so that the same text gives the same batches whatever the number of processes.
    tokens = {name: Path(f"{args.run}-tokens") / name for name in ("train", "held-out")}
    for folder, text in zip(tokens.values(), (args.text, args.held_out), strict=True):
        given = {"tokenizer": args.moe, "text": text}
        llamamoe.tokenize(llamamoe.load_tokenize_recipe(given=given, overrides=["validation=null"]), folder)

    # It trains on the text and on the parent's predictions, whose weight fades: the text teaches what the parent does not know.
    recipe = llamamoe.load_pretrain_recipe(
        given={
            "model": args.moe,
            "parent": args.parent,
            "data": {"train": str(tokens["train"]), "validation": str(tokens["held-out"]), "block_length": args.window},
            "steps": args.steps,
            "batch_size": 8,
            "micro_batch_size": 2,
            "optimizer": {"lr": 2e-4, "router_lr": 2e-5},  # small steps for a router that was fitted
            "router": {"start_std": 0.1},  # a hard router's logits are scaled to this spread, so that it can learn
            "losses": [{"name": "switch", "coefficient": 0.005}],  # an even load over the experts
            "distill": {"kl": {"weight": {"start": 1.0, "end": 0.0, "share": 0.5}, "top_m": 256}},
            "experts_implementation": "llamamoe_auto",
        }
    )
    result = llamamoe.pretrain(recipe, args.run)
    print(f"{result.steps} steps, {result.tokens:,} tokens: {result.model}")
    for name, validation in (("before", result.first), ("after", result.last)):
        if validation is not None:
            print(f"{name}: held-out loss {validation['loss']:.4f}")


if __name__ == "__main__":
    main()
