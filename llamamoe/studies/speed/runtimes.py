"""Time programs that run models: plain transformers in this process, llama.cpp in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...checkpoint.files import unsynced
from ...errors import LlamaMoeError, MissingExtraError, UsageError, near_misses
from ...lazy import torch, transformers
from ...transforms.export_gguf import export_gguf

PYTHON = "LLAMAMOE_CLIENTS_PYTHON"
"""The environment variable that names an interpreter with other programs, if this one lacks them."""
_LIMIT = 600.0  # seconds of one reading of llama.cpp


@dataclass(frozen=True)
class Load:
    """The tasks to time.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Decoding steps.
        batch_sizes: Numbers of sequences that are decoded together.
    """

    prompt_tokens: int = 256
    new_tokens: int = 24
    batch_sizes: tuple[int, ...] = (1, 8)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the rates: ``decode 1``, ``decode 8``, ``prefill``."""
        return (*(f"decode {size}" for size in self.batch_sizes), "prefill")


class Runtime(Protocol):
    """A program that runs models."""

    name: str

    def prepare(self, folder: Path, room: Path) -> Path:
        """Return the file that it loads for a checkpoint, created in ``room`` if it is another file.

        Raises:
            RefusedError: The program cannot run this model.
        """

    def rates(self, model: Path, load: Load) -> dict[str, float]:
        """Measure the tokens per second of everything in ``load.measures`` once."""

    def facts(self) -> dict[str, Any]:
        """Return the facts that determine its speed: versions, threads."""


class Transformers:
    """Plain transformers, with llamamoe's implementations of experts if they are faster (``llamamoe_auto``)."""

    name = "transformers"
    experts = "llamamoe_auto"

    def prepare(self, folder: Path, room: Path) -> Path:
        """See `Runtime.prepare`."""
        return folder

    def rates(self, model: Path, load: Load) -> dict[str, float]:
        """See `Runtime.rates`. Tokens are drawn at random, prompts and continuations alike."""
        loaded = self._load(model)
        generator = torch.Generator().manual_seed(0)
        ids_BN = torch.randint(
            3,
            loaded.config.vocab_size,
            (max(load.batch_sizes), load.prompt_tokens + load.new_tokens),
            generator=generator,
        )
        found = {}
        with torch.inference_mode():
            run(loaded, ids_BN[:1, :8], 4)  # warms up
            for size in load.batch_sizes:
                _, step = run(loaded, ids_BN[:size, load.prompt_tokens - 8 :], 8)
                found[f"decode {size}"] = size / step
            read, _ = run(loaded, ids_BN[:1, : load.prompt_tokens], load.prompt_tokens)
        return found | {"prefill": load.prompt_tokens / read}

    def _load(self, model: Path) -> Any:
        from ...models.experts import register_experts
        from ...models.loading import load_weights, open_model

        register_experts()
        loaded = load_weights(open_model(model), "auto", "cpu")
        if getattr(loaded.config, "num_experts_per_tok", None):
            loaded.set_experts_implementation(self.experts)
        return loaded

    def facts(self) -> dict[str, Any]:
        """See `Runtime.facts`."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions, "threads": torch.get_num_threads(), "experts": self.experts}


def run(model: Any, ids_BN: torch.Tensor, prompt: int) -> tuple[float, float]:
    """Return the seconds of reading the first tokens of each row, and of one step over the rest (0 if none)."""
    started = time.perf_counter()
    out = model(ids_BN[:, :prompt], use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    for at in range(prompt, ids_BN.shape[1]):
        out = model(ids_BN[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
    return read - started, (time.perf_counter() - read) / max(1, ids_BN.shape[1] - prompt)


class LlamaCpp:
    """llama.cpp on files of `llamamoe.export_gguf`, in an interpreter with ``xllamacpp``.

    Raises:
        MissingExtraError: There is no such interpreter.
    """

    name = "llama.cpp"

    def __init__(self) -> None:
        self._python = os.environ.get(PYTHON) or sys.executable
        asked = [self._python, "-c", "from importlib.metadata import version; print(version('xllamacpp'))"]
        try:
            found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            raise MissingExtraError(
                "xllamacpp", "clients", f"Timing llama.cpp (or ${PYTHON}, an interpreter with it)"
            ) from error
        self._version = found.stdout.strip()

    def prepare(self, folder: Path, room: Path) -> Path:
        """See `Runtime.prepare`."""
        out = room / f"{folder.name}.gguf"
        with unsynced():
            return out if out.exists() else export_gguf(folder, out).out

    def rates(self, model: Path, load: Load) -> dict[str, float]:
        """See `Runtime.rates`."""
        from ...checkpoint.gguf.header import read_header

        metadata = read_header(model).metadata
        vocabulary = int(metadata[f"{metadata['general.architecture']}.vocab_size"])
        numbers = (torch.get_num_threads(), load.prompt_tokens, load.new_tokens, vocabulary, *load.batch_sizes)
        found = self._ask([str(model), *map(str, numbers)])
        return {name: float(value) for name, value in found["rates"].items()}

    def _ask(self, arguments: list[str]) -> Mapping[str, Any]:
        """Run the script and return its last output.

        Raises:
            LlamaMoeError: The script failed.
        """
        command = [self._python, str(Path(__file__).with_name("run_llama_cpp.py")), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_LIMIT, errors="replace"
            )
            found: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
            said = "" if isinstance(error, OSError | subprocess.TimeoutExpired) else _last_line(done.stderr)
            raise LlamaMoeError(
                f"llama.cpp could not be timed: {said or str(error)[:200]}",
                hint=f"{self._python} must have xllamacpp; set ${PYTHON} to another interpreter.",
            ) from error
        return found

    def facts(self) -> dict[str, Any]:
        """See `Runtime.facts`."""
        return {"versions": {"xllamacpp": self._version}, "threads": torch.get_num_threads()}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


RUNTIMES: dict[str, type[Transformers] | type[LlamaCpp]] = {"transformers": Transformers, "llama.cpp": LlamaCpp}


def runtime(name: str) -> Runtime:
    """Return a program by its name.

    Raises:
        UsageError: The name is unknown.
        MissingExtraError: The program is not installed.
    """
    if name not in RUNTIMES:
        raise UsageError(f"speed {name!r} is unknown.", hint=near_misses(name, list(RUNTIMES)))
    return RUNTIMES[name]()
