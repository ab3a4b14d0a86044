"""Compare ``llamamoe mix`` with mergekit-moe: same base, experts and prompts, Mixtral; are the weights the same?

    python benchmarks/mix_mergekit.py BASE WORK --mergekit PATH/mergekit-moe

BASE is a Llama folder. The experts are copies of it with noise on the FFNs. mergekit 0.1.5 lives in an environment of its
own (``pip install mergekit``); tests/transforms/test_mergekit.py runs this where LLAMAMOE_MERGEKIT names its program.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import llamamoe

PROMPTS = (("def main():", "for i in range(10):"), ("Solve for x:", "The integral of"))
NEGATIVE = ("Once upon a time",)


def make_experts(base: Path, work: Path) -> list[Path]:
    """Copy BASE with noise of a hundredth of their size on all FFN matrices, one copy for each expert."""
    found = []
    for seed in range(len(PROMPTS)):
        folder = Path(shutil.copytree(base, work / f"expert{seed}", dirs_exist_ok=True))
        generator = torch.Generator().manual_seed(seed)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for name, value in tensors.items():
                if ".mlp." in name:
                    noise = torch.randn(value.shape, generator=generator) * value.float().std() / 100
                    tensors[name] = (value.float() + noise).to(value.dtype)
            save_file(tensors, file, {"format": "pt"})
        found.append(folder)
    return found


def by_mergekit(program: str, base: Path, experts: list[Path], work: Path, mode: str) -> tuple[Path, float]:
    """Run mergekit-moe with one prompt at a time (no padding) and return its output and seconds."""
    entries = [
        {"source_model": str(path), "positive_prompts": [prompts[0]], "negative_prompts": list(NEGATIVE)}
        for path, prompts in zip(experts, PROMPTS, strict=True)
    ]
    config = {
        "base_model": str(base),
        "gate_mode": mode,
        "dtype": "bfloat16",
        "architecture": "mixtral",
        "experts": entries,
    }
    (work / "mergekit.yaml").write_text(json.dumps(config))
    out, began = work / f"mergekit-{mode}", time.monotonic()
    subprocess.run([program, str(work / "mergekit.yaml"), str(out), "--device", "cpu"], check=True)
    seconds = time.monotonic() - began
    llamamoe.fix_config(out)  # mergekit 0.1.5 stores the tensors under their names in memory in transformers 5
    return out, seconds


def by_llamamoe(base: Path, experts: list[Path], work: Path, tokens: str) -> tuple[Path, float]:
    """Run `llamamoe.mix` with the same prompts and return its output and seconds, verification left out."""
    entries = [{"positive_prompts": [each[0]], "negative_prompts": list(NEGATIVE)} for each in PROMPTS]
    (work / "prompts.json").write_text(json.dumps({"experts": entries}))
    recipe = llamamoe.load_mix_recipe(given={
        "experts": [str(each) for each in experts], "router": "hidden", "prompts": str(work / "prompts.json"),
        "hidden_states": "layer_input", "hidden_tokens": tokens, "target": "mixtral", "dtype": "bfloat16",
    })  # fmt: skip
    began = time.monotonic()
    out = llamamoe.mix(base, work / f"llamamoe-{tokens}", recipe, verify=False, force=True).out
    return out, time.monotonic() - began


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Count the equal tensors, and measure the angles between the routers' rows."""
    one, other = weights(ours), weights(theirs)
    gates = sorted(name for name in one if name.endswith(".gate.weight"))
    rest = sorted(one.keys() & other.keys() - set(gates))
    cosines = torch.cat([torch.cosine_similarity(one[name].float(), other[name].float(), dim=1) for name in gates])
    return {
        "names_only_here": sorted(one.keys() - other.keys()),
        "names_only_there": sorted(other.keys() - one.keys()),
        "equal_tensors": sum(torch.equal(one[name], other[name]) for name in rest),
        "tensors": len(rest),
        "least_cosine_of_router_rows": float(cosines.min()),
        "router_rows": len(cosines),
    }


def main() -> None:
    """Print the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--mergekit", default="mergekit-moe", help="the program")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    experts = make_experts(given.base, given.work)
    for mode, tokens in (("hidden", "last"), ("hidden_avg", "mean")):
        theirs, their_seconds = by_mergekit(given.mergekit, given.base, experts, given.work, mode)
        ours, our_seconds = by_llamamoe(given.base, experts, given.work, tokens)
        seconds = {"seconds": round(our_seconds, 1), "seconds_of_mergekit": round(their_seconds, 1)}
        print(json.dumps({"mode": mode, **compare(ours, theirs), **seconds}), flush=True)


if __name__ == "__main__":
    main()
