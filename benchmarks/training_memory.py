"""Memory of a training step: measured against what ``llamamoe pretrain --dry-run`` says on paper.

    python benchmarks/training_memory.py [--json FILE] [--device cpu|cuda] [--only NAME]

Each case is a process of its own that builds a small model (6 layers, hidden 256, 8 experts of which 2, vocabulary
8192, blocks of 512), trains it for three steps as the Trainer does (`LossHead` under autocast, backward pass outside of
it, AdamW, gradients dropped), and looks at the steps after the first. On a CPU torch keeps no peak, so every block that
its allocator hands out and takes back is read from torch's profiler (``profile_memory``), from before the model is made
on, and summed up in order of time: the CPU's equal of ``torch.cuda.max_memory_allocated``, which is used on a GPU. What
libraries take for themselves (oneDNN's scratch, Python) is in neither number.

*state* is what lives when the step is over, before gradients are dropped: weights, gradients, moments, parent. The cases
called *Trainer* run `llamamoe.pretrain` itself, with a balance loss, on a converted model of these sizes. Transformers
loads weights in threads that the profiler does not hear, so there only the *peak* above the state is compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llamamoe
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.models.experts import register_experts
from llamamoe.training.distillation import Distillation
from llamamoe.training.estimate.estimate import estimate
from llamamoe.training.estimate.hardware import Hardware
from llamamoe.training.loss_head import LossHead, next_token_labels
from llamamoe.training.parameters import freeze, optimizer_groups
from llamamoe.training.parent import Parent, share_frozen
from llamamoe.training.recipe import PretrainRecipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.meters import meter_of
from tests.dense import make_dense
from tests.training.runs import make_text

SIZES = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    "wide": {"model_type": "mixtral", "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe", "intermediate_size": 768, "moe_intermediate_size": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "shared_expert_intermediate_size": 256, "mlp_only_layers": [0, 5], "decoder_sparse_step": 1,
    },
    "llama": {"model_type": "llama", "intermediate_size": 768},
}  # fmt: skip
BF16 = {"precision": {"compute": "bfloat16"}}
FP32 = {"precision": {"compute": "float32"}}
CHECKPOINTED = {"gradient_checkpointing": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("mixtral", FP32),
    "float32, checkpointed": ("mixtral", FP32 | CHECKPOINTED),
    "bfloat16": ("mixtral", BF16),
    "bfloat16, checkpointed": ("mixtral", BF16 | CHECKPOINTED),
    "float32, 2 micro-batches": ("mixtral", FP32 | {"batch_size": 8}),
    "bfloat16, checkpointed, 2 micro-batches": ("mixtral", BF16 | CHECKPOINTED | {"batch_size": 8}),
    "bfloat16 weights": ("mixtral", {"precision": {"parameters": "bfloat16", "compute": "bfloat16"}}),
    "loss in 8 chunks": ("mixtral", BF16 | {"logits_at_once": 2**21}),
    "loss in 8 chunks, checkpointed": ("mixtral", FP32 | CHECKPOINTED | {"logits_at_once": 2**21}),
    "eager experts": ("mixtral", BF16 | {"experts_implementation": "eager"}),
    "eager experts, checkpointed": ("wide", BF16 | CHECKPOINTED | {"experts_implementation": "eager"}),
    "grouped products under autocast": ("mixtral", BF16 | {"experts_implementation": "llamamoe_grouped_mm"}),
    "grouped products under autocast, checkpointed": (
        "wide", BF16 | CHECKPOINTED | {"experts_implementation": "llamamoe_grouped_mm"},
    ),
    "sorted experts": ("mixtral", BF16 | {"experts_implementation": "llamamoe_sorted"}),
    "sorted experts, checkpointed": ("wide", BF16 | CHECKPOINTED | {"experts_implementation": "llamamoe_sorted"}),
    "wide experts": ("wide", BF16 | {"micro_batch_size": 1, "batch_size": 1}),
    "wide experts, checkpointed": ("wide", FP32 | CHECKPOINTED | {"micro_batch_size": 1, "batch_size": 1}),
    "wide experts, 4 micro-batches": ("wide", FP32 | {"micro_batch_size": 1, "batch_size": 4}),
    "shared and dense": ("qwen2_moe", FP32),
    "shared and dense, bfloat16, checkpointed": ("qwen2_moe", BF16 | CHECKPOINTED),
    "frozen FFNs": ("qwen2_moe", FP32 | {"freeze": ["experts", "shared", "dense_ffn", "head"]}),
    "frozen but for routers and experts": (
        "mixtral", BF16 | {"freeze": ["attention", "norms", "embeddings", "head"]},
    ),
    "kl": ("mixtral", BF16 | {"distill": {"kl": {}}}),
    "kl top 64": ("mixtral", FP32 | {"distill": {"kl": {"top_m": 64, "temperature": 2.0}}}),
    "kl in 8 chunks": ("mixtral", BF16 | {"distill": {"kl": {}}, "logits_at_once": 2**21}),
    "ffn and hidden": ("mixtral", BF16 | {"distill": {"ffn": {}, "hidden": {}}}),
}  # fmt: skip
"""Name to model and recipe."""
SWITCH = {"losses": [{"name": "switch", "coefficient": 0.01}]}
TRAINER: dict[str, dict[str, Any]] = {
    "Trainer, float32": FP32 | SWITCH,
    "Trainer, bfloat16, checkpointed, 2 micro-batches": BF16 | CHECKPOINTED | SWITCH | {"batch_size": 8},
    "Trainer, kl": BF16 | {"distill": {"kl": {}}},
}
"""Name to recipe."""


def recipe_of(given: dict[str, Any]) -> PretrainRecipe:
    """A recipe: 4 sequences at a time unless it says otherwise."""
    base: dict[str, Any] = {
        "model": "model", "data": {"train": "tokens", "block_length": 512}, "steps": 3, "batch_size": 4,
        "micro_batch_size": 4, "device": "cpu", "experts_implementation": "grouped_mm",
    }  # fmt: skip
    return PretrainRecipe.model_validate(base | ({"parent": "parent"} if "distill" in given else {}) | given)


def train(recipe: PretrainRecipe, folder: Path, device: str) -> dict[str, int]:
    """Three steps of the bare loop; measured peak and state."""
    torch.set_num_threads(1)
    meter = meter_of(device)
    with meter:
        model = _load(folder / "model", recipe, recipe.precision.parameters).to(device).train()
        freeze(model, recipe.freeze)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head, distillation = LossHead(model, logits_at_once=recipe.logits_at_once), None
        if recipe.distill is not None:
            parent = Parent(_load(folder / "parent", recipe, recipe.precision.parent).to(device))
            share_frozen(parent, model)
            distillation = Distillation(recipe.distill, model, parent)
        optimizer = torch.optim.AdamW(optimizer_groups(model, recipe), fused=True)
        for step in range(recipe.max_steps):
            if step == 1:
                meter.begin()
            for _ in range(recipe.batch_size // recipe.micro_batch_size):
                _micro_batch(model, head, distillation, recipe, device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            meter.mark()
            optimizer.zero_grad()
    return {"peak": meter.peak, "state": meter.state}


def train_by_trainer(given: dict[str, Any], folder: Path, device: str) -> dict[str, int]:
    """Three steps by `llamamoe.pretrain`; measured from the end of the first to the end of the last."""
    torch.set_num_threads(1)
    meter = meter_of(device)

    def look(progress: Any) -> None:
        if progress.done == 1:
            meter.begin()
        meter.mark()

    with meter, tempfile.TemporaryDirectory() as out:
        llamamoe.pretrain(trainer_recipe(given, folder).model_copy(update={"device": device}), out, progress=look)
    return {"peak": meter.peak, "state": meter.state}


def trainer_recipe(given: dict[str, Any], folder: Path) -> PretrainRecipe:
    """On what `make_world` has made."""
    paths = {"model": str(folder / "model")} | ({"parent": str(folder / "parent")} if "distill" in given else {})
    data = {"train": str(folder / "text" / "tokens"), "block_length": 512}
    return recipe_of({**given, **paths, "data": data})


def make_world(folder: Path) -> None:
    """A dense model, its conversion to 8 experts of 96 neurons, and tokens."""
    keys = {**SIZES, **MODELS["llama"]}
    keys.pop("model_type")
    dense = make_dense(folder / "parent", **keys)
    given = {"num_experts": 8, "top_k": 2, "method": "random", "target": "mixtral"}
    llamamoe.split(dense, folder / "model", llamamoe.load_recipe(given=given), verify=False)
    make_text(folder / "text" / "text", 0, documents=400)
    texts = {"tokenizer": str(dense), "text": [str(folder / "text" / "text")], "workers": 1}
    llamamoe.tokenize(load_tokenize_recipe(given=texts), folder / "text" / "tokens")


def _load(folder: Path, recipe: PretrainRecipe, dtype: str) -> Any:
    """Random weights: only their sizes count."""
    register_experts()
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if config.model_type != "llama":
        model.set_experts_implementation(recipe.experts_on("cpu"))
    model.config.use_cache = False
    return model


def _micro_batch(model: Any, head: LossHead, distillation: Any, recipe: PretrainRecipe, device: str) -> None:
    """Forward and backward pass of random tokens."""
    ids_BT = torch.randint(0, SIZES["vocab_size"], (recipe.micro_batch_size, recipe.data.block_length), device=device)
    batch = {"input_ids": ids_BT, "use_cache": False}
    autocast = recipe.precision.compute == "bfloat16"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        recording = distillation.recording(batch, 0, 1) if distillation else nullcontext(None)
        with recording as recorded:
            losses = head(model, batch, next_token_labels(ids_BT), recorded.target if recorded else None)
        loss = losses.nll_sum
        if recorded is not None:
            loss = sum(recorded.sums().values(), start=loss) + (0 if losses.kl_sum is None else losses.kl_sum)
    loss.backward()


def compare(name: str, device: str, work: Path) -> dict[str, Any]:
    """One case: measured in a process of its own, next to the estimate."""
    by_trainer = name in TRAINER
    folder = work / ("trainer" if by_trainer else CASES[name][0])
    if by_trainer and not folder.exists():
        make_world(folder)
    for role in () if by_trainer else ("model", "parent"):
        if not (folder / role).exists():
            keys = {**SIZES, **MODELS[CASES[name][0] if role == "model" else "llama"]}
            config = AutoConfig.for_model(keys.pop("model_type"), **keys)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / role)
    command = [sys.executable, __file__, "--case", name, "--folder", str(folder), "--device", device]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    source, parent = SafetensorsCheckpoint(folder / "model"), SafetensorsCheckpoint(folder / "parent")
    recipe = trainer_recipe(TRAINER[name], folder) if by_trainer else recipe_of(CASES[name][1])
    paper = estimate(
        recipe, source.config, source.tensors, Hardware(1),
        parent_tensors=parent.tensors, parent_config=parent.config,
    )  # fmt: skip
    parent_bytes = paper.parts.get("parent", 0)
    state = sum(paper.state.values()) + parent_bytes - by_trainer * paper.state["gradients"]  # dropped there by then
    above = by_trainer * state, by_trainer * measured["state"]
    return {
        "measured": measured,
        "estimated": {"peak": paper.peak, "state": state, "moment": paper.moment, "parts": paper.parts},
        "peak_error": round((paper.peak - above[0]) / (measured["peak"] - above[1]) - 1, 4),
        "state_error": None if by_trainer else round(state / measured["state"] - 1, 4),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/training_memory.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="cases whose name has this in it; nothing is written")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case in TRAINER:
        print(json.dumps(train_by_trainer(TRAINER[options.case], options.folder, options.device)))
        return
    if options.case:
        print(json.dumps(train(recipe_of(CASES[options.case][1]), options.folder, options.device)))
        return
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (*CASES, *TRAINER):
            if options.only is None or options.only in name:
                cases[name] = compare(name, options.device, Path(folder))
                case = cases[name]
                sizes = " ".join(f"{case[k]['peak'] / 2**20:8.1f}" for k in ("measured", "estimated"))
                state = "" if case["state_error"] is None else f"state {case['state_error']:+.1%}"
                print(f"{name:50s} {sizes} MiB  {case['peak_error']:+.1%}  {state}", flush=True)
    worst = {key: max(abs(case[key] or 0) for case in cases.values()) for key in ("peak_error", "state_error")}
    print(json.dumps({"worst": worst}))
    if options.only is None:
        result = {"device": options.device, "torch": torch.__version__, "cases": cases, "worst": worst}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
