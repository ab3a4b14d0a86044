"""Recipes of ``llamamoe pretrain``: model, data, objective, optimiser and devices."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..recipes import Choice, Recipe, Tokens, choose
from .balancing import BalancingOptions
from .changes import deciding
from .distillation_options import DistillOptions
from .gates import GATES
from .losses import LOSSES
from .recipe_parts import (
    GROUPS,
    DataRecipe,
    DistributedRecipe,
    LoraRecipe,
    LrScheduleRecipe,
    OptimizerRecipe,
    PrecisionRecipe,
    RouterRecipe,
    TeacherRecipe,
)
from .trainer_keys import check_trainer_keys


class PretrainRecipe(Recipe):
    """Everything that decides a run of ``llamamoe pretrain``."""

    model: str = Field(min_length=1, description="The converted checkpoint: a folder or hub id.")
    parent: str | None = Field(
        None, min_length=1, description="The dense model that it was made from: a folder, .gguf file or hub id."
    )
    data: DataRecipe = Field(description="What is trained on.")
    steps: int | None = Field(None, ge=1, le=10**9, description="Optimiser steps; or give tokens.")
    tokens: Annotated[Tokens, Field(gt=0, le=1e16)] | None = Field(
        None, description="Tokens to train on; or give steps."
    )
    batch_size: int = Field(512, ge=1, description="Sequences of a step, over all ranks and micro-batches.")
    micro_batch_size: int = Field(1, ge=1, description="Sequences that one rank runs at a time.")
    optimizer: OptimizerRecipe = Field(default_factory=OptimizerRecipe, description="The optimiser.")
    lr_schedule: LrScheduleRecipe = Field(default_factory=LrScheduleRecipe, description="The learning rate.")
    router: RouterRecipe = Field(default_factory=RouterRecipe, description="How routers begin.")
    gate: Annotated[Choice, choose(GATES)] = Field(
        Choice(name="top_k"), validate_default=True, description="How tokens are routed while training."
    )
    losses: tuple[Annotated[Choice, choose(LOSSES)], ...] = Field((), description="Losses on the routing.")
    balancing: BalancingOptions | None = Field(None, description="Balancing without a loss.")
    distill: DistillOptions | None = Field(None, description="Terms from the parent; null: language modelling only.")
    teacher: TeacherRecipe | None = Field(
        None,
        description="Train the parent on the text before it teaches, in the folder teacher/ of the run; null: it teaches as it is.",
    )
    freeze: tuple[Literal[GROUPS], ...] = Field((), description="Groups of parameters that stay as they are.")  # type: ignore[valid-type]
    lora: LoraRecipe | None = Field(None, description="Train adapters in the place of weights.")
    precision: PrecisionRecipe = Field(default_factory=PrecisionRecipe, description="Dtypes.")
    gradient_checkpointing: bool = Field(False, description="Recompute layers in the backward pass to save memory.")
    logits_at_once: int = Field(2**26, ge=1, description="Most float32 logits in memory at a time.")
    experts_implementation: str | None = Field(
        None,
        description="grouped_mm, batched_mm, eager, or one of llamamoe's; null: llamamoe_auto on a CPU, on a GPU grouped products "
        "in the dtype of precision.compute.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(
            None,
            description="How the model computes attention; null: transformers' choice. --dry-run does not count eager's scores.",
        )
    )
    distributed: DistributedRecipe = Field(default_factory=DistributedRecipe, description="Sharding.")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu", "npu"] = Field(
        "auto", description="auto: a CUDA GPU if there is one, else the CPU."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Of everything random.")
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    evaluate_every: int | None = Field(None, ge=1, description="Steps between validations; null: only at the ends.")
    save_every: int | None = Field(None, ge=1, description="Steps between checkpoints; null: only at the end.")
    keep: int | None = Field(
        2,
        ge=1,
        description="Newest checkpoints that are kept, beside the one with the best held-out loss measured; null: all.",
    )
    save_in_background: bool = Field(
        False,
        description="Train on while a checkpoint is written; each process first copies its part to main memory. An error is "
        "reported at the next checkpoint, or at the end.",
    )
    allow_dense: bool = Field(
        False, description="Train a dense model by the same recipe, as a control: what is said of routers is left out."
    )
    stop_on_collapse: bool = Field(False, description="Stop, not only warn, when a router uses few of its experts.")
    trainer: Annotated[dict[str, Any], BeforeValidator(check_trainer_keys)] = Field(
        default_factory=dict, description="Keys of transformers' TrainingArguments, such as report_to or deepspeed."
    )

    @model_validator(mode="after")
    def _consistent(self) -> PretrainRecipe:
        wrong = list(self._contradictions())
        if wrong:
            raise PydanticCustomError("choice", "; ".join(wrong))
        return self

    def _contradictions(self) -> Any:
        if self.steps is None and self.tokens is None:
            yield "the length of the run is missing: give steps or tokens"
        elif self.steps is not None and self.tokens is not None:
            yield f"steps = {self.steps} and tokens = {self.tokens:,.0f} are both given: set one of them to null (--set tokens=null)"
        if self.batch_size % self.micro_batch_size:
            yield f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
        if self.distill is not None and self.distill.needs_parent and self.parent is None:
            yield "distill needs parent: the dense model that the experts were made from"
        yield from self._teacher_contradictions()
        yield from self._mixture_contradictions()
        if self.save_in_background and self.trainer.get("deepspeed") is not None:
            yield "save_in_background cannot be combined with trainer.deepspeed, which writes its own files"
        yield from self._sharding_contradictions()
        if self.data.documents == "apart" and self.attn_implementation not in (None, "sdpa", "eager"):
            yield (
                f"data.documents = apart is checked with sdpa and eager attention only, not with {self.attn_implementation}: leave "
                "attn_implementation to transformers (null)"
            )
        yield from self._lora_contradictions()
        yield from self._precision_contradictions()
        yield from self._loss_contradictions()

    def _mixture_contradictions(self) -> Any:
        if self.data.update.name != "static" and self.data.reference_losses is None:
            yield f"data.update = {self.data.update.name} needs data.reference_losses ('parent', or a loss for each domain)"
        if self.data.reference_losses == "parent" and self.parent is None:
            yield "data.reference_losses = parent needs parent: the dense model that is measured"
        if self.data.update.name != "static" and self.evaluate_every is None:
            yield f"data.update = {self.data.update.name} needs evaluate_every: it follows those losses"

    def _sharding_contradictions(self) -> Any:
        if self.distributed.fsdp_size % self.distributed.ep_size:
            yield f"distributed.ep_size = {self.distributed.ep_size} does not divide fsdp_size = {self.distributed.fsdp_size}"
        if self.distributed.dp_replicate_size > 1 and not self.distributed.sharded:
            yield "distributed.dp_replicate_size copies what is sharded: set fsdp_size; without it every process has a copy (DDP)"
        if self.router.float32 and (
            self.precision.parameters == "bfloat16" or (self.autocasts and self.distributed.sharded)
        ):
            yield "router.float32 needs float32 weights, which neither precision.parameters = bfloat16 nor FSDP2 in bfloat16 has"

    def _loss_contradictions(self) -> Any:
        for name in (each.name for each in self.losses if LOSSES.get(each.name).needs_targets):
            if self.parent is None:
                yield f"the loss {name} needs parent: it compares experts with the dense model's FFNs"
            if self.distributed.sharded:
                yield f"the loss {name} cannot be combined with distributed: it needs all experts on every rank"
        if self.balancing is not None and not GATES.get(self.gate.name).allows_bias:
            yield f"gate = {self.gate.name} selects by noisy logits alone: balancing, which moves biases, has no effect on it"
        if len(set(self.freeze)) == len(GROUPS):
            yield "freeze names every group: nothing is left to train"
        if self.losses and "router" in self.freeze:
            yield "losses on the routing have no effect while freeze names router"
        if any(each.options.get("experts") for each in self.losses if LOSSES.get(each.name).needs_targets):
            frozen = "freeze names experts" if "experts" in self.freeze else None
            if frozen or (self.lora is not None and not self.lora.experts):
                yield f"a loss with experts=true trains none while {frozen or 'lora.experts=false'}: set experts=false"

    def _teacher_contradictions(self) -> Any:
        if self.teacher is None:
            return
        if self.parent is None:
            yield "teacher needs parent: the dense model that is trained first"
        elif self.distill is None or not self.distill.needs_parent:
            yield "teacher trains the parent so that it can teach, but distill has no term from it: add distill.kl"
        if self.lora is not None:
            yield (
                "teacher trains all weights of the parent, which lora is there to avoid: train the parent by a run of its own, "
                "with allow_dense, and name its model as parent"
            )

    def _lora_contradictions(self) -> Any:
        if self.lora is None:
            return
        if self.distributed.sharded and self.lora.train_router:
            yield (
                "lora.train_router trains sharded routers, which a checkpoint of adapters does not hold: set "
                "lora.train_router=false, or run data-parallel (no distributed)"
            )
        if self.distributed.sharded and self.balancing is not None:
            yield "balancing moves biases, which a checkpoint of adapters does not hold under sharding: leave one of them out"
        if self.distributed.ep_size > 1:
            yield "lora adds adapters to all experts on every rank: set distributed.ep_size=1"
        if self.lora.dropout and self.lora.experts:
            yield "lora.dropout does not reach adapters of experts: set it to 0, or lora.experts=false"
        if "attention" in self.freeze and self.lora.attention:
            yield "freeze names attention, which lora would train: set lora.attention=[]"
        if "experts" in self.freeze and self.lora.experts:
            yield "freeze names experts, which lora would train: set lora.experts=false"

    def _precision_contradictions(self) -> Any:
        precision = self.precision
        if precision.rounding == "stochastic" and precision.parameters == "float32":
            yield "precision.rounding = stochastic is for weights in bfloat16, but precision.parameters = float32"
        if self.compacts and self.trainer.get("deepspeed"):
            yield "precision.moments and precision.rounding are not available with DeepSpeed, which has moments of its own"

    @property
    def compacts(self) -> bool:
        """True if the optimiser rounds moments or weights."""
        precision = self.precision
        moments = precision.moments is not None and (self.lora is not None or precision.moments != precision.parameters)
        return moments or precision.rounding == "stochastic"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.data.block_length

    @property
    def autocasts(self) -> bool:
        """True if autocast uses float32 weights in bfloat16."""
        return self.precision.parameters == "float32" and self.precision.compute == "bfloat16"

    def gathers_bfloat16(self, model_type: str) -> bool:
        """Return whether FSDP2 gathers float32 weights in bfloat16, so that autocast has nothing left to cast.

        Not those of ernie4_5_moe: it routes in float32, and its selection biases are parameters that would be rounded.
        """
        return self.autocasts and self.distributed.fsdp_size > 1 and model_type != "ernie4_5_moe"

    def experts_on(self, device: str) -> str | None:
        """Return the experts implementation, chosen if the recipe leaves it open; None: transformers' default.

        Args:
            device: ``cpu``, ``cuda``, ...; ``auto``, which is not resolved yet, counts as a GPU.
        """
        if self.experts_implementation is not None or self.distributed.sharded:
            return self.experts_implementation
        if device == "cpu":
            return "llamamoe_auto"
        return "llamamoe_grouped_mm" if self.autocasts and device in ("cuda", "auto") else None

    @property
    def compares_experts(self) -> bool:
        """True if a loss on the routing compares experts with the parent's FFNs."""
        return any(LOSSES.get(each.name).needs_targets for each in self.losses)

    @property
    def keeps_parent(self) -> bool:
        """True if every step needs the parent."""
        return self.compares_experts or (self.distill is not None and self.distill.needs_parent)

    @property
    def runs_parent(self) -> bool:
        """True if every step runs the whole parent, not only its FFNs."""
        return self.distill is not None and self.distill.needs_forward

    @property
    def skipped_steps(self) -> int:
        """Steps of the text that are passed over at the start."""
        return math.ceil(self.data.skip_tokens / self.tokens_per_step)

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return max(1, math.ceil(self.tokens / self.tokens_per_step))

    def deciding(self) -> dict[str, Any]:
        """Return the keys that decide the weights, see `changes.deciding`."""
        return deciding(self)


load_pretrain_recipe = PretrainRecipe.load
