"""Run the dense parent while a converted model trains: frozen, without gradients, sharing weights.

Shapes: B sequences, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RefusedError
from ..lazy import torch
from .loss_head import LossHead
from .model import telling_attention
from .model_parts import decoder_layers, ffn_modules, first_tensor, residual_multiplier

_RUN_WITH = ("input_ids", "attention_mask", "position_ids")
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "base_layer", "original_module"})
"""Parts of a parameter's name that wrappers insert."""


@dataclass(frozen=True)
class ParentStates:
    """Hidden states of the parent on a batch; no gradient, in the parent's dtype.

    Attributes:
        last_BTH: Inputs of the head.
        after: Residual streams by the layer before them, if requested.
        ffn_inputs: Inputs of FFNs by layer, if requested.
    """

    last_BTH: torch.Tensor
    after: Mapping[int, torch.Tensor]
    ffn_inputs: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class SharingReport:
    """The parent's tensors that are shared with the student.

    Attributes:
        bytes_shared: Saved memory in bytes.
        names: The parent's names.
    """

    bytes_shared: int
    names: tuple[str, ...]


class Parent:
    """A dense model for inference only. It is not trained and never in training mode.

    Args:
        model: A causal language model of transformers; its parameters are frozen here.
        name: Its name in messages.
    """

    def __init__(self, model: Any, name: str = "the parent") -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._layers = decoder_layers(model)
        self._ffns = [ffn_modules(layer)[0] for layer in self._layers]
        self._multipliers = [residual_multiplier(layer) for layer in self._layers]
        self._head = LossHead(model)
        self.hidden_size = int(model.config.get_text_config().hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._ffns)

    def hidden(
        self, batch: Mapping[str, Any], *, after: Sequence[int] = (), ffn_inputs: Sequence[int] = ()
    ) -> ParentStates:
        """Run the parent up to its head.

        Args:
            batch: ``input_ids`` int64 ``[B, T]``, optionally ``attention_mask`` and ``position_ids``; other keys are
                ignored.
            after: Layers whose outputs to keep.
            ffn_inputs: Layers whose FFN's inputs to keep.
        """
        kept_after: dict[int, torch.Tensor] = {}
        kept_inputs: dict[int, torch.Tensor] = {}

        def keep_output(index: int) -> Any:
            return lambda _, __, output: kept_after.__setitem__(index, first_tensor(output))

        def keep_input(index: int) -> Any:
            return lambda _, args: kept_inputs.__setitem__(index, args[0])

        handles = [self._layers[i].register_forward_hook(keep_output(i)) for i in after]
        handles += [self._ffns[i].register_forward_pre_hook(keep_input(i)) for i in ffn_inputs]
        device = self.model.device
        given = {k: batch[k].to(device) for k in _RUN_WITH if batch.get(k) is not None}
        try:
            with self._asked():
                last_BTH = self.model.base_model(**given, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return ParentStates(last_BTH, kept_after, kept_inputs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., V]`` of hidden states ``[..., H]``, in the parent's dtype."""
        with self._asked():
            return self._head.logits(hidden)

    def ffn(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        """Return the contribution of a layer's FFN to the residual stream for these inputs, in the parent's dtype.

        Gradients flow to the inputs if they require them; the FFN is then run again in the backward pass, which keeps
        its activations from piling up over the layers.
        """
        ffn, multiplier = self._ffns[layer], self._multipliers[layer]
        weight = next(ffn.parameters())
        x_TH = x_TH.to(weight.device, weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            out_TH: torch.Tensor = (
                torch.utils.checkpoint.checkpoint(ffn, x_TH, use_reentrant=False) if x_TH.requires_grad else ffn(x_TH)
            )
        return out_TH * multiplier

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Disable gradients and the student's autocast, so that the dtype is the parent's own."""
        device = next(self._ffns[0].parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield

    def keep_ffns_only(self) -> None:
        """Release all but the FFNs, if nothing else is needed; `hidden` and `logits` no longer work afterwards."""
        del self.model, self._head, self._layers


def load_parent(
    folder: Path,
    student: Path,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> Parent:
    """Load the dense model that a converted one was made from.

    Only safetensors are read and no code of the checkpoint is run. Everything is checked by headers and configurations
    before the weights are loaded.

    Args:
        folder: The dense checkpoint: a folder, or a ``.gguf`` file.
        student: The converted checkpoint, with its tokenizer.
        dtype: Dtype of the weights: ``bfloat16``, ``float32`` or ``float16``.
        device: Its device.
        attn_implementation: How attention is computed; None: transformers' choice.

    Raises:
        UsageError: Attention cannot be computed that way here.
        CheckpointError: It is not a dense model of a supported family, or its files are broken.
        RefusedError: Its vocabulary or tokenizer differs from the student's.
    """
    from ..architectures.dense_checkpoint import understand
    from ..checkpoint.json_files import read_json
    from ..checkpoint.locate import open_parent, parent_vocabulary
    from ..models.loading import load_weights, open_model

    spec = understand(open_parent(Path(folder), Path(student))).spec
    size = read_json(Path(student) / "config.json").get("vocab_size")
    if size != spec.vocab_size:
        raise RefusedError(
            f"the parent '{folder}' has {spec.vocab_size} tokens in its vocabulary, the model '{student}' has {size}.",
            hint="Give the dense model that this one was made of.",
        )
    taken = parent_vocabulary(Path(folder), Path(student))
    opened = open_model(folder, tokenizer=taken)
    _check_tokenizers(opened.tokenizer, Path(folder), Path(student))
    if taken is not None:
        _check_vocabulary(Path(folder), opened.tokenizer, Path(student))
    model = load_weights(opened, dtype, device)
    if attn_implementation is not None:
        with telling_attention(attn_implementation):
            model.set_attn_implementation(attn_implementation)
    return Parent(model, str(folder))


def _check_tokenizers(tokenizer: Any, parent: Path, student: Path) -> None:
    from ..checkpoint.tokenizer_difference import difference
    from ..models.loading import open_model

    found = difference(tokenizer, open_model(student).tokenizer, templates=False)
    if found:
        raise RefusedError(
            f"the parent '{parent}' has another tokenizer than the model '{student}': the same ids would mean "
            f"different text ({found}).",
            hint="Give the dense model that this one was made of, with the tokenizer that belongs to it.",
        )


def _check_vocabulary(parent: Path, tokenizer: Any, student: Path) -> None:
    """Refuse a GGUF file whose own tokens have other ids than in the tokenizer that replaces it."""
    from ..checkpoint.locate import Location, open_checkpoint
    from ..checkpoint.tokenizer_loading import parent_tokenizer

    try:
        own = parent_tokenizer(open_checkpoint(Location(parent, parent.name)))
    except CheckpointError:
        return  # it cannot be rebuilt, so it cannot be compared
    mine, theirs = own.get_vocab() if own is not None else {}, tokenizer.get_vocab()
    wrong = [token for token, index in mine.items() if theirs.get(token, index) != index]
    if wrong or 2 * len(mine.keys() & theirs.keys()) < len(mine):
        told = f"{wrong[0]!r} has the ids {mine[wrong[0]]} and {theirs[wrong[0]]}" if wrong else "most tokens differ"
        raise RefusedError(
            f"the parent '{parent}' has another vocabulary than the model '{student}': {told}.",
            hint="Give the dense model that this one was made of.",
        )


def share_frozen(parent: Parent, student: torch.nn.Module) -> SharingReport:
    """Let the parent use the student's own tensors where both are equal and stay equal.

    A tensor is shared if the student has one of the same name (without wrappers), shape, dtype and device, equal to
    the last bit, that will not be trained: ``requires_grad`` is False. To be called when ``requires_grad`` is set on
    everything that will ever be trained; merge adapters into shared weights only after the parent is done: both change
    in place. Weights sharded by FSDP2 are not shared. O(bytes of the parent), once.
    """
    theirs = {_plain_name(name): p for name, p in student.named_parameters(remove_duplicate=False)}
    shared, names = 0, []
    for name, mine in parent.model.named_parameters():
        other = theirs.get(name)
        if other is not None and not other.requires_grad and _same(mine.data, other.data):
            shared += mine.nbytes
            names.append(name)
            mine.data = other.data  # the parameter is kept, so that tied ones stay tied
    return SharingReport(shared, tuple(names))


def _plain_name(name: str) -> str:
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return plain.removeprefix("base_model.model.")  # added by peft


def _same(mine: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two ordinary tensors in different memory have equal bits."""
    if type(mine) is not torch.Tensor or type(other) is not torch.Tensor or mine.is_meta:
        return False
    alike = (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
    if not alike or mine.data_ptr() == other.data_ptr():
        return False
    return torch.equal(mine.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
