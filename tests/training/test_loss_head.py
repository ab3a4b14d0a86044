"""Losses made inside the model's head against the plain formula on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from llamamoe.errors import CheckpointError
from llamamoe.training.loss_head import IGNORED, KlTarget, LossHead, next_token_labels, token_losses
from tests.training.tiny_moe import ARCHITECTURES, COMMON, input_ids, tiny_moe

H, V, T = 5, 19, 11


def dense(name: str = "llama", **keys: Any) -> Any:
    torch.manual_seed(0)
    keys = {**COMMON, "intermediate_size": 20, "head_dim": 8, **keys}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **keys), dtype=torch.float32)


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Hidden states, heads of both models and labels, two of which are ignored."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"hidden": (T, H), "head": (V, H), "parent_hidden": (T, H + 1), "parent_head": (V, H + 1)}
    found = {k: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for k, size in sizes.items()}
    labels = torch.randint(0, V, (T,), generator=g)
    labels[3] = labels[-1] = IGNORED
    return {**found, "labels": labels}


def target_of(p: dict[str, torch.Tensor], temperature: float = 1.0, top_m: int | None = None) -> KlTarget:
    return KlTarget(p["parent_hidden"], lambda h: h @ p["parent_head"].T, temperature, top_m)


def plain(p: dict[str, torch.Tensor], temperature: float, top_m: int | None) -> torch.Tensor:
    """``[T, 2]``, token by token."""
    rows = []
    for t in range(T):
        if p["labels"][t] == IGNORED:
            rows.append(torch.zeros(2, dtype=p["hidden"].dtype))
            continue
        mine, theirs = p["head"] @ p["hidden"][t], p["parent_head"] @ p["parent_hidden"][t]
        nll = -torch.log(torch.softmax(mine, 0)[p["labels"][t]])
        q, r = torch.softmax(mine / temperature, 0), torch.softmax(theirs / temperature, 0)
        if top_m is not None:
            likeliest = sorted(range(V), key=lambda i: -float(theirs[i]))
            keep, rest = likeliest[:top_m], likeliest[top_m:]
            q, r = (torch.cat([x[keep], x[rest].sum()[None]]) for x in (q, r))
        rows.append(torch.stack([nll, temperature**2 * (r * (r / q).log()).sum()]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("temperature", "top_m"), [(1.0, None), (2.5, None), (1.0, 4), (0.7, 1)])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_values_and_gradients_are_those_of_the_plain_formula(
    dtype: torch.dtype, temperature: float, top_m: int | None, rows: int
) -> None:
    p = problem(dtype=dtype)
    upstream = torch.linspace(-1, 2, 2 * T, dtype=dtype).view(T, 2)
    results = []
    for way in ("plain", "ours"):
        hidden, head = p["hidden"].clone().requires_grad_(), p["head"].clone().requires_grad_()
        if way == "plain":
            losses = plain({**p, "hidden": hidden, "head": head}, temperature, top_m)
        else:
            losses = token_losses(
                lambda h, w=head: h @ w.T,  # type: ignore[misc]
                hidden,
                p["labels"],
                target_of(p, temperature, top_m),
                logits_at_once=rows * V,
                vocab_size=V,
            )
        results.append([losses.detach(), *torch.autograd.grad((losses * upstream).sum(), [hidden, head])])
    for wanted, found in zip(*results, strict=True):
        size = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(found, wanted, rtol=size, atol=size)


@pytest.mark.parametrize("top_m", [None, 3])
def test_finite_differences(top_m: int | None) -> None:
    p = problem()

    def sums(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        target = target_of(p, 1.5, top_m)
        return token_losses(lambda h: h @ head.T, hidden, p["labels"], target, logits_at_once=5 * V, vocab_size=V).sum(
            0
        )

    assert torch.autograd.gradcheck(sums, (p["hidden"].requires_grad_(), p["head"].requires_grad_()))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, V + 3), st.floats(0.3, 4))
def test_likeliest_tokens_and_the_rest_are_a_lower_bound_of_the_full_divergence(
    seed: int, top_m: int, temperature: float
) -> None:
    p = problem(seed)

    def kl(m: int | None) -> torch.Tensor:
        return token_losses(lambda h: h @ p["head"].T, p["hidden"], p["labels"], target_of(p, temperature, m), vocab_size=V)[:, 1]  # fmt: skip

    part, full = kl(top_m), kl(None)
    assert bool((part >= -1e-12).all())
    assert bool((part <= full + 1e-12).all())
    if top_m >= V - 1:
        torch.testing.assert_close(part, full, rtol=1e-9, atol=1e-12)


def test_a_parent_that_is_sure_gives_finite_numbers() -> None:
    sure = torch.full((2, V), -500.0)
    sure[:, 3] = 500.0
    mine = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for logits in (sure, mine.detach()):
        target = KlTarget(logits, lambda h: h, top_m=1)
        losses = token_losses(lambda h: h, mine, torch.tensor([3, 4]), target, vocab_size=V)
        (gradient,) = torch.autograd.grad(losses.sum(), mine)
        assert bool(losses.isfinite().all())
        assert bool(gradient.isfinite().all())


def test_low_precision_logits_are_summed_in_float32() -> None:
    p = problem(dtype=torch.bfloat16)
    losses = token_losses(lambda h: h @ p["head"].T, p["hidden"], p["labels"], target_of(p), vocab_size=V)
    logits = (p["hidden"] @ p["head"].T).double()
    wanted = torch.nn.functional.cross_entropy(logits, p["labels"], reduction="none", ignore_index=IGNORED)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses[:, 0].double(), wanted, rtol=1e-6, atol=1e-6)


def test_tokens_of_the_parent_must_match() -> None:
    p = problem()
    with pytest.raises(ValueError, match="tokens of the parent"):
        token_losses(lambda h: h @ p["head"].T, p["hidden"][1:], p["labels"][1:], target_of(p), vocab_size=V)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("top_m", [None, 5])
def test_no_tensor_grows_with_tokens_times_vocabulary(top_m: int | None) -> None:
    vocabulary, rows = 50, 8
    head = torch.randn(vocabulary, 4).requires_grad_()
    for tokens in (64, 512):
        hidden = torch.randn(tokens, 4).requires_grad_()
        target = KlTarget(torch.randn(tokens, 4), lambda h: h @ head.detach().T, top_m=top_m)
        labels = torch.zeros(tokens, dtype=torch.long)
        with Largest() as largest:
            losses = token_losses(lambda h: h @ head.T, hidden, labels, target, logits_at_once=rows * vocabulary, vocab_size=vocabulary)  # fmt: skip
            losses.sum().backward()
        assert largest.elements <= max(rows * vocabulary, 4 * tokens)


@pytest.mark.parametrize(("rows", "calls"), [(T, 1), (T - 1, 4)])
def test_only_several_chunks_are_computed_twice(rows: int, calls: int) -> None:
    p = problem()
    hidden, seen = p["hidden"].requires_grad_(), []

    def head(h: torch.Tensor) -> torch.Tensor:
        seen.append(len(h))
        return h @ p["head"].T

    token_losses(head, hidden, p["labels"], logits_at_once=rows * V, vocab_size=V).sum().backward()
    assert len(seen) == calls


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "llama", "qwen2", "granite", "gemma"])
def test_every_class_has_the_losses_and_gradients_of_its_own_logits(name: str, tied: bool) -> None:
    keys: dict[str, Any] = {"tie_word_embeddings": tied}
    if name.startswith("granite"):
        keys["logits_scaling"] = 3.0
    model = (tiny_moe(name, **keys) if name in ARCHITECTURES else dense(name, **keys)).train()
    ids, names = input_ids(), set(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    labels = next_token_labels(ids)
    wanted = torch.nn.functional.cross_entropy(
        model(ids, use_cache=False).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    gradients = torch.autograd.grad(wanted.sum(), trained, allow_unused=True)
    head = LossHead(model, logits_at_once=300)
    losses = head(model, {"input_ids": ids, "use_cache": False}, labels)
    torch.testing.assert_close(losses.nll_BT.flatten(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.nll_sum, wanted.sum(), rtol=1e-5, atol=1e-5)
    assert losses.counted_BT.sum() == (ids.shape[1] - 1) * ids.shape[0]
    found = torch.autograd.grad(losses.nll_sum, trained, allow_unused=True)
    for mine, theirs in zip(found, gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(head.logits(model.model(ids).last_hidden_state), model(ids).logits)


def test_the_head_is_itself_again_whatever_happens() -> None:
    model = dense().eval()
    ids = input_ids()
    before = model(ids).logits
    head = LossHead(model)
    with torch.no_grad():
        losses = head(model, {"input_ids": ids}, next_token_labels(ids))
    assert not losses.nll_sum.requires_grad
    with pytest.raises(ValueError, match="tokens of the parent"):
        head(model, {"input_ids": ids}, next_token_labels(ids), KlTarget(torch.zeros(1, 16), model.lm_head))
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(ids).logits, before)


class LowRank(torch.nn.Module):
    """Return the module by which peft replaces a linear layer."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = torch.nn.Linear(base.in_features, 2, bias=False)
        self.b = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def test_a_head_inside_an_adapter_is_asked_as_a_whole() -> None:
    model = dense()
    model.lm_head = LowRank(model.lm_head)
    ids = input_ids()
    labels = next_token_labels(ids)
    wanted = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    found = LossHead(model, logits_at_once=300)(model, {"input_ids": ids}, labels).nll_sum
    torch.testing.assert_close(found, wanted)
    for parameter in (model.lm_head.a.weight, model.lm_head.b.weight):
        mine, theirs = (torch.autograd.grad(x, parameter, retain_graph=True)[0] for x in (found, wanted))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


class Doubling(LlamaForCausalLM):
    """Does something with its logits that nobody knows of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_what_is_not_understood_is_refused() -> None:
    model = Doubling(dense().config)
    ids = input_ids()
    with pytest.raises(CheckpointError, match="not known"):
        LossHead(model)(model, {"input_ids": ids}, next_token_labels(ids))
    with pytest.raises(CheckpointError, match="bends its logits"):
        LossHead(dense("gemma2"))
    with pytest.raises(CheckpointError, match="no output head"):
        LossHead(dense().model)
