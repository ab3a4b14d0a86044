"""Measured results of other programs than transformers on each target, by version; see ``tests/clients``.

Plain data, so that ``llamamoe methods --matrix`` and the README can show it. ``make test-clients`` asserts every entry,
and so fails once a program supports another architecture or fixes a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["same", "differs", "refused"]

SIGNS: Mapping[Outcome, str] = {"same": "✓", "differs": "≠", "refused": "–"}


@dataclass(frozen=True)
class Result:
    """The result of a program on a kind of output.

    Attributes:
        outcome: ``"same"``: the logits of transformers in float32 and its greedy tokens; ``"differs"``: it computes
            something else without an error; ``"refused"``: it has no such class, or reports an error.
        note: Reason and remedy, if any.
    """

    outcome: Outcome
    note: str = ""


@dataclass(frozen=True)
class Client:
    """A program that runs checkpoints, and its result on each kind of output.

    Attributes:
        name: Its usual name.
        package: The distribution that was tested.
        version: The version tested.
        results: Results by target, or by target and flags (``"qwen2_moe --rescale unit"``).
    """

    name: str
    package: str
    version: str
    results: Mapping[str, Result]

    def to_json(self) -> dict[str, Any]:
        """Return the client as plain data."""
        return asdict(self)


_SAME = Result("same")
_UNKNOWN = Result("refused", "it does not have this architecture")
_NO_GGUF = Result("refused", "export-gguf refuses it: granitemoeshared and mixtral hold most models")

CLIENTS: tuple[Client, ...] = (
    Client(
        "mlx-lm",
        "mlx-lm",
        "0.32.2",
        {
            "dense": _SAME,
            "cohere2_moe": _UNKNOWN,
            "ernie4_5_moe": _SAME,
            "flex_olmo": _UNKNOWN,
            "glm4_moe": _SAME,
            "glm4_moe --shared 2x": _SAME,
            "granitemoe_swa": _UNKNOWN,
            "granitemoeshared": _UNKNOWN,
            "hunyuan_v1_moe": _UNKNOWN,
            "jetmoe": _UNKNOWN,
            "mixtral": _SAME,
            "qwen2_moe": Result("differs", "it ignores norm_topk_prob; take --rescale unit, or glm4_moe"),
            "qwen2_moe --rescale unit": Result(
                "same", "in float32; in bfloat16 it rounds the router's probabilities, so that experts tie"
            ),
            "qwen3_5_moe_text": _UNKNOWN,
            "qwen3_moe": _SAME,
        },
    ),
    Client(
        "llama.cpp",
        "xllamacpp",
        "2026.10.11549",
        {
            "dense": Result("same", "export-gguf writes llama and mistral; llama.cpp's own converter takes all"),
            "cohere2_moe": _NO_GGUF,
            "ernie4_5_moe": _NO_GGUF,
            "flex_olmo": _NO_GGUF,
            "glm4_moe": _NO_GGUF,
            "glm4_moe --shared 2x": _NO_GGUF,
            "granitemoe_swa": _NO_GGUF,
            "granitemoeshared": _SAME,
            "hunyuan_v1_moe": _NO_GGUF,
            "jetmoe": _NO_GGUF,
            "mixtral": _SAME,
            "qwen2_moe": Result(
                "refused",
                "export-gguf refuses renormalised weights, which llama.cpp would ignore; take --rescale unit. Its own "
                "converter takes the folder, and the result differs",
            ),
            "qwen2_moe --rescale unit": _SAME,
            "qwen3_5_moe_text": _NO_GGUF,
            "qwen3_moe": _NO_GGUF,
        },
    ),
    Client(
        "mistral.rs",
        "mistralrs",
        "0.9.5",
        {
            "dense": _SAME,
            "cohere2_moe": _UNKNOWN,
            "ernie4_5_moe": _UNKNOWN,
            "flex_olmo": _UNKNOWN,
            "glm4_moe": _SAME,
            "glm4_moe --shared 2x": Result("refused", "it takes a shared expert of one expert width only: --shared 1x"),
            "granitemoe_swa": _UNKNOWN,
            "granitemoeshared": _UNKNOWN,
            "hunyuan_v1_moe": Result("differs", "also with every key of HunYuan's own files; take transformers"),
            "jetmoe": _UNKNOWN,
            "mixtral": _SAME,
            "qwen2_moe": _UNKNOWN,
            "qwen2_moe --rescale unit": _UNKNOWN,
            "qwen3_5_moe_text": _UNKNOWN,
            "qwen3_moe": _SAME,
        },
    ),
)


def runs(program: str, target: str) -> bool:
    """Return False if a program was seen to refuse a target, whatever the flags."""
    found = [
        result.outcome
        for client in CLIENTS
        if client.name == program
        for kind, result in client.results.items()
        if kind.split(" ")[0] == target
    ]
    return not found or any(outcome != "refused" for outcome in found)


def table() -> list[list[str]]:
    """Return the rows of a table: a header of clients, then one row for each kind of output."""
    kinds = sorted({kind for client in CLIENTS for kind in client.results})
    rows = [["program", *(client.name for client in CLIENTS)]]
    return rows + [[kind, *(SIGNS[client.results[kind].outcome] for client in CLIENTS)] for kind in kinds]


def notes() -> list[str]:
    """Return a sentence for each result that needs one, equal ones joined."""
    found: dict[tuple[str, str], list[str]] = {}
    for client in CLIENTS:
        for kind, result in client.results.items():
            if result.note:
                found.setdefault((client.name, result.note), []).append(kind)
    return [f"{name}, {', '.join(kinds)}: {note}" for (name, note), kinds in found.items()]


def versions() -> str:
    """Name the version of each client that was tested."""
    return ", ".join(f"{client.name} ({client.package} {client.version})" for client in CLIENTS)
