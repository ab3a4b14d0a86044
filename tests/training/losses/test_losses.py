"""Values against the formulas written out, gradients against finite differences, balance, and ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from llamamoe.training.gates import GATES
from llamamoe.training.losses import LossContext
from llamamoe.training.losses.cv_squared import smooth_load_TN
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.routing import RouterTap, Routing
from tests import forked  # noqa: F401  # what ranks have imported

from ..tiny_moe import H, N, input_ids, routed, tiny_moe
from . import ranks
from .ranks import from_logits, loss

HERE = LossContext()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- values -------------------------------------------------------------------------------------------------------


def test_switch_is_the_formula_layer_by_layer() -> None:
    layers = [torch.randn(20, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    expected = []
    for logits in layers:
        p = softmax(logits.double().numpy())
        f = np.zeros(5)
        for row in p:
            for e in np.argsort(-row)[:2]:
                f[e] += 1 / (20 * 2)
        expected.append(5 * (f * p.mean(0)).sum())
    found = loss("switch").loss([from_logits(logits) for logits in layers], HERE)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-6)
    assert found.dtype == torch.float32


@given(st.integers(2, 6), st.integers(0, 100))
def test_switch_is_one_at_perfect_balance_and_more_for_a_collapsed_router(n: int, seed: int) -> None:
    cycle = torch.stack([torch.arange(n).roll(i) for i in range(n)]).float()
    assert float(loss("switch").loss([from_logits(cycle)], HERE)) == pytest.approx(1, abs=1e-6)
    row = torch.randn(1, n, generator=torch.Generator().manual_seed(seed))
    assert float(loss("switch").loss([from_logits(row.expand(7, n))], HERE)) >= 1 - 1e-6


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    to_first, to_second = torch.tensor([[9.0, 0.0]]).expand(4, 2), torch.tensor([[0.0, 9.0]]).expand(4, 2)
    found = loss("switch").loss([from_logits(to_first, 1), from_logits(to_second, 1)], HERE)
    assert float(found) == pytest.approx(2, rel=1e-3)


def test_switch_counts_what_the_router_wanted_before_capacity() -> None:
    routing = from_logits(torch.tensor([[5.0, 0.0]]).expand(4, 2), 1)
    dropped = Routing(
        routing.moe, routing.logits_TN, routing.weights_Tk, routing.indices_Tk, dropped_Tk=torch.ones(4, 1).bool()
    )
    assert torch.equal(loss("switch").loss([dropped], HERE), loss("switch").loss([routing], HERE))


def test_switch_at_k_times_balance_is_mixtral_s_own_for_one_layer() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    theirs = load_balancing_loss_func((logits,), 4, 2)
    assert float(theirs) == pytest.approx(2 * float(loss("switch").loss([from_logits(logits)], HERE)), rel=1e-5)


def test_cv_squared_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, noise, std = (torch.randn(15, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    std = std.abs() + 0.1
    routing = from_logits(logits, 2, noise, noise_std_TN=std)
    noisy = (logits + noise * std).numpy()
    importance, load = np.zeros(5), np.zeros(5)
    for t in range(15):
        chosen = np.argsort(-noisy[t])[:2]
        importance[chosen] += softmax(noisy[t][chosen])
        for e in range(5):
            threshold = np.sort(np.delete(noisy[t], e))[::-1][1]  # the second largest of the others
            load[e] += norm.cdf((float(logits[t, e]) - threshold) / float(std[t, e]))
    expected = (importance.std() / importance.mean()) ** 2 + (load.std() / load.mean()) ** 2
    assert float(loss("cv_squared").loss([routing], HERE)) == pytest.approx(expected, rel=1e-9)


def test_the_smooth_load_is_the_share_of_fresh_draws_that_select_the_expert() -> None:
    """The estimator means what it says: draw an expert's own noise anew many times, and count."""
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(1, 4, generator=generator), torch.randn(1, 4, generator=generator)
    std = torch.tensor([[0.5, 1.0, 0.7, 2.0]])
    load = smooth_load_TN(from_logits(logits, 2, noise, noise_std_TN=std))[0]
    for e in range(4):
        again = (logits + noise * std).expand(40000, 4).clone()
        again[:, e] = logits[0, e] + std[0, e] * torch.randn(40000, generator=generator)
        share = (again.topk(2, dim=-1)[1] == e).any(-1).float().mean()
        assert float(load[e]) == pytest.approx(float(share), abs=0.01)


def test_cv_squared_without_noise_is_importance_alone_and_says_so() -> None:
    logits = torch.randn(15, 5, generator=torch.Generator().manual_seed(3))
    routing = from_logits(logits)
    importance = np.zeros(5)
    np.add.at(importance, routing.indices_Tk.numpy().ravel(), routing.weights_Tk.double().numpy().ravel())
    found = loss("cv_squared").loss([routing], HERE)
    assert float(found) == pytest.approx((importance.std() / importance.mean()) ** 2, rel=1e-5)
    notes = {name: loss("cv_squared").notes(GATES.get(name)()) for name in ("top_k", "noisy_top_k")}
    assert "importance alone" in notes["top_k"][0]
    assert notes["noisy_top_k"] == []


def test_cv_squared_is_zero_at_perfect_balance() -> None:
    cycle = torch.stack([torch.arange(5).roll(i) for i in range(5)]).double()
    routing = from_logits(cycle, 2, torch.zeros(5, 5), noise_std_TN=torch.ones(5, 5).double())
    assert float(loss("cv_squared").loss([routing], HERE)) == pytest.approx(0, abs=1e-12)
    everything = from_logits(cycle, 5, torch.zeros(5, 5), noise_std_TN=torch.ones(5, 5).double())
    assert float(loss("cv_squared").loss([everything], HERE)) == pytest.approx(0, abs=1e-12)


def test_z_is_a_sum_over_tokens_and_a_mean_over_layers() -> None:
    layers = [torch.randn(8, 5), torch.randn(8, 5)]
    expected = np.mean([sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in x.tolist()) for x in layers])
    found = loss("z").loss([from_logits(x) for x in layers], HERE)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    halves = [loss("z").loss([from_logits(x[part]) for x in layers], HERE) for part in (slice(3), slice(3, 8))]
    assert float(sum(halves)) == pytest.approx(float(found), rel=1e-6)
    balanced = from_logits(torch.full((4, 5), -math.log(5)))
    assert float(loss("z").loss([balanced], HERE)) == pytest.approx(0, abs=1e-10)


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["switch", "z", "cv_squared"])
def test_gradients_for_the_logits(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    logits, noise, std = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    std = (std.abs() + 0.3).requires_grad_()

    def value(logits: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return loss(name).loss([from_logits(logits, 2, noise, noise_std_TN=std)], HERE)

    assert torch.autograd.gradcheck(value, (logits, std))


@pytest.mark.parametrize("name", ["switch", "z"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_gradients_through_native_routers(name: str, architecture: str) -> None:
    moe = find_moe_layers(tiny_moe(architecture).double())[0]
    x_TH = torch.randn(7, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def value(rows: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        found = torch.func.functional_call(moe.router, {"weight": rows}, (x_TH,))
        return loss(name).loss([Routing(moe, *found)], HERE)

    assert torch.autograd.gradcheck(value, (moe.router_NH.detach().requires_grad_(), x_TH.requires_grad_()))


@pytest.mark.parametrize("name", ["switch", "z", "cv_squared"])
@pytest.mark.parametrize("architecture", ["glm4_moe", "granitemoeshared", "ernie4_5_moe", "mixtral"])
def test_gradients_through_routers_that_compute_in_float32(name: str, architecture: str) -> None:
    """Central differences along a random direction, as far as float32 lets them be told."""
    moe = find_moe_layers(tiny_moe(architecture))[0]
    generator = torch.Generator().manual_seed(2)
    x_TH, direction = torch.randn(40, H, generator=generator), torch.randn(N, H, generator=generator)
    start = moe.router_NH.detach().clone()

    def value() -> torch.Tensor:
        return loss(name).loss([routed(moe, x_TH)], HERE)

    value().backward()
    slope = float((moe.router_NH.grad * direction).sum())
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            moe.router_NH.copy_(start + sign * 2e-4 * direction)
            ends.append(float(value()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 4e-4, rel=0.05, abs=2e-3)


@pytest.mark.parametrize("name", ["switch", "cv_squared"])
def test_the_balance_losses_balance_a_router(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.nn.Parameter(torch.randn(64, 8, generator=generator) + torch.arange(8) / 3)
    std = torch.ones(64, 8)

    def routing() -> Routing:
        return from_logits(logits, 2, torch.randn(64, 8, generator=generator), noise_std_TN=std)

    before = from_logits(logits).counts_N().max()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        loss(name).loss([routing()], HERE).backward()
        optimiser.step()
    assert float(from_logits(logits).counts_N().max()) < 0.7 * float(before)


# ---- ranks --------------------------------------------------------------------------------------------------------


def test_two_ranks_are_one_process_with_all_tokens(tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    mp.start_processes(ranks.run, (str(tmp_path),), nprocs=2, start_method="forkserver")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [each["gate"].tolist() for each in found] == [[1.5, 2.5]] * 2
    assert [each["bad"] for each in found] == [[None, (7, 3), (7, 0)]] * 2
    apart = "the processes do not see the same run: one finds checkpoint-40, another none."
    assert [each["checkpoints"] for each in found] == [["the same", "the same", apart]] * 2
    for name in ranks.NAMES:
        rows_NH = ranks.rows()
        value = loss(name).loss([ranks.rank_routing(rows_NH, 0, 1)], HERE)
        value.backward()
        apart = [loss(name).loss([ranks.rank_routing(rows_NH, rank)], HERE).detach() for rank in (0, 1)]
        for rank, expected in zip(found, apart, strict=True):
            torch.testing.assert_close(rank[f"{name}-all_ranks"][0], value.detach())
            torch.testing.assert_close(rank[f"{name}-all_ranks"][1], rows_NH.grad)
            torch.testing.assert_close(rank[f"{name}-micro_batch"][0], expected)
        assert abs(float(sum(apart) / 2 - value.detach())) > 1e-4  # the two windows do differ here


def test_a_whole_model_s_losses_have_gradients_for_every_router() -> None:
    model = tiny_moe("qwen2_moe")
    tap = RouterTap(find_moe_layers(model))
    with tap.armed() as routings:
        model(input_ids=input_ids())
    sum(loss(name).loss(routings, HERE) for name in ("switch", "cv_squared", "z")).backward()
    assert all(float(routing.moe.router_NH.grad.norm()) > 0 for routing in routings)
