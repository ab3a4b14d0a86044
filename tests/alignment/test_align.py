"""Learning through the whole model: its gradient, its promises, and a model whose experts are known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llamamoe.alignment import align as module
from llamamoe.alignment.align import Aligned, Alignment
from llamamoe.alignment.assignment import Assignment
from llamamoe.alignment.choices import Choices
from llamamoe.alignment.layers import AlignedLayer, Start
from llamamoe.alignment.recipe import AlignmentOptions
from llamamoe.alignment.states import States
from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.calibration.compute import Compute
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import LayerContext, Partition
from llamamoe.progress import Progress
from tests.dense import make_dense

CPU = Compute(torch.device("cpu"), torch.float32)
N, K, SHARED, F = 4, 2, 12, 172
STEP = 3e-3
"""Of differences: logits are float32."""
OPTIONS = AlignmentOptions(tokens=1024, batch=48, checks=3, refresh=2, lr_assignment=1.0)


def open_model(folder: Path) -> DenseModel:
    return understand(open_checkpoint(locate(folder)))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return open_model(make_dense(tmp_path_factory.mktemp("parent") / "dense"))


def text(sequences: int = 22, length: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 128, (sequences, length))


def start(layer: int, *, top_k: int = K, seed: int = 0, size: int = F, shared: int = SHARED, hidden: int = 64) -> Start:
    """A random partition, random router rows."""
    rng = np.random.default_rng([seed, layer])
    order = rng.permutation(size)
    width = -(-(size - shared) // N)
    context = LayerContext(layer, N, top_k, width, 0)
    neurons = np.sort(order[shared:])
    labels = rng.permutation(np.arange(len(neurons)) % N)
    made = Partition.from_labels(neurons, labels, context, np.sort(order[:shared]))
    rows = torch.from_numpy(rng.normal(size=(N, hidden))).float()
    part = Partition(made.experts, made.shared, made.omitted, rows)
    return Start(AlignedLayer(part), context, 1.0)


def starts(**keys: Any) -> dict[int, Start]:
    return {layer: start(layer, **keys) for layer in range(2)}


def run(model: DenseModel, options: AlignmentOptions = OPTIONS, **keys: Any) -> Aligned:
    first = keys.pop("starts", None) or starts()
    ids = keys.pop("ids", None)
    found = text() if ids is None else ids
    return Alignment(model, first, found, options, CPU, weights_dtype=torch.float32, **keys).run()


def same(one: Aligned, other: Aligned) -> bool:
    def arrays(each: AlignedLayer) -> list[Any]:
        part = each.partition
        return [part.experts, part.shared, part.omitted, part.router_NH, each.scales_F, *(each.matrices or ())]

    return one.facts == other.facts and all(
        (a is None and b is None) or np.array_equal(a, b)
        for layer in one.layers
        for a, b in zip(arrays(one.layers[layer]), arrays(other.layers[layer]), strict=True)
    )


@pytest.mark.parametrize("weights", ["frozen", "scales", "ffn"])
def test_it_comes_nearer_to_the_parent_and_keeps_its_promises(weights: Any, parent: DenseModel) -> None:
    options = OPTIONS.model_copy(update={"weights": weights})
    found = run(parent, options)
    record = [each["kl"] for each in found.facts["held_out_kl"]]
    assert min(record) < record[0]
    for layer, each in found.layers.items():
        each.partition.check(F)
        assert len(each.partition.shared) == SHARED
        assert (each.scales_F is not None) == (weights == "scales")
        assert (each.matrices is not None) == (weights == "ffn")
        before = start(layer).partition
        assert each.partition.router_NH is not None
        assert not torch.equal(each.partition.router_NH, before.router_NH)  # type: ignore[arg-type]
    assert any(found.facts["moved_neurons"].values())


def test_what_it_measures_is_what_transformers_computes(parent: DenseModel, tmp_path: Path) -> None:
    """KL at the start, of a model in which transformers' own FFN is replaced by experts written out."""
    ids = text()
    job = Alignment(parent, starts(), ids, OPTIONS, CPU, weights_dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(parent.checkpoint.path)
    student = AutoModelForCausalLM.from_pretrained(parent.checkpoint.path)
    for layer, block in enumerate(student.model.layers):
        block.mlp = _Experts(block.mlp, start(layer).partition)
    held_out = torch.from_numpy(ids[: len(job.held_out_ST)])
    with torch.no_grad():
        p, q = (m(held_out).logits.log_softmax(-1).double() for m in (dense, student))
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert job.held_out() == pytest.approx(want, rel=1e-4)


class _Experts(torch.nn.Module):
    """A loop over tokens and experts."""

    def __init__(self, mlp: Any, partition: Partition) -> None:
        super().__init__()
        self.mlp, self.partition = mlp, partition

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        mlp, rows = self.mlp, self.partition.router_NH
        assert rows is not None
        out = []
        for x in x_BSH.flatten(0, -2):
            best = (rows @ x).topk(K).indices.tolist()
            used = np.concatenate([self.partition.shared, *(self.partition.experts[i] for i in best)])
            used = torch.from_numpy(used[used >= 0])
            h = torch.nn.functional.silu(mlp.gate_proj.weight[used] @ x) * (mlp.up_proj.weight[used] @ x)
            out.append(mlp.down_proj.weight[:, used] @ h)
        return torch.stack(out).view_as(x_BSH)


def test_gradient_of_the_whole_model_by_differences(parent: DenseModel) -> None:
    """Of the KL with soft choices, at rows, plan and weights of the first layer, through everything above it."""
    compute = Compute(torch.device("cpu"), torch.float64)
    options = OPTIONS.model_copy(update={"batch": 16})
    job = Alignment(parent, {0: start(0)}, text(4), options, compute, weights_dtype=torch.float64)
    ids = job.ids_ST[:2]
    first = job.layers[0]
    first.rows_NH = first.rows_NH.detach().double()
    assert first.weights is not None
    first.weights = tuple(w.detach().double() for w in first.weights)
    places = first.assignment.plan(1.0).double()
    leaves = [first.rows_NH, places, *first.weights]

    def loss() -> torch.Tensor:
        def choose(temperature: float, *, learning: bool) -> None:
            first.ffn.choices = Choices(leaves[0], leaves[1], K, 1.0, temperature, None, leaves[2:], relaxed=True)

        first.choose = choose  # type: ignore[method-assign]
        return job.loss(ids, 1.0, learning=True)

    for leaf in leaves:
        leaf.requires_grad_()
    gradients = torch.autograd.grad(loss(), leaves)
    assert all(float(g.abs().max()) > 0 for g in gradients)
    for leaf, gradient in zip(leaves[1:], gradients[1:], strict=True):
        index = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf[index] += sign * STEP
            slopes.append(float(loss().detach()))
            with torch.no_grad():
                leaf[index] -= sign * STEP
        # float32 sums of the loss bound what a difference can show
        assert float(gradient[index]) == pytest.approx((slopes[0] - slopes[1]) / (2 * STEP), rel=1e-2)


def test_with_all_experts_selected_nothing_is_lost_and_nothing_changes(parent: DenseModel) -> None:
    found = run(parent, starts=starts(top_k=N))
    assert found.facts["held_out_kl"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found.facts["kept_step"] == 0
    for layer, each in found.layers.items():
        assert np.array_equal(each.partition.slots, start(layer).partition.slots)


def test_the_start_is_kept_if_nothing_is_better(parent: DenseModel) -> None:
    found = run(parent, OPTIONS.model_copy(update={"lr_weights": 100.0}))
    assert found.facts["kept_step"] == 0
    assert not any(found.facts["moved_neurons"].values())
    kept = found.layers[0].matrices
    assert kept is not None
    assert torch.equal(kept[0], parent.read("model.layers.0.mlp.gate_proj.weight").float())


def test_without_a_rate_no_neuron_moves_and_no_row(parent: DenseModel) -> None:
    still = run(parent, OPTIONS.model_copy(update={"lr_assignment": 0.0}))
    assert not any(still.facts["moved_neurons"].values())
    rows = run(parent, OPTIONS.model_copy(update={"lr_router": 0.0})).layers[0].partition.router_NH
    assert rows is not None
    assert torch.equal(rows, start(0).partition.router_NH)  # type: ignore[arg-type]


def test_it_prunes_where_there_is_nothing_to_route(parent: DenseModel) -> None:
    """The control: a mask of neurons, learned in the same way."""

    def pruned(layer: int) -> Start:
        order = np.random.default_rng(layer).permutation(F)
        context = LayerContext(layer, 0, 0, 0, 0)
        part = Partition(np.empty((0, 0), np.int64), np.sort(order[:86]), np.sort(order[86:]))
        return Start(AlignedLayer(part), context, 0.0)

    found = run(parent, starts={layer: pruned(layer) for layer in range(2)})
    record = [each["kl"] for each in found.facts["held_out_kl"]]
    assert min(record) < record[0]
    assert any(found.facts["moved_neurons"].values())
    assert all(len(each.partition.shared) == 86 for each in found.layers.values())


class _StopError(Exception):
    pass


def stop_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.done == step:
            raise _StopError

    return report


@pytest.mark.parametrize("weights", ["frozen", "ffn"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_stopped_run_goes_on_with_the_same_bytes(
    stop: int, weights: Any, parent: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_STATES", -1.0)  # a state before every step
    options = OPTIONS.model_copy(update={"weights": weights})
    whole = run(parent, options)
    with pytest.raises(_StopError):
        run(parent, options, folder=tmp_path, progress=stop_at(stop))
    steps: list[int] = []
    assert same(whole, run(parent, options, folder=tmp_path, progress=lambda p: steps.append(p.done)))
    assert steps[0] == stop  # the step that was under way is done again, and none before it


def test_a_state_is_loaded_onto_the_device_whole(parent: DenseModel, tmp_path: Path) -> None:
    """A fused step on a GPU refuses a number of steps on the CPU."""
    run(parent, folder=tmp_path)
    other = Alignment(parent, starts(), text(), OPTIONS, CPU, weights_dtype=torch.float32)
    for each in other.layers.values():
        each.rows_NH = each.rows_NH.detach().to("meta")
        each.assignment.logits_FC = each.assignment.logits_FC.detach().to("meta")
        each.weights = tuple(weight.detach().to("meta") for weight in each.weights or ())
    parameters = [value for each in other.layers.values() for value in each.parameters.values()]
    optimizer = torch.optim.Adam(parameters)
    assert States(tmp_path, other.layers, optimizer).load() is not None
    assert len(optimizer.state) == len(parameters)
    assert {value.device.type for state in optimizer.state.values() for value in state.values()} == {"meta"}


@pytest.fixture(scope="module")
def whole(parent: DenseModel) -> Aligned:
    return run(parent)


@pytest.mark.parametrize(
    ("file", "place"),
    [("state.safetensors", 0.01), ("state.safetensors", 0.5), ("state.safetensors", 0.99), ("state.sha256", 0.5)],
)
def test_a_damaged_state_is_not_gone_on_from(
    file: str, place: float, parent: DenseModel, whole: Aligned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the damage is: step and record count as much as what is learned."""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_STATES", -1.0)
    with pytest.raises(_StopError):
        run(parent, folder=tmp_path, progress=stop_at(3))
    data = bytearray((tmp_path / file).read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / file).write_bytes(data)
    steps: list[int] = []
    assert same(whole, run(parent, folder=tmp_path, progress=lambda p: steps.append(p.done)))
    assert steps[0] == 1


def test_all_of_a_state_is_under_its_hash(parent: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_STATES", -1.0)
    with pytest.raises(_StopError):
        run(parent, folder=tmp_path, progress=stop_at(3))
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found.keys() == {"state.safetensors", "state.sha256"}
    assert found["state.sha256"].decode().strip() == hashlib.sha256(found["state.safetensors"]).hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_cannot_be_measured_is_an_error(
    value: float, parent: DenseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is less than nothing, and would have been the best state."""
    readings = iter([1.0, value, 0.5, 0.5])
    monkeypatch.setattr(Alignment, "held_out", lambda self: next(readings))
    with pytest.raises(LlamaMoeError, match=rf"predictions is {value} at step \d+ of the alignment"):
        run(parent)


def test_logits_that_are_not_finite_are_an_error(parent: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull_back(self: Assignment, gradient_FC: torch.Tensor, temperature: float) -> None:
        self.logits_FC.grad = torch.full_like(self.logits_FC, float("nan"))

    monkeypatch.setattr(Assignment, "pull_back", pull_back)
    with pytest.raises(LlamaMoeError, match=r"logits is nan at step 2 of the alignment"):
        run(parent)


@pytest.mark.parametrize(
    ("key", "value"),
    [("checks", 10**12), ("batch", 10**30), ("refresh", 10**30), ("margin", 1e308), ("margin", 1e-308), ("reach", 1e308),
     ("lr_assignment", 1e308), ("lr_router", 1e308), ("lr_weights", 1e308), ("lr_scale", 1e308), ("tau_start", 1e-320),
     ("tau_end", 1e308), ("router_start", 1e-320), ("router_end", 1e308)],
)  # fmt: skip
def test_numbers_that_float32_or_memory_cannot_hold_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        AlignmentOptions(**{key: value})


def test_too_little_text_is_one_error(parent: DenseModel) -> None:
    with pytest.raises(LlamaMoeError, match=r"the text gives 1 sequence of 16 tokens, which is held out"):
        run(parent, ids=text(1))


def test_a_step_takes_what_there_is(parent: DenseModel) -> None:
    assert run(parent, OPTIONS.model_copy(update={"batch": 4096}), ids=text(3)).facts["steps"] == 1


# ---- a model whose experts are known ------------------------------------------------------------------------------

GROUPS, WIDTH, HIDDEN = 4, 12, 32


def planted(folder: Path) -> tuple[DenseModel, np.ndarray]:
    """Tokens of four groups, each of which switches on 12 of 48 neurons; the neurons are shuffled. And whose they are."""
    size, vocabulary = GROUPS * WIDTH, 64
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=size, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=vocabulary, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    owner = np.random.default_rng(0).permutation(np.arange(size) % GROUPS)
    with torch.no_grad():
        # the first four dimensions say the group
        embedding = torch.randn(vocabulary, HIDDEN)
        embedding[:, :GROUPS] = 4 * torch.eye(GROUPS)[torch.arange(vocabulary) % GROUPS]
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.normal_(std=0.5)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        gate = 0.05 * torch.randn(size, HIDDEN)
        gate[:, :GROUPS] = torch.where(torch.eye(GROUPS, dtype=torch.bool)[torch.from_numpy(owner)], 2.0, -4.0)
        layer.mlp.gate_proj.weight.copy_(gate)
        layer.mlp.up_proj.weight.normal_(std=0.3)
        layer.mlp.down_proj.weight.normal_(std=0.1)
    model.save_pretrained(folder)
    return open_model(folder), owner


def agreement(partition: Partition, owner: np.ndarray) -> float:
    """Largest share of the neurons that is where it belongs, over all ways to name the experts."""
    counts = np.array([[np.sum(owner[expert] == group) for group in range(GROUPS)] for expert in partition.experts])
    rows, columns = linear_sum_assignment(-counts)
    return float(counts[rows, columns].sum() / len(owner))


@pytest.mark.parametrize("seed", [3, 4])
def test_planted_experts_are_found(seed: int, tmp_path: Path) -> None:
    """From a random partition, by a router that begins at random, with the weights frozen."""
    model, owner = planted(tmp_path / "planted")
    ids = np.random.default_rng(1).integers(0, 64, (1100, 16))
    first = {0: start(0, top_k=1, size=GROUPS * WIDTH, shared=0, hidden=HIDDEN, seed=seed)}
    options = AlignmentOptions(
        tokens=16384, batch=64, weights="frozen", lr_assignment=1.0, reach=3.0, lr_router=0.15, refresh=2
    )
    found = run(model, options, starts=first, ids=ids)
    assert agreement(first[0].partition, owner) < 0.6
    assert agreement(found.layers[0].partition, owner) >= 0.95
