"""Terms from the parent: zero for an exact copy, the plain formula, any split of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llamamoe
from llamamoe.errors import LlamaMoeError, RefusedError, UsageError
from llamamoe.training.distillation import Distillation, _Seen
from llamamoe.training.distillation_options import DistillOptions
from llamamoe.training.loss_head import LossHead, next_token_labels
from llamamoe.training.model_parts import ffn_modules
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.parent import Parent, load_parent
from tests.dense import make_dense
from tests.training.tiny_moe import COMMON, input_ids, tiny_moe

STEPS = 10
EVERYTHING = {"kl": {"weight": 0.5, "temperature": 2}, "ffn": {"weight": 2}, "hidden": {"weight": 0.25, "layers": [-1]}}


def dense_parent(multiplier: float = 1.0) -> Parent:
    """As many layers, tokens and dimensions as the tiny mixtures."""
    name = "llama" if multiplier == 1 else "granite"
    keys = {**COMMON, "intermediate_size": 24} | ({} if multiplier == 1 else {"residual_multiplier": multiplier})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **keys), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return Parent(model)


def options(**terms: Any) -> DistillOptions:
    return DistillOptions.model_validate(terms)


def terms(
    distillation: Distillation, model: Any, ids: torch.Tensor, step: int = 0, logits_at_once: int = 10**6
) -> dict[str, torch.Tensor]:
    """All sums of a batch, as the objective asks for them."""
    batch = {"input_ids": ids, "use_cache": False}
    with distillation.recording(batch, step, STEPS) as recorded:
        losses = LossHead(model, logits_at_once=logits_at_once)(model, batch, next_token_labels(ids), recorded.target)
    found = {"lm": losses.nll_sum, **recorded.sums()}
    return found if losses.kl_sum is None else {**found, "kl": losses.kl_sum}


def total(distillation: Distillation, model: Any, ids: torch.Tensor, **keys: Any) -> torch.Tensor:
    weights = distillation.weights(0, STEPS)
    found: torch.Tensor = sum(weights[name] * value for name, value in terms(distillation, model, ids, **keys).items())  # type: ignore[assignment]
    return found


def gradients(loss: torch.Tensor, model: Any) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


PAIRS = [
    ("llama", "mixtral", 0),
    ("gemma", "qwen2_moe", "1x"),
    ("granite", "granitemoeshared", "2x"),
    ("qwen3", "glm4_moe", "1x"),
    ("smollm3-windows", "granitemoe_swa", "1x"),
    ("olmo2", "flex_olmo", 0),
    ("cohere2", "cohere2_moe", "1x"),
    ("qwen3_5_text", "qwen3_5_moe_text", "1x"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "1x"),
    ("llama-tied", "ernie4_5_moe", "1x"),
]


@pytest.mark.parametrize(("variant", "target", "shared"), PAIRS)
def test_an_exact_conversion_has_nothing_to_learn(variant: str, target: str, shared: Any, tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", variant)
    given = {"method": "random", "num_experts": 4, "top_k": 4, "target": target, "shared": shared}
    llamamoe.split(source, tmp_path / "moe", llamamoe.load_recipe(given=given), verify=False)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").train()
    distillation = Distillation(
        options(kl={}, ffn={}, hidden={}), student, load_parent(source, tmp_path / "moe", dtype="float32")
    )
    layers = find_moe_layers(student)
    with torch.no_grad():
        for moe in layers:
            moe.router_NH.zero_()
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = terms(distillation, student, ids)
    assert {name for name, value in exact.items() if float(value.detach()) < 1e-6} == {"kl", "ffn", "hidden"}
    with torch.no_grad():
        layers[0].experts.down_proj[0].zero_()
    assert {name for name, value in terms(distillation, student, ids).items() if float(value.detach()) < 1e-4} == set()


def plain_terms(model: Any, parent: Any, ids: torch.Tensor, ffn_layers: list[int], hidden_layers: list[int]) -> Any:
    """``ffn`` and ``hidden`` by a walk through both models, token by token."""
    x, found = {}, {"ffn": 0.0, "hidden": 0.0}
    handles = [
        ffn_modules(layer)[0].register_forward_hook(lambda _, args, __, i=i: x.__setitem__(i, args[0]))  # type: ignore[misc]
        for i, layer in enumerate(model.model.layers)
    ]
    after = []
    handles += [layer.register_forward_hook(lambda _, __, out: after.append(out)) for layer in model.model.layers]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        theirs = parent(ids, output_hidden_states=True).hidden_states
    for i in ffn_layers:
        scale = getattr(model.model.layers[i], "residual_multiplier", 1.0)
        for row in range(len(ids)):
            y = scale * sum(module(x[i][row : row + 1]) for module in ffn_modules(model.model.layers[i]))[0]
            aim = getattr(parent.model.layers[i], "residual_multiplier", 1.0) * parent.model.layers[i].mlp(x[i][row])
            for t in range(ids.shape[1]):
                residual = (after[i][row, t] - y[t] + aim[t]).detach()
                found["ffn"] = found["ffn"] + ((y[t] - aim[t]) ** 2).mean() / (residual**2).mean() / len(ffn_layers)
    for i in hidden_layers:
        for mine, wanted in zip(after[i].flatten(0, 1), theirs[i + 1].flatten(0, 1), strict=True):
            found["hidden"] = found["hidden"] + ((mine - wanted) ** 2).mean() / (wanted**2).mean() / len(hidden_layers)
    return found


@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared", "glm4_moe"])
def test_sums_and_all_gradients_are_those_of_the_plain_formula(name: str) -> None:
    multiplier = 0.7 if name == "granitemoeshared" else 1.0
    model = tiny_moe(name, rms_norm_eps=1e-12, **({"residual_multiplier": 0.4} if multiplier != 1 else {})).double()
    model.set_experts_implementation("eager")
    parent = dense_parent(multiplier)
    parent.model.double()
    distillation = Distillation(options(ffn={}, hidden={"layers": [0]}), model, parent)
    ids = input_ids(length=6)
    found, wanted = terms(distillation, model, ids), plain_terms(model, parent.model, ids, [0, 1], [0])
    for term in ("ffn", "hidden"):
        assert float(found[term].detach()) == pytest.approx(float(wanted[term].detach()), rel=1e-6)
        for mine, theirs in zip(gradients(found[term], model), gradients(wanted[term], model), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=3e-6)  # norms round to float32


def test_finite_differences_of_what_is_learned_from_layers() -> None:
    """Those of lm and kl are in test_loss_head; a whole model rounds to float32 in its norms."""
    parent = dense_parent(0.7)
    parent.model.double()
    model = tiny_moe("granitemoeshared", residual_multiplier=0.4)
    distillation = Distillation(options(ffn={}, hidden={}), model, parent)
    g = torch.Generator().manual_seed(0)
    before, x, routed, shared = torch.randn(4, 1, 3, 16, generator=g, dtype=torch.float64)

    def ffn(routed: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return distillation.ffn_error(1, _Seen(x, [routed, shared], before + 0.4 * (routed + shared)))

    assert torch.autograd.gradcheck(ffn, (routed.requires_grad_(), shared.requires_grad_()))
    assert torch.autograd.gradcheck(lambda mine: distillation.hidden_error(mine, before), routed)


@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared"])
def test_any_split_of_a_batch_and_checkpointing_have_the_same_gradients(name: str) -> None:
    model, parent = tiny_moe(name), dense_parent()
    distillation = Distillation(options(**EVERYTHING), model, parent)
    ids = input_ids(rows=4)
    whole = total(distillation, model, ids)
    wanted = gradients(whole, model)
    assert all(float(each.abs().max()) > 0 for each in wanted)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = total(distillation, model, ids, logits_at_once=500)
    parts = [total(distillation, model, ids[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
    halves = zip(*(gradients(part, model) for part in parts), strict=True)
    for theirs, mine, split in zip(wanted, gradients(checkpointed, model), halves, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sum(split), theirs, rtol=1e-4, atol=1e-4)


def test_reentrant_checkpointing_is_refused_since_it_loses_the_gradient() -> None:
    model = tiny_moe("mixtral")
    distillation = Distillation(options(ffn={}), model, dense_parent())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(LlamaMoeError, match="reentrant"):
        terms(distillation, model, input_ids())


def test_constant_aims_stop_at_the_parent() -> None:
    """Only the layers before differ: the layer's own weights have the same gradient either way."""
    found = []
    for through in (True, False):
        model = tiny_moe("mixtral")
        distillation = Distillation(options(ffn={"layers": [1], "through_parent": through}), model, dense_parent())
        loss = terms(distillation, model, input_ids())["ffn"]
        own, before = model.model.layers[1].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj
        found.append((loss.detach(), *torch.autograd.grad(loss, [own, before])))
    (loss, own, before), (other_loss, other_own, other_before) = found
    assert torch.equal(loss, other_loss)
    assert torch.equal(own, other_own)
    assert not torch.allclose(before, other_before)


def test_nothing_is_computed_for_a_weight_of_zero() -> None:
    model = tiny_moe("mixtral")
    late = {"start": 0, "end": 1, "steps": 5}
    distillation = Distillation(
        options(kl={"weight": late}, ffn={"weight": late}, hidden={"weight": late}, lm={"weight": 0}),
        model,
        dense_parent(),
    )
    assert set(terms(distillation, model, input_ids(), step=0)) == {"lm"}
    assert distillation.weights(0, STEPS) == {"lm": 0, "kl": 0, "ffn": 0, "hidden": 0}
    assert set(terms(distillation, model, input_ids(), step=1)) == {"lm", "kl", "ffn", "hidden"}
    assert distillation.weights(1, STEPS) == pytest.approx({"lm": 0, "kl": 0.2, "ffn": 0.2, "hidden": 0.2})


def test_all_means_the_converted_layers() -> None:
    model = tiny_moe("qwen2_moe", mlp_only_layers=[0], intermediate_size=24)
    distillation = Distillation(options(ffn={}), model, dense_parent())
    only = Distillation(options(ffn={"layers": [1]}), model, dense_parent())
    first = Distillation(options(ffn={"layers": [0]}), model, dense_parent())
    ids = input_ids()
    assert torch.equal(terms(distillation, model, ids)["ffn"], terms(only, model, ids)["ffn"])
    assert not torch.equal(terms(first, model, ids)["ffn"], terms(only, model, ids)["ffn"])


def test_hooks_record_only_when_asked_and_go_when_closed() -> None:
    model = tiny_moe("mixtral")
    distillation = Distillation(options(ffn={}, hidden={}), model, dense_parent())
    model(input_ids())
    assert distillation._seen is None
    distillation.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_ffns_alone_do_for_the_ffn_term() -> None:
    model, parent = tiny_moe("mixtral"), dense_parent()
    before = terms(Distillation(options(ffn={}), model, parent), model, input_ids())["ffn"]
    parent.keep_ffns_only()
    assert torch.equal(terms(Distillation(options(ffn={}), model, parent), model, input_ids())["ffn"], before)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_moe("mixtral")
    with pytest.raises(UsageError, match="need the parent"):
        Distillation(options(kl={}), model, None)
    with pytest.raises(UsageError, match="no layer 2"):
        Distillation(options(ffn={"layers": [2]}), model, dense_parent())
    deeper = tiny_moe("mixtral", num_hidden_layers=3)
    with pytest.raises(RefusedError, match="3 layers"):
        Distillation(options(hidden={}), deeper, dense_parent())
    Distillation(options(kl={}), deeper, dense_parent())
