"""``llamamoe.densify``: turn a converted checkpoint back into a dense one, with every neuron active for every token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..architectures.dense_checkpoint import DenseModel, understand
from ..architectures.expert_weighting import is_router, may_overlap
from ..architectures.moe_checkpoint import ConvertedModel, FfnParts, check_shapes
from ..architectures.moe_layout import NEARLY_ZERO, Combine, Copy, MoeLayout, Neurons, OutTensor
from ..architectures.sources.base import DenseSpec
from ..architectures.targets.base import common_config
from ..architectures.targets.dense import Dense
from ..checkpoint.base import DTYPE_BYTES, TORCH_NAMES
from ..checkpoint.layout import check_size, deal
from ..checkpoint.locate import Location, locate, open_parent
from ..checkpoint.out_folder import normal_path
from ..errors import RefusedError
from ..lazy import np, torch
from ..models.loadable import check_model
from ..numerics import is_power_of_two
from ..progress import Progress, ProgressCallback, ignore_progress
from .dense_refusals import check_like, open_sinks, refuse_biases
from .rewrite import Rewriting, check_place, opened, rewrite


@dataclass(frozen=True)
class DensifyResult:
    """The result of `densify`.

    Attributes:
        out: The output folder.
        intermediate_size: Neurons of each FFN.
        exact: Whether the weights equal the parent's without rounding, as far as conversion and repair kept them; False
            for a model that was trained further.
        receipt: The content of ``llamamoe_derived.json``.
        warnings: Sentences for the user.
    """

    out: Path
    intermediate_size: int
    exact: bool
    receipt: dict[str, Any]
    warnings: tuple[str, ...]


def densify(
    model: str | Path,
    out: str | Path,
    *,
    like: str | Path | None = None,
    rescale: str | None = None,
    shard_size: str = "5GB",
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> DensifyResult:
    """Combine the neurons of shared and routed experts into one FFN, and drop the router; the same of attention experts.

    The resulting FFN is the sum over all experts, each counted as in the dense model that the conversion started
    from; zero neurons that padded the experts are dropped. For an exact conversion this is the parent. For a repaired
    or trained one it is the dense model of its weights, which were not fitted to it: down projections that compensated
    for unselected experts now run beside them.

    Args:
        model: A converted checkpoint.
        out: The folder to create: Llama, Mistral, Qwen2, Qwen3, Granite or Seed-OSS, the first that can hold it exactly.
        like: A dense checkpoint; neurons are put into its order, found by the bits of their gate rows, and the output is
            of its family where that can hold it.
        rescale: Name of the rescale in effect; None: the one that the conversion recorded.
        shard_size: Maximum size of a file, such as ``"5GB"``.
        resume: Finish a stopped call with the same arguments.
        force: Replace ``out`` if it holds a checkpoint by llamamoe, and discard the work of a stopped call.
        progress: Called after every layer.

    Raises:
        RefusedError: Experts are copies or share neurons that differ, no dense architecture supports the attention, or
            ``like`` has other neurons; or OUT cannot be written.
    """
    location, checkpoint = opened(model)
    origin = locate(like) if like is not None else None
    parent = understand(open_parent(origin.path, location.path)) if origin is not None else None
    check_size(shard_size)
    read = [location.path, *([origin.path] if origin is not None else [])]
    check_place(normal_path(out), read, resume=resume, force=force, names=("MODEL", "--like"))
    converted = ConvertedModel(checkpoint, rescale)
    check_shapes(converted)
    check_model(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    job = _Job(converted, parent, progress)
    exact = job.exact
    warnings = tuple(job.warnings())
    facts = {
        "rescale": converted.rescale,
        "intermediate_size": job.width,
        "routed_factor": converted.routed_factor,
        "exact": exact,
        "order": "experts" if parent is None else "like",
        "like": None if origin is None else origin.name,
    }
    receipt = rewrite(
        _rewriting(job, location, shard_size, facts, warnings), out, resume=resume, force=force, progress=progress
    )
    return DensifyResult(Path(out).expanduser(), job.width, exact, receipt, warnings)


def _rewriting(
    job: _Job, location: Location, shard_size: str, facts: dict[str, Any], warnings: tuple[str, ...]
) -> Rewriting:
    entries = {t.name: (job.dtype, t.shape, math.prod(t.shape) * DTYPE_BYTES[job.dtype]) for t in job.tensors.values()}
    config = common_config(job.spec, job.target, TORCH_NAMES[job.dtype]) | job.target.config(job.spec, job.layout)
    converted = job.converted
    return Rewriting(
        deed="densify",
        title=f"{location.name} as a dense model",
        sources=(location,),
        checkpoints=(converted.checkpoint,),
        config={**config, "llamamoe": {"converted": converted.block or None}},
        make=job.make,
        facts=facts,
        story=f"The {converted.experts.num_experts} experts of each FFN of `{location.name}` were combined into one FFN of {job.width} "
        f"neurons{', and those of attention into its query heads' if converted.target.attention_experts else ''}.",
        warnings=warnings,
        shards=deal(entries, shard_size),
        read_too=() if job.parent is None else (job.parent.checkpoint,),
    )


class _Job:
    """The dense model to write, tensor by tensor; the neurons of one layer are in memory at a time."""

    def __init__(self, converted: ConvertedModel, parent: DenseModel | None, progress: ProgressCallback) -> None:
        self.converted, self.parent, self._progress = converted, parent, progress
        method = converted.block.get("method")
        if method in ("upcycle", "mix"):
            kind = "copies of one FFN" if method == "upcycle" else "the FFNs of several models"
            raise RefusedError(
                f"the experts are {kind} (method {method}): together they are several dense FFNs, not one.",
                hint="Use the dense model that it was made from.",
            )
        self.target = Dense()
        self._held: tuple[int, FfnParts] | None = None
        if parent is not None:
            check_like(converted, parent)
        refuse_biases(converted)
        self._kept = self._kept_neurons()
        self.width = max(len(each) for each in self._kept)
        self.spec = self._spec()
        reasons = self.target.refusals(self.spec) + list(open_sinks(converted))
        if reasons:
            raise RefusedError("no dense architecture supports the attention: " + "; ".join(reasons) + ".")
        self.layout = _layout(self.width)
        self.tensors: dict[str, OutTensor] = {t.name: t for t in self.target.tensors(self.spec, self.layout)}
        outputs = (f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "linear_attn.out_proj"))
        self.dtype = converted.dtype_of(next(filter(converted.has, outputs)))
        if parent is not None:
            self._kept = [self._order(layer, parent) for layer in range(self.spec.num_layers)]

    # ---- what is decided first ------------------------------------------------------------------------------------

    def _spec(self) -> DenseSpec:
        """Return the spec of the dense model, without biases that are all zero and a head that equals the embedding.

        It is of the parent's family where that family's own architecture holds it.
        """
        converted = self.converted
        spec = replace(converted.spec, intermediate_size=self.width)
        if spec.qkv_bias != spec.o_bias:
            parts = "qkv" if spec.qkv_bias else "o"
            names = [f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(spec.num_layers) for p in parts]
            used = any(bool(converted.read(name).any()) for name in names)
            spec = replace(spec, qkv_bias=spec.qkv_bias and used, o_bias=spec.o_bias and used)
        if not spec.tie_word_embeddings:
            head, table = converted.read("lm_head.weight"), converted.read("model.embed_tokens.weight")
            tied = head.dtype == table.dtype and torch.equal(head, table)
            spec = replace(spec, tie_word_embeddings=tied)
        if self.parent is not None:
            own = replace(spec, family=self.parent.spec.family)
            spec = spec if self.target.refusals(own) else own
        return spec

    @property
    def exact(self) -> bool:
        """See `DensifyResult.exact`."""
        block, converted = self.converted.block, self.converted
        kinds = {info.dtype for name, info in converted.checkpoint.tensors.items() if not is_router(name)} - {"F32"}
        one_dtype = self.dtype == "F32" or kinds == {self.dtype}
        trained = bool(block.get("healed") or block.get("trained") or block.get("merge"))
        factors = (converted.routed_factor, converted.residual_scale)
        return all(map(is_power_of_two, factors)) and one_dtype and not trained and not self._gate_was_trained

    @property
    def _gate_was_trained(self) -> bool:
        gates = [name for name in self.converted.checkpoint.tensors if name.endswith("shared_expert_gate.weight")]
        return any(bool((self.converted.checkpoint.read(name).abs() > 2 * NEARLY_ZERO).any()) for name in gates)

    def _kept_neurons(self) -> list[np.ndarray]:
        """Return the places of each layer whose neurons are kept, int64: all but zero neurons. Reads all FFNs."""
        found, layers = [], self.converted.spec.num_layers
        for layer in range(layers):
            found.append(self._kept_of(layer))
            self._progress(Progress("look", layer + 1, layers, "layer"))
        return found

    def _kept_of(self, layer: int) -> np.ndarray:
        ffn = self._ffn(layer)
        used = ffn.gate_PH.ne(0).any(1) | ffn.up_PH.ne(0).any(1) | ffn.down_HP.ne(0).any(0)
        places: np.ndarray = used.nonzero().flatten().numpy()
        if may_overlap(self.converted.checkpoint.config) and len(np.unique(_rows(ffn, places))) < len(places):
            raise RefusedError(
                f"layer {layer}: neurons are in several experts (gradient, overlap inner), scaled for how often they are "
                "expected to run: together they are not a dense FFN.",
                hint="Use the dense model that it was made from.",
            )
        return places

    def _order(self, layer: int, parent: DenseModel) -> np.ndarray:
        """Return the kept places in the parent's order."""
        from ..checkpoint.tensors import torch_dtype

        ffn, places = self._ffn(layer), self._kept[layer]
        names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        gate, up = (parent.read(name).to(torch_dtype(self.dtype)) for name in names)
        theirs = _rows(FfnParts(gate, up, up), np.arange(len(gate)))
        mine = _rows(ffn, places)
        order = np.argsort(theirs, kind="stable")
        at = np.searchsorted(theirs[order], mine).clip(max=len(theirs) - 1)
        found = order[at]
        if not bool((theirs[found] == mine).all()):
            raise RefusedError(
                f"layer {layer}: its neurons differ from those of the model given for the order.",
                hint="Trained neurons cannot be recognised: omit --like.",
            )
        ordered: np.ndarray = places[np.argsort(found, kind="stable")]
        return ordered

    def warnings(self) -> Iterator[str]:
        """Yield sentences for the user."""
        block, converted = self.converted.block, self.converted
        if block.get("repair"):
            yield (
                "the conversion was repaired: gate and up projections, and all else that the repair kept, are the parent's; down "
                "projections were fitted to compensate for unselected experts, and now run beside them"
            )
        if block.get("healed") or block.get("trained"):
            yield "the model was trained with few experts selected: the dense model is not the parent, so measure it first"
        if not is_power_of_two(converted.routed_factor) and self.dtype != "F32":
            yield f"the experts' factor {1 / converted.routed_factor:.6g} is not a power of two: down projections are rounded once"
        if converted.residual_scale != 1.0:
            yield (
                f"the residual stream is {converted.residual_scale:.6g} times the parent's, as in {converted.target.name}, and rms_norm_eps is "
                f"{self.spec.rms_norm_eps:g}: the same function with other numbers"
            )
        if self._gate_was_trained:
            yield "the shared expert's gate was trained and depends on the token: it is replaced by one half"
        short = sum(len(each) < self.width for each in self._kept)
        if short:
            yield f"{short} layers have fewer neurons than others: zero neurons fill them up to {self.width}"

    # ---- the weights ----------------------------------------------------------------------------------------------

    def _ffn(self, layer: int) -> FfnParts:
        if self._held is None or self._held[0] != layer:
            self._held = None  # release one layer before the next is read
            self._held = (layer, self.converted.ffn(layer))
        return self._held[1]

    def make(self, name: str) -> torch.Tensor:
        """Return one tensor of the dense model."""
        from ..checkpoint.tensors import cast, interleave, torch_dtype

        tensor, dtype = self.tensors[name], torch_dtype(self.dtype)
        if isinstance(tensor.origin, Copy):
            value, heads = self.converted.read(tensor.origin.name), tensor.origin.interleave
            return cast(interleave(value, heads) if heads else value, dtype, tensor.origin.scale).contiguous()
        assert isinstance(tensor.origin, Neurons)
        assert tensor.layer is not None
        return self._neurons(tensor.layer, tensor.origin.part).to(dtype).contiguous()

    def _neurons(self, layer: int, part: str) -> torch.Tensor:
        ffn, places = self._ffn(layer), torch.from_numpy(self._kept[layer])
        if part == "down":
            kept = ffn.down_HP[:, places]
            return torch.cat([kept, kept.new_zeros(len(kept), self.width - len(places))], dim=1)
        kept = (ffn.gate_PH if part == "gate" else ffn.up_PH)[places]
        return torch.cat([kept, kept.new_zeros(self.width - len(places), kept.shape[1])])


def _rows(ffn: FfnParts, places: np.ndarray) -> np.ndarray:
    """Return the bits of gate and up row of each place as one sortable value."""
    index = torch.from_numpy(places)
    rows = torch.cat([ffn.gate_PH[index], ffn.up_PH[index]], dim=1).contiguous()
    bits: np.ndarray = rows.view(torch.uint8).numpy()
    return bits.view(f"S{bits.shape[1]}").ravel()  # of equal length, so that zeros at the end do not matter


def _layout(width: int) -> MoeLayout:
    """Return a layout without experts: all neurons are shared."""
    combine = Combine("renormalised", 1.0, 1.0, any_k=True, parity_factor=1.0)
    return MoeLayout(0, 0, 0, width, width, (), combine, copies=0)
