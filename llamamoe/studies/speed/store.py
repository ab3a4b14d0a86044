"""Store measured speeds, one small file per shape and program, and measure missing ones."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...architectures.dense_checkpoint import understand
from ...checkpoint.contents import content_fingerprint
from ...checkpoint.locate import locate, open_checkpoint
from ...errors import LlamaMoeError
from ..store import read_result, write_result
from .material import material
from .measure import machine, measure_shapes
from .runtimes import Load, Runtime, runtime
from .shapes import ModelShape
from .wanted import Wanted

FOLDER = "speeds"
TURNS = 3
TOGETHER = 3
"""Number of shapes measured in one run, whose models are on disk together."""


class SpeedStore:
    """Measured speeds of shapes on one model on this machine.

    Args:
        out: Parent of the folder of results.
        model: The shape of the model that they are measured on; or a dense folder, GGUF file or hub id.
        load: Tasks and their sizes.
        turns: Number of measurements of each model.
        room: A folder on the disk for models; None: the system's folder of temporary files.
        tokenizer: For a GGUF file, a folder whose tokenizer is used instead of the one in the file.

    Raises:
        LlamaMoeError: The model cannot be read.
    """

    def __init__(
        self,
        out: Path,
        model: ModelShape | str | Path,
        *,
        load: Load | None = None,
        turns: int = TURNS,
        room: Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> None:
        self.folder, self._load, self._turns, self._room = out / FOLDER, load or Load(), turns, room
        self._tokenizer = tokenizer
        self._runtimes: dict[str, Runtime] = {}
        self._model: ModelShape | Path
        self._facts: dict[str, Any]
        if isinstance(model, ModelShape):
            self._model, self._facts = model, asdict(model)
        else:
            location = locate(model)
            checkpoint = understand(open_checkpoint(location, tokenizer=tokenizer)).checkpoint
            fingerprint = content_fingerprint(checkpoint.tensors, checkpoint.config)
            self._model, self._facts = location.path, {"name": location.name, "fingerprint": fingerprint}

    def load(self, wanted: Wanted) -> dict[str, Any] | None:
        """Return a result, or None if it was not measured on this machine with these versions."""
        path, depends = self._place(wanted)
        found = read_result(path)
        return found if found is not None and found.get("depends") == json.loads(json.dumps(depends)) else None

    def readings(self, wanted: Iterable[Wanted]) -> int:
        """Return the maximum number of readings of `measure`."""
        missing = [each for each in dict.fromkeys(wanted) if self.load(each) is None]
        return self._turns * sum(
            1 + len(group) + sum(each.shape.num_experts > 0 for each in group) for group in _groups(missing)
        )

    def measure(
        self,
        wanted: Iterable[Wanted],
        tell: Callable[[str], None] = lambda _: None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> list[tuple[Wanted, str]]:
        """Measure missing speeds, shapes of about the same size together.

        Args:
            wanted: Shapes and programs.
            tell: Called after each reading.
            go_on: Called before each run; returns whether there is time for it.

        Returns:
            Speeds that could not be measured, with the reason.
        """
        missing = [each for each in dict.fromkeys(wanted) if self.load(each) is None]
        failed: list[tuple[Wanted, str]] = []
        if not missing:
            return failed
        with material(self._model, self._room, tokenizer=self._tokenizer) as made:
            for group in _groups(missing):
                if not go_on():
                    break
                program = self._runtime(group[0].program)
                try:
                    shapes = [each.shape for each in group]
                    found = measure_shapes(made, program, shapes, load=self._load, turns=self._turns, tell=tell)
                except LlamaMoeError as error:
                    failed += [(each, str(error)) for each in group]
                    continue
                for each, result in zip(group, found, strict=True):
                    path, depends = self._place(each)
                    data = {
                        "program": each.program,
                        **result,
                        "model": self._facts,
                        "machine": machine(),
                        "depends": depends,
                    }
                    write_result(path, data)
        return failed

    def _runtime(self, name: str) -> Runtime:
        if name not in self._runtimes:
            self._runtimes[name] = runtime(name)
        return self._runtimes[name]

    def _place(self, wanted: Wanted) -> tuple[Path, dict[str, Any]]:
        depends = {
            "program": wanted.program,
            "shape": wanted.shape.to_json(),
            "model": self._facts,
            "machine": machine(),
            "load": asdict(self._load),
            **self._runtime(wanted.program).facts(),
        }
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w+.-]+", "_", wanted.label)
        return self.folder / f"{name}.{key[:12]}.json", depends


def _groups(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Yield small groups of one program and similar size, so that their models fit on the disk."""

    def size(each: Wanted) -> tuple[str, float]:
        shape = each.shape
        active = shape.shared + (1 - shape.shared) * shape.top_k / max(shape.num_experts, 1)
        return each.program, -active

    ordered = sorted(wanted, key=size)
    for program in dict.fromkeys(each.program for each in ordered):
        own = [each for each in ordered if each.program == program]
        for start in range(0, len(own), TOGETHER):
            yield own[start : start + TOGETHER]
