"""Time and memory of ``llamamoe split`` on a 7B-shaped checkpoint, beside ``cp`` of the same folder.

    python benchmarks/conversion.py --work /big/disk [--layers 32] [--repeat 3] [--json FILE]

Both sides end with their files synced to disk; the order alternates; the median counts. Memory is RssAnon, the
anonymous pages of the process, sampled while it runs, above that of an idle process that imported torch.
Processor seconds hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from synthetic import LLAMA_2_7B, LLAMA_3_70B, make

CLI = [sys.executable, "-c", "from llamamoe_cli.main import main; main()"]


def rss_anon(pid: int) -> int:
    """Anonymous resident bytes of a process, 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak RssAnon of a command that must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{process.stderr.read()}")
    return time.perf_counter() - started, peak


def processor_seconds() -> float:
    """Of all processes that were run and have ended, in the program and in the system."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def idle_torch() -> int:
    """RssAnon of a process that has imported torch and does nothing."""
    code = "import torch, time; print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    found = rss_anon(process.pid)
    process.kill()
    process.wait()
    return found


def copy(source: Path, out: Path) -> tuple[float, int]:
    """``cp -r`` and a sync of what it wrote."""
    return run(["bash", "-c", 'cp -r "$0" "$1" && sync "$1"/* "$1"', str(source), str(out)])


def split(source: Path, out: Path, method: str, *more: str) -> tuple[float, int]:
    """``llamamoe split`` without verification; it syncs what it writes."""
    options = ["--experts", "8", "--top-k", "2", "--method", method, "--no-verify", "-q", *more]
    return run([*CLI, "split", str(source), str(out), *options])


def prepare(work: Path, layers: int) -> Path:
    """The source, made on the spot if it is not there."""
    source = work / f"llama-{layers}-layers"
    if not (source / "config.json").exists():
        make(source, {**LLAMA_2_7B, "num_hidden_layers": layers}, num_shards=3)
        os.sync()
    return source


def conversion(work: Path, layers: int, repeat: int) -> dict:
    """Alternate cp and split; ratios of medians, memory above idle torch."""
    source, out = prepare(work, layers), work / "out"
    idle = idle_torch()
    result = {"layers": layers, "bytes": sum(p.stat().st_size for p in source.iterdir()), "idle_torch_bytes": idle}
    times, processor = {"cp": [], "random": []}, {"cp": [], "random": []}
    peaks = []
    for turn in range(repeat):
        for side in ("cp", "random") if turn % 2 == 0 else ("random", "cp"):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            before = processor_seconds()
            seconds, peak = copy(source, out) if side == "cp" else split(source, out, "random")
            processor[side].append(round(processor_seconds() - before, 2))
            times[side].append(round(seconds, 2))
            if side == "random":
                peaks.append(peak - idle)
    shutil.rmtree(out, ignore_errors=True)
    result["random"] = {
        "seconds": times["random"],
        "cp_seconds": times["cp"],
        "processor_seconds": processor["random"],
        "cp_processor_seconds": processor["cp"],
        "ratio": round(statistics.median(times["random"]) / statistics.median(times["cp"]), 3),
        "peak_anon_above_idle_bytes": max(peaks),
    }
    return result


def memory(work: Path, layers: int, methods: list[str]) -> dict:
    """Time and peak memory of other methods, and of ``verify``, once each."""
    source, out, idle, result = prepare(work, layers), work / "out", idle_torch(), {}
    for method in methods:
        shutil.rmtree(out, ignore_errors=True)
        if method == "verify":
            split(source, out, "random")
            seconds, peak = run([*CLI, "verify", str(out), "--against", str(source), "-q"])
        else:
            seconds, peak = split(source, out, method)
        result[method] = {"seconds": round(seconds, 2), "peak_anon_above_idle_bytes": peak - idle}
    shutil.rmtree(out, ignore_errors=True)
    return result


def dry_run(work: Path) -> dict:
    """The whole process of ``--dry-run`` on 70B-shaped sparse shards, and of ``--help``."""
    source = work / "llama-70b-sparse"
    make(source, LLAMA_3_70B, num_shards=30, sparse=True)
    dry = [*CLI, "split", str(source), "--experts", "16", "--top-k", "4", "--dry-run", "-q"]
    found = {
        "dry_run_70b_seconds": round(min(run(dry)[0] for _ in range(3)), 3),
        "help_seconds": round(min(run([*CLI, "--help"])[0] for _ in range(3)), 3),
    }
    shutil.rmtree(source)
    return found


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/work"), help="A folder with room for three copies."
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=["kmeans", "verify"], help="What is run once each.")
    parser.add_argument("--parts", nargs="*", default=["dry_run", "conversion", "memory"], help="What to measure.")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/conversion.json"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    result = json.loads(options.json.read_text()) if options.json.exists() else {}  # parts not measured now stay
    if "dry_run" in options.parts:
        result |= dry_run(options.work)
    if "conversion" in options.parts:
        result |= conversion(options.work, options.layers, options.repeat)
    if "memory" in options.parts:
        result |= memory(options.work, options.layers, options.methods)
    result["machine"] = {"cores": os.cpu_count()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
