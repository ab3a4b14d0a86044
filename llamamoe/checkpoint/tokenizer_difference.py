"""Compare two tokenizers by vocabulary, special tokens and the ids of probe text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..errors import VerificationError

PROBES = (
    "",
    " ",
    "a",
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces   lead and   trail  ",
    "1234567890 3.14159 1,000 007 x86_64",
    "line\nline\r\n\n\n\tend\n",
    "I'M, don't, we'll, THEY'RE",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # O(n)",
    "Ünï­cödé naïve cafe\u0301 ﬁ ½ \u00a0\u200b",
    "Привет, мир! 専門家が答える。 안녕하세요 مرحبا नमस्ते ไทย",
    "😀👩‍👩‍👧 🇩🇪 \U0001f600 \x00\x07 \ufffd",
    "[INST] <s> </s> <unk> <pad> <|endoftext|> <|im_start|>user\nhi<|im_end|>",
)
"""Text that is tokenised to compare two tokenizers; each one's special tokens are added."""
_MOST_SPECIAL = 64
_NAMES = (
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
)


def _probes(tokenizer: Any) -> list[str]:
    added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().__getitem__)[:_MOST_SPECIAL]
    return [*PROBES, "".join(added), "".join(f" a {token} b" for token in added)]


def _behaviour(tokenizer: Any, probes: list[str], *, roles: bool = True) -> dict[str, Any]:
    """Return ids and text of the probes, and ids of special tokens (``roles``), as JSON-compatible data."""
    names = _NAMES if roles else ()
    found: dict[str, Any] = {name.removesuffix("_id"): getattr(tokenizer, name, None) for name in names}
    for text in probes:
        full = list(tokenizer(text).input_ids)
        plain = list(tokenizer(text, add_special_tokens=False).input_ids)
        decoded = [tokenizer.decode(full, skip_special_tokens=skip) for skip in (False, True)]
        found[f"the text {text[:60]!r}"] = [full, plain, decoded]
    return found


def _model(tokenizer: Any) -> list[Any]:
    """Return the vocabulary and a fast tokenizer's merges or scores, which decide the ids of all other text."""
    if not getattr(tokenizer, "is_fast", False):
        return [sorted(tokenizer.get_vocab().items())]
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [each.split(" ") if isinstance(each, str) else list(each) for each in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else None
    return [sorted(tokenizer.get_vocab().items()), merges, scores]


def _same_model(parent: Any, other: Any) -> bool:
    """Compare vocabularies, merges and scores; parsing them takes most of the time, and the same text needs none."""
    if all(getattr(each, "is_fast", False) for each in (parent, other)):
        first, second = (each.backend_tokenizer.to_str() for each in (parent, other))
        if first == second:
            return True
    return _model(parent) == _model(other)


def difference(parent: Any, other: Any, *, templates: bool = True, roles: bool = True) -> str | None:
    """Describe the first difference between two tokenizers; None if they produce the same ids.

    Compares vocabulary and merges, special tokens, chat templates, and the ids of probe text, with special tokens
    and without, and the text that they decode to.

    Args:
        parent: A tokenizer of transformers.
        other: Another tokenizer.
        templates: Whether to compare chat templates, which do not change ids of text.
        roles: Whether to compare which ids begin, end and pad a text.
    """
    if not _same_model(parent, other):
        return "the vocabulary or its merges differ"
    if templates and chat_template(parent) != chat_template(other):
        return "the chat template differs"
    probes = _probes(parent)
    ours, theirs = (_behaviour(each, probes, roles=roles) for each in (parent, other))
    for what, value in ours.items():
        if theirs[what] != value:
            return f"{what} becomes {str(theirs[what])[:200]} where the parent has {str(value)[:200]}"
    return None


def check_same(parent: Any, other: Any, name: str) -> None:
    """Refuse a tokenizer that differs from its parent's.

    Raises:
        VerificationError: The tokenizers differ; see `difference`.
    """
    found = difference(parent, other)
    if found:
        raise VerificationError(
            f"the tokenizer of {name} differs from its parent's: {found}.",
            hint="Files that changed since the conversion do this; otherwise please report it.",
        )


def ids_sha256(tokenizer: Any) -> str:
    """Return a hash of vocabulary, merges and the ids of probe text, equal for tokenizers with the same ids."""
    facts = [_model(tokenizer), _behaviour(tokenizer, _probes(tokenizer))]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def chat_template(tokenizer: Any | None) -> str | dict[str, str] | None:
    """Return the tokenizer's template, its templates by name, or None."""
    return getattr(tokenizer, "chat_template", None)
