"""Recipes of ``llamamoe pretrain``: model, data, objective, optimiser and devices."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ..recipes import Choice, Count, Recipe, choose, count_of
from .balancing import BalancingOptions
from .changes import deciding
from .distillation_options import DistillOptions
from .gates import GATES
from .losses import LOSSES
from .mixtures.updates import MIXTURES
from .trainer_keys import check_trainer_keys

GROUPS = ("router", "experts", "shared", "dense_ffn", "attention", "norms", "embeddings", "head")
"""Groups of parameters that can be frozen; `llamamoe.training.parameters` defines their content."""
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    """A part of the recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Part):
    """The training and held-out data."""

    train: str = Field(min_length=1, description="Folder that `llamamoe tokenize` wrote.")
    validation: str | None = Field(
        None,
        min_length=1,
        description="Another such folder, of held-out text; null: what train holds out, if anything.",
    )
    verify: bool = Field(True, description="Compare the tokens with their hashes before a run begins.")
    skip_tokens: Annotated[float, BeforeValidator(count_of)] = Field(
        0,
        ge=0,
        le=1e16,
        description="Tokens that the model has seen of this text, by the same seed, batch, blocks and mixture: the run begins "
        "with those after them (rounded up to a whole step).",
    )
    block_length: Annotated[int, Count] = Field(2048, ge=2, le=2**20, description="Tokens of one sequence.")
    mixture: str | dict[str, Rate] = Field(
        "proportional", description="Share of each domain: llama, sheared_llama, uniform, proportional, or a mapping."
    )
    update: Annotated[Choice, choose(MIXTURES)] = Field(
        Choice(name="static"), validate_default=True, description="How the mixture changes after every validation."
    )
    reference_losses: Literal["parent"] | dict[str, Rate] | None = Field(
        None, description="Loss of each domain that dynamic mixtures aim at: measured on the parent, or given."
    )
    documents: Literal["joined", "apart"] = Field(
        "joined",
        description="apart: in each document of a block positions begin again, and its tokens attend to no other document.",
    )
    validation_blocks: int | None = Field(16, ge=1, description="Blocks of each domain to measure on; null takes all.")


class OptimizerRecipe(_Part):
    """AdamW, with separate learning rates for routers and experts."""

    lr: float = Field(2e-4, gt=0, lt=10, description="Largest learning rate.")
    router_lr: float | None = Field(None, ge=0, lt=10, description="That of the routers; null: lr.")
    experts_lr: float | None = Field(None, ge=0, lt=10, description="That of routed and shared experts; null: lr.")
    down_lr_factor: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="The rate of routed down projections over that of experts; null: the factor that the conversion "
        "multiplied them by, since Adam's steps do not grow with the weights.",
    )
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="Adam's decay rates.")
    eps: float = Field(1e-8, gt=0, lt=1, description="Adam's epsilon.")
    weight_decay: float = Field(0.1, ge=0, lt=10, description="On matrices; norms, biases and routers have none.")
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False, description="Gradients are clipped to it; 0: never.")
    gate_clipping: Literal["together", "apart"] = Field(
        "together",
        description="The gradients of a gate's own parameters (noisy_top_k) are clipped by one norm with the model's, or by their own.",
    )


class LrScheduleRecipe(_Part):
    """The schedule of the learning rate."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="wsd: constant, then a linear fall over the last decay_share."
    )
    warmup: Annotated[int, Field(ge=0)] | Share = Field(0.03, description="Steps of linear rise, or their share.")
    min_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate over the largest.")
    decay_share: float = Field(0.2, gt=0, le=1, description="Share of the steps in which wsd falls.")


class RouterRecipe(_Part):
    """The start of the routers."""

    start_std: float | None = Field(
        0.1,
        gt=0,
        le=10,
        description="A hard router's rows are scaled until its logits spread by this; small: little changes at once. null: left.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps at the start in which only routers are trained.")
    float32: bool = Field(
        False, description="Logits in float32 while training, where autocast would round them to bfloat16."
    )


class LoraRecipe(_Part):
    """Low-rank adapters by peft; merged into the weights of the final model."""

    rank: int = Field(8, ge=1, le=4096, description="r.")
    alpha: float = Field(32.0, gt=0, description="The adapters' output is multiplied by alpha / rank.")
    dropout: Share = Field(0.0, description="On the inputs of attention's adapters; those of experts can have none.")
    attention: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), description="Modules of attention that get adapters."
    )
    experts: bool = Field(True, description="Adapters for the routed experts too.")
    train_router: bool = Field(True, description="Routers are trained in full.")


class TeacherRecipe(_Part):
    """Teacher correction: the parent is first trained on the same text, so that it can teach it (arXiv:2408.11796)."""

    tokens: float = Field(
        gt=0, le=1e16, description="Tokens that the parent is trained on, from the run's first batch on."
    )
    lr: float | None = Field(None, gt=0, lt=10, description="Its largest learning rate; null: optimizer.lr.")


class PrecisionRecipe(_Part):
    """The dtypes of storage and products."""

    parameters: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Dtype of weights and optimiser states; bfloat16 for weights that stay as they are (lora without "
        "lora.train_router), or with rounding = stochastic.",
    )
    moments: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of AdamW's moments, rounded stochastically; null: that of the parameters."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="Of weights in bfloat16 after a step; stochastic keeps small steps on average."
    )
    compute: Literal["float32", "bfloat16"] = Field("bfloat16", description="Dtype of large products (autocast).")
    parent: Literal["float32", "bfloat16"] = Field("bfloat16", description="Dtype of the parent's weights.")
    save: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of the model written at the end; null: the source's."
    )


class DistributedRecipe(_Part):
    """Sharding by transformers' own DistributedConfig; without it several processes run data-parallel (DDP).

    With ``precision: {parameters: float32, compute: bfloat16}`` FSDP2 gathers weights in bfloat16 and sums gradients in
    float32. Tensor parallelism is not offered: one token's losses and routers would be on several ranks.
    """

    fsdp_size: int = Field(1, ge=1, description="Ranks that parameters are sharded over (FSDP2).")
    dp_replicate_size: int = Field(
        1, ge=1, description="Copies of what is sharded (HSDP): nodes, if fsdp_size is a node's GPUs."
    )
    ep_size: int = Field(1, ge=1, description="Ranks that experts are spread over, among those of fsdp_size.")

    @property
    def sharded(self) -> bool:
        """True if transformers shards the model at loading."""
        return self.fsdp_size > 1

    @property
    def world_size(self) -> int:
        """Number of processes that a sharded run needs."""
        return self.fsdp_size * self.dp_replicate_size


class PretrainRecipe(Recipe):
    """Everything that decides a run of ``llamamoe pretrain``."""

    model: str = Field(min_length=1, description="The converted checkpoint: a folder or hub id.")
    parent: str | None = Field(
        None, min_length=1, description="The dense model that it was made from: a folder, .gguf file or hub id."
    )
    data: DataRecipe = Field(description="What is trained on.")
    steps: int | None = Field(None, ge=1, le=10**9, description="Optimiser steps; or give tokens.")
    tokens: Annotated[float, Field(gt=0, le=1e16), BeforeValidator(count_of)] | None = Field(
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
        if (self.steps is None) == (self.tokens is None):
            yield "give either steps or tokens"
        if self.batch_size % self.micro_batch_size:
            yield f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
        if self.distill is not None and self.distill.needs_parent and self.parent is None:
            yield "distill needs parent: the dense model that the experts were made from"
        yield from self._teacher_contradictions()
        if self.data.update.name != "static" and self.data.reference_losses is None:
            yield f"data.update = {self.data.update.name} needs data.reference_losses ('parent', or a loss for each domain)"
        if self.data.reference_losses == "parent" and self.parent is None:
            yield "data.reference_losses = parent needs parent: the dense model that is measured"
        if self.data.update.name != "static" and self.evaluate_every is None:
            yield f"data.update = {self.data.update.name} needs evaluate_every: it follows those losses"
        if self.save_in_background and self.trainer.get("deepspeed") is not None:
            yield "save_in_background cannot be combined with trainer.deepspeed, which writes its own files"
        if self.distributed.fsdp_size % self.distributed.ep_size:
            yield f"distributed.ep_size = {self.distributed.ep_size} does not divide fsdp_size = {self.distributed.fsdp_size}"
        if self.distributed.dp_replicate_size > 1 and not self.distributed.sharded:
            yield "distributed.dp_replicate_size copies what is sharded: set fsdp_size; without it every process has a copy (DDP)"
        if self.router.float32 and (
            self.precision.parameters == "bfloat16" or (self.autocasts and self.distributed.sharded)
        ):
            yield "router.float32 needs float32 weights, which neither precision.parameters = bfloat16 nor FSDP2 in bfloat16 has"
        if self.data.documents == "apart" and self.attn_implementation not in (None, "sdpa", "eager"):
            yield (
                f"data.documents = apart is checked with sdpa and eager attention only, not with {self.attn_implementation}: leave "
                "attn_implementation to transformers (null)"
            )
        yield from self._lora_contradictions()
        yield from self._precision_contradictions()
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
