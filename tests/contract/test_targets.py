"""Every pair of family and target that the plan accepts computes what the parent computes, in plain transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.architectures.moe_layout import Router
from llamamoe.architectures.rescales import RESCALES
from llamamoe.architectures.targets import TARGETS
from llamamoe.conversion.layer import convert_layer
from llamamoe.conversion.verify import HARD_TOLERANCE
from llamamoe.methods.layer import PADDING
from tests.dense import VARIANTS, make_dense

EXPERTS = 4
IDS = torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(1))

PLAIN = "llama llama-tied llama-llama3-rope llama-head-dim mistral phi3-longrope gemma seed-oss-no-bias"
PLAIN += " ernie4_5 ernie4_5-head-dim smollm3-rope internlm3"
FITS = {
    "mixtral": f"{PLAIN} mistral-window phi3-window ministral",
    "qwen2_moe": f"{PLAIN} mistral-window phi3-window ministral ministral-windows qwen2 qwen2-tied qwen2-windows seed-oss seed-oss-head-dim",
    "qwen3_moe": "qwen3 qwen3-tied",
    "glm4_moe": f"{PLAIN} glm glm-no-bias phi3-partial qwen2 qwen2-tied qwen3 qwen3-tied seed-oss seed-oss-head-dim",
    "granitemoeshared": f"{PLAIN} llama-attention-bias granite seed-oss-all-biases",
    "flex_olmo": "olmo2 olmo2-biases olmo2-llama3-rope",
    "hunyuan_v1_moe": "hunyuan_v1_dense hunyuan_v1_dense-alpha",
    "cohere2_moe": "cohere cohere2 cohere2-biases",
    "qwen3_5_moe_text": "qwen3_5_text qwen3_5_text-biases",
    "granitemoe_swa": f"{PLAIN} llama-attention-bias granite seed-oss-all-biases mistral-window phi3-window smollm3 smollm3-windows "
    "ministral ministral-windows",
    "ernie4_5_moe": PLAIN,
    "jetmoe": PLAIN,
}
"""The targets of each variant; everything else must be refused."""

PAIRS = [(v, t) for t, variants in FITS.items() for v in variants.split()]
ALIKE = {
    "smollm3-rope": "mixtral",
    "internlm3": "mixtral",
    "ernie4_5-head-dim": "glm4_moe",
    "seed-oss-no-bias": "qwen2_moe",
}
"""Variants that read as the plainest Llama does, with the one target whose logits are compared."""
RUN = [(v, t) for v, t in PAIRS if ALIKE.get(v, t) == t]
ROUTED = [t.name for t in TARGETS if t.routed]
OTHERS = [(v, t) for t in ROUTED for v in VARIANTS if (v, t) not in PAIRS]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a variant, made once."""
    folder = tmp_path_factory.mktemp("dense")

    def get(variant: str) -> Path:
        path = folder / variant
        return path if path.exists() else make_dense(path, variant)

    return get


def logits(folder: Path, ids: torch.Tensor = IDS, **keys: Any) -> torch.Tensor:
    """Logits by plain transformers, which must not complain about a single key."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **keys)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model(ids).logits.float()


def zero_router(folder: Path, plan: Any) -> None:
    """Set the router rows of a written checkpoint to zero: all weights equal."""
    names = {t.name for t in plan.tensors if isinstance(t.origin, Router)}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: torch.zeros_like(v) if n in names else v for n, v in tensors.items()}, file, {"format": "pt"})


def convert(source: Path, out: Path, **given: Any) -> llamamoe.SplitResult:
    experts = 2 if given.get("target") == "jetmoe" else EXPERTS  # the query heads of each of 2 key/value heads
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": experts, "top_k": experts, **given})
    return llamamoe.split(source, out, recipe, verify=False)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("shared", [0, "2x"])
@pytest.mark.parametrize(("variant", "target"), RUN)
def test_all_experts_together_are_the_parent(
    sources: Any, tmp_path: Path, variant: str, target: str, shared: Any
) -> None:
    if shared and TARGETS.get(target).shared == "none":
        with pytest.raises(llamamoe.RefusedError, match="no shared expert"):
            convert(sources(variant), tmp_path / "out", target=target, shared=shared)
        return
    if shared and TARGETS.get(target).shared == "one":
        with pytest.raises(llamamoe.RefusedError, match="use --shared 1x"):
            convert(sources(variant), tmp_path / "out", target=target, shared=shared)
        shared = "1x"
    result = convert(sources(variant), tmp_path / "out", target=target, shared=shared)
    parent = logits(sources(variant))
    assert difference(logits(result.out), parent) <= HARD_TOLERANCE
    zero_router(result.out, result.plan)
    assert difference(logits(result.out), parent) <= 1e-5


@pytest.mark.parametrize(("variant", "target"), OTHERS)
def test_what_does_not_fit_is_refused_with_a_reason(sources: Any, tmp_path: Path, variant: str, target: str) -> None:
    with pytest.raises(llamamoe.RefusedError, match=rf"{target} (cannot hold|has biases)"):
        convert(sources(variant), tmp_path / "out", target=target, shared=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("variant", "keys"), [("llama", {"mlp_bias": True}), ("ernie4_5", {"use_bias": True})])
def test_biases_in_the_ffn_are_refused_with_the_reason(tmp_path: Path, variant: str, keys: dict[str, Any]) -> None:
    source = make_dense(tmp_path / "dense", variant, **keys)
    with pytest.raises(llamamoe.RefusedError, match="no architecture of transformers has SwiGLU experts with biases"):
        llamamoe.plan_conversion(source, llamamoe.load_recipe(given={"method": "random", "num_experts": EXPERTS}))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shared", [0, "1x"])
def test_auto_finds_a_target_for_every_family(sources: Any, variant: str, shared: Any) -> None:
    given = {"method": "random", "num_experts": EXPERTS, "top_k": 2, "shared": shared}
    recipe = llamamoe.load_recipe(given=given)
    holding = [target for v, target in PAIRS if v == variant]
    if shared and all(TARGETS.get(target).shared == "none" for target in holding):
        with pytest.raises(llamamoe.RefusedError, match="no shared expert"):
            llamamoe.plan_conversion(sources(variant), recipe)
        return
    assert llamamoe.plan_conversion(sources(variant), recipe).target.name in holding


def _by_hand(plan: Any, layer: int, x: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Shared neurons plus ``coefficient`` times those of the top-k experts, a loop over tokens, from dense weights."""
    parts = convert_layer(plan, layer).parts
    gate, up, down = parts.ffn.gate_FH.double(), parts.ffn.up_FH.double(), parts.ffn.down_HF.double()
    rows = []
    for token in x.reshape(-1, x.shape[-1]).double():
        h = torch.nn.functional.silu(gate @ token) * (up @ token)
        chosen = torch.topk(parts.router_NH.double() @ token, plan.layout.top_k).indices
        routed = np.concatenate([parts.partition.experts[i] for i in chosen])
        routed = torch.from_numpy(routed[routed != PADDING])
        shared = torch.from_numpy(parts.partition.shared)
        rows.append(coefficient * down[:, routed] @ h[routed] + down[:, shared] @ h[shared])
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("rescale", ["dropout", "unit", "llama_moe"])
@pytest.mark.parametrize(
    ("variant", "target", "shared"),
    [
        ("llama", "mixtral", 0),
        ("llama", "qwen2_moe", 0),
        ("llama", "qwen2_moe", 0.25),
        ("qwen3", "qwen3_moe", 0),
        ("llama", "glm4_moe", "1x"),
        ("llama", "granitemoeshared", 0.25),
        ("llama", "ernie4_5_moe", "2x"),
        ("smollm3", "granitemoe_swa", 0.25),
        ("olmo2", "flex_olmo", 0),
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "1x"),
        ("cohere2", "cohere2_moe", "1x"),
        ("qwen3_5_text", "qwen3_5_moe_text", "1x"),
    ],
)
def test_top_k_is_what_the_rescale_says(
    sources: Any, tmp_path: Path, variant: str, target: str, shared: Any, rescale: str
) -> None:
    """A soft-scaled router would weigh experts; a hard one gives each selected expert the rescale's coefficient."""
    result = convert(sources(variant), tmp_path / "out", target=target, shared=shared, rescale=rescale, top_k=2)
    model = AutoModelForCausalLM.from_pretrained(result.out)
    layer = model.model.layers[1]
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
    blocks = [getattr(layer, name, None) for name in result.plan.target.ffn_modules]
    with torch.no_grad():
        outputs = [block(x) for block in blocks if block is not None]
    found = sum(o[0] if isinstance(o, tuple) else o for o in outputs).reshape(x.shape)
    coefficient = {"dropout": EXPERTS / 2, "unit": 1.0, "llama_moe": EXPERTS / 4}[rescale]
    assert RESCALES.get(rescale)().coefficient(EXPERTS, 2) == coefficient
    assert difference(found, _by_hand(result.plan, 1, x, coefficient).float()) < 2 * HARD_TOLERANCE


@pytest.mark.parametrize("rescale", ["dropout", "unit", "llama_moe"])
@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe", "granitemoeshared", "ernie4_5_moe"])
def test_verify_allows_for_every_rescale(sources: Any, tmp_path: Path, target: str, rescale: str) -> None:
    recipe = llamamoe.load_recipe(
        given={"method": "random", "num_experts": EXPERTS, "target": target, "rescale": rescale}
    )
    receipt = llamamoe.split(sources("llama"), tmp_path / "out", recipe).receipt["verification"]
    assert receipt["equal_weights"] <= 1e-5
    assert receipt["as_stored"] <= HARD_TOLERANCE
    assert receipt["neurons_checked"] == 2


@pytest.mark.parametrize(
    ("target", "keep"), [("qwen2_moe", [1]), ("glm4_moe", [0]), ("ernie4_5_moe", [0]), ("ernie4_5_moe", [-1])]
)
def test_dense_layers_stay_dense(sources: Any, tmp_path: Path, target: str, keep: list[int]) -> None:
    result = convert(sources("llama"), tmp_path / "out", target=target, keep_dense=keep)
    assert result.plan.layout.dense_layers == (keep[0] % 2,)
    assert difference(logits(result.out), logits(sources("llama"))) <= HARD_TOLERANCE
    assert llamamoe.verify(result.out, sources("llama")).neurons_checked == 1


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe", "granitemoeshared", "ernie4_5_moe"])
@pytest.mark.parametrize("experts", [4, 3])
def test_bf16_is_no_worse_than_the_parent_in_bf16(tmp_path: Path, target: str, experts: int) -> None:
    """Mean error to the float32 parent: 1.05 x that of the parent run in bf16, 1.3 x where the bake rounds."""
    source = make_dense(tmp_path / "dense", dtype=torch.bfloat16, num_hidden_layers=3, hidden_size=128)
    given = {"num_experts": experts, "top_k": experts, "target": target, "method": "random"}
    result = llamamoe.split(source, tmp_path / "out", llamamoe.load_recipe(given=given), verify=False)
    ids = torch.randint(3, 128, (16, 48), generator=torch.Generator().manual_seed(3))
    exact = logits(source, ids, dtype=torch.float32)
    parent = (logits(source, ids, dtype=torch.bfloat16) - exact).abs().mean()
    error = (logits(result.out, ids, dtype=torch.bfloat16) - exact).abs().mean()
    power_of_two = math.log2(result.plan.layout.combine.bake).is_integer()
    assert error <= (1.05 if power_of_two else 1.3) * parent


@pytest.mark.parametrize(
    ("variant", "target"),
    [
        ("llama", "mixtral"),
        ("llama", "qwen2_moe"),
        ("qwen3", "qwen3_moe"),
        ("llama", "glm4_moe"),
        ("llama", "granitemoeshared"),
        ("llama", "ernie4_5_moe"),
        ("smollm3-windows", "granitemoe_swa"),
        ("llama-tied", "jetmoe"),
        ("olmo2-biases", "flex_olmo"),
        ("hunyuan_v1_dense-alpha", "hunyuan_v1_moe"),
        ("cohere2", "cohere2_moe"),
        ("qwen3_5_text", "qwen3_5_moe_text"),
    ],
)
def test_generation_with_cache_and_left_padding_is_the_parents(
    sources: Any, tmp_path: Path, variant: str, target: str
) -> None:
    result = convert(sources(variant), tmp_path / "out", target=target)
    ids = IDS[:, :9].clone()
    ids[0, :3] = 0
    mask = (ids != 0).long()
    texts = []
    for folder in (sources(variant), result.out):
        model = AutoModelForCausalLM.from_pretrained(folder)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist())
    assert texts[0] == texts[1]


def test_glm4_moe_writes_a_tied_head_out(sources: Any, tmp_path: Path) -> None:
    """mlx-lm always reads ``lm_head.weight``; vLLM ignores ``tie_word_embeddings`` and runs with an unloaded head."""
    result = convert(sources("llama-tied"), tmp_path / "out", target="glm4_moe")
    tensors = {k: v for file in result.out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    config = json.loads((result.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert result.plan.cost.total["head"] == tensors["lm_head.weight"].numel()
    assert any("head is written out" in line for line in result.plan.advice)
    assert any("no auxiliary loss" in line for line in result.plan.advice)


def test_granitemoeshared_names_its_experts_as_trl_asks(sources: Any, tmp_path: Path) -> None:
    result = convert(sources("llama"), tmp_path / "out", target="granitemoeshared")
    assert AutoModelForCausalLM.from_pretrained(result.out).config.num_experts == EXPERTS


@pytest.mark.parametrize(("rescale", "warned"), [("dropout", True), ("unit", False)])
def test_qwen2_moe_that_renormalises_names_the_clients_that_do_not(sources: Any, rescale: str, warned: bool) -> None:
    given = {"method": "random", "num_experts": EXPERTS, "target": "qwen2_moe", "rescale": rescale}
    advice = llamamoe.plan_conversion(sources("llama"), llamamoe.load_recipe(given=given)).advice
    assert any("llama.cpp and mlx-lm never renormalise" in line for line in advice) is warned
