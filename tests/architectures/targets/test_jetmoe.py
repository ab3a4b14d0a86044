"""JetMoE: query heads as experts, exactly; what cannot be held is refused; other commands refuse it or are right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.architectures.targets.jetmoe import EPSILON
from llamamoe.conversion.verify import HARD_TOLERANCE
from llamamoe.transforms.mixing.recipe import MixRecipe
from tests.dense import make_dense

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
KV, N, D, H = 2, 4, 8, 64


def recipe(**given: Any) -> llamamoe.SplitRecipe:
    return llamamoe.load_recipe(given={"method": "random", "target": "jetmoe", **given})


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 query heads over 2 key/value heads, llama3 rope, epsilon 1e-5."""
    return make_dense(tmp_path_factory.mktemp("jetmoe") / "dense", "llama-llama3-rope", num_attention_heads=N * KV)


@pytest.fixture(scope="module")
def half(dense: Path) -> llamamoe.SplitResult:
    """The sizes that the target chooses."""
    return llamamoe.split(dense, dense.parent / "half", recipe())


def test_every_head_of_a_key_value_head_is_in_another_expert(dense: Path, half: llamamoe.SplitResult) -> None:
    assert (half.plan.layout.num_experts, half.plan.layout.top_k) == (N, N // 2)
    ours, theirs = load_file(half.out / "model.safetensors"), load_file(dense / "model.safetensors")
    block, source = "model.layers.1.self_attention.", "model.layers.1.self_attn."
    scale = N * (EPSILON / 1e-5) ** 0.5
    for expert in range(N):
        rows = torch.cat([torch.arange(D) + D * (N * group + expert) for group in range(KV)])
        query, output = (ours[f"{block}experts.{part}_linear.weight"][expert] for part in ("input", "output"))
        assert torch.equal(query, theirs[source + "q_proj.weight"][rows])
        assert torch.allclose(output, theirs[source + "o_proj.weight"][:, rows] * scale, rtol=1e-6)
    both = torch.cat([theirs[f"{source}{part}_proj.weight"] for part in "kv"])
    assert torch.equal(ours[block + "kv_proj.weight"], both)


def test_the_card_and_the_plan_tell_of_attention(half: llamamoe.SplitResult, dense: Path) -> None:
    from click.testing import CliRunner
    from llamamoe_cli.main import root

    assert "attention was split into 4 experts, too" in (half.out / "README.md").read_text()
    shown = CliRunner().invoke(root, ["split", str(dense), "out", "--target", "jetmoe", "--dry-run"])
    assert "2 of 4 query heads of each key/value head" in shown.output


def test_the_outcome_names_the_commands_that_take_it(dense: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from llamamoe_cli.main import root

    command = ["split", str(dense), str(tmp_path / "out"), "--target", "jetmoe", "--method", "random", "--no-verify"]
    shown = CliRunner().invoke(root, command)
    assert "llamamoe evaluate" in shown.output
    assert "llamamoe report" in shown.output
    assert "llamamoe_auto" not in shown.output
    assert "export-gguf" not in shown.output


def test_verified_with_all_heads(half: llamamoe.SplitResult, dense: Path) -> None:
    told = half.receipt["verification"]
    assert told["equal_weights"] <= 1e-5
    assert told["as_stored"] <= HARD_TOLERANCE
    assert max(error for _, error in told["layer_error"]) <= 1e-5
    assert llamamoe.verify(half.out, dense).passed


def test_changed_heads_are_found(half: llamamoe.SplitResult, dense: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(half.out, tmp_path / "out"))
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attention.experts.input_linear.weight"][1, 0, 0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(llamamoe.VerificationError, match=r"input_linear\.weight is not the parent's, bit for bit"):
        llamamoe.verify(out, dense)


def test_selected_heads_count_as_the_rescale_says(dense: Path, half: llamamoe.SplitResult) -> None:
    """The parent's attention with the heads that the router does not select zero, the others times N/k."""
    parent, ours = (AutoModelForCausalLM.from_pretrained(folder).model for folder in (dense, half.out))
    x = torch.randn(1, 16, H, generator=torch.Generator().manual_seed(2))
    positions = parent.rotary_emb(x, torch.arange(16)[None])
    causal = torch.full((16, 16), float("-inf")).triu(1)[None, None]
    attention, experts = parent.layers[1].self_attn, ours.layers[1].self_attention
    chosen = (x @ experts.experts.router.layer.weight.T).topk(2).indices
    weights = torch.zeros(1, 16, N).scatter_(-1, chosen, N / 2)

    def mask(_: Any, args: tuple[torch.Tensor]) -> torch.Tensor:
        return (args[0].unflatten(-1, (KV, N, D)) * weights[:, :, None, :, None]).flatten(2)

    attention.o_proj.register_forward_pre_hook(mask)
    with torch.no_grad():
        want = attention(x, position_embeddings=positions, attention_mask=causal)[0] * (EPSILON / 1e-5) ** 0.5
        have = experts(x, position_embeddings=positions, attention_mask=causal)[0]
    assert apart(have, want) < 2 * HARD_TOLERANCE


def test_another_k_is_the_conversion_with_it(dense: Path, half: llamamoe.SplitResult, tmp_path: Path) -> None:
    saved = tmp_path / "saved"  # transformers writes the number of query heads of k experts
    AutoModelForCausalLM.from_pretrained(half.out).save_pretrained(saved)
    for folder in (half.out, saved):
        out = llamamoe.retop(folder, tmp_path / f"{folder.name}-all", N, rescale="dropout").out
        assert apart(logits(out), logits(dense)) <= HARD_TOLERANCE


def test_the_cost_is_that_of_the_files(half: llamamoe.SplitResult) -> None:
    found, plan = llamamoe.inspect(half.out), half.plan
    assert found.cost == plan.cost
    assert found.cost.active["routed_attention"] * 2 == found.cost.total["routed_attention"] == 2 * 2 * H * H
    assert (found.experts.num_experts, found.experts.expert_width) == (N, plan.layout.expert_width)
    assert found.kv_bytes_per_token == 2 * 2 * KV * D * 2


def test_a_stopped_conversion_continues_with_the_same_bytes(
    dense: Path, half: llamamoe.SplitResult, tmp_path: Path
) -> None:
    def stop(step: Any) -> None:
        if step.stage == "convert" and step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llamamoe.split(dense, tmp_path / "out", recipe(), verify=False, progress=stop)
    out = llamamoe.split(dense, tmp_path / "out", recipe(), verify=False, resume=True).out
    assert (out / "model.safetensors").read_bytes() == (half.out / "model.safetensors").read_bytes()


def test_a_bias_of_the_output_is_held(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", "seed-oss-no-bias", attention_out_bias=True)
    told = llamamoe.split(source, tmp_path / "out", recipe()).receipt["verification"]
    assert told["equal_weights"] <= 1e-5


def test_half_precision_needs_norms_of_its_epsilon(tmp_path: Path) -> None:
    other = make_dense(tmp_path / "other", dtype=torch.bfloat16)
    with pytest.raises(llamamoe.RefusedError, match=r"norms of epsilon 1e-06 only, not 1e-05.*use --dtype float32"):
        llamamoe.plan_conversion(other, recipe())
    assert llamamoe.plan_conversion(other, recipe(dtype="float32")).parity == "exact"
    same = make_dense(tmp_path / "same", dtype=torch.bfloat16, rms_norm_eps=EPSILON)
    told = llamamoe.split(same, tmp_path / "out", recipe()).receipt["verification"]
    assert told["equal_weights"] <= 1e-5


@pytest.mark.parametrize(
    ("variant", "keys", "given", "message"),
    [
        ("llama", {"num_key_value_heads": 4}, {}, "cannot hold multi-head attention"),
        ("qwen2", {}, {}, "biases on the query, key and value"),
        ("qwen3", {}, {}, "an RMSNorm on queries and keys"),
        ("mistral-window", {}, {}, "a sliding window"),
        ("llama", {}, {"num_experts": 4}, r"there are 2 \(--experts 2, not 4\)"),
        ("llama", {}, {"method": "upcycle", "num_experts": 2}, "upcycle does not copy"),
        ("llama", {}, {"shared": "1x"}, "no shared expert"),
        ("llama", {}, {"keep_dense": [0]}, "no dense layers"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    variant: str, keys: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = make_dense(tmp_path / "dense", variant, **keys)
    with pytest.raises(llamamoe.RefusedError, match=message):
        llamamoe.plan_conversion(source, recipe(**given))


def test_auto_leaves_attention_dense(tmp_path: Path) -> None:
    """Nothing else holds this bias alone."""
    source = make_dense(tmp_path / "dense", "seed-oss-no-bias", attention_out_bias=True)
    with pytest.raises(llamamoe.RefusedError) as refused:
        llamamoe.plan_conversion(source, recipe(target="auto"))
    assert "jetmoe" not in str(refused.value)


def test_the_heads_go_back_into_a_dense_model(dense: Path, half: llamamoe.SplitResult, tmp_path: Path) -> None:
    told = llamamoe.densify(half.out, tmp_path / "out")
    assert apart(logits(told.out), logits(dense)) <= 1e-5
    assert not told.exact
    assert any("rms_norm_eps is 1e-06: the same function" in warning for warning in told.warnings)


def test_a_parent_with_its_epsilon_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """With a bias of the output, which the target stores elsewhere."""
    keys = {"attention_out_bias": True, "rms_norm_eps": EPSILON, "num_attention_heads": N * KV}
    source = make_dense(tmp_path / "dense", "seed-oss-no-bias", **keys)
    out = llamamoe.split(source, tmp_path / "moe", recipe(top_k=1), verify=False).out
    told = llamamoe.densify(out, tmp_path / "out", like=source)
    assert told.exact
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (told.out, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_trained_bias_of_an_ffn_is_refused(half: llamamoe.SplitResult, tmp_path: Path) -> None:
    out = shutil.copytree(half.out, tmp_path / "moe")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.bias"][0] = 1.0
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(llamamoe.RefusedError, match=r"model\.layers\.1\.mlp\.bias is not zero: it was trained"):
        llamamoe.densify(out, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_commands_refuse_it_before_anything_is_written(
    dense: Path, half: llamamoe.SplitResult, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", [str(dense / "config.json")]
    mix = MixRecipe(experts=[str(dense)] * 2, router="random", target="jetmoe")
    for command, message in (
        (lambda: llamamoe.resplit(half.out, out, pieces=2), "FFNs cannot have more experts alone"),
        (lambda: llamamoe.export_gguf(half.out, tmp_path / "out.gguf"), "but this model is jetmoe"),
        (lambda: llamamoe.mix(dense, out, mix), "jetmoe routes attention with as many experts as FFNs"),
        (lambda: llamamoe.budget(dense, recipe(calibration=text), budget=0.5), "jetmoe has no dense layers"),
        (lambda: llamamoe.bench(half.out, experts_implementation="eager"), "jetmoe in transformers has one of its own"),
        (lambda: llamamoe.plan_conversion(half.out, recipe()), "already a mixture of experts"),
    ):
        with pytest.raises(llamamoe.LlamaMoeError, match=message) as refused:
            command()
        assert refused.value.hint
        assert "resplit" not in refused.value.hint
    assert not list(tmp_path.iterdir())
