"""``llamamoe.merge``: average checkpoints of equal shape by weights (LM-Cocktail, arXiv:2311.13534)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..architectures.config_compat import addable_keys
from ..architectures.expert_weighting import complete_config, mixing_of, rescaled_block
from ..architectures.sources import SOURCES
from ..architectures.sources.base import number
from ..architectures.targets import TARGETS
from ..checkpoint.locate import Location, name_with_run
from ..checkpoint.out_folder import normal_path
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.text_part import whole_hint
from ..errors import RefusedError, UsageError
from ..progress import ProgressCallback, ignore_progress
from .averaging import average
from .cocktail import TEMPERATURE, cocktail_weights, example_losses
from .rewrite import Rewriting, check_place, opened, rewrite, same_tensors

_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
_COSMETIC = {
    "_name_or_path", "architectures", "attention_dropout", "dtype", "initializer_range", "llamamoe", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "torch_dtype", "transformers_version", "use_cache", *_TOKENS,
}  # fmt: skip
"""Keys of a configuration that do not change what the model computes."""
_WEIGHING = {"norm_topk_prob", "routed_scaling_factor"}
"""Keys that only set the weights of selected experts, which merging can convert to one form."""


@dataclass(frozen=True)
class MergeResult:
    """The result of `merge`.

    Attributes:
        out: The output folder.
        weights: Weights of the models, in their order; their sum is 1.
        losses: Each model's loss on the examples, in nats per token; None if the weights were given.
        receipt: The content of ``llamamoe_derived.json``.
        warnings: Sentences for the user.
    """

    out: Path
    weights: tuple[float, ...]
    receipt: dict[str, Any]
    warnings: tuple[str, ...]
    losses: tuple[float, ...] | None = None


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | Literal["auto"] | None = None,
    examples: Sequence[str | Path] = (),
    temperature: float = TEMPERATURE,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> MergeResult:
    """Average checkpoints with the same tensors: a trained model with its earlier state, or runs of several seeds.

    ``sum_i w_i theta_i`` with weights normalised to sum to 1, computed relative to the first model
    (``theta_1 + sum_i w_i (theta_i - theta_1)``), so that equal tensors stay equal bit for bit. Float32 for 16-bit
    tensors, float64 for others, and one rounding to the dtype of the first. If the models weight selected experts in
    different ways (training switches routers to weights that sum to one), all are brought to the renormalised form: the
    mean weight of an expert moves into its down projection. Training also scales the rows of hard routers up: if a
    layer's rows are more than ten times smaller than another model's, they are scaled to the same root mean square,
    which does not change their choices; unscaled they would vanish in the average.

    Args:
        models: Two or more checkpoints of one architecture.
        out: The folder to create; files, dtypes and tokenizer are those of the first model.
        weights: One for each model, not negative; None: equal weights; ``"auto"``: by the losses of the models on
            ``examples``, see `llamamoe.transforms.cocktail.cocktail_weights`.
        examples: Text for ``"auto"``, a few documents of what the result should be good at: files, folders or globs.
        temperature: Of that softmax; the smaller, the more the best model counts.
        resume: Finish a stopped call with the same arguments.
        force: Replace ``out`` if it holds a checkpoint by llamamoe, and discard the work of a stopped call.
        progress: Called after every layer.

    Raises:
        UsageError: There are fewer than two models, or the weights are invalid.
        RefusedError: The models do not correspond (the message names every reason), or OUT cannot be written.
    """
    _check_examples(weights, examples, temperature)
    shares = _shares(len(models), None if weights == "auto" else weights)
    pairs = [opened(model) for model in models]
    locations, checkpoints = tuple(each for each, _ in pairs), tuple(each for _, each in pairs)
    configs = [_complete(each) for each in checkpoints]
    _check(locations, checkpoints, configs)
    losses = None
    if weights == "auto":
        paths = [each.path for each in locations]
        check_place(normal_path(out), paths, resume=resume, force=force)
        losses = example_losses(paths, examples, progress)
        shares = _shares(len(models), cocktail_weights(losses, temperature))
    job = _job(locations, checkpoints, configs, shares, None if losses is None else temperature)
    receipt = rewrite(job, out, resume=resume, force=force, progress=progress)
    return MergeResult(Path(out).expanduser(), shares, receipt, job.warnings, losses)


def _job(
    locations: tuple[Location, ...],
    checkpoints: tuple[SafetensorsCheckpoint, ...],
    configs: Sequence[Mapping[str, Any]],
    shares: tuple[float, ...],
    temperature: float | None,
) -> Rewriting:
    """Return the description of the result; with a temperature, its weights come from examples."""
    config, factors = _one_weighing(checkpoints, configs)
    config["llamamoe"] = _block(checkpoints, factors[0], _scaling(config) / _scaling(configs[0]))
    return Rewriting(
        deed="merge",
        title=f"A merge of {len(checkpoints)} models",
        sources=locations,
        checkpoints=checkpoints,
        config=config,
        make=lambda name: average(checkpoints, shares, factors, name),
        facts=_facts(locations, shares, temperature),
        story=_story(locations, shares),
        warnings=tuple(_warnings(locations, checkpoints, configs, factors)),
    )


def _facts(locations: Sequence[Location], shares: Sequence[float], temperature: float | None) -> dict[str, Any]:
    """Return the merge's entries of the receipt."""
    chosen = {} if temperature is None else {"weighed_by": "examples", "temperature": temperature}
    return {"models": [_named(each) for each in locations], "weights": list(shares)} | chosen


def _named(place: Location) -> str:
    return name_with_run(place.path, place.name)


def _story(locations: Sequence[Location], shares: Sequence[float]) -> str:
    parts = ", ".join(f"`{_named(each)}` ({share:.4g})" for share, each in zip(shares, locations, strict=True))
    return f"The average of the weights of {parts}."


def _check_examples(weights: Sequence[float] | str | None, examples: Sequence[str | Path], temperature: float) -> None:
    if (weights == "auto") != bool(examples):
        raise UsageError("weights = auto needs examples, and only it does: the text that the models are weighed by.")
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature is {temperature:g}, but must be a finite number above 0.")


def _shares(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    if count < 2:
        raise UsageError(f"{count} model was given, but merging takes two or more.")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights were given for {count} models: give one for each.")
    wrong = next((w for w in weights if not (math.isfinite(w) and w >= 0)), None)
    if wrong is not None or sum(weights) <= 0:
        raise UsageError(f"invalid weights {weights}: each must be a number >= 0, and one of them more than 0.")
    return tuple(w / sum(weights) for w in weights)


def _complete(checkpoint: SafetensorsCheckpoint) -> dict[str, Any]:
    """Return the configuration with every default of its class, so that two spellings of one model compare as equal."""
    name, known = checkpoint.config.get("model_type"), {*TARGETS.names(), *SOURCES.names()} - {"dense"}
    if name not in known:
        raise RefusedError(
            f"{checkpoint.path}: model_type {name!r} is not supported.",
            hint=whole_hint(checkpoint.config, f"Supported: {', '.join(sorted(known))}."),
        )
    return complete_config(checkpoint.config)


def _scaling(config: Mapping[str, Any]) -> float:
    return number(config, "routed_scaling_factor", 1.0)


def _block(checkpoints: Sequence[SafetensorsCheckpoint], weights: float, scaling: float) -> dict[str, Any] | None:
    """Return the record of the first conversion without its claims, and later steps of any of the models."""
    blocks = [dict(each.config.get("llamamoe") or {}) for each in checkpoints]
    block = rescaled_block(blocks[0], weights=weights, config=scaling)
    if "parity" in block:
        block |= {"parity": "none", "exactness": "not exact: the weights are an average"}
    for key in ("repair", "healed", "trained"):
        found = next((each[key] for each in blocks if each.get(key)), None)
        block |= {key: found} if found is not None else {}
    if "router_scale" in block and any(each.get("trained") for each in blocks):
        block["router_scale"] = "soft"
    return block or None


def _check(
    locations: Sequence[Location], checkpoints: Sequence[SafetensorsCheckpoint], configs: Sequence[Mapping[str, Any]]
) -> None:
    reasons = same_tensors(checkpoints)
    for place, config in zip(locations[1:], configs[1:], strict=True):
        for key in sorted((configs[0].keys() | config.keys()) - _COSMETIC - _WEIGHING):
            here, there = configs[0].get(key), config.get(key)
            if here != there:
                reasons.append(f"{key} is {here!r} in {locations[0].path}, but {there!r} in {place.path}")
    if reasons:
        more = f" (and {len(reasons) - 5} more reasons)" if len(reasons) > 5 else ""
        raise RefusedError(
            "the models cannot be averaged: " + "; ".join(reasons[:5]) + more + ".",
            hint="Merge checkpoints of one architecture and size, such as a trained model and what it was trained from.",
        )


def _one_weighing(
    checkpoints: Sequence[SafetensorsCheckpoint], configs: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Return a configuration for all, and the factor of each model's routed down projections for it."""
    base = {**checkpoints[0].config}
    if len({tuple(config.get(key) for key in sorted(_WEIGHING)) for config in configs}) == 1:
        return base | addable_keys(base), (1.0,) * len(configs)
    mixings = [mixing_of(config) for config in configs]
    chosen = next((m for m in mixings if m.weighting == "renormalised"), mixings[0])
    base |= {key: configs[mixings.index(chosen)][key] for key in _WEIGHING & configs[0].keys()}
    return base | addable_keys(base), tuple(m.mean_weight / chosen.mean_weight for m in mixings)


def _warnings(
    locations: Sequence[Location],
    checkpoints: Sequence[SafetensorsCheckpoint],
    configs: Sequence[Mapping[str, Any]],
    factors: Sequence[float],
) -> list[str]:
    found = []
    if any(config.get(key) != configs[0].get(key) for config in configs for key in _TOKENS):
        found.append("ids of special tokens differ between the configurations: the first model's are used")
    files = [_tokenizer_digest(checkpoint.path) for checkpoint in checkpoints]
    for place, digest in zip(locations[1:], files[1:], strict=True):
        if None not in (digest, files[0]) and digest != files[0]:
            found.append(f"{place.name} has another tokenizer.json than {locations[0].name}, whose is used")
    changed = [_named(place) for place, factor in zip(locations, factors, strict=True) if factor != 1.0]
    if changed:
        found.append(
            f"{', '.join(changed)} weighted selected experts in another way than the result, to which it was converted: exact where "
            "its router is hard, as split writes it, and a change of the model where training made it soft"
        )
    return found


def _tokenizer_digest(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
