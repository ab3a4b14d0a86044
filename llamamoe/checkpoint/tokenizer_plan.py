"""Check a tokenizer for a plan from its files, without torch and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..lazy import tokenizers
from .infilling import infilling_warnings
from .json_files import read_json
from .tokenizer_ids import beyond_embedding
from .tokenizer_loading import holds_vocabulary, one_error


def _check_unique(name: str, data: Mapping[str, Any]) -> None:
    """Refuse a vocabulary in which two tokens share an id: which of them an id decodes to varies between runs."""
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping):
        return
    first: dict[Any, str] = {}
    for token, index in vocab.items():
        if first.setdefault(index, token) != token:
            raise CheckpointError(
                f"{name}: the tokens {first[index]!r} and {token!r} share the id {index}.",
                hint="Correct the file, or copy it again from the model's origin.",
            )


def tokenizer_warnings(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> list[str]:
    """Return warnings about the tokenizer of a folder before anything is written, without torch and transformers.

    Args:
        folder: The parent's folder.
        vocab_size: Rows of its embedding.
        config: The parent's configuration.

    Raises:
        CheckpointError: ``tokenizer.json`` or ``generation_config.json`` is broken.
    """
    _check_generation(folder)
    if not holds_vocabulary(folder):
        other = " (tekken.json alone is not enough)" if (folder / "tekken.json").exists() else ""
        return [f"the source has no tokenizer that transformers can load{other}: the output has none"]
    path, vocabulary = folder / "tokenizer.json", None
    if path.is_file():
        with one_error(f"{path.name} of '{folder}'", folder, "tokenizers"):
            tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        vocabulary = read_json(path, vocabulary=True)
        _check_unique(path.name, vocabulary)
    return [*beyond_embedding(folder, vocab_size, config, vocabulary), *infilling_warnings(folder, config)]


def _check_generation(folder: Path) -> None:
    """Check that ids in ``generation_config.json`` are integers; only the end of sequence may be a list."""
    path = folder / "generation_config.json"
    data = read_json(path) if path.is_file() else {}
    for key in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        value = data.get(key)
        several = (
            value
            if isinstance(value, list) and value and key in ("eos_token_id", "decoder_start_token_id")
            else [value]
        )
        if value is not None and not all(isinstance(each, int) and not isinstance(each, bool) for each in several):
            raise CheckpointError(
                f"generation_config.json: {key} is {value!r}, but must be an integer.",
                hint="Correct it, or remove the file.",
            )
