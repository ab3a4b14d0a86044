"""Time and memory of a calibrated ``llamamoe split`` of SmolLM2-135M, and how they grow with tokens and layers.

    python benchmarks/calibration.py --work /big/disk [--calibration PATH ...] [--evaluation PATH] [--json FILE]

Without ``--calibration`` the text is Python's own help topics. With ``--evaluation`` every conversion of the whole model
is measured on that text, too (8192 tokens of each domain), after the clock has stopped. Memory is RssAnon, the anonymous pages of the process,
sampled while it runs; seconds are those of the whole process without verification, core_seconds those of its threads (what
two cores with nothing else to do would take at least, times two).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

from conversion import CLI, run
from safetensors import safe_open
from safetensors.torch import save_file

from llamamoe.checkpoint.gguf.reader import export_dense
from llamamoe.studies.demo_material import model_file, write_topics

METHOD = [
    *("--method", "token_clusters", "--set", "method.rounds=3", "--experts", "88", "--top-k", "36", "--shared", "128"),
    *("--shared-by", "power", "--router", "ridge", "--keep-dense", "0"),
    *("--repair", "distill", "--set", "repair.epochs=5", "--calibration-length", "512", "--compute-dtype", "bfloat16"),
]
"""Our best at half of the FFN's multiply-adds (recipes/compare/smollm2_best.yaml)."""


def dense(work: Path) -> Path:
    """SmolLM2-135M as a folder."""
    folder = work / "smollm2"
    if not (folder / "config.json").exists():
        export_dense(model_file(), folder, dtype="BF16")
    return folder


def shorter(source: Path, layers: int) -> Path:
    """The same model with its first layers only."""
    folder = source.with_name(f"smollm2-{layers}-layers")
    config = json.loads((source / "config.json").read_text())
    if layers == config["num_hidden_layers"]:
        return source
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with safe_open(source / "model.safetensors", framework="pt") as file:
        kept = [n for n in file.keys() if ".layers." not in n or int(n.split(".")[2]) < layers]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in kept}, folder / "model.safetensors", {"format": "pt"})
    return folder


def core_seconds() -> float:
    """Processor time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def convert(source: Path, out: Path, text: list[str], tokens: int) -> dict[str, float]:
    """One conversion: seconds and the peak of anonymous memory."""
    shutil.rmtree(out, ignore_errors=True)
    given = [part for path in text for part in ("--calibration", path)]
    command = [*CLI, "split", str(source), str(out), *METHOD, *given, "--calibration-tokens", str(tokens)]
    before = core_seconds()
    seconds, peak = run([*command, "--no-verify", "-q"])
    return {
        "seconds": round(seconds, 1),
        "core_seconds": round(core_seconds() - before, 1),
        "peak_anon_bytes": peak,
    }


def quality(out: Path, text: str) -> dict[str, float]:
    """Perplexity of a conversion, from the mean over domains of its logarithm."""
    command = [*CLI, "evaluate", str(out), "--text", text, "--max-tokens", "8192", "--dtype", "bfloat16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"perplexity": json.loads(done.stdout)["model"]["mean_over_domains"]["perplexity"]}


def main() -> None:
    """Parse, measure, print, write after every conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"), help="A folder with room for 2 GB.")
    parser.add_argument("--calibration", nargs="*", default=[], help="Text; Python's help topics if none is given.")
    parser.add_argument("--evaluation", help="Text to measure perplexity on.")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 15], help="Depths, at the least tokens.")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/calibration.json"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source, out = dense(options.work), options.work / "calibrated"
    text = options.calibration
    if not text:
        write_topics(options.work / "topics")
        text = [str(options.work / "topics" / "calibration")]
    result: dict = json.loads(options.json.read_text()) if options.json.exists() else {}
    result |= {"method": " ".join(METHOD), "machine": {"cores": os.cpu_count()}}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    runs = [("layers", n, shorter(source, n), min(options.tokens)) for n in options.layers]
    runs += [("tokens", n, source, n) for n in options.tokens]
    for kind, n, folder, tokens in runs:
        found = convert(folder, out, text, tokens)
        if options.evaluation and kind == "tokens":
            found |= quality(out, options.evaluation)
        result.setdefault(kind, {})[str(n)] = found
        options.json.write_text(json.dumps(result, indent=2) + "\n")
        print(kind, n, result[kind][str(n)], flush=True)
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
