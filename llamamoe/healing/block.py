"""The FFN of one decoder layer of a converted checkpoint, as transformers' own modules run it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.quiet import quiet_transformers
from ..lazy import torch, transformers
from ..models.streaming import StreamedModel, _load_part
from ..training.moe_layers import MoeLayer, find_moe_layers
from ..training.router_start import renormalise
from .plan import FROZEN, HealPlan


@dataclass
class NativeFfn:
    """Router, experts and shared neurons of one layer, with a model of one layer around them.

    Attributes:
        layer: Index of the layer in its checkpoint.
        model: The model of one layer; float32.
        moe: Its mixture of experts.
        modules: Names of the modules whose outputs together are the FFN's.
        scale: Factor of these outputs relative to the parent's, of a residual stream with another scale.
    """

    layer: int
    model: Any
    moe: MoeLayer
    modules: tuple[str, ...]
    scale: float = 1.0

    @property
    def scalable(self) -> bool:
        """True if scaling the router keeps its choices and the size of the routed sum.

        That is without a correction bias and groups of experts, and with weights that sum to one.
        """
        bias = self.moe.correction_bias
        by_logits = bias is None or not bool(bias.any())
        one_group = int(getattr(self.moe.router, "num_group", 1)) == 1
        return by_logits and one_group and self.moe.weighting.endswith("renormalised")

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return every parameter of the FFN by its name in the decoder layer."""
        return {
            f"{name}.{key}": parameter
            for name, module in self._modules()
            for key, parameter in module.named_parameters()
        }

    def trained(self, *, router: bool) -> dict[str, torch.nn.Parameter]:
        """Return the parameters to train: of experts and shared neurons, and of the router if requested."""
        rows = self.moe.router_NH
        return {
            name: parameter
            for name, parameter in self.parameters().items()
            if not any(part in name for part in FROZEN) and (router or parameter is not rows)
        }

    def outputs(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return the FFN's outputs ``[T, H]``, as large as the parent's, in the dtype of ``x_TH``.

        Weights are rounded to that dtype with gradients.
        """
        total: torch.Tensor | None = None
        for _, module in self._modules():
            weights = {
                key: value if FROZEN[0] in key else value.to(x_TH.dtype) for key, value in module.named_parameters()
            }
            out = torch.func.functional_call(module, weights, (x_TH[None],))[0]
            total = out if total is None else total + out
        assert total is not None
        return total if self.scale == 1.0 else total / self.scale

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return the router's raw logits, float32 ``[T, N]``."""
        return x_TH.float() @ self.moe.router_NH.float().T

    def to(self, device: torch.device) -> NativeFfn:
        """Move the FFN; attention is not moved."""
        for _, module in self._modules():
            module.to(device)
        return self

    def shared_outputs(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return the FFN's outputs without its routed experts, ``[T, H]``."""
        return self.outputs(x_TH) - self.moe.routed_outputs(x_TH) / self.scale

    def renormalise(self) -> None:
        """See `llamamoe.training.router_start.renormalise`."""
        self.moe = renormalise(self.model, [self.moe])[0]

    def stored(self, names: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Return the layer's tensors as the files hold them: by name, contiguous, on the CPU.

        Args:
            names: Names of the tensors, with their dtypes.
        """
        state = {f"model.layers.0.{name}": value.detach() for name, value in self.parameters().items()}
        reverted = transformers.core_model_loading.revert_weight_conversion(self.model, state)
        found = {re.sub(r"^model\.layers\.0\.", f"model.layers.{self.layer}.", k): v for k, v in reverted.items()}
        return {name: found[name].to("cpu", dtype).contiguous().clone() for name, dtype in names.items()}

    def _modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        decoder = self.model.model.layers[0]
        for name in self.modules:
            module = getattr(decoder, name, None)
            if module is not None:
                yield name, module


def load_ffn(
    plan: HealPlan, layer: int, read: Callable[[str], torch.Tensor], *, keys: Mapping[str, Any] | None = None
) -> NativeFfn:
    """Build one layer's FFN from a checkpoint's tensors.

    Args:
        plan: The plan of the checkpoint.
        layer: Index of the layer.
        read: Returns a tensor by its name in the files.
        keys: Configuration keys that replace the checkpoint's.

    Raises:
        VerificationError: Transformers reports a missing or unexpected tensor.
    """
    prefix = f"model.layers.{layer}."
    names = [name for name in plan.checkpoint.tensors if name.startswith(prefix)]
    streamed = StreamedModel(plan.checkpoint.config, names, read)
    config = streamed._keys() | streamed._kind(layer) | dict(keys or {}) | plan.target.one_layer(dense=False)
    config |= {"num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": None, "tie_word_embeddings": False}
    hidden = config["hidden_size"]
    # copies, because a tensor may be mapped from the file and training in place would change it for later readers
    tensors = {"model.layers.0." + name.removeprefix(prefix): read(name).to(torch.float32, copy=True) for name in names}
    tensors |= {name: torch.zeros(8, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = torch.ones(hidden)
    with quiet_transformers():
        model = _load_part(config, tensors, f"layer {layer}", torch.float32)
    model.eval().requires_grad_(False)
    for name in ("self_attention", "self_attn", "linear_attn"):
        getattr(model.model.layers[0], name, torch.nn.Identity()).to(device="meta")
    moe = next(each for each in find_moe_layers(model) if each.part == "ffn")
    return NativeFfn(layer, model, moe, plan.target.ffn_modules, plan.target.residual_scale(plan.dense.spec))
