"""Memory, time and disk on paper: numbers worked out by hand, what autograd really keeps, and which way things go."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llamamoe.checkpoint.base import TensorInfo
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.errors import CheckpointError
from llamamoe.models.experts import register_experts
from llamamoe.training.estimate.estimate import Estimate, estimate
from llamamoe.training.estimate.hardware import Hardware
from llamamoe.training.estimate.memory import FIXED_OVERHEAD, StepMemory
from llamamoe.training.estimate.shapes import read_shape
from llamamoe.training.estimate.sharding import Sharding
from llamamoe.training.loss_head import LossHead, next_token_labels
from llamamoe.training.recipe import PretrainRecipe

FLOAT32 = {"precision": {"compute": "float32"}}


def recipe(**keys: Any) -> PretrainRecipe:
    """One sequence of 16 tokens a step, 3 steps, on a CPU."""
    base: dict[str, Any] = {
        "model": "m", "data": {"train": "t", "block_length": 16}, "steps": 3, "batch_size": 1, "device": "cpu",
        "experts_implementation": "grouped_mm",
    }  # fmt: skip
    return PretrainRecipe.model_validate(base | keys)


class Headers(dict[str, TensorInfo]):
    """Headers by name."""

    def add(self, name: str, *shape: int) -> None:
        """A tensor in bfloat16."""
        self[name] = TensorInfo("BF16", shape, Path("model.safetensors"))

    def attention(self, layer: int, hidden: int, keys: int, *, bias: bool = False) -> None:
        """Norms and projections."""
        block = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add(f"{block}{name}.weight", hidden)
        for name, rows in (("q", hidden), ("k", keys), ("v", keys)):
            self.add(f"{block}self_attn.{name}_proj.weight", rows, hidden)
            if bias:
                self.add(f"{block}self_attn.{name}_proj.bias", rows)
        self.add(f"{block}self_attn.o_proj.weight", hidden, hidden)

    def ffn(
        self, prefix: str, hidden: int, width: int, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    ) -> None:
        """Gate, up and down."""
        gate, up, down = names
        self.add(f"{prefix}{gate}.weight", width, hidden)
        self.add(f"{prefix}{up}.weight", width, hidden)
        self.add(f"{prefix}{down}.weight", hidden, width)

    def ends(self, hidden: int, vocab: int) -> None:
        """Embedding, last norm, head."""
        self.add("model.embed_tokens.weight", vocab, hidden)
        self.add("model.norm.weight", hidden)
        self.add("lm_head.weight", vocab, hidden)


def mixtral(hidden: int = 8, width: int = 4, layers: int = 2, vocab: int = 16) -> tuple[dict[str, Any], Headers]:
    """4 experts of which 2; two heads, one for keys."""
    found = Headers()
    found.ends(hidden, vocab)
    for layer in range(layers):
        found.attention(layer, hidden, hidden // 2)
        block = f"model.layers.{layer}.block_sparse_moe."
        found.add(block + "gate.weight", 4, hidden)
        for i in range(4):
            found.ffn(f"{block}experts.{i}.", hidden, width, ("w1", "w3", "w2"))
    config = {
        "model_type": "mixtral", "hidden_size": hidden, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": vocab, "num_hidden_layers": layers, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    return config, found


def qwen2_moe() -> tuple[dict[str, Any], Headers]:
    """Layer 0 dense with 12 neurons; layer 1 with 4 experts of 4 neurons, and 4 shared behind a gate."""
    found = Headers()
    found.ends(8, 16)
    for layer in range(2):
        found.attention(layer, 8, 4, bias=True)
    found.ffn("model.layers.0.mlp.", 8, 12)
    found.add("model.layers.1.mlp.gate.weight", 4, 8)
    found.add("model.layers.1.mlp.shared_expert_gate.weight", 1, 8)
    found.ffn("model.layers.1.mlp.shared_expert.", 8, 4)
    for i in range(4):
        found.ffn(f"model.layers.1.mlp.experts.{i}.", 8, 4)
    config, _ = mixtral()
    return {**config, "model_type": "qwen2_moe", "num_experts": 4}, found


def llama(hidden: int = 8, width: int = 16, layers: int = 2, vocab: int = 16) -> tuple[dict[str, Any], Headers]:
    """The dense parent of `mixtral`."""
    found = Headers()
    found.ends(hidden, vocab)
    for layer in range(layers):
        found.attention(layer, hidden, hidden // 2)
        found.ffn(f"model.layers.{layer}.mlp.", hidden, width)
    config, _ = mixtral(hidden, layers=layers, vocab=vocab)
    return {**config, "model_type": "llama"}, found


def on_paper(what: PretrainRecipe, model: tuple[dict[str, Any], Headers] | None = None, **keys: Any) -> Estimate:
    """Of `mixtral` on one device, unless told otherwise."""
    config, headers = model or mixtral()
    parent = {key: keys.pop(key) for key in ("parent_tensors", "parent_config") if key in keys}
    return estimate(what, config, headers, Hardware(**{"world_size": 1, **keys}), **parent)


def moments(what: PretrainRecipe, model: tuple[dict[str, Any], Headers], sharding: Sharding | None = None) -> Any:
    """All moments of a step."""
    shape = read_shape(*model)
    return StepMemory(what, shape, sharding or Sharding()).moments()


# ---- by hand ------------------------------------------------------------------------------------------------------


def test_parameters_of_mixtral() -> None:
    layer = 2 * 8 + (64 + 32 + 32 + 64) + 4 * 8 + 4 * 3 * 4 * 8
    total = 2 * 16 * 8 + 8 + 2 * layer
    found = on_paper(recipe(**FLOAT32))
    assert found.parameters == {
        "total": total, "active": total - 16 * 8 - 2 * 384 // 2, "trained": total, "adapters": 0,
    }  # fmt: skip
    assert found.state == {"weights": 4 * total, "gradients": 4 * total, "moments": 8 * total}


def test_peak_of_mixtral_in_float32() -> None:
    """16 tokens, H 8, Q 8, K 4, N 4, k 2, W 4: every array that a layer keeps, one by one."""
    tokens, norm = 16, 16 * 8 * (4 + 4) + 16 * 4
    attention = norm + tokens * 8 * 4 + tokens * 4 * (8 + 4 + 4 + 8) + tokens * 2 * 4
    router = tokens * (2 * 4 * 4 + 40 * 2)
    experts = tokens * 2 * 4 * (8 + 2 * 4 + 4 + 4 + 8)
    layer = attention + norm + tokens * 8 * 4 + router + experts
    found = on_paper(recipe(**FLOAT32))
    assert found.moment == "loss, backward"
    assert found.parts == {
        "weights": 4 * 1512,
        "moments": 8 * 1512,
        "rotary tables": 2 * 16 * 4 * 4 + 16 * 8,
        "activations": 2 * layer + norm + tokens * 8 * 4,
        "logits": 3 * 16 * 16 * 4,
    }
    assert found.peak == sum(found.parts.values()) == found.lines[-1][1]


def test_moments_of_qwen2_moe_in_bfloat16_with_checkpoints() -> None:
    found = moments(recipe(gradient_checkpointing=True), qwen2_moe())
    norm, numbers = 16 * 8 * 8 + 64, 16 * 8
    attention = norm + 3 * 2 * numbers + 16 * 2 * (8 + 4 + 4 + 8) + 16 * 2 * 4
    dense = norm + 2 * 2 * numbers + 4 * 16 * 12 * 2
    copied_inputs = 4 * 2 * numbers  # of the router, the shared expert's gate and up, and its own gate
    shared = 4 * 16 * 4 * 2 + numbers * 2
    routed = 16 * (8 * 4 + 40 * 2) + 32 * 4 * (2 * 8 + 4 * 4)  # experts run in float32 all the same
    attention_copies = 2 * (192 + 16)
    copies = [attention_copies + 2 * 3 * 8 * 12, attention_copies + 2 * (4 * 8 + 8 + 3 * 8 * 4)]
    loss = found["loss, forward"]
    assert loss["weight copies"] == 2 * 16 * 8 + sum(copies)
    assert loss["logits"] == 2 * 16 * 16 * 4
    assert loss["activations"] == 2 * numbers * 4 + norm + 2 * numbers
    last, first = found["backward pass of layer 1"], found["backward pass of layer 0"]
    assert last["activations"] == numbers * 4 + attention + norm + copied_inputs + shared + routed
    assert first["activations"] == attention + dense  # its input is among them
    assert (first["weight copies"], last["weight copies"]) == (copies[0], copies[1])
    assert last["gradients"] == 4 * (128 + 8)
    assert first["gradients"] == 4 * (128 + 8 + 16 + 208 + 40 + 96 + 384)


def test_operations_time_and_disk() -> None:
    keys = {"gradient_checkpointing": True, "logits_at_once": 64, "save_every": 1, "keep": 2, "steps": 5}
    distill = {"parent": "p", "distill": {"kl": {}, "ffn": {}}}
    config, headers = llama()
    found = on_paper(
        recipe(**FLOAT32, **keys, **distill), parent_config=config, parent_tensors=headers,
        world_size=1, peak_flops=1e6, utilisation=0.5,
    )  # fmt: skip
    dense = sum(info.numel for info in headers.values()) - 128
    assert found.operations == {
        "student": 6.0 * 1000 + 6 * 2 * 8 * 16,
        "parent": 2.0 * dense + 2 * 2 * 8 * 16 + 2.0 * (2 * 3 * 8 * 16),
        "competition": 0.0,
        "recomputation": 2.0 * (1000 - 128) + 2 * 2 * 8 * 16,
        "head again": 2.0 * 128,
    }
    assert found.seconds_per_step == pytest.approx(16 * found.flops_per_token / 5e5)
    assert found.seconds == pytest.approx(5 * 16 * found.flops_per_token / 5e5)
    assert found.disk == {
        "checkpoint": 12 * 1512, "checkpoints": 3 * 12 * 1512, "model": 2 * 1512, "total": 36 * 1512 + 2 * 1512,
    }  # fmt: skip
    assert (found.tokens_per_step, found.steps, found.tokens) == (16, 5, 80)


def test_saves_and_resumes() -> None:
    """HSDP stores what one copy holds; every copy reads it, after the first process has verified it."""
    one = on_paper(recipe(**FLOAT32), world_size=1).saving
    keys = {"distributed": {"fsdp_size": 2, "dp_replicate_size": 2}, "batch_size": 4}
    four = on_paper(recipe(**FLOAT32, **keys), world_size=4, disk_rate=2e9).saving
    assert one["save_bytes"] == four["save_bytes"] == 12 * 1512
    assert (one["save_bytes_of_a_rank"], four["save_bytes_of_a_rank"]) == (12 * 1512, 12 * 1512 / 4)
    assert one["copied_bytes_of_a_rank"] == 0
    beside = on_paper(recipe(**FLOAT32, **keys, save_in_background=True), world_size=4).saving
    assert beside["copied_bytes_of_a_rank"] == 12 * 1512 / 4
    assert (one["save_seconds"], four["save_seconds"]) == (12 * 1512 / 1e9, 12 * 1512 / 2e9)
    assert (one["resume_bytes"], four["resume_bytes"]) == (2 * 12 * 1512, 3 * 12 * 1512)
    assert four["resume_seconds"] == 3 * 12 * 1512 / 2e9


# ---- what is frozen, added, shared --------------------------------------------------------------------------------


def test_frozen_groups_have_no_gradient_and_fewer_operations() -> None:
    everything = on_paper(recipe(**FLOAT32))
    found = on_paper(recipe(**FLOAT32, freeze=["experts", "embeddings"]))
    assert found.state["weights"] == everything.state["weights"]
    assert found.state["gradients"] == 4 * (1512 - 768 - 128)
    assert found.operations["student"] == everything.operations["student"] - 2 * 768 / 2
    kept = [each.parts["activations"] for each in (everything, found)]
    assert kept[0] - kept[1] == 2 * 32 * (8 + 4) * 4  # gathered inputs and products of the experts


def test_lora_trains_adapters_and_routers() -> None:
    found = on_paper(recipe(**FLOAT32, lora={"rank": 2, "attention": ["q_proj", "k_proj"]}))
    adapters = 2 * (2 * (8 + 8) + 2 * (8 + 4) + 4 * 2 * 3 * (8 + 4))
    assert found.parameters["adapters"] == adapters
    assert found.parameters["trained"] == adapters + 2 * 32
    assert found.state == {
        "weights": 4 * (1512 + adapters),
        "gradients": 4 * (adapters + 64),
        "moments": 8 * (adapters + 64),
    }
    merged = 2 * 384 * 4
    without = on_paper(recipe(**FLOAT32, lora={"rank": 2, "attention": ["q_proj", "k_proj"], "experts": False}))
    experts = 2 * 32 * (8 + 4) * 4
    assert found.parts["activations"] - without.parts["activations"] == merged + experts
    assert found.disk["checkpoint"] == 4 * adapters + 8 * (adapters + 64)


@pytest.mark.parametrize(
    ("keys", "shared", "forward"),
    [
        ({"distill": {"kl": {}}}, (), True),
        ({"distill": {"ffn": {}}}, (), False),
        ({"losses": ["competitive"]}, (), False),
        ({"distill": {"kl": {}}, "freeze": ["embeddings", "head"], "precision": {"parameters": "bfloat16"}}, ("embed", "lm_head"), True),
        ({"distill": {"kl": {}}, "freeze": ["embeddings", "head"]}, (), True),
    ],
)  # fmt: skip
def test_parent_holds_what_it_cannot_share(keys: dict[str, Any], shared: tuple[str, ...], forward: bool) -> None:
    config, headers = llama()
    found = on_paper(recipe(parent="p", **keys), parent_config=config, parent_tensors=headers)
    held = [
        info.numel
        for name, info in headers.items()
        if (forward or ".mlp." in name) and not any(part in name for part in shared)
    ]
    assert found.parts["parent"] == 2 * sum(held)


def test_competition_runs_all_experts_and_the_parent_s_ffn() -> None:
    config, headers = llama()
    for learn, passes in ((False, 1), (True, 2 + 4 / 3)):
        losses = [{"name": "competitive", "experts": learn}]
        found = on_paper(recipe(parent="p", losses=losses), parent_config=config, parent_tensors=headers)
        # its routed experts as selected, twice; the parent's FFN; all experts
        assert found.operations["competition"] == pytest.approx(2 * (2 * 768 / 2 + 2 * 3 * 8 * 16 + 768 * passes))


def test_parent_without_headers_is_said() -> None:
    found = on_paper(recipe(parent="p", distill={"kl": {}}))
    assert any("parent is not counted" in line for line in found.warnings)


def test_tied_head_is_counted_once() -> None:
    config, headers = mixtral()
    del headers["lm_head.weight"]
    found = on_paper(recipe(**FLOAT32), ({**config, "tie_word_embeddings": True}, headers))
    assert found.parameters["total"] == 1512 - 128
    assert found.parameters["active"] == 1000


# ---- which way things go ------------------------------------------------------------------------------------------

BIG = mixtral(hidden=512, width=344, layers=8, vocab=2048)


@settings(max_examples=30)
@given(
    ranks=st.sampled_from([2, 4, 8]),
    micro=st.sampled_from([1, 4]),
    checkpointing=st.booleans(),
    compute=st.sampled_from(["float32", "bfloat16"]),
)
def test_more_ranks_need_less_each(ranks: int, micro: int, checkpointing: bool, compute: str) -> None:
    def needs(size: int) -> Estimate:
        what = recipe(
            data={"train": "t", "block_length": 128}, batch_size=64 * micro, micro_batch_size=micro,
            gradient_checkpointing=checkpointing, precision={"compute": compute}, distributed={"fsdp_size": size},
        )  # fmt: skip
        return on_paper(what, BIG, world_size=16)

    fewer, more = needs(ranks), needs(2 * ranks)
    assert more.peak < fewer.peak
    assert sum(more.state.values()) == sum(fewer.state.values()) // 2
    assert fewer.peak < needs(1).peak


@settings(max_examples=30)
@given(length=st.integers(16, 512), micro=st.integers(1, 8), compute=st.sampled_from(["float32", "bfloat16"]))
def test_checkpointing_needs_less_and_more_tokens_need_more(length: int, micro: int, compute: str) -> None:
    def needs(micro: int, **keys: Any) -> int:
        data = {"train": "t", "block_length": length}
        keys |= {"precision": {"compute": compute}, "batch_size": micro, "micro_batch_size": micro}
        return on_paper(recipe(data=data, **keys), BIG).peak

    assert needs(micro, gradient_checkpointing=True) <= needs(micro)
    assert needs(micro + 1) >= needs(micro)


def test_accumulation_keeps_gradients_and_ddp_copies_them() -> None:
    once = on_paper(recipe(**FLOAT32))
    twice = on_paper(recipe(**FLOAT32, batch_size=2))
    assert twice.peak - once.peak == once.state["gradients"]
    both = on_paper(recipe(**FLOAT32, batch_size=2), world_size=2)
    assert both.accumulation == 1
    assert both.peak - once.peak == both.parts["gradient buckets"] == once.state["gradients"]


def test_expert_parallelism_cuts_experts_while_they_are_gathered() -> None:
    experts = on_paper(recipe(**FLOAT32, batch_size=2, distributed={"fsdp_size": 2, "ep_size": 2}), world_size=2)
    assert experts.state["weights"] == 4 * 1512 // 2
    full = moments(recipe(**FLOAT32), mixtral(), Sharding(fsdp_size=2))["backward pass of layer 0"]
    spread = moments(recipe(**FLOAT32), mixtral(), Sharding(fsdp_size=2, ep_size=2))["backward pass of layer 0"]
    assert full["gathered weights"] - spread["gathered weights"] == 4 * 384 // 2


def test_fsdp_gathers_bfloat16_and_keeps_float32() -> None:
    """Weights, gradients and moments stay as they are; what is gathered and kept is that of a bfloat16 model."""
    keys: dict[str, Any] = {"distributed": {"fsdp_size": 2}, "batch_size": 2, "experts_implementation": None}
    whole, mixed, half = (
        on_paper(recipe(precision={"parameters": p, "compute": c}, **keys), world_size=2)
        for p, c in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
    )
    assert mixed.state == whole.state
    assert mixed.parts.get("weight copies", 0) == 0
    sharding = Sharding(fsdp_size=2)
    for moment in ("loss, forward", "backward pass of layer 0"):
        found = [
            moments(recipe(precision={"parameters": p, "compute": c}, **keys), mixtral(), sharding)[moment]
            for p, c in (("float32", "bfloat16"), ("bfloat16", "bfloat16"))
        ]
        for kind in ("activations", "gathered weights"):
            assert found[0][kind] == found[1][kind]
    assert half.peak < mixed.peak < whole.peak
    assert not [line for line in mixed.warnings if "float32" in line]


def test_a_gpu_has_a_fixed_overhead() -> None:
    assert on_paper(recipe(**FLOAT32, device="cuda")).peak - on_paper(recipe(**FLOAT32)).peak == FIXED_OVERHEAD


# ---- warnings -----------------------------------------------------------------------------------------------------


def test_warns_of_narrow_experts() -> None:
    [line] = [line for line in on_paper(recipe(**FLOAT32), mixtral(width=6)).warnings if "not a multiple of 4" in line]
    assert "experts_implementation=eager" in line
    ours = recipe(device="cuda", experts_implementation=None)
    [line] = [line for line in on_paper(ours, mixtral(width=6)).warnings if "not a multiple of 8" in line]
    assert "one by one" in line


def test_a_dense_model_has_no_experts_to_warn_of() -> None:
    dense = on_paper(recipe(precision={"compute": "bfloat16"}), llama())
    assert not [line for line in dense.warnings if "experts" in line]


@pytest.mark.parametrize(
    ("keys", "world", "expected"),
    [
        ({"distributed": {"fsdp_size": 3}, "batch_size": 4}, 4, "needs 3 processes (fsdp_size x dp_replicate_size), not 4"),
        ({"distributed": {"fsdp_size": 3, "ep_size": 3}, "batch_size": 3}, 3, "ep_size = 3 does not divide the 4 experts"),
        ({"batch_size": 3}, 2, "cannot be dealt to 2 ranks"),
        ({"precision": {"compute": "bfloat16"}}, 1, "experts run in float32"),
    ],
)  # fmt: skip
def test_warns(keys: dict[str, Any], world: int, expected: str) -> None:
    assert [line for line in on_paper(recipe(**FLOAT32 | keys), world_size=world).warnings if expected in line]
    assert not on_paper(recipe(**FLOAT32)).warnings


def test_says_whether_it_fits() -> None:
    peak = on_paper(recipe(**FLOAT32)).peak
    assert on_paper(recipe(**FLOAT32)).fits is None
    assert on_paper(recipe(**FLOAT32), device_memory=peak).fits is True
    tight = on_paper(recipe(**FLOAT32), device_memory=peak - 1)
    assert tight.fits is False
    assert "does not fit" in tight.warnings[0]
    assert tight.to_json()["fits"] is False


def test_refuses_a_configuration_without_sizes() -> None:
    config, headers = mixtral()
    with pytest.raises(CheckpointError, match="hidden_size"):
        read_shape({**config, "hidden_size": None}, headers)


# ---- against autograd ---------------------------------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40, "num_experts": 4,
        "num_experts_per_tok": 2, "mlp_only_layers": [0], "decoder_sparse_step": 1,
    },
    "qwen3_moe": {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "granitemoeshared": {
        "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", REAL)
@pytest.mark.parametrize(
    ("precision", "experts"),
    [
        (("float32", "float32"), "grouped_mm"),
        (("float32", "bfloat16"), "grouped_mm"),
        (("float32", "bfloat16"), "llamamoe_grouped_mm"),
        (("bfloat16", "bfloat16"), "grouped_mm"),
    ],
)
def test_counts_what_autograd_keeps(model_type: str, precision: tuple[str, str], experts: str, tmp_path: Path) -> None:
    """Bytes of all distinct tensors that the forward pass of transformers' own model saves, weights left out."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    keys = {**sizes, "vocab_size": 96, "tie_word_embeddings": False, "use_cache": False, **REAL[model_type]}
    config = AutoConfig.for_model(model_type, **keys)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision[0])).train()
    register_experts()
    model.set_experts_implementation(experts)
    model.save_pretrained(tmp_path)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids_BT = torch.randint(96, (2, 128))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == ("float32", "bfloat16") else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        LossHead(model)(model, {"input_ids": ids_BT}, next_token_labels(ids_BT))
    measured = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights)

    what = recipe(
        data={"train": "t", "block_length": 128}, batch_size=2, micro_batch_size=2,
        precision=dict(zip(("parameters", "compute"), precision, strict=True)), experts_implementation=experts,
    )  # fmt: skip
    checkpoint = SafetensorsCheckpoint(tmp_path)
    loss = moments(what, (checkpoint.config, checkpoint.tensors))["loss, backward"]  # type: ignore[arg-type]
    logits = 256 * 96 * 4
    expected = loss["activations"] + loss.get("weight copies", 0) + loss["rotary tables"] + logits
    assert loss["logits"] == 3 * logits
    assert expected == pytest.approx(measured, rel=0.03)


def test_needs_no_torch() -> None:
    code = "import sys, llamamoe.training.estimate.estimate; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
