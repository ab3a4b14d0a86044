"""Data exchanged by the tests and the interpreters of other programs; needs numpy only.

A folder to check holds, beside the checkpoint, ``expected.json`` (texts, prompts and greedy ids) and ``expected.npy``
(logits ``[T, V]`` of prompts followed by greedy ids, all one
behind the other). A runner prints one JSON object: the version of its program
(the first of its ``versions`` by package), and for each folder's name what `Expected.compare` returns, or ``{"refused": message}``.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np


class Expected:
    """Results of transformers for a checkpoint in float32.

    Attributes:
        texts: The prompts as text.
        prompts: Their ids.
        greedy: The ids that greedy decoding appends to each.
        sequences: Prompts followed by greedy ids.
        logits: Each ``[T, V]``, of the sequences.
        largest: The largest logit.
    """

    def __init__(self, folder: Path) -> None:
        found = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        self.texts: list[str] = found["texts"]
        self.prompts: list[list[int]] = found["prompts"]
        self.greedy: list[list[int]] = found["greedy"]
        self.sequences = [[*a, *b] for a, b in zip(self.prompts, self.greedy, strict=True)]
        ends = np.cumsum([len(ids) for ids in self.sequences])
        self.logits = np.split(np.load(folder / "expected.npy"), ends[:-1])
        self.largest = max(float(np.abs(each).max()) for each in self.logits)

    def compare(self, logits: Sequence[np.ndarray], greedy: list[list[int]]) -> dict:
        """The largest difference over the largest logit, and whether greedy ids are the same."""
        error = max(float(np.abs(a - b).max()) for a, b in zip(logits, self.logits, strict=True))
        return {"error": error / self.largest, "greedy": greedy == self.greedy}

    def compare_logs(self, logs: Sequence[np.ndarray], greedy: list[list[int]]) -> dict:
        """The same for ``[T, V]`` log-probabilities; those that are not a number are left out."""
        pairs = zip(logs, map(log_softmax, self.logits), strict=True)
        error = max(float(np.nanmax(np.abs(a - b))) for a, b in pairs)
        return {"error": error / self.largest, "greedy": greedy == self.greedy}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities of ``[..., V]`` logits."""
    rows = logits.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def report(packages: Sequence[str], check: Callable[[Path], dict]) -> None:
    """Check every folder on the command line; print one line of JSON after whatever the program prints itself."""
    found = {}
    for folder in map(Path, sys.argv[1:]):
        try:
            found[folder.name] = check(folder)
        except Exception as error:  # whatever a program raises is its refusal; the tests compare the words
            found[folder.name] = {"refused": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
    sys.stdout.flush()
    versions = {name: version(name) for name in packages}
    os.write(
        1, ("\n" + json.dumps({"version": versions[packages[0]], "versions": versions, "found": found}) + "\n").encode()
    )
