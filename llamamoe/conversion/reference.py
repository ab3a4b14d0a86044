"""Load the parent in plain transformers and compare it with what was read for the conversion.

``AutoModelForCausalLM.from_pretrained`` opens the folder: transformers itself reads the configuration, chooses the
files, renames and ties. The weights stay on disk (accelerate's disk offload reads each matrix from the parent's
own files just before it is used), so that memory holds one matrix. Whatever it loads is compared with what llamamoe
reads: a wrong reading is found even where logits are not comparable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.sources.base import DenseSpec
from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.tensors import torch_dtype
from ..checkpoint.unmapped import unmapped
from ..checkpoint.whole_pairs import as_causal
from ..errors import VerificationError
from ..lazy import accelerate, torch, transformers
from ..models.streaming import computing_keys

_SAID = ("missing_keys", "mismatched_keys", "error_msgs")
_NOT_COMPUTED = ("extra", "tie_word_embeddings", "family", "whole")
"""Fields of a `DenseSpec` that are not compared: tying shows in the weights, the rest is unused by the forward pass."""


BLOCK_ROWS = 1024
"""Number of rows compared at a time, so that a cast copy stays small."""


class Reference:
    """A dense parent folder, opened by transformers with its weights on disk.

    Args:
        model: The parent as llamamoe reads it.
        dtype: Safetensors name of the dtype that the weights are rounded to before they are used.

    Raises:
        VerificationError: Transformers cannot load the parent, or interprets its configuration differently.
    """

    def __init__(self, model: DenseModel, dtype: str) -> None:
        self._dense = model
        self._dtype = dtype
        self.model: Any = _load(model)
        check_config(model, as_causal(self.model.config.get_text_config().to_dict()))
        for name, module in self.model.named_modules():
            if model.part and not name.startswith((f"model.{model.part.module}.", "lm_head")):
                continue  # the rest does not run
            if next(module.parameters(recurse=False), None) is not None:
                self._watch(name, module)

    def logits(
        self,
        input_ids: torch.Tensor,
        *,
        before_layer: Callable[[int, torch.nn.Module], None],
        after_layer: Callable[[int, torch.nn.Module], None],
    ) -> torch.Tensor:
        """Return float32 logits ``[B, T, V]`` of ``input_ids`` ``[B, T]``, checking every weight on the way.

        Args:
            input_ids: int64 ``[B, T]``.
            before_layer: Called with index and layer before it runs (its weights are not loaded yet).
            after_layer: Called with index and layer after it ran.

        Raises:
            VerificationError: A weight differs from what llamamoe reads.
        """
        for index, layer in enumerate(self.model.get_decoder().layers):
            layer.register_forward_pre_hook(lambda module, args, index=index: before_layer(index, module))
            layer.register_forward_hook(lambda module, args, output, index=index: after_layer(index, module))
        options = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
        with torch.no_grad(), quiet_transformers(), unmapped():
            given = {"input_ids": input_ids}
            if (
                self._dense.part
            ):  # as images come in; some classes move tokens to the device of the first weight, which is none
                given = {"inputs_embeds": self.model.get_input_embeddings()(input_ids)}
            logits: torch.Tensor = self.model(**given, **options).logits
        return logits.float()

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        """Compare and round the module's own weights once accelerate has loaded them."""
        reference = self

        class Watch(accelerate.hooks.ModelHook):  # type: ignore[misc]
            def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
                for key, parameter in module.named_parameters(recurse=False):
                    reference._check(f"{name}.{key}", parameter)
                return args, kwargs

        accelerate.hooks.add_hook_to_module(module, Watch(), append=True)

    def _check(self, name: str, parameter: torch.nn.Parameter) -> None:
        raw = self._raw_name(name)
        info = self._dense.checkpoint.tensors.get(raw)
        rounded = self._dtype != "F32" and (info is None or info.dtype != self._dtype)
        if info is None or not (
            same_bits(parameter.data, self._dense.checkpoint.read(raw))
            or (rounded and same_bits(parameter.data, self._dense.checkpoint.read(raw).to(torch_dtype(self._dtype))))
        ):
            raise VerificationError(
                f"{name}: transformers loads different values from {self._dense.checkpoint.path} than llamamoe read for "
                "the conversion, so it was not made from the model that transformers runs.",
                hint="Leave only one set of weights in the folder, or save the model again with transformers.",
            )
        if rounded:
            parameter.data = parameter.data.to(torch_dtype(self._dtype)).to(torch.float32)

    def _raw_name(self, name: str) -> str:
        """Return the name of a parameter of transformers' model in the parent's files."""
        dense = self._dense
        if dense.part:
            name = dense.part.text_name(name)
        if name not in dense.checkpoint.tensors and name == "lm_head.weight" and dense.spec.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        read = dense.reads.get(name)
        return name if name in dense.checkpoint.tensors or read is None else read.name


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have equal bits, after casting ``other`` to the dtype of ``one`` block by block."""
    if one.shape != other.shape:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    blocks = (slice(start, start + BLOCK_ROWS) for start in range(0, len(one), BLOCK_ROWS))
    return all(
        torch.equal(one[b].contiguous().view(bits), other[b].to(one.dtype).contiguous().view(bits)) for b in blocks
    )


def check_config(model: DenseModel, effective: dict[str, Any]) -> None:
    """Compare llamamoe's reading of ``config.json`` with transformers' configuration object.

    ``effective`` names every value, so that a default assumed for a missing key is compared too.

    Args:
        model: The parent as llamamoe reads it.
        effective: ``AutoConfig.from_pretrained(parent).to_dict()``.

    Raises:
        VerificationError: A value that the forward pass uses differs.
    """
    have, want = model.spec, model.source.spec(effective)
    for field in fields(have):
        if field.name in _NOT_COMPUTED:
            continue
        ours, theirs = getattr(have, field.name), getattr(want, field.name)
        if ours != theirs and not (field.name == "rope" and _same_rope(have, want)):
            raise VerificationError(
                f"config.json of {model.checkpoint.path}: transformers takes {field.name} = {theirs!r}, but the "
                f"conversion was made for {ours!r}.",
                hint="Write the value into the parent's config.json and convert again.",
            )


def _same_rope(have: DenseSpec, want: DenseSpec) -> bool:
    """Return whether all parameters that both name agree (either side may name more)."""
    both = have.rope.keys() & want.rope.keys()
    return {"rope_type", "rope_theta"} <= both and all(have.rope[key] == want.rope[key] for key in both)


def _load(dense: DenseModel) -> Any:
    folder = dense.checkpoint.path
    _refuse_others(folder)
    loader = transformers.AutoModelForMultimodalLM if dense.part else transformers.AutoModelForCausalLM
    rotary = f"model.{dense.part.module}.rotary_emb" if dense.part else "model.rotary_emb"
    try:
        keys, _ = transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        config: Any = transformers.AutoConfig.for_model(**computing_keys(keys))
        with quiet_transformers(), _quiet_accelerate(), unmapped(later=True):
            loaded: Any = loader.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                device_map={"model": "disk", "lm_head": "disk", rotary: "cpu"},
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                generation_config=transformers.GenerationConfig(),
                output_loading_info=True,
            )
    except Exception as error:  # any exception means that transformers cannot load the parent
        raise VerificationError(
            f"transformers cannot load the parent {folder}: {type(error).__name__}: {error}".rstrip(".") + ".",
            hint="Save the model again with transformers' save_pretrained.",
        ) from error
    model, info = loaded
    for kind in _SAID:
        if info.get(kind):
            names = sorted(map(str, info[kind]))[:3]
            raise VerificationError(f"parent {folder}: transformers reports {kind.replace('_', ' ')}: {names}.")
    if dense.part is None:
        _name_tied(model)
    return model.eval().requires_grad_(False)


def _name_tied(model: Any) -> None:
    """Let accelerate find a tied weight under both of its names, since it is only given those in the file.

    Transformers adds the head's name if the file has the embedding, but not vice versa (``save_model``).
    """
    places = model.lm_head._hf_hook.weights_map.dataset.index
    if "model.embed_tokens.weight" not in places and "lm_head.weight" in places:
        places["model.embed_tokens.weight"] = places["lm_head.weight"]


def _refuse_others(folder: Path) -> None:
    """Refuse files that make ``from_pretrained`` load more than the folder's own model.

    Raises:
        VerificationError: The folder holds an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise VerificationError(
            f"{folder} holds adapter_config.json: transformers would apply that adapter to the model.",
            hint="Merge the adapter into the model, or move it to a separate folder.",
        )


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Suppress accelerate's warning that weights stay on disk, which is intended."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
