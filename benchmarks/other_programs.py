"""What other programs compute of default outputs of every target: differences of logits, and greedy tokens.

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
    if "refused" in result:
        return "refused"
    return f"{result['error']:.0e}, {'same' if result['greedy'] else 'other tokens'}"


def measure(pythons: dict[str, str], folders: list[Path]) -> dict[str, Any]:
    """What each program says of every case."""
    found = {}
    for program, python in pythons.items():
        there = [each for each in folders if program != "llama.cpp" or (each / "model.gguf").is_file()]
        groups = [[each] for each in there] if program == "vLLM" else [there]  # one engine a process
        answers = [run_client(SCRIPTS[program], group, python=python) for group in groups]
        gone = {each.name: {"refused": (each / "refused.txt").read_text()} for each in folders if each not in there}
        said = {name: result for answer in answers for name, result in answer["found"].items()}
        found[program] = {"version": answers[0]["version"], "found": said | gone}
    return found


def main() -> None:
    """Convert, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+", metavar="NAME=PYTHON", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in given.programs)
    with tempfile.TemporaryDirectory() as work:
        found = measure(pythons, build(Path(work)))
    print("| output |", " | ".join(f"{name} {found[name]['version']}" for name in found), "|")
    print("|---" * (1 + len(found)) + "|")
    for name in CASES:
        print(f"| {name} |", " | ".join(cell(each["found"][name]) for each in found.values()), "|")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
