"""Distil a converted model from its dense parent: predictions, FFN outputs, hidden states.

Every term is a sum over the tokens of a micro-batch, so that a global batch may be split in any way. Shapes: T tokens,
H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import LlamaMoeError, RefusedError, UsageError
from ..lazy import torch
from .distillation_options import DistillOptions, FfnTerm, HiddenTerm, resolve_layers
from .loss_head import KlTarget
from .model_parts import decoder_layers, ffn_modules, find_causal_lm, first_tensor, residual_multiplier
from .parent import Parent, ParentStates
from .routing import at_least_float32


@dataclass
class _Seen:
    """Inputs and outputs of a student's layer for T tokens, all ``[T, H]``.

    Attributes:
        ffn_input: With gradient, unless the parent's output for it is constant.
        ffn_outputs: With gradient; they add up to the FFN's output.
        after: The residual stream after the layer, with gradient.
    """

    ffn_input: torch.Tensor | None = None
    ffn_outputs: list[torch.Tensor] = field(default_factory=list)
    after: torch.Tensor | None = None


@dataclass
class Recorded:
    """The terms of one forward pass of the student.

    Attributes:
        target: Target of the loss head while the student runs; None if its weight is 0 at this step.
    """

    target: KlTarget | None
    _distillation: Distillation
    _states: ParentStates | None
    _seen: dict[int, _Seen]
    _ffn_layers: tuple[int, ...]
    _hidden_layers: tuple[int, ...]

    def sums(self) -> dict[str, torch.Tensor]:
        """Return ``ffn`` and ``hidden`` if their weights are not 0 at this step; to be called once, after the student.

        Returns:
            Scalars with gradient in float32 (float64 for a student in it), summed over the tokens, means over the
            layers, dimensionless, without their weights.
        """
        found = {}
        if self._ffn_layers:
            errors = [self._distillation.ffn_error(layer, self._seen[layer]) for layer in self._ffn_layers]
            found["ffn"] = sum(errors[1:], start=errors[0]) / len(errors)
        if self._hidden_layers and self._states is not None:
            pairs = [(self._seen[layer].after, self._states.after[layer]) for layer in self._hidden_layers]
            errors = [self._distillation.hidden_error(mine, theirs) for mine, theirs in pairs if mine is not None]
            found["hidden"] = sum(errors[1:], start=errors[0]) / len(errors)
        self._seen.clear()
        return found


class Distillation:
    """The terms of `DistillOptions`, from hooks on the student and runs of the parent.

    Hooks are attached to the student's layers and record only inside `recording`: the second forward pass of gradient
    checkpointing is not recorded. Memory beside the parent's: for each layer in ``ffn`` the FFN's input
    and output and a float32 error, for each in ``hidden`` both residual streams and a float32 error.

    Args:
        options: The terms and their schedules.
        student: The model that is trained, wrapped or not; its layers must not be sharded later.
        parent: Its parent; None if no term needs it. Unless ``options.needs_forward``, its FFNs are enough (see
            `Parent.keep_ffns_only`).
        separator: The token after every document, for ``kl.separators``.

    Raises:
        UsageError: A term needs the parent, or a layer does not exist.
        RefusedError: Student and parent have different shapes.
    """

    def __init__(
        self, options: DistillOptions, student: torch.nn.Module, parent: Parent | None, separator: int | None = None
    ) -> None:
        if parent is None and options.needs_parent:
            raise UsageError("distill: its terms need the parent.", hint="Name the dense model as parent.")
        if options.kl is not None and not options.kl.separators and separator is None:
            raise UsageError("distill.kl.separators: the token that separates documents is not known.")
        self.options = options
        self._parent, self._separator = parent, separator
        self._layers = decoder_layers(student)
        self._multipliers = [residual_multiplier(layer) for layer in self._layers]
        config = find_causal_lm(student).config.get_text_config()
        self._layer_norm = getattr(config, "rms_norm_eps", None) is None and hasattr(config, "layer_norm_eps")
        self._eps = float(config.layer_norm_eps if self._layer_norm else getattr(config, "rms_norm_eps", 1e-6))
        everyone = range(len(self._layers))
        converted = [i for i in everyone if hasattr(ffn_modules(self._layers[i])[0], "experts")] or everyone
        self._ffn_layers = resolve_layers(options.ffn.layers, converted, len(everyone)) if options.ffn else ()
        self._hidden_layers = resolve_layers(options.hidden.layers, everyone, len(everyone)) if options.hidden else ()
        if parent is not None:
            _check_shapes(parent, len(everyone), int(config.hidden_size), options)
        self._wanted: frozenset[int] = frozenset()
        self._seen: dict[int, _Seen] | None = None
        self._handles = [handle for i in {*self._ffn_layers, *self._hidden_layers} for handle in self._hook(i)]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def weights(self, step: int, max_steps: int) -> dict[str, float]:
        """Return the weight of each term at a step: ``lm``, and those of ``kl``, ``ffn``, ``hidden`` in use."""
        terms = {"lm": self.options.lm, "kl": self.options.kl, "ffn": self.options.ffn, "hidden": self.options.hidden}
        return {name: term.weight.value(step, max_steps) for name, term in terms.items() if term is not None}

    @contextmanager
    def recording(self, batch: Mapping[str, Any], step: int, max_steps: int) -> Iterator[Recorded]:
        """Run the parent on a batch, then record one forward pass of the student on it.

        Args:
            batch: Inputs of the student.
            step: Finished optimiser steps.
            max_steps: Total number of steps.
        """
        counts = {name for name, weight in self.weights(step, max_steps).items() if weight > 0}
        ffn_layers = self._ffn_layers if "ffn" in counts else ()
        hidden_layers = self._hidden_layers if "hidden" in counts else ()
        states = target = None
        if self._parent is not None and counts & {"kl", "hidden"}:
            states = self._parent.hidden(batch, after=hidden_layers)
            kl = self.options.kl
            if kl is not None and "kl" in counts:
                counted = None if kl.separators else self._inside_documents(batch["input_ids"])
                target = KlTarget(states.last_BTH, self._parent.logits, kl.temperature, kl.top_m, counted)
        seen: dict[int, _Seen] = {i: _Seen() for i in {*ffn_layers, *hidden_layers}}
        self._seen, self._wanted = seen, frozenset(ffn_layers)
        try:
            yield Recorded(target, self, states, seen, ffn_layers, hidden_layers)
        finally:
            self._seen = None

    def _inside_documents(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return bool ``[B, T]``: neither the token nor the next one separates documents."""
        assert self._separator is not None
        within_BT = ids_BT.ne(self._separator)
        next_BT = torch.nn.functional.pad(within_BT[..., 1:], (0, 1), value=True)
        return within_BT & next_BT

    def _hook(self, index: int) -> Iterator[Any]:
        """Attach hooks to a layer and its FFN."""
        through_parent = self.options.ffn is not None and self.options.ffn.through_parent

        def keep_ffn(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._seen is not None and index in self._wanted:
                seen = self._seen[index]
                seen.ffn_input = args[0] if through_parent else args[0].detach()
                seen.ffn_outputs.append(_with_gradient(first_tensor(output), module))

        def keep_after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._seen is not None and index in self._seen:
                self._seen[index].after = first_tensor(output)

        layer = self._layers[index]
        for module in ffn_modules(layer):
            yield module.register_forward_hook(keep_ffn)
        yield layer.register_forward_hook(keep_after)

    def ffn_error(self, index: int, seen: _Seen) -> torch.Tensor:
        """Return ``sum_t |y_t - F(x_t)|^2 / |r_t|^2``, with F the parent's FFN on the student's own input.

        r is the residual stream after the layer, had the FFN been the parent's: the next RMSNorm divides by its size,
        and by the same small constant as here. So an error counts as much as it changes the next layer's input. The
        gradient treats r as constant.
        """
        assert self._parent is not None
        assert seen.ffn_input is not None
        assert seen.after is not None
        multiplier = self._multipliers[index]
        y_TH = multiplier * at_least_float32(sum(seen.ffn_outputs[1:], start=seen.ffn_outputs[0]).flatten(0, -2))
        aim_TH = self._parent.ffn(index, seen.ffn_input.flatten(0, -2)).to(y_TH.device, y_TH.dtype)
        error_TH = y_TH - aim_TH
        with torch.no_grad():
            residual_TH = at_least_float32(seen.after.flatten(0, -2)) - error_TH
            if self._layer_norm:
                residual_TH = residual_TH - residual_TH.mean(-1, keepdim=True)
            size_T = residual_TH.square().mean(-1) + self._eps
        return (error_TH.square().mean(-1) / size_T).sum()

    def hidden_error(self, mine_BTH: torch.Tensor, theirs_BTH: torch.Tensor) -> torch.Tensor:
        """Return ``sum_t |h_t - p_t|^2 / |p_t|^2``, with p the parent's residual stream at the same place."""
        mine_TH = at_least_float32(mine_BTH.flatten(0, -2))
        theirs_TH = theirs_BTH.flatten(0, -2).to(mine_TH.device, mine_TH.dtype)
        size_T = theirs_TH.square().mean(-1) + self._eps
        return ((mine_TH - theirs_TH).square().mean(-1) / size_T).sum()


def _with_gradient(output: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """Return the output; refuse it if reentrant checkpointing has silently detached it."""
    if torch.is_grad_enabled() or output.requires_grad:
        return output
    if module.training and any(p.requires_grad for p in module.parameters()):
        raise LlamaMoeError(
            "distill.ffn gets no gradient under reentrant gradient checkpointing.",
            hint="Use gradient_checkpointing_kwargs = {use_reentrant: false}.",
        )
    return output


def _check_shapes(parent: Parent, layers: int, hidden_size: int, options: DistillOptions) -> None:
    terms: list[tuple[str, FfnTerm | HiddenTerm | None]] = [("ffn", options.ffn), ("hidden", options.hidden)]
    named = [name for name, term in terms if term is not None]
    mine, theirs = (layers, hidden_size), (parent.num_layers, parent.hidden_size)
    if named and mine != theirs:
        raise RefusedError(
            f"distill.{named[0]}: the model has {layers} layers of hidden size {hidden_size}, "
            f"{parent.name} has {theirs[0]} of {theirs[1]}.",
            hint="Give the dense model that this one was made of; kl alone does with any parent of the same tokenizer.",
        )
