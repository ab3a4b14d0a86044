"""Speed of a training step: ours beside a bare Trainer on the same model, and the converted model beside its parent.

    python benchmarks/training_throughput.py --work FOLDER [--rounds 3] [--steps 4] [--json FILE]

SmolLM2-135M, half of its FFN active in 8 experts; steps of 4 x 512 tokens, bfloat16 autocast, language modelling alone.
Every arm is a process of its own that runs a few steps; the turns alternate, the first step of each is left out, the
median of all others counts. Only ratios within a run mean something: other work may share the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCH, LENGTH = 4, 512
ARMS = ("bare", "ours", "ours, everything", "dense")


def prepare(work: Path) -> dict[str, str]:
    """The parent, its conversion, and tokens."""
    import llamamoe
    from llamamoe.checkpoint.gguf.reader import export_dense
    from llamamoe.data.recipe import load_tokenize_recipe
    from llamamoe.studies.demo_material import model_file, write_topics

    work.mkdir(parents=True, exist_ok=True)
    places = {name: work / name for name in ("dense", "moe", "text", "tokens")}
    if not places["dense"].exists():
        export_dense(model_file(), places["dense"], dtype="BF16")
    if not places["moe"].exists():
        recipe = llamamoe.load_recipe(given={"num_experts": 8, "top_k": 4, "method": "random"})
        llamamoe.split(places["dense"], places["moe"], recipe, verify=False)
    if not places["tokens"].exists():
        write_topics(places["text"])
        given = {"tokenizer": str(places["dense"]), "text": [str(places["text"])]}
        llamamoe.tokenize(load_tokenize_recipe(given=given), places["tokens"])
    return {name: str(path) for name, path in places.items()}


class Clock:
    """Times of steps, as a Trainer's callback sees them."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        times: list[float] = []

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *args: Any, **keys: Any) -> None:
                times.append(-time.perf_counter())

            def on_step_end(self, *args: Any, **keys: Any) -> None:
                times[-1] += time.perf_counter()

        self.times, self.callback = times, Callback()


def bare(places: dict[str, str], steps: int, work: Path) -> list[float]:
    """Transformers' own Trainer and loss on the converted model, with the same optimiser."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from llamamoe.data.shards import TokenCorpus
    from llamamoe.models.experts import register_experts

    register_experts()
    corpus = TokenCorpus(places["tokens"])
    domain = corpus.domains[0]
    rows = [torch.from_numpy(corpus.block(domain, i, LENGTH)) for i in range(corpus.num_blocks(domain, LENGTH))]
    data = [{"input_ids": row, "labels": row} for row in rows] * (1 + steps * BATCH // len(rows))
    model = AutoModelForCausalLM.from_pretrained(
        places["moe"], dtype=torch.float32, experts_implementation="llamamoe_auto"
    )
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    args = TrainingArguments(
        output_dir=str(work / "bare"), max_steps=steps, per_device_train_batch_size=BATCH, bf16=True, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=steps, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    clock = Clock()
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[clock.callback])
    trainer.train()
    return clock.times


def ours(places: dict[str, str], steps: int, work: Path, **keys: Any) -> list[float]:
    """`llamamoe.pretrain` on the same model."""
    from llamamoe.training.build import assemble, deterministic
    from llamamoe.training.recipe import load_pretrain_recipe

    given = {
        "model": places["moe"], "data": {"train": places["tokens"], "block_length": LENGTH}, "steps": steps,
        "batch_size": BATCH, "micro_batch_size": BATCH, "optimizer": {"lr": 1e-5}, "device": "cpu",
        "lr_schedule": {"shape": "constant", "warmup": 0}, "log_every": steps,
        "experts_implementation": "llamamoe_auto", "logits_at_once": 2**28,
    }  # fmt: skip
    recipe = load_pretrain_recipe(given=given | keys)
    clock = Clock()
    with deterministic("cpu"):  # as `llamamoe.pretrain` does
        trainer, _ = assemble(recipe, work / "ours", Path(recipe.model), None, None)
        trainer.add_callback(clock.callback)
        trainer.args.save_strategy = "no"  # type: ignore[assignment]
        trainer.train()
    return clock.times


def arm(name: str, places: dict[str, str], steps: int, work: Path) -> list[float]:
    """Seconds of each step."""
    if name == "bare":
        return bare(places, steps, work)
    if name == "dense":
        return ours(places, steps, work, model=places["dense"], allow_dense=True, experts_implementation=None)
    everything = {"losses": [{"name": "switch"}, {"name": "z"}], "gate": "jitter"}
    return ours(places, steps, work, **(everything if name == "ours, everything" else {}))


def operations(places: dict[str, str]) -> float:
    """Operations a token of the parent over the converted model's, by active parameters, attention scores left out."""
    from llamamoe import inspect

    dense, moe = (inspect(places[name]).cost.flops_per_token for name in ("dense", "moe"))
    return dense / moe


def main() -> None:
    """Parse, run the arms in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/throughput"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "training_throughput.json")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    places = prepare(options.work)
    if options.arm:
        print(json.dumps(arm(options.arm, places, options.steps, options.work)))
        return
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(options.rounds):
        for name in ARMS if turn % 2 == 0 else reversed(ARMS):
            command = [
                sys.executable,
                __file__,
                "--work",
                str(options.work),
                "--steps",
                str(options.steps),
                "--arm",
                name,
            ]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times[name] += json.loads(out.splitlines()[-1])[1:]
            print(name, [round(each, 2) for each in times[name]], flush=True)
    median = {name: statistics.median(each) for name, each in times.items()}
    result = {
        "tokens_per_step": BATCH * LENGTH,
        "seconds_per_step": {name: round(value, 3) for name, value in median.items()},
        "tokens_per_second": {name: round(BATCH * LENGTH / value, 1) for name, value in median.items()},
        "ours_over_bare": round(median["ours"] / median["bare"], 4),
        "everything_over_bare": round(median["ours, everything"] / median["bare"], 4),
        "converted_over_dense_tokens_per_second": round(median["dense"] / median["ours"], 4),
        "dense_over_converted_active_operations": round(operations(places), 4),
        "times": {name: [round(each, 3) for each in values] for name, values in times.items()},
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "times"}, indent=2))


if __name__ == "__main__":
    main()
