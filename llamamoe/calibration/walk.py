"""Run calibration text through the model with one decoder layer in memory, keeping hidden states between layers.

For each layer: `Walk.enter` runs the parent's attention on the residual stream and returns the FFN's inputs;
`Walk.leave` adds the outputs of the (converted) FFN, so that the next layer's inputs include the errors of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures.dense_checkpoint import DenseModel
from ..checkpoint.files import set_size
from ..errors import LlamaMoeError
from ..lazy import torch
from ..methods.attention import HeadInputs, RoutedHeads
from ..methods.layer import BATCH_TOKENS, FfnWeights, LayerInputs
from ..models.streaming import LayerRunner, StreamedModel
from .compute import Compute
from .gradients import GradientStore
from .heads import running, watched
from .residual import next_normed

if TYPE_CHECKING:
    from .text import CalibrationText


class StoredFfn(FfnWeights):
    """The FFN of one layer as the source stores it: a matrix is read on first access."""

    def __init__(self, model: DenseModel, layer: int) -> None:
        # bypasses the frozen class, as its cached properties do
        self.__dict__.update(_model=model, _prefix=f"model.layers.{layer}.", hidden_act=model.spec.hidden_act)

    @cached_property
    def gate_FH(self) -> torch.Tensor:
        """The gate matrix ``[F, H]``."""
        return self._read("mlp.gate_proj.weight")

    @cached_property
    def up_FH(self) -> torch.Tensor:
        """The up matrix ``[F, H]``."""
        return self._read("mlp.up_proj.weight")

    @cached_property
    def down_HF(self) -> torch.Tensor:
        """The down matrix ``[H, F]``."""
        return self._read("mlp.down_proj.weight")

    @cached_property
    def norm_H(self) -> torch.Tensor:
        """The weights ``[H]`` of the norm before the FFN.

        Where norms follow attention and FFN, the FFN reads the sum of their outputs so far: the root of the sum of their
        squared weights, its size if they are independent.
        """
        model: DenseModel = self.__dict__["_model"]
        if not model.spec.post_norm:
            return model.spec.norm_weight(self._read(model.spec.ffn_norm))
        prefix = self.__dict__["_prefix"]
        squares = (model.read(name).float().square() for name in _norms_before(int(prefix.split(".")[2])))
        return torch.stack(list(squares)).sum(0).sqrt()

    def _read(self, name: str) -> torch.Tensor:
        model: DenseModel = self.__dict__["_model"]
        return model.read(self.__dict__["_prefix"] + name)

    @property
    def intermediate_size(self) -> int:
        """``F``, the number of neurons."""
        model: DenseModel = self.__dict__["_model"]
        return model.spec.intermediate_size

    def release(self) -> None:
        """Release the matrices; each is read again on the next access."""
        for name in ("gate_FH", "up_FH", "down_HF"):
            self.__dict__.pop(name, None)


def _norms_before(layer: int) -> list[str]:
    """Return the norms whose outputs the FFN of a layer reads, where norms follow attention and FFN."""
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(layer + 1) for part in after]
    return names[:-1]


def read_ffn(model: DenseModel, layer: int) -> FfnWeights:
    """Return the weights of one layer's FFN and of the norm before it, as the source stores them."""
    return StoredFfn(model, layer)


def cast_ffn(ffn: FfnWeights, dtype: torch.dtype) -> FfnWeights:
    """Return the same weights rounded to a dtype."""
    gate, up, down, norm = (m.to(dtype) for m in (ffn.gate_FH, ffn.up_FH, ffn.down_HF, ffn.norm_H))
    return FfnWeights(gate, up, down, norm, ffn.hidden_act)


_FILES = ("residual.0", "residual.1", "inputs")


class Walk:
    """Hidden states of the calibration text on their way through the layers.

    Two buffers hold the residual stream before a layer and after its attention, so that the input of a layer is
    available until it is finished: buffer ``layer % 2`` is the input of layer ``layer``.

    Args:
        model: The dense parent.
        text: The tokens.
        compute: Device and dtype of large products; the residual stream is float32.
        weights_dtype: Dtype to which norms and attention are rounded, because they will be stored in it.
        folder: Folder of memory-mapped files for the residual stream (``residual.0``, ``residual.1``); in memory if
            None.
        map_inputs: Keep the FFN's inputs in a memory-mapped file too (``inputs``); needs ``folder``.
        gradients: Gradients of the parent's loss at the FFN outputs, if a method needs them.
        batch_tokens: Tokens per batch, rounded to whole sequences, at least one.
    """

    def __init__(
        self,
        model: DenseModel,
        text: CalibrationText,
        compute: Compute,
        *,
        weights_dtype: torch.dtype,
        folder: Path | None = None,
        map_inputs: bool = False,
        gradients: GradientStore | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.model, self.text, self.compute = model, text, compute
        self.batch_tokens = batch_tokens
        self._gradients = gradients
        sequences, length = text.ids_ST.shape
        self._step = max(1, batch_tokens // length)
        shape = (sequences, length, model.spec.hidden_size)
        self.buffers = [buffer(shape, torch.float32, folder and folder / _FILES[i]) for i in range(2)]
        self._x = buffer(shape, compute.dtype, folder / _FILES[2] if folder and map_inputs else None)
        self._scale = torch.empty(sequences, length)
        self._clusters: torch.Tensor | None = None
        if text.clusters_S is not None:
            self._clusters = torch.from_numpy(text.clusters_S).repeat_interleave(length)
        with torch.no_grad():
            self._runner = LayerRunner(self._streamed(weights_dtype), length)

    def _streamed(self, dtype: torch.dtype) -> StreamedModel:
        """Return the model, run layer by layer with its weights rounded to a dtype."""
        read = self.model.checkpoint.read
        return StreamedModel.of_dense(self.model, lambda name: read(name).to(dtype), device=self.compute.device)

    def start(self) -> None:
        """Fill the residual stream with the embeddings."""
        ids = torch.from_numpy(self.text.ids_ST)
        with torch.no_grad():
            for part in self._parts():
                self.buffers[0][part] = self._runner.embed(ids[part]).float().cpu()

    def enter(self, layer: int, convert: Callable[[HeadInputs], RoutedHeads] | None = None) -> LayerInputs:
        """Run the layer's attention and return the inputs of its FFN, valid until the next call.

        Args:
            layer: The layer.
            convert: Converts its attention, which then runs as converted.

        Raises:
            LlamaMoeError: A hidden state is NaN or infinite; the message names the layer.
        """
        before, after = self.buffers[layer % 2], self.buffers[(layer + 1) % 2]
        device = self.compute.device
        half = torch.autocast(device.type, self.compute.dtype, enabled=self.compute.dtype != torch.float32)
        with torch.no_grad(), half, self._runner.layer(layer) as module, self._without_ffn(module) as seen:
            heads = None if convert is None else convert(self._heads(layer, module))
            with nullcontext() if heads is None else running(module.self_attn, heads):
                for part in self._parts():
                    out = self._runner.run(layer, module, before[part].to(device))
                    self._check(out, layer, "attention")
                    after[part] = out.float().cpu()
                    self._keep(part, seen)
        inputs = self._inputs(layer)
        self._measure(inputs, layer, after.flatten(0, 1))
        return inputs

    @contextmanager
    def _without_ffn(self, module: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Let the layer's FFN give zeros meanwhile, and yield where its last inputs are then found."""
        seen: dict[str, torch.Tensor] = {}

        def record(x_BSH: torch.Tensor) -> torch.Tensor:
            seen["ffn"] = x_BSH
            return torch.zeros_like(x_BSH)

        ffn: Any = module.mlp
        ffn.to(device="meta")
        ffn.forward = record
        try:
            yield seen
        finally:
            del ffn.forward

    def _keep(self, part: slice, seen: dict[str, torch.Tensor]) -> None:
        """Store what was seen of the FFN for some sequences."""
        self._x[part] = seen.pop("ffn").to(self.compute.dtype).cpu()

    def _heads(self, layer: int, module: Any) -> HeadInputs:
        """Return the inputs of the layer's attention, and its heads, which are computed again each time."""
        before, attention = self.buffers[layer % 2], module.self_attn

        def run() -> Iterator[torch.Tensor]:
            with watched(attention) as seen:
                for part in self._parts():
                    self._runner.run(layer, module, before[part].to(self.compute.device))
                    self._x[part] = seen["input"].to(self.compute.dtype).cpu()
                    yield seen["heads"].flatten(0, 1).float()

        for _ in run():
            pass
        tokens = self._step * before.shape[1]  # whole sequences, as they are run
        return HeadInputs(replace(self._inputs(layer), batch_tokens=tokens, gradients_TH=None), run)

    def _measure(self, inputs: LayerInputs, layer: int, after_TH: torch.Tensor) -> None:
        """Set the norm, at every token, of what the next norm of the parent divides by it (see `next_normed`)."""
        scale_T, spec = self._scale.flatten(), self.model.spec
        for part, y_BH in zip(inputs.batches(), self._outputs(inputs, layer), strict=True):
            scale_T[part] = next_normed(spec, after_TH[part], y_BH.cpu()).square().mean(-1).sqrt()

    def _outputs(self, inputs: LayerInputs, layer: int) -> Iterator[torch.Tensor]:
        """Yield the outputs of the parent's FFN in batches."""
        from ..methods.moe_layer import dense_outputs

        return dense_outputs(inputs, read_ffn(self.model, layer))

    def leave(self, layer: int, outputs: Iterable[torch.Tensor]) -> None:
        """Add the FFN's outputs to the residual stream.

        Args:
            layer: The layer that was entered.
            outputs: float32 ``[B, H]`` in batches, in the order of the tokens.

        Raises:
            LlamaMoeError: An output is NaN or infinite; the message names the layer.
        """
        after, add = self.buffers[(layer + 1) % 2].flatten(0, 1), self._added(layer)
        start = 0
        for y_BH in outputs:
            self._check(y_BH, layer, "FFN")
            after[start : start + len(y_BH)] += add(y_BH).cpu()
            start += len(y_BH)
        assert start == len(after)

    def _added(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function of a layer's FFN outputs that the residual stream adds."""
        spec = self.model.spec
        if not spec.post_norm:
            return lambda y_BH: y_BH * spec.residual_multiplier
        norm_H = self.model.read(f"model.layers.{layer}.post_feedforward_layernorm.weight").float()
        weight_H = norm_H.to(self.compute.device)
        return lambda y_BH: torch.nn.functional.rms_norm(y_BH, y_BH.shape[-1:], weight_H, spec.rms_norm_eps)

    def _parts(self) -> Iterable[slice]:
        count = len(self.text.ids_ST)
        return (slice(start, min(start + self._step, count)) for start in range(0, count, self._step))

    def _inputs(self, layer: int) -> LayerInputs:
        return LayerInputs(
            x_TH=self._x.flatten(0, 1),
            residual_scale_T=self._scale.flatten(),
            device=self.compute.device,
            compute_dtype=self.compute.dtype,
            gradients_TH=self._gradients.read(layer) if self._gradients else None,
            clusters_T=self._clusters,
            batch_tokens=self.batch_tokens,
        )

    def _check(self, values: torch.Tensor, layer: int, part: str) -> None:
        if not bool(values.isfinite().all()):
            raise LlamaMoeError(
                f"layer {layer}: the {part}'s output on the calibration text contains NaN or infinite values.",
                hint="If the source's own weights do (`llamamoe split --dry-run --strict` checks), repair them; otherwise "
                "try --compute-dtype float32.",
            )


def remove_buffers(folder: Path) -> None:
    """Delete the files of finished walks in a folder."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def buffer(shape: tuple[int, ...], dtype: torch.dtype, path: Path | None) -> torch.Tensor:
    """Return uninitialised memory, or a memory-mapped file with its contents (zeros if it is new)."""
    if path is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    nbytes = size * dtype.itemsize
    set_size(path, nbytes)  # torch then opens by name a plain file that llamamoe created
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
