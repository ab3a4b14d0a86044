"""Estimate the peak bytes of one device in a training step, from shapes alone, over several moments.

State: weights ``s P``, gradients ``s P_trained``, AdamW's two moments ``2 s P_trained``, all in the dtype of the
parameters unless the recipe gives moments another (ZeRO, arXiv:1910.02054, section 3.1, counts 2 + 2 + 12 with half-precision weights and a float32 copy; here
the parameters themselves are float32 and autocast copies them), each sharded over its ranks. The rest follows
`llamamoe.training.estimate.activations`, and these rules of torch 2.13 and transformers 5.23:

* Autocast keeps a bfloat16 copy of each trained matrix until the loss is computed; the graph keeps it until the layer's
  backward pass. FSDP2 gathers float32 weights in bfloat16 instead, and sums their gradients in float32.
* Without accumulation gradients appear layer by layer as activations are freed; with it they exist throughout, and a
  new gradient exists beside the one that it is added to.
* With checkpointing a layer keeps its input only, and its own activations come back during its backward pass.
* The loss head holds 2 float32 arrays of ``logits_at_once`` numbers in the forward and 3 in the backward pass; with
  ``kl`` 7, the parent's included.
* Losses on the routing and terms from the parent are computed after the model has run, before its backward pass.
  The backward pass starts with them and leaves gradients that wait for their layer, freed as activations are.
* DDP copies gradients into buckets of the same size. FSDP2 holds gathered weights of two layers (one is prefetched)
  and of the output head, and for one layer the whole gradient and the copy that is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..gates import GATES
from ..losses import made
from ..recipe import PretrainRecipe
from .activations import (
    Pass,
    Widths,
    adapter_bytes,
    attention_bytes,
    experts_bytes,
    ffn_bytes,
    style_for,
    working_bytes,
)
from .shapes import LayerShape, ModelShape
from .sharding import Sharding, adapters, moment_bytes, trained_groups
from .terms import distillation_bytes, routing_bytes

FIXED_OVERHEAD = 2**30
"""A GPU's context, libraries and their work spaces, communication buffers: a fixed allowance."""
HEAD_COPIES, HEAD_COPIES_KL = 3, 7
"""Number of float32 arrays of a chunk's logits in memory at once."""


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer on one device.

    Attributes:
        weights: Weights at rest.
        gradients: Gradients at rest.
        copies: Copies by autocast that the graph keeps.
        cached: Copies that autocast itself keeps while the loss is computed.
        kept: Activations.
        experts: Activations of the routed experts among them.
        working: Working memory in the backward pass.
        early: Gradients that losses on the routing give before the backward pass reaches the layer.
        new: The gradient of the largest weight, with the copies from which it is computed.
        full: Weights as gathered by FSDP2; 0 without.
    """

    weights: int
    gradients: int
    copies: int
    cached: int
    kept: int
    experts: int
    working: int
    early: int
    new: int
    full: int


class StepMemory:
    """The memory of one device through a step.

    Args:
        recipe: The recipe of the run.
        shape: The model.
        sharding: The sharding over ranks.
        parent_bytes: Bytes of the parent.
        parent_width: Neurons of its FFNs; 0: unknown.
        accumulates: Whether a rank runs several micro-batches in a step.
        replicas: Ranks that gradients are averaged over by DDP; 1: none.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        shape: ModelShape,
        sharding: Sharding,
        *,
        parent_bytes: int = 0,
        parent_width: int = 0,
        accumulates: bool = False,
        replicas: int = 1,
    ) -> None:
        self.recipe, self.shape, self.sharding, self.accumulates = recipe, shape, sharding, accumulates
        self.trained = trained_groups(recipe, shape)
        gate, tokens = GATES.get(recipe.gate.name), recipe.micro_batch_size * recipe.data.block_length
        self.run = Pass(
            model=shape,
            widths=Widths.of(recipe, shape.model_type),
            tokens=tokens,
            style=style_for(recipe, shape, tokens),
            trained=self.trained | ({"experts"} if recipe.lora is not None and recipe.lora.experts else set()),
            ep_size=sharding.ep_size,
            gate_TN=gate.kept_TN,
            gate_TH=gate.kept_TH,
            mask=tokens * recipe.data.block_length if recipe.data.documents == "apart" else 0,
        )
        self._ddp = replicas > 1 and not sharding.cut
        self._parent = parent_bytes
        self._distillation = distillation_bytes(recipe, self.run, parent_width)
        self._routing = routing_bytes(recipe, self.run)
        early = any(loss.trains_experts for loss in made(recipe.losses))
        self._early = frozenset({"experts"}) if early else frozenset()
        self._layers = [self._layer(layer, first=index == 0) for index, layer in enumerate(shape.layers)]
        self._ends = {"embeddings": shape.embeddings, "head": shape.head, "norms": shape.norms}
        self._head = "embeddings" if shape.tied else "head"

    # Memory at rest

    def _held(self, numel: Mapping[str, int], *, trained: bool = False) -> int:
        """Return the bytes of these weights at rest on one device, or of their gradients."""
        groups = [group for group in numel if not trained or group in self.trained]
        return sum(numel[group] * self.run.widths.stored // self.sharding.fsdp_size for group in groups)

    def _layer(self, layer: LayerShape, *, first: bool) -> _Layer:
        run, widths = self.run, self.run.widths
        computed = {group: numel // self.sharding.computed(group) for group, numel in layer.numel.items()}
        extra = 4 * adapters(self.recipe, self.shape, layer)  # peft keeps them in float32
        uncopied = {"norms"} if widths.casts_experts else {"norms", "experts"}
        kept = ffn_bytes(layer, run) + adapter_bytes(layer, self.recipe, run)
        if not first or self.recipe.lora is not None or run.trained & {"embeddings", "attention", "norms"}:
            kept += attention_bytes(layer, run)  # else no gradient reaches this layer
        sizes = {
            group: n // self.sharding.computed(group) for group, n in layer.largest.items() if group in run.trained
        }
        new = max(sizes.values(), default=0) * widths.weights
        if run.style in ("eager", "split"):
            new *= 2  # each expert's gradient is written into zeros of all experts' size
        return _Layer(
            weights=self._held(layer.numel) + extra,
            gradients=self._held(layer.numel, trained=True) + extra,
            copies=2 * sum(n for group, n in computed.items() if group not in uncopied) if widths.casts else 0,
            cached=2 * sum(n for group, n in computed.items() if group in self.trained - {"norms", "experts"})
            if widths.casts
            else 0,
            kept=kept,
            experts=experts_bytes(layer, run),
            working=working_bytes(layer, run),
            early=self._early_bytes(layer),
            new=new + (sizes.get("experts", 0) * 2 if widths.casts_experts else 0),
            full=sum(computed.values()) * widths.weights if self.sharding.cut else 0,
        )

    def _early_bytes(self, layer: LayerShape) -> int:
        """Return the bytes of the gradients that losses on the routing give to experts or their adapters."""
        lora = self.recipe.lora
        if not self._early or lora is None:
            return self._held({group: layer.numel.get(group, 0) for group in self._early}, trained=True)
        return 4 * (adapters(self.recipe, self.shape, layer) if lora.experts else 0)

    def state(self) -> dict[str, int]:
        """Return weights, gradients and moments of one device."""
        weights = self._held(self._ends) + sum(layer.weights for layer in self._layers)
        gradients = self._held(self._ends, trained=True) + sum(layer.gradients for layer in self._layers)
        added = sum(adapters(self.recipe, self.shape, layer) for layer in self.shape.layers)
        trained = (gradients - 4 * added) // self.run.widths.stored
        return {"weights": weights, "gradients": gradients, "moments": moment_bytes(self.recipe, trained, added)}

    # Moments of a step

    def moments(self) -> dict[str, dict[str, int]]:
        """Return the memory at each moment of a step, by kind."""
        found = self._head_moments()
        for index in reversed(range(len(self._layers))):
            found[f"backward pass of layer {index}"] = self._backward(index)
        found["gradient of the embedding"] = self._embedding()
        found["optimiser step"] = self._optimiser()
        return found

    def peak(self) -> tuple[str, dict[str, int]]:
        """Return the moment of the peak, and the memory at that moment."""
        moments = self.moments()
        name = max(moments, key=lambda each: sum(moments[each].values()))
        return name, moments[name]

    def _always(self) -> dict[str, int]:
        state, block = self.state(), self.recipe.data.block_length
        return {
            "weights": state["weights"],
            "moments": state["moments"],
            "parent": self._parent,
            "gradient buckets": state["gradients"] if self._ddp else 0,
            "rotary tables": 2 * block * self.shape.head_dim * self.run.widths.weights + 8 * self.run.tokens,
            "attention mask": self.run.mask,
            "fixed overhead": FIXED_OVERHEAD if self.recipe.device != "cpu" else 0,
        }

    def _kept(self, layers: int) -> int:
        """Return the first layers' bytes: inputs if they are checkpointed, and their part of the parent's terms."""
        terms = (self._distillation.backward + self._routing.backward) * layers // len(self._layers)
        if self.recipe.gradient_checkpointing:
            return terms + layers * self.run.numbers * self.run.widths.weights
        return terms + sum(layer.kept for layer in self._layers[:layers])

    def _head_moments(self) -> dict[str, dict[str, int]]:
        """Return the moments of the head: all activations with a chunk's logits, then with the head's gradient."""
        run, widths, checkpointed = self.run, self.run.widths, self.recipe.gradient_checkpointing
        numel = self._ends[self._head] // self.sharding.computed("head")
        chunk = min(run.tokens, max(1, self.recipe.logits_at_once // self.shape.vocab_size))
        logits = 4 * chunk * self.shape.vocab_size
        gathered = numel * widths.weights if self.sharding.cut else 0
        new = (
            numel * (widths.weights + (2 if widths.casts else 0)) + self._sent(gathered)
            if self._head in self.trained
            else 0
        )
        base = self._always() | {
            "gradients": self.state()["gradients"] if self.accumulates else sum(each.early for each in self._layers),
            "activations": self._head_inputs(chunk),
            "gathered weights": gathered,
        }
        copies = (2 * numel if widths.casts else 0) + (0 if checkpointed else sum(each.copies for each in self._layers))
        cached = sum(each.cached for each in self._layers) if checkpointed else 0
        kl = self.recipe.distill is not None and self.recipe.distill.kl is not None
        arrays = HEAD_COPIES_KL if kl else HEAD_COPIES
        last = logits + (logits // 2 if widths.casts else 0)
        return self._terms_moment(base, copies + cached) | {
            "loss, forward": base | {"weight copies": copies + cached, "logits": (arrays - 1) * logits},
            "loss, backward": base | {"weight copies": copies, "logits": arrays * logits},
            "gradient of the head": base | {"weight copies": copies, "logits": last, "working space": new},
        }

    def _head_inputs(self, chunk: int) -> int:
        """Return the activations of all layers, and the head's inputs if it runs on so many tokens at a time."""
        run, widths = self.run, self.run.widths
        kept = self._kept(len(self._layers)) + run.norm(run.numbers)
        if chunk == run.tokens:
            return kept + run.inputs({self._head: 1})
        # chunks are checkpointed: all inputs, and one chunk's copy
        return kept + run.numbers * widths.weights + (2 * chunk * self.shape.hidden_size if widths.casts else 0)

    def _terms_moment(self, base: dict[str, int], copies: int) -> dict[str, dict[str, int]]:
        """Return the moment of the terms beside language modelling, if there are any."""
        terms = (self._distillation, self._routing)
        if not any(each.forward for each in terms):
            return {}
        return {
            "terms beside language modelling": base
            | {
                "activations": base["activations"] + sum(each.forward - each.backward for each in terms),
                "weight copies": copies,
                "gathered weights": 0,
                "working space": max(each.working for each in terms),
            }
        }

    def _backward(self, index: int) -> dict[str, int]:
        """Return activations of this layer and those before it, gradients of those after it, and working space."""
        layer, checkpointed = self._layers[index], self.recipe.gradient_checkpointing
        copying = self._layers[index : index + 1] if checkpointed else self._layers[: index + 1]
        done = {self._head: self._ends[self._head], "norms": self._ends["norms"]}
        gradients = self._held(done, trained=True) + sum(each.gradients for each in self._layers[index + 1 :])
        gradients += sum(each.early for each in self._layers[: index + 1])
        kept = self._kept(index + 1)
        if checkpointed:  # the layer's input is already kept, if the norm does not copy it to float32
            kept += layer.kept - (4 * self.run.numbers if self.run.widths.weights == 4 else 0)
        new = layer.new + layer.experts // 2  # with half of the experts' own activations
        if not self.accumulates and not layer.early:
            new += layer.new // 2 - layer.experts  # both weights' gradients, in place of activations
        return self._always() | {
            "gradients": self.state()["gradients"] if self.accumulates else gradients,
            "activations": kept,
            "weight copies": sum(each.copies for each in copying),
            "gathered weights": layer.full + (self._layers[index - 1].full if index else 0),
            "working space": max(layer.working, new) + layer.full + self._sent(layer.full),
        }

    def _sent(self, gathered: int) -> int:
        """Return the bytes that FSDP2 sends of the gradient of gathered weights, summed in the stored dtype."""
        return gathered * self.run.widths.stored // self.run.widths.weights

    def _embedding(self) -> dict[str, int]:
        """Return the end of the backward pass: all gradients, and that of the embedding before it is added or sent."""
        run, cut = self.run, self.sharding.cut
        full = self.shape.embeddings * run.widths.weights if "embeddings" in self.trained else 0
        new = full + self._sent(full) if cut else full if self.accumulates or self.shape.tied else 0
        return self._always() | {
            "gradients": self.state()["gradients"],
            "gathered weights": full if cut else 0,
            "working space": new + run.numbers * run.widths.weights,
        }

    def _optimiser(self) -> dict[str, int]:
        """Return all gradients, and what AdamW computes in float32 for one weight at a time if it rounds anything.

        These are two moments, the rounding's random bits, and of weights in bfloat16 weight and gradient; else fused
        AdamW works in place.
        """
        sizes = [size for layer in self.shape.layers for group, size in layer.largest.items() if group in self.trained]
        sizes += [size for group, size in self._ends.items() if group in self.trained]
        each = (20 if self.recipe.precision.parameters == "bfloat16" else 12) if self.recipe.compacts else 0
        return self._always() | {
            "gradients": self.state()["gradients"],
            "working space": each * max(sizes, default=0) // self.sharding.fsdp_size,
        }
