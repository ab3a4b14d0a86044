"""The pre-tokenizers of byte-level tokenizers, and llama.cpp's names for them (``tokenizer.ggml.pre``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """The pre-tokenizer of a byte-level tokenizer: its own regular expression, or GPT-2's after single digits."""

    regex: str | None = None
    digits: bool = False
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_GPT2 = Cut()
_STARCODER = Cut(digits=True)
_LLAMA_BPE = Cut(_LLAMA3, whole_words=True, add_bos=True)
CUTS: dict[str, Cut] = {
    "gpt-2": _GPT2,
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "qwen2": Cut(_QWEN2, nfc=True),
    "tekken": Cut(_TEKKEN, whole_words=True, add_bos=True),
}
"""The values of ``tokenizer.ggml.pre`` whose original ``tokenizer.json`` is known."""


def cut_of(content: Mapping[str, Any]) -> Cut | None:
    """Return the pre-tokenizer of a byte-level ``tokenizer.json``; None for other kinds and unknown ones."""
    normalizer, first = content.get("normalizer"), content.get("pre_tokenizer") or {}
    steps = list(first.get("pretokenizers", [first]))
    last = steps.pop() if steps else {}
    if (
        last.get("type") != "ByteLevel"
        or last.get("add_prefix_space")
        or (normalizer or {}).get("type") not in (None, "NFC")
    ):
        return None
    cut = Cut(nfc=normalizer is not None, whole_words=bool(content["model"].get("ignore_merges")))
    own = last.get("use_regex", True)
    if not steps and own:
        return cut
    if steps == [{"type": "Digits", "individual_digits": True}] and own:
        return replace(cut, digits=True)
    if len(steps) == 1 and steps[0].get("type") == "Split" and not own:
        step = steps[0]
        if step.get("behavior") == "Isolated" and not step.get("invert") and "Regex" in step.get("pattern", {}):
            return replace(cut, regex=step["pattern"]["Regex"])
    return None
