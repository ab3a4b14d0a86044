"""Prompts that describe experts: a file of the form of mergekit-moe's configuration, and router rows from hidden states."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ...architectures.dense_checkpoint import DenseModel
from ...errors import InvalidRecipeError, LlamaMoeError, UsageError, problem_lines
from ...lazy import torch
from ...progress import ProgressCallback
from ...recipes import read_recipe_file, validated
from ...words import plural
from .recipe import MixRecipe
from .states import layer_states, padded, tokenizer_of

_LEAST_NORM = 1e-8
_FORM = "Write one entry with `positive_prompts:` for each expert under `experts:`, in their order, counted from 0."


class ExpertPrompts(BaseModel):
    """Prompts of one expert."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    positive_prompts: tuple[str, ...] = Field(min_length=1, description="Texts that should select the expert.")
    negative_prompts: tuple[str, ...] = Field((), description="Texts that should not.")
    source_model: str | None = Field(None, description="Not read: a note on whose prompts these are.")

    @property
    def direction(self) -> frozenset[tuple[str, Fraction]]:
        """The share of each prompt in the expert's row, with equal sets for rows of one direction; empty if the row is zero."""
        shares: defaultdict[str, Fraction] = defaultdict(Fraction)
        for prompts, sign in ((self.positive_prompts, 1), (self.negative_prompts, -1)):
            for prompt in prompts:
                shares[prompt] += Fraction(sign, len(prompts))
        largest = max(map(abs, shares.values()))
        return frozenset((prompt, share / largest) for prompt, share in shares.items() if share)


class Prompts(BaseModel):
    """Prompts of all experts, in the order of the experts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    experts: tuple[ExpertPrompts, ...] = Field(description="One entry for each expert.")

    def sha256(self) -> str:
        """Return a hash of the prompts."""
        texts = [[each.positive_prompts, each.negative_prompts] for each in self.experts]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_prompts(path: str | Path, models: Sequence[str]) -> Prompts:
    """Read a file of prompts, YAML or JSON.

    Args:
        path: The file.
        models: The experts' models, in the order of the experts.

    Raises:
        UsageError: The file is invalid, or has prompts for another number of experts.
    """
    data = read_recipe_file(Path(path).expanduser(), "prompts file")
    try:
        found = validated(Prompts, data)
    except InvalidRecipeError as error:
        lines = problem_lines([(_place(key, models), rule) for key, rule in error.problems])
        text = "\n".join(f"  - {line}" for line in lines)
        raise UsageError(f"the prompts file {str(path)!r} is not valid:\n{text}", hint=_FORM) from None
    if len(found.experts) != len(models):
        raise UsageError(
            f"{path} has prompts for {plural(len(found.experts), 'expert')}, not for {len(models)}.", hint=_FORM
        )
    _check_directions(found, path, models)
    return found


def _check_directions(prompts: Prompts, path: str | Path, models: Sequence[str]) -> None:
    """Refuse an expert whose positive prompts are its negative ones, so that its row of the router would be zero."""
    for index, (each, model) in enumerate(zip(prompts.experts, models, strict=True)):
        if not each.direction:
            raise UsageError(
                f"the prompts file {str(path)!r}: the positive and the negative prompts of expert {index} ({model}) are the same, so its row "
                "of the router would be zero.",
                hint="Give other negative prompts, or none.",
            )


def _place(key: str, models: Sequence[str]) -> str:
    """Return words for a key of the file, with the expert that it is about."""
    first, *rest = key.split(".")
    if first != "experts" or not rest:
        return key
    index = int(rest[0])
    entry = f"experts, entry {index}" + (f" ({models[index]})" if index < len(models) else "")
    return f"{entry}: {'.'.join(rest[1:])}" if rest[1:] else entry


def prompt_rows(
    base: DenseModel, prompts: Prompts, recipe: MixRecipe, dtype: str, progress: ProgressCallback
) -> dict[int, torch.Tensor]:
    """Return the router's rows of each layer, float32 ``[N, H]``, from the hidden states of prompts in BASE.

    Row i is ``p_i - n_i`` divided by its norm, with ``p_i`` the mean over the expert's positive prompts and ``n_i`` that
    over the negative ones (0 without any). Each prompt counts the mean over its tokens or the state of its last one
    (``hidden_tokens``), at the FFN's input or the layer's (``hidden_states``), as the recipe chooses. One layer is in memory.

    Raises:
        CheckpointError: BASE has no tokenizer.
        LlamaMoeError: A prompt has no tokens, or a hidden state is not finite.
    """
    texts = [text for each in prompts.experts for text in (*each.positive_prompts, *each.negative_prompts)]
    ids = _tokens(base, texts)
    states = _states(base, ids, recipe, dtype, progress)
    return {layer: _rows(prompts, found) for layer, found in enumerate(states)}


def _tokens(base: DenseModel, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = tokenizer_of(base, "prompts")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [begin + list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    empty = next((text for text, found in zip(texts, ids, strict=True) if len(found) == len(begin)), None)
    if empty is not None:
        raise LlamaMoeError(f"the prompt {empty!r} has no tokens.", hint="Write a text, or remove it.")
    longest = max(map(len, ids))
    if longest > base.spec.max_position_embeddings:
        raise LlamaMoeError(
            f"a prompt has {longest:,} tokens, but the model has {base.spec.max_position_embeddings:,} positions.",
            hint="Shorten it.",
        )
    return ids


def _states(
    base: DenseModel, ids: list[list[int]], recipe: MixRecipe, dtype: str, progress: ProgressCallback
) -> list[torch.Tensor]:
    """Return the state of each prompt in each layer, float64 ``[P, H]``."""
    padded_PT, real_PT = padded(ids)
    if recipe.hidden_tokens == "last":
        real_PT = real_PT & (real_PT.cumsum(1) == real_PT.sum(1, keepdim=True))
    weights_PT = real_PT / real_PT.sum(1, keepdim=True, dtype=torch.float64)
    states = layer_states(base, padded_PT, recipe.hidden_states, dtype, "prompts", progress)
    return [(each.double() * weights_PT[..., None]).sum(1) for each in states]


def _rows(prompts: Prompts, states_PH: torch.Tensor) -> torch.Tensor:
    rows, start = [], 0
    for each in prompts.experts:
        middle = start + len(each.positive_prompts)
        end = middle + len(each.negative_prompts)
        row = states_PH[start:middle].mean(0)
        rows.append(row - states_PH[middle:end].mean(0) if end > middle else row)
        start = end
    rows_NH: torch.Tensor = torch.stack(rows)
    unit_NH: torch.Tensor = (rows_NH / rows_NH.norm(dim=1, keepdim=True).clamp(min=_LEAST_NORM)).float()
    return unit_NH
