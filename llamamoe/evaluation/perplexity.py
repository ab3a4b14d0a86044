"""Measure perplexity and bits per byte of a model, for each domain of a text and over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.encoding import Encoded, Window, encode, windows_of
from ..data.text import Document, read_documents
from ..errors import LlamaMoeError, UsageError
from ..models.devices import pick_devices
from ..models.loading import Opened, open_models
from ..progress import LOADING, Progress, ProgressCallback, counting, ignore_progress
from .fitted_text import fitted_text_warnings
from .scores import Counts, Evaluation, differences, model_scores

MAX_CONTEXT = 2048
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def evaluate(
    model: str | Path,
    text: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    max_tokens: int | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> Evaluation:
    """Measure perplexity and bits per byte, by domain and over all; `Evaluation.protocol` describes how.

    The text and its tokens are held in memory (about 20 bytes per token); the logits are not, whatever the size of
    the vocabulary. Two models are loaded one after the other.

    Args:
        model: A folder or ``.gguf`` file (nothing is downloaded), or a Hub id; see
            `llamamoe.models.loading.open_model`.
        text: Files, folders or globs; see `llamamoe.data.text.read_documents`.
        against: Another model to measure on the same text.
        tokenizer: For GGUF files, a folder whose tokenizer is used instead of the one in the file.
        max_tokens: Maximum number of tokens per domain (of ``model``'s tokenizer); None: all.
        context_length: Tokens per window; None: the models' positions, at most 2048.
        stride: Tokens from the start of one window to the next, which then scores only its new tokens (a sliding
            window: more context for each token, ``context_length / stride`` times the work); None: windows that do not
            overlap.
        batch_size: Windows that run together; changes speed and memory, results only by rounding.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: See `pick_devices`.
        progress: Called with tokens scored so far.

    Raises:
        UsageError: An argument is out of range, or a model or text does not exist.
        CheckpointError: A folder is not a model, lacks weights or its tokenizer, or needs remote code.
        LlamaMoeError: A domain has nothing to score, a document cannot be read, or a loss is not finite.
    """
    check_numbers(max_tokens=max_tokens, context_length=context_length, batch_size=batch_size, dtype=dtype)
    devices = pick_devices(device)
    documents = read_documents(text)  # checked before models are opened
    sides = open_models([name for name in (model, against) if name is not None], tokenizer=tokenizer)
    length = window_length(context_length, sides)
    _check_stride(stride, length)
    encoded, skipped = _take(documents, sides[0], max_tokens)
    plans, same = _plans(encoded, sides, length, stride)
    results = _results(plans, same, batch_size, dtype, devices, progress)
    words = protocol(length, max_tokens, sides, same, stride)
    warnings = (
        *fitted_text_warnings(sides, [each.document for each in encoded]),
        *(note for side in sides for note in side.notes),
    )
    return Evaluation(words, length, stride, max_tokens, ",".join(devices), skipped, **results, warnings=warnings)


def _plans(
    encoded: list[Encoded], sides: Sequence[Opened], length: int, stride: int | None
) -> tuple[list[ScoringPlan], bool]:
    """Return the scoring plan of each model, and whether all tokenise the text alike."""
    plans, same = [ScoringPlan(encoded, windows_of(encoded, length, stride), sides[0])], True
    for side in sides[1:]:
        again, same = encode_again(encoded, side)
        plans.append(ScoringPlan(again, windows_of(again, length, stride), side))
    return plans, same


def _results(
    plans: Sequence[ScoringPlan],
    same: bool,
    batch_size: int,
    dtype: str,
    devices: Sequence[str],
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Score with one model, then with the other one if there are two; return the scores as fields of `Evaluation`."""
    advance = counting("evaluate", sum(int(plan.tokens.sum()) for plan in plans), "token", progress)
    results = []
    for number, plan in enumerate(plans, start=1):
        progress(Progress(LOADING, number, len(plans), "model", plan.side.name))
        results.append(plan.run(batch_size, dtype, devices, advance))
    scores = [model_scores(plan.side.name, *result) for plan, result in zip(plans, results, strict=True)]
    if len(plans) == 1:
        return {"model": scores[0], "against": None, "comparable": None, "difference": None}
    return {
        "model": scores[0],
        "against": scores[1],
        "comparable": "perplexity" if same else "bits_per_byte",
        "difference": differences(results[0][1], results[1][1], same),
    }


def check_numbers(*, max_tokens: int | None, context_length: int | None, batch_size: int, dtype: str) -> None:
    """Refuse invalid arguments of an evaluation.

    Raises:
        UsageError: A number is too small, or the dtype is unknown.
    """
    limits = (("max_tokens", max_tokens, 2), ("context_length", context_length, 2), ("batch_size", batch_size, 1))
    for name, value, least in limits:
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}, but must be at least {least}.")
    if dtype not in _DTYPES:
        raise UsageError(f"dtype is '{dtype}', but must be one of {', '.join(_DTYPES)}.")


def _check_stride(stride: int | None, length: int) -> None:
    if stride is not None and not 1 <= stride < length:
        raise UsageError(
            f"stride is {stride}, but must be at least 1 and less than {length}, the tokens of a window.",
            hint="Omit it for windows that do not overlap.",
        )


def window_length(asked: int | None, sides: Sequence[Opened]) -> int:
    """Return the window's length, the same for both models so that a position has the same context in both."""
    stated = {side.name: getattr(side.config, "max_position_embeddings", None) for side in sides}
    positions = {name: count for name, count in stated.items() if count}
    name = min(positions, key=positions.__getitem__, default="")
    if asked is not None and asked > positions.get(name, asked):
        raise UsageError(
            f"context_length is {asked}, but '{name}' has only {positions[name]} positions.",
            hint=f"Use {positions[name]} or less.",
        )
    return asked if asked is not None else min(positions.get(name, MAX_CONTEXT), MAX_CONTEXT)


def _take(documents: Iterable[Document], side: Opened, max_tokens: int | None) -> tuple[list[Encoded], int]:
    """Tokenise ``max_tokens`` tokens of each domain; also return the number of documents too short to score."""
    taken: dict[str, int] = {}
    kept: list[Encoded] = []
    skipped = 0
    for document in documents:
        before = taken.setdefault(document.domain, 0)
        if max_tokens is not None and before >= max_tokens:
            continue
        limit = None if max_tokens is None else max_tokens - before
        encoded = encode(side.tokenizer, document, bos=side.bos, limit=limit)
        taken[document.domain] += len(encoded.ids) - (side.bos is not None)
        if len(encoded.ids) < 2:
            skipped += 1
        else:
            kept.append(encoded)
    if not taken:
        raise LlamaMoeError("The text contains no document.", hint="All of its files are empty.")
    for domain in set(taken) - {encoded.document.domain for encoded in kept}:
        raise _nothing_to_score(domain, side)
    return kept, skipped


def _nothing_to_score(domain: str, side: Opened) -> LlamaMoeError:
    return LlamaMoeError(
        f"The domain '{domain}' has nothing to score: no document of it has two tokens of '{side.name}'.",
        hint="The first token of a document is never scored; give longer text or omit the domain.",
    )


def encode_again(encoded: Sequence[Encoded], side: Opened) -> tuple[list[Encoded], bool]:
    """Tokenise the same text for another model; also return whether the tokens are the same."""
    again = [encode(side.tokenizer, each.document, bos=side.bos, limit=each.limit) for each in encoded]
    pairs = list(zip(encoded, again, strict=True))
    if all(np.array_equal(a.ids, b.ids) and np.array_equal(a.byte_ends, b.byte_ends) for a, b in pairs):
        return again, True
    cut = (replace(each.document, text=each.document.text[: each.characters]) for each in encoded)
    return [encode(side.tokenizer, document, bos=side.bos) for document in cut], False


class ScoringPlan:
    """The text that one model scores, checked before its weights are read.

    Attributes:
        tokens: Scored tokens of each document, int64.
        bytes: Bytes of their text, int64.
    """

    def __init__(self, encoded: list[Encoded], windows: list[Window], side: Opened) -> None:
        self.encoded, self.windows, self.side = encoded, windows, side
        self.owner = np.array([window.document for window in windows], dtype=np.int64)
        ends = [encoded[w.document].byte_ends for w in windows]
        self.tokens = self._sum([w.scored for w in windows])
        self.bytes = self._sum([end[w.stop - 1] - end[w.begin - 1] for w, end in zip(windows, ends, strict=True)])
        self.domains: dict[str, list[int]] = {}
        for index, document in enumerate(encoded):
            self.domains.setdefault(document.document.domain, []).append(index)
        for domain, members in self.domains.items():
            if not self.bytes[members].sum():
                raise _nothing_to_score(domain, side)

    def _sum(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.bincount(self.owner, weights=np.asarray(values, dtype=np.float64), minlength=len(self.encoded))

    def run(
        self, batch_size: int, dtype: str, devices: Sequence[str], advance: Callable[[str, int], None]
    ) -> tuple[str, dict[str, Counts]]:
        """Load the model onto every device, score and release it; return the weights' dtype and the sums by domain."""
        from ..models.loading import free_memory, load_weights

        models = [load_weights(self.side, dtype, device) for device in devices]
        counts = self._score(models, batch_size, lambda tokens: advance(self.side.name, tokens))
        used = str(models[0].dtype).removeprefix("torch.")
        models.clear()
        free_memory()
        return used, counts

    def score(self, model: Any, batch_size: int, advance: Callable[[int], None]) -> dict[str, Counts]:
        """Return the sums by domain for a loaded model; ``advance`` is called with the tokens of every batch."""
        return self._score([model], batch_size, advance)

    def _score(self, models: Sequence[Any], batch_size: int, advance: Callable[[int], None]) -> dict[str, Counts]:
        from .scoring import score_windows

        nll = score_windows(models, self.encoded, self.windows, batch_size, advance)
        sums = (self._sum(nll), self.tokens, self.bytes)
        return {domain: Counts(*(each[members] for each in sums)) for domain, members in self.domains.items()}


def scoring_plan(
    side: Opened, text: Sequence[str | Path], *, max_tokens: int | None, context_length: int | None
) -> tuple[ScoringPlan, int]:
    """Return the plan of `evaluate` for one model, and its window length, for models without a checkpoint.

    Raises:
        UsageError: ``context_length`` exceeds the model's positions, or the text does not exist.
        LlamaMoeError: A domain has nothing to score, or a document cannot be read.
    """
    documents = read_documents(text)
    length = window_length(context_length, [side])
    encoded, _ = _take(documents, side, max_tokens)
    return ScoringPlan(encoded, windows_of(encoded, length), side), length


def protocol(
    length: int, max_tokens: int | None, sides: Sequence[Opened], same: bool = True, stride: int | None = None
) -> str:
    """Describe in words what was measured."""
    windows = (
        f"non-overlapping windows of {length} tokens, and in each window every token but the first is scored given those "
        "before it in the window."
        if stride is None
        else f"windows of {length} tokens, each starting {stride} tokens after the previous one; every token but the document's "
        "first is scored once, in the first window that holds it, given those before it in the window."
    )
    firsts = ["none" if s.bos is None else f"'{s.tokenizer.convert_ids_to_tokens(s.bos)}'" for s in sides]
    parts = [
        "Per domain the documents are taken in order"
        + (f" until {max_tokens} tokens of text are taken, the last document being cut" if max_tokens else "")
        + ", each is tokenised (beginning-of-sequence token, where the tokenizer itself adds one: "
        + f"{' and '.join(dict.fromkeys(firsts))}) and cut into {windows}",
        "Loss is the mean negative log-likelihood of a scored token in nats, perplexity its exponential; bits "
        "per byte divide the sum in bits by the UTF-8 bytes of the scored tokens' text.",
        "Overall counts every token (byte) alike; mean over domains is the plain mean of the domains' losses "
        "(perplexity: its exponential) and bits per byte.",
        "Standard errors are over documents within domains, and absent where a domain has fewer than two.",
    ]
    if not same:
        parts.append(
            "The two tokenizers split the text into different tokens: the second model gets the text that the "
            "first one's tokens cover, and only bits per byte may be compared."
        )
    if not all(side.tokenizer.is_fast for side in sides):
        parts.append("A tokenizer without offsets had its documents' bytes spread evenly over their tokens.")
    return " ".join(parts)
