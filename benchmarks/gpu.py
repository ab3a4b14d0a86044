"""Everything of llamamoe that only a GPU can show, in one run of at most 12 minutes on one H200-class GPU.

    python benchmarks/gpu.py [--device cuda] [--json FILE] [--only NAME ...] [--minutes 12] [--tiny]

Models have random weights and the sizes that count: the width of a 7B model for what is timed and compared with the CPU, a
small one for what runs whole (conversion, alignment, training). Each check writes its figures to FILE when it ends, with
``ok``: whether they are within the limits that stand beside them there. A check that fails is told and the others go on; one
for which no time is left is named under ``left_out``. The same checks run with ``--tiny`` on a CPU, in the test suite.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import llamamoe
from llamamoe.checkpoint.files import write_text
from llamamoe.checkpoint.out_folder import RECEIPT_FILE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import training_memory
from benchmarks.gpu_bench import FULL, TINY, Bench

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", *llamamoe.register_experts())
CALIBRATED = {
    "num_experts": 8, "top_k": 4, "method": "token_clusters", "router": "ridge", "repair": "none", "target": "qwen2_moe",
}  # fmt: skip
MEMORY_CASES = ("bfloat16", "bfloat16, checkpointed", "kl", "grouped products under autocast, checkpointed")


Check = Callable[[Bench], dict[str, Any]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


@check
def losses(bench: Bench) -> dict[str, Any]:
    """Loss and logits in bfloat16 by each experts implementation, against float32 on the CPU."""
    ids = torch.randint(
        0, bench.sizes.wide["vocab_size"], (1, bench.sizes.tokens), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        right = bench.load(bench.wide, torch.float32, "cpu", experts_implementation="eager")(ids, labels=ids)
        model, found = bench.load(bench.wide, torch.bfloat16), {}
        for name in IMPLEMENTATIONS:
            model.set_experts_implementation(name)
            seen = model(ids.to(bench.device), labels=ids.to(bench.device))
            error = (seen.logits.float().cpu() - right.logits).norm() / right.logits.norm()
            found[name] = {"loss": float(seen.loss) - float(right.loss), "logits": float(error)}
    worst = {key: max(abs(each[key]) for each in found.values()) for key in ("loss", "logits")}
    limits = {"loss": 0.02, "logits": 0.1}
    return {"ok": all(worst[key] < limits[key] for key in limits), "limits": limits, "difference": found}


@check
def memory(bench: Bench) -> dict[str, Any]:
    """Peak of a training step against what ``pretrain --dry-run`` says."""
    gates = [name for name in training_memory.CASES if "noisy" in name and "checkpointed" in name]
    names = (*MEMORY_CASES, *gates)[: None if bench.sizes is FULL else 2]
    found = {}
    for name in names:
        case = training_memory.compare(name, "cuda" if bench.device == "cuda" else "cpu", bench.work / "memory")
        found[name] = {
            "measured": case["measured"]["peak"],
            "estimated": case["estimated"]["peak"],
            "error": case["peak_error"],
        }
    worst = max(abs(each["error"]) for each in found.values())
    return {"ok": worst < 0.1, "limits": {"error": 0.1}, "cases": found}


@check
def ffn(bench: Bench) -> dict[str, Any]:
    """Forward and backward pass of an FFN block in bfloat16, router included, over that of the dense FFN."""
    hidden, width, tokens = bench.sizes.blocks
    dense = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=width)).to(bench.device, torch.bfloat16)
    x = torch.randn(1, tokens, hidden, device=bench.device, dtype=torch.bfloat16, requires_grad=True)

    def both(block: Any) -> float:
        def step() -> None:
            y = block(x)
            (y[0] if isinstance(y, tuple) else y).sum().backward()
            block.zero_grad(set_to_none=True)

        return bench.seconds(step)

    first, found = both(dense), {}
    for experts, top_k in bench.sizes.shapes:
        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=width // experts, num_local_experts=experts, num_experts_per_tok=top_k
        )
        block = MixtralSparseMoeBlock(config).to(bench.device, torch.bfloat16)
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        for name in ("grouped_mm", "llamamoe_grouped_mm", "llamamoe_sorted"):
            config._experts_implementation = name
            found[f"{top_k} of {experts}, {name}"] = both(block) / first
        del block
    again = both(dense)
    return {"ok": True, "dense_seconds": first, "drift": again / first, "time_over_dense": found}


@check
def split(bench: Bench) -> dict[str, Any]:
    """A calibrated conversion on the device against the same on the CPU: time, and divergence from the parent."""
    found = {}
    for device in dict.fromkeys((bench.device, "cpu")):
        given = CALIBRATED | bench.calibration(device) | {"repair": "least_squares"}
        began = time.perf_counter()
        out = bench.split("small", f"split-{device}", given)
        seconds = time.perf_counter() - began
        scored = llamamoe.evaluate(
            out, [bench.text], max_tokens=4096, context_length=64, device=bench.device, dtype="float32"
        )
        found[device] = {"seconds": seconds, "loss": scored.model.mean_over_domains.loss}
    difference = abs(found[bench.device]["loss"] - found["cpu"]["loss"])
    return {"ok": difference < 0.02, "limits": {"loss": 0.02}, "loss_difference": difference, "runs": found}


@check
def align(bench: Bench) -> dict[str, Any]:
    """Assignment, router and weights learned through the whole model, against the same on the CPU."""
    found = {}
    for device in dict.fromkeys((bench.device, "cpu")):
        given = CALIBRATED | bench.calibration(device) | {"align": {"tokens": bench.sizes.alignment, "length": 64}}
        began = time.perf_counter()
        out = bench.split("small", f"aligned-{device}", given)
        seconds = time.perf_counter() - began
        record = json.loads((out / RECEIPT_FILE).read_text())["alignment"]
        curve = [each["kl"] for each in record["held_out_kl"]]
        found[device] = {"held_out_kl": curve, "tokens_per_second": record["tokens"] / seconds}
    curves = [each["held_out_kl"] for each in found.values()]
    worst = max(abs(mine / theirs - 1) for mine, theirs in zip(curves[0], curves[-1], strict=True))
    return {"ok": worst < 0.05, "limits": {"held_out_kl": 0.05}, "difference": worst, "runs": found}


@check
def decoding(bench: Bench) -> dict[str, Any]:
    """Decode and prefill of the wide model over its parent, by `llamamoe bench`."""
    few = bench.sizes is TINY
    found = {}
    for name in ("grouped_mm", "llamamoe_auto"):
        speed = llamamoe.bench(
            bench.wide, against=bench.parent("wide"), batch_sizes=(1, 2) if few else (1, 8), device=bench.device, repeats=3,
            prompt_tokens=16 if few else 256, new_tokens=4 if few else 24, dtype="bfloat16", experts_implementation=name,
        )  # fmt: skip
        found[name] = speed.to_json()
    return {"ok": True, "speeds": found}


@check
def compile(bench: Bench) -> dict[str, Any]:
    """torch.compile on and off (on a CPU without its code generator): the same logits, and the time of a forward pass."""
    model, found = bench.load(bench.wide, torch.bfloat16, experts_implementation="grouped_mm"), {}
    ids = torch.randint(0, bench.sizes.wide["vocab_size"], (1, bench.sizes.tokens), device=bench.device)
    with torch.no_grad():
        plain, found["eager"] = model(ids).logits.float(), bench.seconds(lambda: model(ids))
        compiled = torch.compile(model, backend="inductor" if bench.device == "cuda" else "aot_eager")
        fast, found["compiled"] = compiled(ids).logits.float(), bench.seconds(lambda: compiled(ids))
    error = float((fast - plain).norm() / plain.norm())
    return {"ok": error < 0.1, "limits": {"logits": 0.1}, "logits": error, "seconds": found}


@check
def resume(bench: Bench) -> dict[str, Any]:
    """Four steps at once, and two that stop and two more: the same losses."""
    whole = bench.pretrain("whole")
    bench.pretrain("halves")
    halves = bench.pretrain("halves", resume="checkpoint-2")
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, halves, strict=True))
    return {
        "ok": worst < 1e-3,
        "limits": {"loss": 1e-3},
        "difference": worst,
        "losses": [each["loss"] for each in whole],
    }


@check
def distillation(bench: Bench) -> dict[str, Any]:
    """Steps with every term from the parent, and with a noisy gate, a balance loss and checkpointing."""
    terms = {"kl": {}, "ffn": {}, "hidden": {}}
    runs = {
        "all terms": {"distill": terms, "parent": str(bench.parent("small"))},
        "noisy gate": {
            "gate": "noisy_top_k",
            "losses": [{"name": "switch", "coefficient": 0.01}],
            "gradient_checkpointing": True,
        },
    }
    found = {
        name: [each["loss"] for each in bench.pretrain(name.replace(" ", "-"), **keys)] for name, keys in runs.items()
    }
    return {"ok": all(math.isfinite(each) for run in found.values() for each in run), "losses": found}


@check
def other_programs(bench: Bench) -> dict[str, Any]:
    """Quantised weights of bitsandbytes, and vLLM, where they are installed: the tokens that follow a prompt."""
    found: dict[str, Any] = {}
    there = {
        name: importlib.util.find_spec(name) is not None and bench.device == "cuda" for name in ("bitsandbytes", "vllm")
    }
    ids = torch.arange(8)[None]
    right = (
        bench.load(bench.wide, torch.bfloat16)
        .generate(ids.to(bench.device), max_new_tokens=8, do_sample=False)[0, 8:]
        .tolist()
    )
    if there["bitsandbytes"]:
        keys = {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True), "device_map": 0}
        model = AutoModelForCausalLM.from_pretrained(bench.wide, **keys)
        found["bitsandbytes"] = model.generate(ids.cuda(), max_new_tokens=8, do_sample=False)[0, 8:].tolist()
    if there["vllm"]:
        import vllm

        engine = vllm.LLM(str(bench.wide), dtype="bfloat16", gpu_memory_utilization=0.3, enforce_eager=True)
        prompt, greedy = {"prompt_token_ids": ids[0].tolist()}, vllm.SamplingParams(temperature=0, max_tokens=8)
        found["vllm"] = list(engine.generate([prompt], greedy)[0].outputs[0].token_ids)
    return {"ok": found.get("vllm", right) == right, "installed": there, "transformers": right, "tokens": found}


def run(bench: Bench, names: list[str], json_file: Path | None, minutes: float) -> dict[str, Any]:
    """All checks of these names, one after another; what they found."""
    name = torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "llamamoe": llamamoe.__version__}
    result: dict[str, Any] = {"device": name, "versions": versions, "checks": {}, "left_out": list(names)}
    began = time.monotonic()
    for each in names:
        if time.monotonic() - began > 60 * minutes:
            break
        started = time.monotonic()
        try:
            found = CHECKS[each](bench)
        except Exception as error:
            found = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        result["checks"][each] = {"seconds": round(time.monotonic() - started, 1)} | found
        result["left_out"].remove(each)
        print(each, "ok" if found["ok"] else "FAILED", json.dumps(result["checks"][each])[:400], flush=True)
        if json_file is not None:
            write_text(json_file, json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """Run the checks; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=list(CHECKS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=12, help="no check begins after them")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, which show only that the checks run")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA GPU. --device cpu --tiny shows that the checks run.")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.device, TINY if options.tiny else FULL, Path(folder))
        found = run(bench, options.only, options.json, options.minutes)
    sys.exit(not all(each["ok"] for each in found["checks"].values()))


if __name__ == "__main__":
    main()
