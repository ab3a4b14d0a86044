"""Jacobs et al. 1991: distances against the native experts, gradient p - h, and a planted router that SGD finds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from llamamoe.training.losses import LossContext
from llamamoe.training.losses import competitive as module
from llamamoe.training.losses.competitive import Competitive, expert_distances
from llamamoe.training.moe_layers import MoeLayer, find_moe_layers
from llamamoe.training.routing import Routing

from ..tiny_moe import ARCHITECTURES, H, N, routed, tiny_moe

COMPARED = [name for name in ARCHITECTURES if name != "jetmoe"]  # whose runs refuse this loss


def layer(name: str = "mixtral", **keys: Any) -> MoeLayer:
    return find_moe_layers(tiny_moe(name, **keys))[0]


def case(moe: MoeLayer, tokens: int = 30) -> tuple[Routing, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(tokens, H, generator=generator)
    return routed(moe, x_TH), torch.randn(tokens, H, generator=generator)


def alone(moe: MoeLayer, x_TH: torch.Tensor) -> torch.Tensor:
    """[T, N, H]: each expert by the native module, at weight 1."""
    outs = []
    with torch.no_grad():
        for expert in range(moe.num_experts):
            index = torch.full((len(x_TH), 1), expert)
            outs.append(moe.experts(x_TH, index, torch.ones(len(x_TH), 1)))
    return torch.stack(outs, 1)


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("chunk", [1, 10**6])
def test_distances_are_those_of_the_native_experts(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", chunk * 2 * N * 8)
    moe = layer(name)
    routing, target = case(moe)
    outs = alone(moe, routing.inputs_TH) * moe.factor
    weights = {"softmax": routing.logits_TN.softmax(-1), "sigmoid": routing.logits_TN.sigmoid()}.get(moe.weighting)
    if weights is not None:
        outs = outs * weights[..., None]
    expected = (target[:, None] - outs).square().sum(-1)
    torch.testing.assert_close(expert_distances(routing, target, "alone"), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_fitted_size_is_the_least_squares_one_or_nothing(sign: int) -> None:
    moe = layer()
    routing, _ = case(moe)
    outs = alone(moe, routing.inputs_TH)
    target = sign * outs.sum(1) + 0.1 * torch.randn(30, H, generator=torch.Generator().manual_seed(0))
    found = expert_distances(routing, target, "fitted")
    for t in range(30):
        size, *_ = torch.linalg.lstsq(outs[t].reshape(-1, 1), target[t].repeat(N)[:, None])
        expected = (target[t] - max(float(size), 0.0) * outs[t]).square().sum(-1)
        torch.testing.assert_close(found[t], expected, rtol=1e-4, atol=1e-4)


def test_the_value_is_the_formula() -> None:
    moe = layer()
    routing, target = case(moe)
    distances = expert_distances(routing, target)
    expected = 0.0
    for t in range(30):
        sigma2 = 0.5 * float(distances[t].mean())
        p = torch.softmax(routing.logits_TN[t], -1).tolist()
        expected -= math.log(sum(p[i] * math.exp(-float(distances[t, i]) / (2 * sigma2)) for i in range(N)))
    loss = Competitive(Competitive.Options(temperature=0.5))
    found = loss.loss([routing], LossContext(targets=lambda _: target)).detach()
    assert float(found) == pytest.approx(expected, rel=1e-4)
    halves = [
        loss.loss(
            [routed(moe, routing.inputs_TH[part])], LossContext(targets=lambda _, part=part: target[part])
        ).detach()
        for part in (slice(11), slice(11, 30))
    ]
    assert float(sum(halves)) == pytest.approx(float(found), rel=1e-5)


@pytest.mark.parametrize("weighting", ["renormalised", "sigmoid_renormalised"])
def test_the_gradient_is_probability_minus_posterior(weighting: Any) -> None:
    moe = layer()
    routing, target = case(moe)
    logits = routing.logits_TN.detach().double().requires_grad_()
    routing = replace(routing, moe=replace(moe, weighting=weighting), logits_TN=logits)
    Competitive().loss([routing], LossContext(targets=lambda _: target)).backward()
    distances = expert_distances(routing, target).double()
    p = routing.probabilities_TN.detach()
    posterior = p * torch.exp(-distances / (2 * distances.mean(-1, keepdim=True)))
    posterior /= posterior.sum(-1, keepdim=True)
    expected = p - posterior
    if weighting.startswith("sigmoid"):
        expected = expected * (1 - logits.detach().sigmoid())
    torch.testing.assert_close(logits.grad, expected)


def test_nothing_of_size_tokens_times_experts_times_hidden_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(each, torch.Tensor):
                    self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.element_size())
            return out

    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 2**10)
    routing, target = case(layer(), tokens=2000)
    with Largest() as largest:
        Competitive().loss([routing], LossContext(targets=lambda _: target))
    assert largest.numbers <= 2000 * max(N, H)


@pytest.mark.parametrize("scale", ["fitted", "alone"])
def test_descent_finds_the_planted_router(scale: Any) -> None:
    """The target of each token is the output of the expert that a hidden router would choose."""
    moe = layer(router_std=1e-5)
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(4000, H, generator=generator)
    hidden_NH = torch.randn(N, H, generator=generator)
    best_T = (x_TH @ hidden_NH.T).argmax(-1)
    with torch.no_grad():
        target = alone(moe, x_TH)[torch.arange(4000), best_T]
    loss = Competitive(Competitive.Options(scale=scale, temperature=0.2))
    optimiser = torch.optim.SGD([moe.router_NH], lr=1.0, momentum=0.9)
    for step in range(300):
        rows = torch.arange(256) + 256 * (step % 12)
        optimiser.zero_grad()
        value = loss.loss([routed(moe, x_TH[rows])], LossContext(targets=lambda _, rows=rows: target[rows]))
        (value / 256).backward()
        optimiser.step()
    held_out = slice(3072, 4000)
    agree = (moe.router(x_TH[held_out])[0].argmax(-1) == best_T[held_out]).float().mean()
    assert float(agree) > 0.9


def test_the_fitted_size_does_not_prefer_weak_experts_of_a_partition() -> None:
    """Experts are parts of one FFN, stored N times too large; the part that matters must win, not the smallest."""
    moe = layer()
    with torch.no_grad():
        moe.experts.down_proj.mul_(torch.linspace(0.2, 2, N)[:, None, None])
    x_TH = torch.randn(400, H, generator=torch.Generator().manual_seed(0))
    routing = routed(moe, x_TH)
    outs = alone(moe, x_TH)
    target = outs.mean(1)  # with N baked in, the mean is the whole FFN
    strongest = outs.square().sum(-1).argmax(-1)
    agree = {}
    for scale in ("fitted", "alone"):
        best = expert_distances(routing, target, scale).argmin(-1)  # type: ignore[arg-type]
        agree[scale] = float((best == strongest).float().mean())
    assert agree["fitted"] > 0.8
    assert agree["alone"] < 0.1


def test_a_token_that_no_expert_helps_leaves_the_router_alone() -> None:
    moe = layer()
    with torch.no_grad():
        moe.experts.down_proj.zero_()
    routing, target = case(moe)
    Competitive().loss([routing], LossContext(targets=lambda _: target)).backward()
    assert float(moe.router_NH.grad.abs().max()) < 1e-5


def test_autocast_does_not_round_the_distances() -> None:
    routing, target = case(layer())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = expert_distances(routing, target)
    assert torch.equal(rounded, expert_distances(routing, target))


# ---- experts that learn ---------------------------------------------------------------------------------------------

PAPER = Competitive.Options(experts=True, variance=1.0, scale="alone")


def paper_loss(moe: MoeLayer, logits_TN: torch.Tensor, x_TH: torch.Tensor, target_TH: torch.Tensor) -> torch.Tensor:
    """Equation 1.3 of the paper, token by token and expert by expert: -log sum_i p_i exp(-||d - o_i||^2 / 2)."""
    total, width = logits_TN.new_zeros(()), moe.experts.down_proj.shape[2]
    for logits_N, x_H, target_H in zip(logits_TN, x_TH, target_TH, strict=True):
        p_N, likelihood = torch.softmax(logits_N, 0), logits_TN.new_zeros(())
        for p, gate_up, down in zip(p_N, moe.experts.gate_up_proj, moe.experts.down_proj, strict=True):
            gate, up = gate_up[:width] @ x_H, gate_up[width:] @ x_H
            out_H = down @ (gate * torch.sigmoid(gate) * up)
            likelihood = likelihood + p * torch.exp(-(target_H - out_H).square().sum() / 2)
        total = total - torch.log(likelihood)
    return total


def double_case(name: str = "mixtral") -> tuple[MoeLayer, Routing, torch.Tensor]:
    """A layer in float64, the routing of a few tokens whose inputs have a gradient, and their targets."""
    moe = layer(name)
    moe.block.double()
    generator = torch.Generator().manual_seed(3)
    x_TH, target_TH = torch.randn(2, 9, H, generator=generator, dtype=torch.float64)
    return moe, routed(moe, x_TH.requires_grad_()), target_TH


def learned(moe: MoeLayer) -> list[torch.Tensor]:
    return [moe.router_NH, moe.experts.gate_up_proj, moe.experts.down_proj]


@pytest.mark.parametrize("chunk", [1, 10**6])
def test_loss_and_gradients_are_the_paper_s(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", chunk * 2 * N * 8)
    moe, routing, target_TH = double_case()
    found = Competitive(PAPER).loss([routing], LossContext(targets=lambda _: target_TH))
    expected = paper_loss(moe, routing.logits_TN, routing.inputs_TH.detach(), target_TH)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    inputs = [routing.inputs_TH, *learned(moe)]
    ours, theirs = (torch.autograd.grad(each, inputs, retain_graph=True) for each in (found, expected))
    for our, their in zip(ours, theirs, strict=True):
        assert float(our.abs().max()) > 1e-3
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("scale", ["fitted", "alone"])
def test_each_expert_is_drawn_to_what_it_explains(name: str, scale: Any) -> None:
    """The gradient for an expert's output o is s h (s o - r) / sigma^2, where neither size s nor sigma moves."""
    moe, routing, target_TH = double_case(name)
    loss = Competitive(Competitive.Options(experts=True, scale=scale, temperature=0.5))
    value = loss.loss([routing], LossContext(targets=lambda _: target_TH))
    found = torch.autograd.grad(value, moe.experts.down_proj)[0]
    distances_TN = expert_distances(routing, target_TH, scale)
    variance_T1 = 0.5 * distances_TN.mean(-1, keepdim=True)
    posterior_TN = torch.softmax(routing.probabilities_TN.log() - distances_TN / (2 * variance_T1), -1).detach()
    x_TH, width = routing.inputs_TH.detach(), moe.experts.down_proj.shape[2]
    both_TNW = torch.einsum("th,nwh->tnw", x_TH, moe.experts.gate_up_proj.detach())
    h_TNW = moe.experts.act_fn(both_TNW[..., :width]) * both_TNW[..., width:]
    out_TNH = torch.einsum("tnw,nhw->tnh", h_TNW, moe.experts.down_proj.detach())
    size_TN = module._alone(routing)
    if scale == "fitted":
        dots_T, squares_T = (out_TNH * target_TH[:, None]).sum((1, 2)), out_TNH.square().sum((1, 2))
        size_TN = (dots_T / squares_T).clamp(min=0)[:, None].expand(-1, N)
    pull_TNH = (size_TN * posterior_TN / variance_T1)[..., None] * (size_TN[..., None] * out_TNH - target_TH[:, None])
    torch.testing.assert_close(
        found, torch.einsum("tnh,tnw->nhw", pull_TNH, h_TNW), rtol=1e-4, atol=1e-7
    )  # ernie routes in float32


def test_experts_have_no_gradient_unless_they_learn() -> None:
    moe, routing, target_TH = double_case()
    value = Competitive().loss([routing], LossContext(targets=lambda _: target_TH))
    assert torch.autograd.grad(value, learned(moe), allow_unused=True)[1:] == (None, None)


def test_descent_finds_router_and_experts_together() -> None:
    """Each token's target is what one of the experts gave before noise was added to all of them."""
    moe = layer(router_std=1e-3)
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(512, H, generator=generator)
    best_T = (x_TH @ torch.randn(N, H, generator=generator).T).argmax(-1)
    with torch.no_grad():
        target_TH = alone(moe, x_TH)[torch.arange(512), best_T]
        for weights in (moe.experts.gate_up_proj, moe.experts.down_proj):
            weights.add_(0.5 * weights.std() * torch.randn(weights.shape, generator=generator))
    optimiser, loss = torch.optim.Adam(learned(moe), lr=0.03), Competitive(PAPER)

    def distance() -> float:
        routing = routed(moe, x_TH)
        distances_TN = expert_distances(routing, target_TH, "alone")
        return float(distances_TN.gather(-1, routing.logits_TN.argmax(-1, keepdim=True)).mean())

    before = distance()
    for _ in range(60):
        optimiser.zero_grad()
        (loss.loss([routed(moe, x_TH)], LossContext(targets=lambda _: target_TH)) / 512).backward()
        optimiser.step()
    assert distance() < 0.15 * before


def test_training_experts_costs_what_the_estimate_counts() -> None:
    """A forward pass, the same again, and 4/3 of it for gradients: two of the down projections, one of the others."""
    from torch.utils.flop_counter import FlopCounterMode

    moe = layer()
    routing, target_TH = case(moe)
    with FlopCounterMode(display=False) as flops:
        expert_distances(routing, target_TH, learn=True).sum().backward()
    weights = moe.experts.gate_up_proj.numel() + moe.experts.down_proj.numel()
    assert flops.get_total_flops() == pytest.approx(2 * 30 * weights * (2 + 4 / 3))


def test_adapters_of_experts_are_part_of_them() -> None:
    """Distances are those of what the layer computes, and what learns are the adapters."""
    peft = pytest.importorskip("peft")
    model = tiny_moe("mixtral")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    moe = find_moe_layers(peft.get_peft_model(model, config))[0]
    routing, target_TH = case(moe)
    expected_TN = (target_TH[:, None] - alone(moe, routing.inputs_TH)).square().sum(-1)
    found_TN = expert_distances(routing, target_TH, "alone", learn=True)
    torch.testing.assert_close(found_TN, expected_TN, rtol=1e-4, atol=1e-4)
    found_TN.sum().backward()
    learns = {part for part in ("lora_A", "lora_B", "gate_up_proj", "down_proj")
              for name, each in moe.experts.named_parameters() if part in name.split(".") and each.grad is not None}  # fmt: skip
    assert learns == {"lora_A", "lora_B"}
