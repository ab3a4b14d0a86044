"""Check that models have one architecture, one shape and one tokenizer, so that their FFNs can be experts of one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...architectures.dense_checkpoint import DenseModel
from ...checkpoint.tokenizer import REWRITTEN
from ...checkpoint.tokenizer_difference import difference
from ...checkpoint.tokenizer_ids import folder_vocabulary
from ...checkpoint.tokenizer_loading import parent_tokenizer
from ...errors import RefusedError

_KEYS = {
    "family": "model_type",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rope": "rope_parameters",
    "qkv_bias": "the bias of q, k and v",
    "o_bias": "the bias of o",
}
"""Keys of ``config.json`` for fields of a `DenseSpec` that have other names."""
_BY_LAYER = {"sliding", "no_rope", "linear"}
"""Fields with a part for each layer, which differ wherever the number of layers does."""
_LENIENT = {"extra", "max_position_embeddings", "tie_word_embeddings"}
"""Fields that may differ: BASE's value is used, which only matters beside the FFNs."""
_HINTS = {
    "model_type": "Mix fine-tuned copies of BASE, or give the model that all of them were trained from as BASE.",
    "vocab_size": "Resize the embedding of the model that has more tokens: model.resize_token_embeddings({}).",
    "rope_parameters": "Positions would be rotated differently: train the model with BASE's, or give another BASE.",
}
_MORE = 5
_TOKENIZER = (*sorted(REWRITTEN), "tokenizer.model", "chat_template.jinja")


def check_shapes(models: Sequence[DenseModel]) -> None:
    """Compare the configurations of all models with the first one's. Weights agree with these (see `understand`).

    Raises:
        RefusedError: They differ; the message names key, both values and both folders.
    """
    reasons, first = [], None
    for other in models[1:]:
        for key, ours, theirs in _differences(models[0], other):
            reasons.append(f"{key} is {ours!r} in {_config(models[0])}, but {theirs!r} in {_config(other)}")
            first = first or (key, ours)
    if first is not None:
        more = f" (and {len(reasons) - _MORE} more differences)" if len(reasons) > _MORE else ""
        raise RefusedError(
            "the models cannot be experts of one model: " + "; ".join(reasons[:_MORE]) + more + ".",
            hint=_HINTS.get(first[0], _HINTS["model_type"]).format(first[1]),
        )


def _differences(base: DenseModel, other: DenseModel) -> Iterator[tuple[str, Any, Any]]:
    ignored = _LENIENT | (_BY_LAYER if base.spec.num_layers != other.spec.num_layers else set())
    for field in fields(base.spec):
        ours, theirs = getattr(base.spec, field.name), getattr(other.spec, field.name)
        if field.name in ignored or ours == theirs:
            continue
        if field.name == "sliding":
            pairs = enumerate(zip_longest(ours, theirs))
            layer, (here, there) = next((layer, pair) for layer, pair in pairs if pair[0] != pair[1])
            yield f"sliding_window of layer {layer}", here, there
        else:
            yield _KEYS.get(field.name, field.name), ours, theirs


def _config(model: DenseModel) -> str:
    return str(model.checkpoint.path / "config.json")


def check_vocabularies(models: Sequence[DenseModel]) -> None:
    """Compare the vocabularies in ``tokenizer.json`` by id, without transformers; folders without one are left out.

    Raises:
        RefusedError: A token has another id in another model.
    """
    base, *others = (model.checkpoint.path for model in models)
    ours = folder_vocabulary(base)
    for path in others:
        theirs = folder_vocabulary(path)
        if ours and theirs and ours != theirs:
            token = min(ours.keys() ^ theirs.keys() or (t for t in ours if ours[t] != theirs[t]))
            here, there = (f"the id {found[token]}" if token in found else "no id" for found in (ours, theirs))
            raise _other_tokens(
                f"the token {token[:60]!r} has {here} in {base}/tokenizer.json, but {there} in {path}/tokenizer.json"
            )


def check_tokenizers(models: Sequence[DenseModel]) -> list[str]:
    """Compare tokenizers by the ids of vocabulary and probe text, as transformers opens them; return warnings.

    Raises:
        RefusedError: The same text gives other ids.
        CheckpointError: Transformers cannot load one of them.
    """
    base, *others = (model.checkpoint for model in models)
    others = [other for other in others if not _same_files(base.path, other.path)]
    ours, warnings = parent_tokenizer(base) if others else None, []
    for other in others:
        theirs = parent_tokenizer(other)
        if ours is None or theirs is None:
            lacking = base.path if ours is None else other.path
            warnings.append(f"{lacking} has no tokenizer: that all models have the same ids was not checked")
        elif found := difference(ours, theirs):
            decides = difference(ours, theirs, templates=False, roles=False)
            if decides:
                raise _other_tokens(f"the tokenizer of {other.path} differs from that of {base.path}: {decides}")
            warnings.append(f"{other.path}: {found}; BASE's tokenizer is used")
    return warnings


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same files of a tokenizer, byte for byte, and at least one of them."""
    names = [name for name in _TOKENIZER if (one / name).is_file() or (other / name).is_file()]
    return bool(names) and all(_bytes(one / name) == _bytes(other / name) for name in names)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _other_tokens(what: str) -> RefusedError:
    return RefusedError(f"{what}.", hint="All experts read the same ids: mix models with one tokenizer.")


def setting_warnings(models: Sequence[DenseModel]) -> Iterator[str]:
    """Yield values that differ and of which BASE's is used."""
    base = models[0].spec
    for model in models[1:]:
        if model.spec.max_position_embeddings != base.max_position_embeddings:
            yield (
                f"max_position_embeddings is {model.spec.max_position_embeddings:,} in {_config(model)}: BASE's "
                f"({base.max_position_embeddings:,}) is used"
            )
