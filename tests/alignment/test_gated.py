"""The gated FFN: what it computes, and its gradients by differences."""

from __future__ import annotations

import pytest
import torch

from llamamoe.alignment.choices import Choices
from llamamoe.alignment.gated import GatedFfn
from llamamoe.methods.layer import FfnWeights

B, H, F, N = 5, 6, 10, 4
ACTS = ["silu", "gelu_pytorch_tanh"]


def random_ffn(hidden_act: str = "silu") -> FfnWeights:
    g = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((F, H), (F, H), (H, F)))
    return FfnWeights(gate, up, down, torch.ones(H, dtype=torch.float64), hidden_act)


def random_inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, B, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_choices(**keys: object) -> Choices:
    """Three neurons shared, one omitted, the others in four experts, two selected."""
    g = torch.Generator().manual_seed(2)
    labels = torch.tensor([4, 4, 4, 0, 1, 2, 3, 0, 1, 5])
    one_hot = torch.nn.functional.one_hot(labels, N + 2).double()
    rows = torch.randn(N, H, generator=g, dtype=torch.float64)
    values: dict[str, object] = {"rows_NH": rows, "assignment_FC": one_hot, "top_k": 2, "coefficient": 1.5}
    return Choices(**{**values, "temperature": 0.7, **keys})  # type: ignore[arg-type]


def gated(hidden_act: str, choices: Choices | None) -> GatedFfn:
    module = GatedFfn(random_ffn(hidden_act), torch.device("cpu"), torch.float64)
    module.choices = choices
    return module


@pytest.mark.parametrize("act", ACTS)
def test_without_choices_it_is_the_parent(act: str) -> None:
    ffn, x = random_ffn(act), random_inputs()
    function = torch.nn.functional.silu if act == "silu" else lambda v: torch.nn.functional.gelu(v, approximate="tanh")
    want = (function(x @ ffn.gate_FH.T) * (x @ ffn.up_FH.T)) @ ffn.down_HF.T
    torch.testing.assert_close(gated(act, None)(x), want)


def test_it_computes_selected_experts_shared_neurons_and_no_omitted_ones() -> None:
    ffn, x = random_ffn(), random_inputs()
    scales = torch.linspace(0.5, 1.5, F, dtype=torch.float64)
    choices = random_choices(scales_F=scales)
    members = {0: [3, 7], 1: [4, 8], 2: [5], 3: [6]}
    h = torch.nn.functional.silu(x[0] @ ffn.gate_FH.T) * (x[0] @ ffn.up_FH.T)
    for token in range(B):
        want = sum(scales[j] * h[token, j] * ffn.down_HF[:, j] for j in (0, 1, 2))
        best = sorted(range(N), key=lambda i: -float(choices.rows_NH[i] @ x[0, token]))[:2]
        want = want + sum(1.5 * scales[j] * h[token, j] * ffn.down_HF[:, j] for i in best for j in members[i])
        torch.testing.assert_close(gated("silu", choices)(x)[0, token], want)


@pytest.mark.parametrize("act", ACTS)
def test_gradients_by_differences(act: str) -> None:
    """Of a soft choice, which is what the hard one passes its gradients through: inputs, router, places, weights."""
    g = torch.Generator().manual_seed(3)
    plan = torch.rand(F, N + 2, generator=g, dtype=torch.float64)
    ffn = random_ffn(act)

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        x, rows, places, scales, gate, up, down = leaves
        # the spread of the logits is a unit, not a function: it is divided by, so that it is the same for all differences
        rows = rows / _spread_of(x, rows)
        choices = random_choices(
            rows_NH=rows, assignment_FC=places, scales_F=scales, weights=(gate, up, down), relaxed=True
        )
        out: torch.Tensor = gated(act, choices)(x)
        return out

    scales = torch.rand(F, generator=g, dtype=torch.float64) + 0.5
    leaves = random_inputs(), random_choices().rows_NH, plan, scales, ffn.gate_FH, ffn.up_FH, ffn.down_HF
    assert torch.autograd.gradcheck(run, [leaf.clone().requires_grad_() for leaf in leaves])


def _spread_of(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    logits = x[0] @ rows.T
    return (logits - logits.mean(1, keepdim=True)).square().mean().sqrt()


def test_the_hard_choice_has_the_gradient_of_the_soft_one_at_its_own_outputs() -> None:
    """Straight through: with an output that is linear in the choice, the router's gradient is the soft choice's."""
    x = random_inputs()
    found = []
    for relaxed in (False, True):
        rows = random_choices().rows_NH.clone().requires_grad_()
        values = random_choices(rows_NH=rows, relaxed=relaxed).values(x[0])
        (values * torch.arange(values.numel()).view_as(values)).sum().backward()  # type: ignore[no-untyped-call]
        assert rows.grad is not None
        found.append(rows.grad)
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0].abs().max()) > 0


def test_frozen_weights_get_no_gradient() -> None:
    choices = random_choices()
    choices.assignment_FC.requires_grad_()
    module = gated("silu", choices)
    x = random_inputs().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert choices.assignment_FC.grad is not None
    assert all(weight.grad is None for weight in module.parent)
