"""Parts of the recipe of ``llamamoe pretrain``: text, optimiser, routers, adapters, dtypes and devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..recipes import Choice, Count, Tokens, choose
from .mixtures.updates import MIXTURES

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
    skip_tokens: Tokens = Field(
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

    tokens: Tokens = Field(
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
