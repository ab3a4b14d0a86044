"""Run calibration text through a mixture of experts with one decoder layer in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from ...architectures.dense_checkpoint import DenseModel
from ...architectures.moe_checkpoint import ConvertedModel
from ...calibration.compute import Compute
from ...calibration.text import CalibrationText
from ...calibration.walk import Walk, buffer
from ...lazy import torch
from ...methods.layer import LayerInputs
from ...models.streaming import StreamedModel


class MixtureWalk(Walk):
    """Hidden states of the calibration text on their way through the layers of a mixture.

    The FFN of each layer runs in transformers' own class: its outputs, with those of shared experts, are kept beside its
    inputs.

    Args:
        source: The mixture.
        text: The tokens.
        compute: Device and dtype of large products; the model itself runs in float32.
        keys: Arguments of `Walk`.
    """

    def __init__(self, source: ConvertedModel, text: CalibrationText, compute: Compute, **keys: Any) -> None:
        self._source = source
        # of a dense model, a walk uses only what a mixture has, too, and what is replaced below
        super().__init__(cast(DenseModel, source), text, compute, weights_dtype=torch.float32, **keys)
        folder = keys.get("folder")
        self._y = buffer(tuple(self.buffers[0].shape), torch.float32, folder and folder / "outputs")

    def _streamed(self, dtype: torch.dtype) -> StreamedModel:
        source, dense = self._source, self._source.layout.dense_layers
        return StreamedModel(
            source.checkpoint.config,
            source.checkpoint.tensors,
            source.checkpoint.read,
            lambda layer: source.target.one_layer(dense=layer in dense),
            device=self.compute.device,
            experts="eager",
        )

    @contextmanager
    def _without_ffn(self, module: Any) -> Iterator[dict[str, torch.Tensor]]:
        """See `Walk._without_ffn`: the FFN runs, in float32, and zeros are passed on."""
        seen: dict[str, torch.Tensor] = {}
        blocks = [
            block for name in self._source.target.ffn_modules if (block := getattr(module, name, None)) is not None
        ]

        def record(x_BSH: torch.Tensor, forward: Any) -> Any:
            with torch.autocast(self.compute.device.type, enabled=False):
                output = forward(x_BSH.float())
            y_BSH = output[0] if isinstance(output, tuple) else output
            seen["ffn"], seen["output"] = x_BSH, seen.get("output", 0) + y_BSH.view(x_BSH.shape)
            zeros = torch.zeros_like(x_BSH)
            return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

        for block in blocks:
            block.forward = lambda x_BSH, forward=block.forward: record(x_BSH, forward)
        try:
            yield seen
        finally:
            for block in blocks:
                del block.forward

    def _keep(self, part: slice, seen: dict[str, torch.Tensor]) -> None:
        super()._keep(part, seen)
        self._y[part] = seen.pop("output").float().cpu()

    def _outputs(self, inputs: LayerInputs, layer: int) -> Iterator[torch.Tensor]:
        outputs_TH = self._y.flatten(0, 1)
        return (outputs_TH[part] for part in inputs.batches())

    def leave_changed(
        self, layer: int, inputs: LayerInputs, before: Iterable[torch.Tensor], after: Iterable[torch.Tensor]
    ) -> None:
        """Continue to the next layer with other outputs of the routed experts; shared ones are as they were.

        Args:
            layer: The layer that was entered.
            inputs: Its inputs.
            before: The outputs of the source's routed experts in batches.
            after: The outputs that replace them.
        """
        whole = self._outputs(inputs, layer)
        self.leave(layer, (y.to(b.device) - b + a for y, b, a in zip(whole, before, after, strict=True)))

    def leave_unchanged(self, layer: int, inputs: LayerInputs) -> None:
        """Continue to the next layer with the FFN's own outputs."""
        self.leave(layer, self._outputs(inputs, layer))
