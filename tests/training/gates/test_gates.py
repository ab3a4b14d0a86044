"""Every gate: attached and detached without a trace, native in eval mode, the same noise wherever it is drawn again."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.errors import RefusedError
from llamamoe.training.gates import GATES
from llamamoe.training.gates.base import Gate
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.routing import RouterTap, Routing

from ..tiny_moe import ARCHITECTURES, H, N, input_ids, tiny_moe

STEPS = {"switch": 1, "gshard": 2}


def gate(name: str, **options: Any) -> Gate:
    cls = GATES.get(name)
    return cls(cls.Options(**options))


def model_for(name: str, architecture: str = "mixtral", **keys: Any) -> Any:
    return tiny_moe(architecture, num_experts_per_tok=STEPS.get(name, 2), **keys)


def outputs(model: Any) -> torch.Tensor:
    return model(input_ids=input_ids(), use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", GATES.names())
def test_a_gate_keeps_names_is_native_in_eval_mode_and_goes_without_a_trace(name: str, architecture: str) -> None:
    model = model_for(name, architecture)
    names, native = list(model.state_dict()), outputs(model)
    gates = gate(name, capacity_factor=0.5) if name in STEPS else gate(name)
    gates.attach(find_moe_layers(model), 7)
    assert list(model.state_dict()) == names
    changed = outputs(model)
    assert torch.equal(outputs(model.eval()), native)
    gates.detach()
    assert torch.equal(outputs(model.train()), native)
    assert torch.equal(changed, native) == (name == "top_k")
    assert not any("forward" in moe.router.__dict__ for moe in find_moe_layers(model))


@pytest.mark.parametrize("name", GATES.names())
def test_what_is_saved_under_a_gate_is_native(name: str, tmp_path: Path) -> None:
    model = model_for(name)
    gates = gate(name)
    gates.attach(find_moe_layers(model), 7)
    outputs(model).sum().backward()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(again.eval()), outputs(model.eval()))


@pytest.mark.parametrize("name", GATES.names())
def test_the_second_pass_of_checkpointing_leaves_nothing_behind(name: str) -> None:
    """Notes of a gate for the losses would hold the graph of its pass, and all that checkpointing released."""
    before = {id(thing) for thing in gc.get_objects()}  # other tests' tensors may be alive
    model = model_for(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = find_moe_layers(model)
    gates = gate(name)
    gates.attach(layers, 7)
    tap = RouterTap(layers)
    with tap.armed() as found:
        loss = outputs(model).square().mean()
    loss = loss + sum(routing.logits_TN.square().mean() for routing in found)
    loss.backward()
    del found, loss
    gc.collect()
    made = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and id(thing) not in before]
    graphs = [tensor for tensor in made if tensor.grad_fn is not None]
    assert not graphs, [tuple(tensor.shape) for tensor in graphs]


@pytest.mark.parametrize(
    ("name", "options"), [("jitter", {}), ("noisy_top_k", {}), ("gshard", {"random_second": True})]
)
def test_noise_depends_on_seed_and_place_and_on_nothing_else(name: str, options: dict[str, Any]) -> None:
    model = model_for(name)
    gates = gate(name, **options)
    gates.attach(find_moe_layers(model), 7)

    def at(*place: int) -> torch.Tensor:
        gates.set_step(*place)
        torch.rand(3)  # the global generator has no say
        return outputs(model)

    first = at(3, 1, 0)
    assert torch.equal(first, at(3, 1, 0))
    assert not any(torch.equal(first, at(*place)) for place in ((4, 1, 0), (3, 2, 0), (3, 1, 1)))
    gates.detach()
    gates.attach(find_moe_layers(model), 8)
    assert not torch.equal(first, at(3, 1, 0))


@pytest.mark.parametrize("name", ["jitter", "noisy_top_k", "gshard"])
def test_gradient_checkpointing_draws_the_same_noise_again(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = model_for(name)
        if checkpointed:
            model.activation_checkpointing_enable()
        gates = gate(name)
        gates.attach(find_moe_layers(model), 7)
        gates.set_step(5)
        tap = RouterTap(find_moe_layers(model))
        with tap.armed() as routings:
            logits = outputs(model)
        gates.set_step(5)
        (logits.square().mean() + sum(r.weights_Tk.square().sum() for r in routings)).backward()
        gradients.append([p.grad for p in (*model.parameters(), *gates.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_jitter_disturbs_the_router_s_input_alone() -> None:
    model = model_for("jitter")
    moe = find_moe_layers(model)[0]
    seen: list[torch.Tensor] = []
    moe.experts.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    outputs(model)
    gates = gate("jitter", eps=0.25)
    gates.attach([moe], 0)
    outputs(model)
    assert torch.equal(*seen)
    x_TH = torch.ones(200, H)
    rows = torch.eye(H)[:N]
    with torch.no_grad():
        moe.router_NH.copy_(rows)
    noise = moe.router(x_TH)[0].detach()
    assert float(noise.min()) >= 0.75
    assert float(noise.max()) < 1.25
    assert float(noise.mean()) == pytest.approx(1, abs=0.02)
    assert float(noise.std()) == pytest.approx(0.5 / 12**0.5, rel=0.1)


def test_noisy_top_k_is_the_paper_s_formula() -> None:
    """On a renormalising router: softmax over the k largest of clean + noise x softplus(x W) + floor."""
    moe = find_moe_layers(model_for("noisy_top_k"))[0]
    gates = gate("noisy_top_k", floor=0.02)
    gates.attach([moe], 3)
    gates.set_step(1, 2, 3)
    rows = next(gates.parameters())
    with torch.no_grad():
        rows.normal_(generator=torch.Generator().manual_seed(0))
    x_TH = torch.randn(9, H)
    tap = RouterTap([moe])
    with tap.armed() as routings:
        logits, weights, indices = moe.router(x_TH)
    std = torch.log1p(torch.exp(x_TH @ rows.T)) + 0.02
    normal = torch.empty(9, N).normal_(generator=gates.generator(moe, torch.device("cpu")))
    noisy = (x_TH @ moe.router_NH.T + normal * std).detach()
    for t in range(9):
        best = sorted(range(N), key=lambda e: -float(noisy[t, e]))[:2]
        assert indices[t].tolist() == best
        torch.testing.assert_close(weights[t], noisy[t, best].softmax(-1))
    assert routings[0].selection_TN is not None
    torch.testing.assert_close(routings[0].selection_TN, noisy)
    torch.testing.assert_close(routings[0].noise_std_TN, std)
    assert torch.equal(logits, x_TH @ moe.router_NH.T)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "glm4_moe"])
def test_noisy_top_k_without_renormalising_weighs_by_all_noisy_logits(architecture: str) -> None:
    moe = find_moe_layers(tiny_moe(architecture, norm_topk_prob=False))[0]
    gates = gate("noisy_top_k")
    gates.attach([moe], 3)
    tap = RouterTap([moe])
    with tap.armed() as routings:
        moe.router(torch.randn(9, H))
    noisy = routings[0].selection_TN
    scores = noisy.sigmoid() * 3.0 if architecture == "glm4_moe" else noisy.softmax(-1)
    torch.testing.assert_close(routings[0].weights_Tk, scores.gather(-1, routings[0].indices_Tk))


def test_noise_is_learned_saved_and_restored() -> None:
    model = model_for("noisy_top_k")
    gates = gate("noisy_top_k")
    assert list(gates.parameters()) == []
    gates.attach(find_moe_layers(model), 3)
    outputs(model).square().mean().backward()
    assert all(float(p.grad.norm()) > 0 for p in gates.parameters())
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_()
    other = gate("noisy_top_k")
    gates.detach()
    other.attach(find_moe_layers(model), 3)
    other.load_state_dict(gates.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(gates.parameters(), other.parameters(), strict=True))
    assert sorted(other.state_dict()) == ["0", "1"]


def test_refusals_name_the_way_out_and_change_nothing() -> None:
    layers = find_moe_layers(tiny_moe("mixtral"))
    with pytest.raises(RefusedError, match=r"switch.*1 expert, but the model selects 2[\s\S]*--top-k 1"):
        gate("switch").attach(layers, 0)
    with pytest.raises(RefusedError, match="gshard"):
        gate("gshard").attach(find_moe_layers(tiny_moe("mixtral", num_experts_per_tok=3)), 0)
    assert not any("forward" in moe.router.__dict__ for moe in layers)
    biased = find_moe_layers(tiny_moe("glm4_moe"))
    gate("noisy_top_k").attach(biased[:1], 0)
    biased[1].correction_bias.add_(0.1)
    with pytest.raises(RefusedError, match="correction bias"):
        gate("noisy_top_k").attach(biased[1:], 0)


def test_one_gate_at_a_time() -> None:
    layers = find_moe_layers(tiny_moe("mixtral"))
    first = gate("jitter")
    first.attach(layers, 0)
    with pytest.raises(ValueError, match="another gate"):
        gate("jitter").attach(layers, 0)
    with pytest.raises(ValueError, match="already"):
        first.attach(layers, 0)


def test_a_forward_that_a_hook_had_put_there_is_given_back() -> None:
    moe = find_moe_layers(tiny_moe("mixtral"))[0]
    theirs = moe.router.forward
    moe.router.forward = theirs
    gates = gate("jitter")
    gates.attach([moe], 0)
    assert moe.router.forward is not theirs
    gates.detach()
    assert moe.router.forward is theirs


def test_the_tap_is_told_what_the_gate_did_in_training_only() -> None:
    model = model_for("gshard")
    gates = gate("gshard", capacity_factor=0.5)
    gates.attach(find_moe_layers(model), 0)
    tap = RouterTap(find_moe_layers(model))
    found: list[list[Routing]] = []
    for mode in (True, False):
        model.train(mode)
        with tap.armed() as routings:
            outputs(model)
        found.append(routings)
    assert all(r.dropped_Tk is not None and bool(r.dropped_Tk.any()) for r in found[0])
    assert all(r.dropped_Tk is None and r.wanted_Tk is None for r in found[1])
