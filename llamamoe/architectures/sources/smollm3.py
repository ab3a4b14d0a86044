"""SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Source, common, positive, rope_parameters, windows_by_type
from .fields import DECODER, TOKEN, TOKENS, Field, Fields, sizes


class SmolLm3(Source):
    """Llama without rotary positions in some layers, which may have a sliding window instead."""

    name = "smollm3"
    summary = "SmolLM3, with its layers without rotary positions"
    reference = "https://huggingface.co/blog/smollm3"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(128256, 2048, 11008, layers=36, heads=16, positions=32768),
        "num_key_value_heads": Field(int | None, 4),
        "pad_token_id": Field(TOKEN, 128004),
        "bos_token_id": Field(TOKEN, 128000),
        "eos_token_id": Field(TOKENS, 128001),
        "use_sliding_window": Field(bool, False),
        "sliding_window": Field(int | None, None),
        "no_rope_layers": Field(list[int] | None, None),
        "no_rope_layer_interval": Field(int, 4),
        "layer_types": Field(list[str] | None, None),
        "attention_bias": Field(bool, False),
        "mlp_bias": Field(bool, False),
        "tie_word_embeddings": Field(bool, True),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        layers = positive(config, "num_hidden_layers")
        turned = _turned(config, layers)
        types = config.get("layer_types")
        if types is None:
            windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
            types = ["sliding_attention" if windowed and not turns else "full_attention" for turns in turned]
        bias = bool(config.get("attention_bias", False))
        return common(
            self.name,
            config,
            rope=rope_parameters(config, 2000000.0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding=windows_by_type({**config, "layer_types": types}, layers, None),
            no_rope=tuple(layer for layer, turns in enumerate(turned) if not turns),
        )


def _turned(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Return for each layer whether it has rotary positions."""
    given = config.get("no_rope_layers")
    if given is not None:
        if len(given) < layers:
            raise CheckpointError(
                f"config.json: no_rope_layers has {len(given)} entries, but there are {layers} layers: one is needed for each."
            )
        return [bool(turns) for turns in given[:layers]]
    interval = config.get("no_rope_layer_interval", 4)
    if not interval:
        raise CheckpointError(f"config.json: no_rope_layer_interval = {interval!r}, but it must not be 0.")
    return [(layer + 1) % interval != 0 for layer in range(layers)]
