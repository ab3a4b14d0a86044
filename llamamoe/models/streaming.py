"""Run a checkpoint in transformers' own classes with one decoder layer in memory.

The whole model is built without weights; just before a layer runs, its tensors are loaded by transformers'
``from_pretrained`` as a model of one layer (so that names, fusing of experts and dtypes are handled by
transformers), and just after it they are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..architectures.dense_checkpoint import DenseModel
from ..checkpoint.quiet import quiet_transformers
from ..errors import VerificationError
from ..lazy import torch, transformers

_RUNTIME = re.compile(
    r"^(_?attn_implementation|_?experts_implementation|(use_)?return_dict|torchscript|output_.*|auto_map|use_cache"
    r"|torch_dtype|dtype|_name_or_path|transformers_version|architectures|llamamoe)$"
)
"""Keys that control how a model runs, not what it computes; a checkpoint's values are ignored."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
ReadTensor = Callable[[str], "torch.Tensor"]


def computing_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a ``config.json`` that decide what is computed, without those that control how it runs."""
    return {k: v for k, v in config.items() if not _RUNTIME.match(k)}


@dataclass
class StreamedModel:
    """A checkpoint that is run layer by layer.

    Attributes:
        config: Its ``config.json``.
        names: All tensor names.
        read: Returns a tensor by name.
        one_layer: Configuration keys for the one-layer model of layer i.
        dtype: Dtype of the computation; None for float32.
        device: Device of the computation.
        experts: Implementation of a mixture's experts in transformers; None for its default, which fails if the bytes of
            an expert's width are not a multiple of 16.
    """

    config: Mapping[str, Any]
    names: Iterable[str]
    read: ReadTensor
    one_layer: Callable[[int], dict[str, Any]] = field(default=lambda layer: {})
    dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    experts: str | None = None

    def __post_init__(self) -> None:
        self._by_layer: dict[int, list[str]] = {}
        self._outer: list[str] = []
        self._kinds: list[str] | None = None
        for name in self.names:
            found = _LAYER.match(name)
            if found:
                self._by_layer.setdefault(int(found[1]), []).append(name)
            else:
                self._outer.append(name)

    @classmethod
    def of_dense(cls, model: DenseModel, read: ReadTensor | None = None, **kwargs: Any) -> StreamedModel:
        """Stream a dense checkpoint, optionally with another function to ``read`` its tensors."""
        checkpoint = model.checkpoint
        tied = model.spec.tie_word_embeddings
        names = {read.name for read in model.reads.values()} - ({"lm_head.weight"} if tied else set())
        return cls(checkpoint.config, sorted(names), read or checkpoint.read, **kwargs)

    def logits(
        self,
        input_ids: torch.Tensor,
        *,
        before_layer: Callable[[int, torch.nn.Module], None] | None = None,
        after_layer: Callable[[int, torch.nn.Module], None] | None = None,
    ) -> torch.Tensor:
        """Return float32 logits ``[B, T, V]`` of ``input_ids`` ``[B, T]``.

        Args:
            input_ids: int64 ``[B, T]``.
            before_layer: Called with index and loaded layer before it runs; it may change the weights.
            after_layer: Called with index and layer after it ran, while its weights are still loaded.

        Raises:
            VerificationError: Transformers reports a missing or unexpected tensor.
        """
        model = self._shell()
        for index, layer in enumerate(model.model.layers):

            def load(module: torch.nn.Module, args: Any, index: int = index) -> None:
                self._load(module, index)
                if before_layer is not None:
                    before_layer(index, module)

            def drop(module: torch.nn.Module, args: Any, output: Any, index: int = index) -> None:
                if after_layer is not None:
                    after_layer(index, module)
                module.to(device="meta")

            layer.register_forward_pre_hook(load)
            layer.register_forward_hook(drop)
        with torch.no_grad(), quiet_transformers():
            logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
        return logits.float()

    def whole(self) -> Any:
        """Load the whole model into memory, to run it token by token. It is held once, plus one layer as stored.

        Raises:
            VerificationError: Transformers reports a missing or unexpected tensor.
        """
        model = self._shell()
        with quiet_transformers():
            for index, layer in enumerate(model.model.layers):
                self._load(layer, index)
        return model

    def _keys(self) -> dict[str, Any]:
        return computing_keys(self.config)

    def _kind(self, layer: int) -> dict[str, Any]:
        """Return the key that makes the only layer of a one-layer model of this layer's kind, where layers differ."""
        if self._kinds is None:
            self._kinds = getattr(transformers.AutoConfig.for_model(**self._keys()), "layer_types", None) or []
        return {"layer_types": [self._kinds[layer]]} if self._kinds else {}

    def _shell(self) -> Any:
        """Build the whole model without weights, except embedding, final norm, head and rotary positions."""
        keys, dtype = self._keys(), self.dtype or torch.float32
        config = transformers.AutoConfig.for_model(**keys)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=_attention(config)
            )
        if self.experts is not None:
            model.set_experts_implementation(self.experts)
        tensors = {name: self.read(name) for name in self._outer}
        outer = _load_part(keys | {"num_hidden_layers": 0}, tensors, "outer tensors", dtype).to(self.device)
        for name, child in outer.model.named_children():
            if name != "layers":
                setattr(model.model, name, child)
        model.lm_head = outer.lm_head
        return model.eval().requires_grad_(False)

    def _load(self, module: torch.nn.Module, layer: int) -> None:
        hidden = self.config["hidden_size"]
        keys = self._keys() | self.one_layer(layer) | self._kind(layer)
        keys |= {"num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": None, "tie_word_embeddings": False}
        tensors = {_LAYER.sub("model.layers.0.", name): self.read(name) for name in self._by_layer.get(layer, [])}
        # in the stored dtype if there is one: experts are then fused as read, without a float32 copy of each,
        # which would fragment the heap and let the process grow with every layer
        kinds = {tensor.dtype for tensor in tensors.values()}
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = torch.zeros(8, hidden, dtype=dtype)
        tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
        one = _load_part(keys, tensors, f"layer {layer}", dtype)
        loaded = one.model.layers[0].to(self.device, self.dtype or torch.float32)
        module.load_state_dict(loaded.state_dict(), strict=True, assign=True)
        module.requires_grad_(False)


class LayerRunner:
    """Runs many sequences of one length through a `StreamedModel`, loading each layer once for all of them.

    Embedding, final norm and head stay in memory, with one decoder layer at a time. The other inputs of a
    layer (mask, positions) are recorded from the model's own forward pass: without padding they
    depend on the length only.

    Args:
        streamed: The model.
        sequence_length: Tokens of every sequence.
    """

    def __init__(self, streamed: StreamedModel, sequence_length: int) -> None:
        self._streamed = streamed
        self._model = streamed._shell()
        self._calls = self._pass_by(torch.zeros(1, sequence_length, dtype=torch.long))[1]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._model.model.layers)

    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the first layer, ``[B, S, H]``, for token ids int64 ``[B, S]``."""
        return self._pass_by(ids_BS)[0]

    @contextmanager
    def layer(self, index: int) -> Iterator[torch.nn.Module]:
        """Load the decoder layer with its weights, which are dropped at the end; its parameters take no gradient."""
        module: torch.nn.Module = self._model.model.layers[index]
        with quiet_transformers():
            self._streamed._load(module, index)
        try:
            yield module
        finally:
            module.to(device="meta")

    def hold(self, change: Callable[[int, torch.nn.Module], None]) -> list[torch.nn.Module]:
        """Load all decoder layers with their weights permanently; ``change`` may replace parts of each when loaded."""
        modules = list(self._model.model.layers)
        with quiet_transformers():
            for index, module in enumerate(modules):
                self._streamed._load(module, index)
                change(index, module)
        return modules

    def run(self, index: int, module: torch.nn.Module, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after the layer, ``[B, S, H]``; gradients flow if they are on."""
        output: torch.Tensor = module(hidden_BSH, **self._calls[index])
        return output

    def logits(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        """Return float32 ``[P, V]``: final norm and head on hidden states ``[P, H]``; gradients flow if they are on."""
        ids = torch.zeros(len(hidden_PH), 1, dtype=torch.long)
        return self._pass_by(ids, hidden_PH[:, None])[2][:, 0].float()

    def _pass_by(
        self, ids_BS: torch.Tensor, instead: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[dict[str, Any]], torch.Tensor]:
        """Run the model's own forward pass around its layers.

        Args:
            ids_BS: Token ids.
            instead: Replacement of the last layer's output, ``[B, S, H]``; if None no logits are computed.

        Returns:
            The inputs of the first layer, the other inputs of each layer, and the logits (else final states).
        """
        first: list[torch.Tensor] = []
        calls: list[dict[str, Any]] = []

        def record(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            first.append(hidden)
            calls.append(kwargs)
            return hidden if instead is None else instead

        layers = self._model.model.layers
        for layer in layers:
            layer.forward = record
        try:
            whole = self._model.model if instead is None else self._model
            output = whole(input_ids=ids_BS.to(self._streamed.device), use_cache=False)
        finally:
            for layer in layers:
                del layer.forward
        return first[0], calls, output[0]


def _attention(config: Any) -> str:
    """Return the implementation of attention: torch's fused one where the class has it."""
    cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if cls._supports_sdpa else "eager"


def _load_part(keys: Mapping[str, Any], tensors: dict[str, torch.Tensor], what: str, dtype: torch.dtype) -> Any:
    """Build a model from given tensors, by transformers' own loading.

    Raises:
        VerificationError: Transformers reports a missing or unexpected tensor.
    """
    keys = dict(keys)
    for each in ("layer_types", "mlp_layer_types"):
        if keys.get(each):
            keys[each] = keys[each][: keys["num_hidden_layers"]]
    config = transformers.AutoConfig.for_model(**keys)
    cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet_transformers():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=_attention(config),
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            names = sorted(map(str, info[kind]))[:3]
            raise VerificationError(f"{what}: transformers reports {kind.replace('_', ' ')}: {names}.")
    return model
