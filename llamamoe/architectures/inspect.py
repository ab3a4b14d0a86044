"""``llamamoe.inspect``: describe a checkpoint and its costs from its headers and configuration alone.

The checkpoint may be dense or a mixture of experts, made by llamamoe or not: a folder of safetensors, a GGUF file, or a
hub id. No tensor is read and neither torch nor transformers is imported, so a 70B model takes no longer than a small
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.base import DTYPE_BYTES, Checkpoint, TensorInfo
from ..checkpoint.json_files import read_json
from ..checkpoint.locate import Location, locate_headers
from ..checkpoint.paths import inside
from ..checkpoint.text_part import TextPart, open_text
from ..errors import CheckpointError
from ..words import plural, size
from .costs import Cost, count, role_of
from .dense_checkpoint import understand
from .sources import SOURCES
from .stored_experts import Experts, dense_width, is_size, stored_experts
from .targets import TARGETS

_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint, read from headers and configuration.

    Attributes:
        name: Hub id, or name of the folder or file.
        path: Its location: a folder or file, or of a Hub repository what was given.
        revision: The commit of a hub download.
        kind: ``"dense"`` or ``"moe"``.
        format: ``"safetensors"`` or ``"gguf"``.
        model_type: The ``model_type`` in ``config.json``; `family`, `target` and the sizes of a model of images and text are
            those of its text model.
        architecture: The model class that ``config.json`` names, or None.
        family: The supported dense family it belongs to, or None.
        target: The supported target it belongs to, or None.
        refusal: For a dense model, the reason why it cannot be split; None if it can (the plan may still refuse a
            recipe).
        sizes: The sizes that ``config.json`` names.
        intermediate_size: Neurons of a dense FFN according to its tensors; None if no layer has one.
        dtypes: Parameters per stored type, in descending order.
        cost: Total and active parameters per part, FLOPs per token, and bytes once loaded.
        tied: Whether the output head is the embedding table.
        experts: The mixture; None for a dense model.
        files: Number of weight files.
        bytes_on_disk: Bytes of the weight files.
        kv_bytes_per_token: Key and value cache of one token in 16 bits; None if the sizes are not known.
        provenance: ``config.json["llamamoe"]``: how llamamoe made the checkpoint; None for any other.
        receipt: A summary of ``llamamoe_receipt.json``; None if there is none.
        notes: Remarks on anything unusual.
    """

    name: str
    path: str
    revision: str | None
    kind: Literal["dense", "moe"]
    format: Literal["safetensors", "gguf"]
    model_type: str
    architecture: str | None
    family: str | None
    target: str | None
    refusal: str | None
    sizes: dict[str, int]
    intermediate_size: int | None
    dtypes: dict[str, int]
    cost: Cost
    tied: bool
    experts: Experts | None
    files: int
    bytes_on_disk: int
    kv_bytes_per_token: int | None
    provenance: dict[str, Any] | None
    receipt: dict[str, Any] | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON-compatible data."""
        return asdict(self) | {"cost": self.cost.to_json(), "notes": list(self.notes)}


def inspect(path: str | Path) -> Inspection:
    """Describe a checkpoint and its costs. O(number of tensors); reads headers only, also of a Hub repository.

    Args:
        path: A folder, a ``.gguf`` file, ``org/name`` or ``hf://org/name@revision``.

    Raises:
        CheckpointError: The path is not a checkpoint, or its files are broken.
    """
    with locate_headers(path) as location:
        return _inspect(location, str(path) if location.revision else str(location.path))


def _inspect(location: Location, path: str) -> Inspection:
    checkpoint = open_text(location, weights_only=True)
    config, provenance = checkpoint.config, _mapping(checkpoint.config.get("llamamoe"))
    notes = list(checkpoint.notes)
    tied, tensors = _counted(checkpoint, notes)
    stub = provenance is not None and provenance.get("shared_neurons") == 0
    experts = stored_experts(config, tensors, stub, notes)
    name = str(config.get("model_type", ""))
    whole = checkpoint.whole if isinstance(checkpoint, TextPart) else config
    sizes = {key: config[key] for key in _SIZES if is_size(config.get(key))}
    files = sorted({info.file for info in checkpoint.tensors.values()})
    is_gguf = location.path.is_file()
    return Inspection(
        name=location.name,
        path=path,
        revision=location.revision,
        kind="dense" if experts is None else "moe",
        format="gguf" if is_gguf else "safetensors",
        model_type=str(whole.get("model_type", "")),
        architecture=_first_name(whole.get("architectures")),
        family=name if name in SOURCES else None,
        target=name if name in TARGETS and experts is not None else None,
        refusal=_refusal(checkpoint, notes) if experts is None else None,
        sizes=sizes,
        intermediate_size=dense_width(tensors),
        dtypes=_gguf_dtypes(location) if is_gguf else _dtypes(tensors.values()),
        cost=_cost(tensors, experts, tied),
        tied=tied,
        experts=experts,
        files=len(files),
        bytes_on_disk=sum(file.stat().st_size for file in files),
        kv_bytes_per_token=_kv_bytes(sizes),
        provenance=provenance,
        receipt=None if is_gguf else _receipt(location.path, notes),
        notes=tuple(notes),
    )


def _mapping(value: Any) -> dict[str, Any] | None:
    return dict(value) if isinstance(value, Mapping) else None


def _first_name(value: Any) -> str | None:
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else None


def _refusal(checkpoint: Checkpoint, notes: list[str]) -> str | None:
    try:
        understand(checkpoint)
    except CheckpointError as error:
        return error.message
    if checkpoint.path.is_file():
        from ..checkpoint.gguf.reader import GgufCheckpoint

        assert isinstance(checkpoint, GgufCheckpoint)
        try:
            notes += checkpoint.check_tokenizer()
        except CheckpointError as error:  # the hint concerns the tokenizer only: the weights are good
            return str(error)
    return None


def _counted(checkpoint: Checkpoint, notes: list[str]) -> tuple[bool, dict[str, TensorInfo]]:
    """Return whether the head is tied, and the tensors without a stored copy of a tied head."""
    quantised = _mapping(checkpoint.config.get("quantization_config"))
    if quantised is not None:
        kind = quantised.get("quant_method", "an unknown method")
        notes.append(f"quantised ({kind}): the counts are of stored elements, which pack several parameters")
    tensors = dict(checkpoint.tensors)
    if isinstance(checkpoint, TextPart):
        rest = checkpoint.rest
        tensors = {name: info for name, info in tensors.items() if name not in rest}
        nbytes = size(sum(info.nbytes for info in rest.values()))
        notes.append(
            f"the counts are of the text model; all else, {plural(len(rest), 'tensor')} ({nbytes}), is not counted"
        )
    stated = checkpoint.config.get("tie_word_embeddings")
    tied = "lm_head.weight" not in tensors if stated is None else bool(stated)
    if tied and tensors.pop("lm_head.weight", None) is not None:
        notes.append("the files hold an output head beside the embedding that it is tied to; it is not counted")
    return tied, tensors


def _cost(tensors: Mapping[str, TensorInfo], experts: Experts | None, tied: bool) -> Cost:
    stub = experts is not None and experts.shared_is_stub
    rows = []
    for name, info in tensors.items():
        role = role_of(name)
        rows.append(("stub" if stub and role == "shared" else role, info.shape, info.nbytes))
    return count(rows, active_share=experts.top_k / experts.num_experts if experts else 1.0, tied=tied)


def _dtypes(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    found: dict[str, int] = {}
    for info in tensors:
        found[info.dtype] = found.get(info.dtype, 0) + info.numel
    return _most_first(found)


def _gguf_dtypes(location: Location) -> dict[str, int]:
    from math import prod

    from ..checkpoint.gguf.header import read_header

    found: dict[str, int] = {}
    for tensor in read_header(location.path).tensors.values():
        found[tensor.kind] = found.get(tensor.kind, 0) + prod(tensor.shape)
    return _most_first(found)


def _most_first(found: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _kv_bytes(sizes: Mapping[str, int]) -> int | None:
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    layers = sizes.get("num_hidden_layers")
    width = sizes.get("head_dim") or (hidden // heads if heads and hidden else None)
    pairs = sizes.get("num_key_value_heads") or heads
    return 2 * layers * pairs * width * DTYPE_BYTES["BF16"] if layers and pairs and width else None


def _receipt(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """Return the main results of the receipt in a few keys."""
    path = folder / "llamamoe_receipt.json"
    if not path.is_file():
        return None
    try:
        data = read_json(inside(folder, path.name))
    except CheckpointError as error:
        notes.append(f"the receipt cannot be read: {error.message}")
        return None
    checked, run = _mapping(data.get("verification")), _mapping(data.get("run")) or {}
    found: dict[str, Any] = {"verified": checked is not None, "weights_sha256": data.get("weights_sha256")}
    keys = ("passed", "equal_weights", "equal_tolerance", "as_stored", "stored_tolerance", "neurons_checked")
    found |= {key: checked.get(key) for key in keys} if checked is not None else {}
    return found | {key: run[key] for key in ("finished", "seconds") if key in run}
