"""Determine the keys of a recipe that decide the weights, and those that may change when a run continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RefusedError
from .gates import GATES
from .losses import LOSSES

if TYPE_CHECKING:
    from .recipe import PretrainRecipe

_FREE = frozenset({
    "model", "parent", "data.train", "data.validation", "data.verify", "gradient_checkpointing", "precision.save",
    "log_every", "save_every", "save_in_background", "keep", "stop_on_collapse", "trainer.report_to", "trainer.run_name", "trainer.project",
    "trainer.logging_dir", "trainer.log_level", "trainer.include_tokens_per_second",
})  # fmt: skip
"""Keys that do not affect weights. Model, parent and text are identified by content (`preflight.identities`)."""
_ROUNDING = frozenset({
    "logits_at_once", "experts_implementation", "attn_implementation", "device", "distributed.fsdp_size",
    "distributed.dp_replicate_size", "distributed.ep_size",
})  # fmt: skip
"""Keys that only change the order of sums, or where they are computed."""
_MEASURING = frozenset({"evaluate_every", "data.validation_blocks", "data.reference_losses"})
"""Keys that do not affect weights unless the mixture follows measurements."""
_LENGTH = "steps"
_CHANGEABLE = ("optimizer", "lr_schedule", "losses", "balancing", "distill", "data.update", "precision.compute",
               "precision.parent", "micro_batch_size", _LENGTH, *_MEASURING)  # fmt: skip
"""Keys, with those below them, that may change when a run continues; a change of any other makes a new run."""
_FIXED = ("optimizer.down_lr_factor",)


def deciding(recipe: PretrainRecipe) -> dict[str, Any]:
    """Return the keys that decide the weights, flat: ``{"optimizer.lr": 0.0002, ...}``; the length always as ``steps``.

    Micro-batches only group the sums, unless a gate or a loss uses the tokens of one together.
    """
    left_out = _FREE | _ROUNDING
    if recipe.data.update.name == "static":
        left_out |= _MEASURING
    together = GATES.get(recipe.gate.name).replaces or any(not LOSSES.get(each.name).linear for each in recipe.losses)
    if not together:
        left_out |= {"micro_batch_size"}
    found = {key: value for key, value in _flat(recipe.model_dump(mode="json")).items() if key not in left_out}
    found.pop("tokens", None)
    return found | {_LENGTH: recipe.max_steps}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@dataclass(frozen=True)
class Changes:
    """The keys that decide the weights and differ between a checkpoint's recipe and the one to continue with.

    Attributes:
        values: Values before and now by key; None in a recipe that lacks the key.
        rates: Learning rate at the next step, relative to the largest: before and now.
    """

    values: Mapping[str, tuple[Any, Any]]
    rates: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def between(cls, before: PretrainRecipe, now: PretrainRecipe, step: int) -> Changes:
        """Compare two recipes.

        Args:
            before: The checkpoint's recipe.
            now: The recipe to continue with.
            step: Finished steps.
        """
        from .parameters import LrSchedule

        old, new = deciding(before), deciding(now)
        # A key that matters under only one of the recipes is still compared by its value.
        every = [_flat(each.model_dump(mode="json")) | {_LENGTH: each.max_steps} for each in (before, now)]
        keys = sorted(key for key in old.keys() | new.keys() if every[0].get(key) != every[1].get(key))
        rates = tuple(LrSchedule.of(each.lr_schedule, each.max_steps)(step) for each in (before, now))
        return cls({key: (every[0].get(key), every[1].get(key)) for key in keys}, rates)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """True if anything differs."""
        return bool(self.values)

    @property
    def fixed(self) -> tuple[str, ...]:
        """The keys that cannot change within a run: text, random numbers, trained parts, and keys used at the start."""
        return tuple(key for key in self.values if _under(key, _FIXED) or not _under(key, _CHANGEABLE))

    @property
    def extends(self) -> bool:
        """True if the run gets longer, and nothing else changes."""
        before, now = self.values.get(_LENGTH, (0, 0))
        return set(self.values) == {_LENGTH} and now > before

    def __str__(self) -> str:
        """Return one line: ``optimizer.lr 0.002 -> 0.001, steps 6 -> 9``."""
        return ", ".join(f"{key} {_told(old)} -> {_told(new)}" for key, (old, new) in self.values.items())

    def describe(self) -> str:
        """Return `str`, and the change of the learning rate."""
        before, now = self.rates
        told = f"the learning rate goes from {before:.3g} to {now:.3g} of its largest value at the next step"
        return f"{self}; {told}" if abs(before - now) > 1e-9 else str(self)

    def to_json(self) -> dict[str, list[Any]]:
        """Return ``key: [before, now]``."""
        return {key: list(pair) for key, pair in self.values.items()}

    def check(self, checkpoint: str, anew: str, *, extend: bool, allow_change: bool) -> None:
        """Refuse to continue with these changes.

        Args:
            checkpoint: Name of the checkpoint, for messages.
            anew: Description of a new run from there, for messages.
            extend: Whether the run may become longer.
            allow_change: Whether keys that may change within a run are allowed to.

        Raises:
            RefusedError: A change is not allowed; the message names every key with its values.
        """
        if not self or (allow_change and not self.fixed) or (extend and self.extends):
            return
        message = f"{checkpoint} was made by another recipe: {self}."
        if self.fixed:
            one = ", ".join(self.fixed)
            raise RefusedError(message, hint=f"Put back {one}, which cannot change within a run; or start {anew}.")
        if self.extends:
            raise RefusedError(message, hint=f"--extend makes the run longer ({self.describe()}); or start {anew}.")
        raise RefusedError(
            message,
            hint=f"--allow-change goes on with the new values and writes them to metrics.jsonl; or start {anew}.",
        )


def _under(key: str, parts: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _told(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
