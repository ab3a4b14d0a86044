"""Damage files at random and see what the commands make of them: ``python tests/hostile/fuzz.py --mutations 3000``.

Each attempt follows from the seed and its number alone, so that ``--only N`` repeats it. What must hold: the exit code is
0 or one of ours with one message; nobody sees a traceback; it takes less than a minute and little memory; and what is
published loads in transformers and, from ``split``, computes what its parent computes with all experts selected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

SECONDS, BYTES = 60.0, 2 * 10**9
Result = dict[str, Any]


# ---- one attempt ---------------------------------------------------------------------------------------------------


def invoke(*arguments: Any) -> Any:
    """Run a command line in this process."""
    from click.testing import CliRunner
    from llamamoe_cli.main import root

    return CliRunner().invoke(root, [str(each) for each in arguments], prog_name="llamamoe")


def must(*arguments: Any) -> None:
    """Run a command line that has to succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output


def attempt(world: Any, seed: int, number: int, only: str | None = None) -> Result:
    """Make, run and judge one attempt."""
    from tests.hostile.fuzz_subjects import SUBJECTS

    rng = random.Random(f"{seed}/{number}")
    names = [only] if only else list(SUBJECTS)
    subject = rng.choices(names, [SUBJECTS[name][0] for name in names])[0]
    with tempfile.TemporaryDirectory(dir=world.folder) as name:
        made = SUBJECTS[subject][1](world, rng, Path(name))
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            failure, code, said = judged(made)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            failure, code, said = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}", None, ""
        used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if not failure and used > BYTES:
            failure = f"took {used:,} bytes"
        seconds = round(time.monotonic() - started, 2)
    return {"number": number, "subject": subject, "kind": made.kind, "verb": made.arguments[0], "damage": made.damage,
            "code": code, "seconds": seconds, "said": said, "failure": failure}  # fmt: skip


def judged(made: Any) -> tuple[str, int, str]:
    """Run an attempt; what is wrong with the outcome, or nothing, the exit code, and the message."""
    result = invoke(*made.arguments)
    said = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return wrong_with(made, result, said), result.exit_code, said[0] if said else ""


def wrong_with(made: Any, result: Any, said: list[str]) -> str:
    """Return a fault of the outcome, or nothing."""
    from llamamoe.checkpoint.ledger import partial_path

    code, error = result.exit_code, result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"escaped: {result.exception!r}"
    if "traceback" in error.lower():
        return f"unforeseen: {error[-800:]}"
    if code not in (0, 1, 2, 3, 4) or (code != 0) != (len(said) == 1):
        return f"exit code {code} with {len(said)} messages: {error[-800:]}"
    if len(error[error.find("Error: ") :]) > 3000 and code != 0:
        return f"{len(error):,} characters: {error[:300]}"
    wild = {each for each in result.stdout + error if not each.isprintable() and each != "\n"}
    if wild:
        return f"control characters {wild!r} in {(result.stdout + error)[:500]!r}"
    if made.out is None:
        return ""
    if code == 0:
        return published(made)
    if made.keeps or made.arguments[0] == "fix-config":
        return ""
    left = [path.name for path in (made.out, partial_path(made.out)) if path.exists()]
    return f"exit code {code} left {left} behind: {error[-500:]}" if left and code != 4 else ""


def published(made: Any) -> str:
    """Return a fault of a published checkpoint, or nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from llamamoe.checkpoint.tokenizer_difference import difference
    from llamamoe.checkpoint.tokenizer_loading import holds_vocabulary

    AutoConfig.from_pretrained(made.out)
    if (made.out / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(made.out)
    if holds_vocabulary(made.out):
        own = AutoTokenizer.from_pretrained(made.out, local_files_only=True)
        if made.ids:
            found = difference(AutoTokenizer.from_pretrained(made.parent, local_files_only=True), own)
            if found:
                return f"the tokenizer differs: {found}"
    _, loaded = AutoModelForCausalLM.from_pretrained(made.out, output_loading_info=True)
    wrong = {key: sorted(map(str, loaded[key]))[:3] for key in loaded if loaded[key]}
    if wrong:
        return f"loading reports {wrong}"
    return differs(made) if made.parent is not None else ""


def differs(made: Any) -> str:
    """Return a difference between the published model and its parent, or nothing."""
    import torch

    from tests.hostile.test_config_defaults import logits

    index = made.parent / "model.safetensors.index.json"
    if index.is_file():  # transformers needs its metadata, and we do not
        index.write_text(json.dumps({"metadata": {}} | json.loads(index.read_text())))
    parent, made_of_it = (logits(folder, dtype=torch.float32) for folder in (made.parent, made.out))
    if not bool(parent.isfinite().all()):
        return ""
    error = float((made_of_it - parent).abs().max() / parent.abs().max())
    return f"logits differ by {error:.2e}" if not error < 1e-3 else ""


# ---- a process that may die ----------------------------------------------------------------------------------------


def work(folder: Path, seed: int, numbers: range, only: str | None) -> None:
    """Print a line of JSON for each attempt."""
    from transformers.utils import logging

    from tests.hostile.fuzz_world import World

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    world = World(folder, must)
    for number in numbers:
        print("@" + json.dumps(attempt(world, seed, number, only)), flush=True)


def results(folder: Path, seed: int, numbers: range, only: str | None = None) -> Iterator[Result]:
    """Run attempts in a process of their own; one that kills it or hangs is a failure, and a new one goes on."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = numbers.start
    while start < numbers.stop:
        command = [sys.executable, __file__, "--work", str(folder), "--seed", str(seed), "--from", str(start)]
        command += ["--mutations", str(numbers.stop - start), *(["--subject", only] if only else [])]
        log = folder / "stderr.txt"
        with (
            log.open("wb") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env) as process,
        ):
            assert process.stdout is not None
            while start < numbers.stop:
                ready, _, _ = select.select([process.stdout], [], [], SECONDS + 60 * (start == numbers.start))
                line = process.stdout.readline() if ready else b""
                if line.startswith(b"@"):
                    yield json.loads(line[1:])
                    start += 1
                elif not line:
                    process.kill()
                    said = log.read_text(errors="replace")[-2000:]
                    why = "hung" if not ready else f"died with {process.wait()}: {said}"
                    yield {"number": start, "subject": "?", "verb": "?", "damage": "?", "code": None, "failure": why}
                    start += 1
                    break


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="start")
    parser.add_argument("--subject")
    parser.add_argument("--only", type=int, help="repeat this one, in this process")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    numbers = range(given.start, given.start + given.mutations)
    if given.work is not None:
        work(given.work, given.seed, numbers, given.subject)
        return
    folder = Path(tempfile.mkdtemp(prefix="llamamoe-fuzz-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if given.only is not None:
            work(folder, given.seed, range(given.only, given.only + 1), given.subject)
            return
        report(results(folder, given.seed, numbers, given.subject))


def report(found: Iterator[Result]) -> None:
    """Print failures as they come, and at the end what became of each kind of damage."""
    rows: dict[str, list[Result]] = {}
    for each in found:
        rows.setdefault(f"{each['subject']} {each.get('kind', '')}", []).append(each)
        if each["failure"]:
            print(
                f"#{each['number']} {each['subject']} {each['verb']}\n  {each['damage']}\n  {each['failure']}",
                flush=True,
            )
    print(f"{'':44} {'all':>5} {'harmless':>8} {'refused':>7} {'failed':>6} {'verbs':>5} {'messages':>8}")
    for kind, all_of in sorted(rows.items()):
        failed = sum(bool(each["failure"]) for each in all_of)
        harmless = sum(each["code"] == 0 and not each["failure"] for each in all_of)
        refused = len(all_of) - failed - harmless
        messages = {re.sub(r"'[^']*'|\"[^\"]*\"|[/\w.-]*\d[\w./,-]*", "_", each.get("said", "")) for each in all_of} - {
            ""
        }
        verbs = {each["verb"] for each in all_of}
        print(f"{kind:44} {len(all_of):5} {harmless:8} {refused:7} {failed:6} {len(verbs):5} {len(messages):8}")


if __name__ == "__main__":
    main()
