"""``llamamoe.inspect``: what a checkpoint is and what it costs, from its headers and configuration alone.

Dense or a mixture of experts, ours or anybody's: a folder of safetensors, a GGUF file, or a hub id. No tensor is read
and neither torch nor transformers is imported, so a 70B model answers as fast as a small one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.base import DTYPE_BYTES, Checkpoint, TensorInfo
from ..checkpoint.json_files import read_json
from ..checkpoint.locate import Location, locate, open_checkpoint
from ..checkpoint.paths import inside
from ..errors import CheckpointError
from .costs import Cost, count, role_of
from .dense_checkpoint import understand
from .expert_weighting import EXPERT_KEYS, TOP_K_KEYS
from .sources import SOURCES
from .targets import TARGETS

_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_GATE = re.compile(r"(gate_proj|w1|gate_up_proj|input_linear)(\.weight)?$")


@dataclass(frozen=True)
class Experts:
    """The mixture of a checkpoint.

    Attributes:
        num_experts: N, routed experts per layer.
        top_k: k, experts selected per token; N if the configuration does not say.
        expert_width: Neurons of one routed expert, padding included.
        shared_width: Neurons of the shared expert as stored; 0 if there is none.
        shared_is_stub: Whether that shared expert holds only zeros (known for our own conversions).
        moe_layers: Layers with routed experts.
        dense_layers: Layers with a dense FFN.
        dense_width: Neurons of such a dense FFN; None if there is none.
    """

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    shared_is_stub: bool
    moe_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    dense_width: int | None


@dataclass(frozen=True)
class Inspection:
    """What headers and configuration say.

    Attributes:
        name: Hub id, or name of the folder or file.
        path: Where it lies.
        revision: The commit of a hub download.
        kind: ``"dense"`` or ``"moe"``.
        format: ``"safetensors"`` or ``"gguf"``.
        model_type: As in ``config.json``.
        architecture: The model class that ``config.json`` names, or None.
        family: The dense family that llamamoe knows it as, or None.
        target: The target that llamamoe knows it as, or None.
        refusal: For a dense model why it cannot be split; None if it can (the plan may still refuse a recipe).
        sizes: The sizes in ``config.json``, those that it names.
        intermediate_size: Neurons of a dense FFN as its tensors have it; None if no layer has one.
        dtypes: Parameters per stored type, the most first.
        cost: Total and active parameters per part, FLOPs per token, and bytes once loaded.
        tied: Whether the output head is the embedding table.
        experts: The mixture; None for a dense model.
        files: Number of weight files.
        bytes_on_disk: Bytes of the weight files.
        kv_bytes_per_token: Key and value cache of one token in 16 bits; None if the sizes are not known.
        provenance: ``config.json["llamamoe"]``: how llamamoe made it; None for anything else.
        receipt: The gist of ``llamamoe_receipt.json``; None if there is none.
        notes: What is odd or worth knowing.
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
        """As plain data."""
        return asdict(self) | {"cost": self.cost.to_json(), "notes": list(self.notes)}


def inspect(path: str | Path) -> Inspection:
    """Say what a checkpoint is and what it costs. O(number of tensors); reads headers only.

    Args:
        path: A folder, a ``.gguf`` file, ``org/name`` or ``hf://org/name@revision``.

    Raises:
        CheckpointError: It is no checkpoint, or its files are broken.
    """
    location = locate(path)
    checkpoint = open_checkpoint(location, weights_only=True)
    config, provenance = checkpoint.config, _mapping(checkpoint.config.get("llamamoe"))
    notes = list(checkpoint.notes)
    tied, tensors = _counted(checkpoint, notes)
    stub = provenance is not None and provenance.get("shared_neurons") == 0
    experts = _experts(config, tensors, stub, notes)
    name = str(config.get("model_type", ""))
    sizes = {key: config[key] for key in _SIZES if _is_size(config.get(key))}
    files = sorted({info.file for info in checkpoint.tensors.values()})
    is_gguf = location.path.is_file()
    return Inspection(
        name=location.name,
        path=str(location.path),
        revision=location.revision,
        kind="dense" if experts is None else "moe",
        format="gguf" if is_gguf else "safetensors",
        model_type=name,
        architecture=_first_name(config.get("architectures")),
        family=name if name in SOURCES else None,
        target=name if name in TARGETS and experts is not None else None,
        refusal=_refusal(checkpoint, notes) if experts is None else None,
        sizes=sizes,
        intermediate_size=_dense_width(tensors),
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


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        except CheckpointError as error:  # the way out belongs to it: the weights are good
            return str(error)
    return None


def _counted(checkpoint: Checkpoint, notes: list[str]) -> tuple[bool, dict[str, TensorInfo]]:
    """Whether the head is tied, and the tensors without a stored copy of a tied head."""
    quantised = _mapping(checkpoint.config.get("quantization_config"))
    if quantised is not None:
        kind = quantised.get("quant_method", "an unknown method")
        notes.append(f"quantised ({kind}): the counts are of stored elements, which pack several parameters")
    tensors = dict(checkpoint.tensors)
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
    if not heads or not hidden or not layers:
        return None
    width = sizes.get("head_dim") or hidden // heads
    return 2 * layers * (sizes.get("num_key_value_heads") or heads) * width * DTYPE_BYTES["BF16"]


def _experts(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], stub: bool, notes: list[str]
) -> Experts | None:
    """The mixture as the tensors have it; the configuration gives k, and N where the tensors do not tell."""
    routed = {name: info for name, info in tensors.items() if role_of(name) == "routed"}
    if not routed:
        return None
    counted = _stored_experts(routed)
    stated = next((config[key] for key in EXPERT_KEYS if _is_size(config.get(key))), counted)
    if stated != counted:
        notes.append(f"config.json says {stated} experts, but the files hold {counted} in one layer")
    top_k = next((config[key] for key in TOP_K_KEYS if _is_size(config.get(key))), None)
    if top_k is None or not 1 <= top_k <= counted:
        notes.append(f"config.json names no usable number of selected experts ({top_k!r}): all {counted} are counted")
        top_k = counted
    width = _width(routed)
    shared = _width({n: i for n, i in tensors.items() if role_of(n) == "shared"})
    return Experts(
        num_experts=counted,
        top_k=top_k,
        expert_width=width or 0,
        shared_width=shared or 0,
        shared_is_stub=bool(shared) and stub,
        moe_layers=_layers(routed),
        dense_layers=_layers(n for n in tensors if role_of(n) == "dense_ffn"),
        dense_width=_dense_width(tensors),
    )


def _stored_experts(routed: Mapping[str, TensorInfo]) -> int:
    """N: one more than the highest index in the names, or the first size of a tensor that holds all experts."""
    indices = [int(found[1]) for name in routed if (found := _EXPERT.search(name))]
    return max(indices) + 1 if indices else max(info.shape[0] for info in routed.values())


def _width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Neurons of the first FFN among the tensors: rows of its gate, half of them where gate and up are one tensor."""
    for name, info in tensors.items():
        found = _GATE.search(name)
        if found and len(info.shape) >= 2:
            rows = info.shape[-2]
            return rows // 2 if found[1] in ("gate_up_proj", "input_linear") else rows
    return None


def _dense_width(tensors: Mapping[str, TensorInfo]) -> int | None:
    return _width({name: info for name, info in tensors.items() if role_of(name) == "dense_ffn"})


def _layers(names: Iterable[str]) -> tuple[int, ...]:
    return tuple(sorted({int(found[1]) for name in names if (found := _LAYER.search(name))}))


def _receipt(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """What the receipt proves, in a few keys; the whole of it stays in the file."""
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
