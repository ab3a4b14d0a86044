"""Compare the default outputs of every target in other programs: differences of logits, and greedy tokens.

    python benchmarks/other_programs.py mlx-lm=PYTHON llama.cpp=PYTHON mistral.rs=PYTHON vLLM=PYTHON OpenVINO=PYTHON

Each PYTHON is an interpreter that has the program; ``make clients-large`` makes two environments (gigabytes) and runs
this. The models are those of ``tests/clients/cases.py``: small, random, float32. One process runs at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.clients.cases import CASES, build
from tests.clients.loading import run_client

SCRIPTS = {
    "mlx-lm": "run_mlx_lm.py", "llama.cpp": "run_llama_cpp.py", "mistral.rs": "run_mistralrs.py",
    "vLLM": "run_vllm.py", "OpenVINO": "run_openvino.py",
}  # fmt: skip


def cell(result: dict[str, Any]) -> str:
    """One cell of the table."""
    for key in ("refused", "failed"):
        if key in result:
            return key
    return f"{result['error']:.0e}, {'same' if result['greedy'] else 'other tokens'}"


def ask(program: str, python: str, folders: list[Path]) -> dict[str, Any]:
    """Return the results of a program for some folders; a crash of the program loses only these."""
    print(f"{program}: {', '.join(each.name for each in folders)}", file=sys.stderr, flush=True)
    try:
        return run_client(SCRIPTS[program], folders, python=python)
    except (AssertionError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1:] or ["no word"]
        return {"versions": {}, "found": {each.name: {"failed": reason[0][:300]} for each in folders}}


def measure(pythons: dict[str, str], folders: list[Path]) -> dict[str, Any]:
    """Return the results of every program for every case."""
    found = {}
    for program, python in pythons.items():
        there = [each for each in folders if program != "llama.cpp" or (each / "model.gguf").is_file()]
        groups = [[each] for each in there] if program == "vLLM" else [there]  # one engine a process
        answers = [ask(program, python, group) for group in groups]
        gone = {each.name: {"refused": (each / "refused.txt").read_text()} for each in folders if each not in there}
        said = {name: result for answer in answers for name, result in answer["found"].items()}
        versions = {package: number for answer in answers for package, number in answer["versions"].items()}
        found[program] = {"versions": versions, "found": said | gone}
    return found


def reasons(found: dict[str, Any]) -> dict[str, list[str]]:
    """Return the errors of a program without results, in its own words, and the outputs that they concern."""
    told: dict[str, list[str]] = {}
    for program, answer in found.items():
        for name in CASES:
            for key in ("refused", "failed"):
                if key in answer["found"][name]:
                    words = " ".join(answer["found"][name][key].split())
                    told.setdefault(f"{program} {key}: {words}", []).append(name)
    return told


def main() -> int:
    """Convert, run, print the table and what stands behind its words; 1 if a program did not come to an end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+", metavar="NAME=PYTHON", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    pythons = dict(each.partition("=")[::2] for each in given.programs)
    unknown = set(pythons) - set(SCRIPTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SCRIPTS)}")
    with tempfile.TemporaryDirectory() as work:
        found = measure(pythons, build(Path(work)))
    heads = [" ".join([name, *(f"({' '.join(each)})" for each in found[name]["versions"].items())]) for name in found]
    print("| output |", " | ".join(heads), "|")
    print("|---" * (1 + len(found)) + "|")
    for name in CASES:
        print(f"| {name} |", " | ".join(cell(each["found"][name]) for each in found.values()), "|")
    print()
    told = reasons(found)
    for reason, names in told.items():
        print(f"- {reason} ({', '.join(names)})")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return int(any(" failed: " in each for each in told))


if __name__ == "__main__":
    sys.exit(main())
