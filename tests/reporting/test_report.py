"""The numbers of a report against slow plain references on small models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe import CheckpointError, LlamaMoeError, RefusedError, UsageError, load_recipe, split
from llamamoe.calibration.reading import document_hash
from llamamoe.data.text import read_documents
from llamamoe.evaluation import fitted_text
from llamamoe.reporting import text as report_text
from llamamoe.reporting.report import report
from llamamoe.reporting.routing import js_divergence, overlap

from ..dense import ROUTED, make_dense
from ..training.runs import make_text


def convert(dense: Path, out: Path, target: str, shared: Any) -> Path:
    given = {"method": "random", "num_experts": 5, "top_k": 2, "target": target, "shared": shared}
    split(dense, out, load_recipe(given=given | {"shared_by": "weight_norm", "router_scale": "soft"}), verify=False)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("world")
    dense = make_dense(root / "dense", "llama-tied", num_hidden_layers=3)
    make_text(root / "text", 0, documents=6)
    return {"dense": dense, "text": root / "text", "moe": convert(dense, root / "moe", "qwen2_moe", "1x")}


@pytest.fixture(scope="module")
def found(world: dict[str, Path]) -> dict[str, Any]:
    return report([world["moe"]], [world["text"]], against=world["dense"], dtype="float32")


def tokens_of(world: dict[str, Path]) -> dict[str, list[torch.Tensor]]:
    """Each document as one window, by domain: the documents are shorter than the context."""
    tokenizer = AutoTokenizer.from_pretrained(world["moe"])
    return {
        path.stem: [
            torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]]) for line in path.read_text().splitlines()
        ]
        for path in sorted(world["text"].glob("*.jsonl"))
    }


def plainly(model: Path, ids: torch.Tensor) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """One document: its loss, and of every layer the FFN's inputs and the experts that transformers' router chose."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    for layer in loaded.model.layers:
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        router = next(m for name, m in block.named_children() if name in ("gate", "router"))
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        router.register_forward_hook(lambda _, args, out: chosen.append(out[2]))
    with torch.no_grad():
        logits = loaded(ids).logits[0, :-1]
    loss = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return loss, inputs, chosen


def _flat(node: dict[str, Any]) -> dict[str, Any]:
    """Intervals as two numbers each."""
    ends = {
        f"{key} {i}": end
        for key, value in node.items()
        if isinstance(value, tuple | list)
        for i, end in enumerate(value)
    }
    return ends | {key: value for key, value in node.items() if not isinstance(value, tuple | list)}


def test_losses_are_those_of_evaluate(found: dict[str, Any], world: dict[str, Path]) -> None:
    wanted = llamamoe.evaluate(world["moe"], [world["text"]], against=world["dense"], dtype="float32").to_json()
    pairs = [(found["models"][0]["scores"], wanted["model"]), (found["parent"]["scores"], wanted["against"])]
    pairs.append((found["models"][0]["difference"], wanted["difference"]))
    for ours, theirs in pairs:
        for key in ("overall", "mean_over_domains"):
            assert _flat(ours[key]) == pytest.approx(_flat(theirs[key]), rel=1e-5, abs=1e-7)
        for domain in theirs["domains"]:
            assert _flat(ours["domains"][domain]) == pytest.approx(_flat(theirs["domains"][domain]), rel=1e-5, abs=1e-7)
    assert found["parent"]["difference"] is None
    assert found["parent"]["routing"] is None


def test_load_and_what_follows_from_it(found: dict[str, Any], world: dict[str, Path]) -> None:
    layers = found["models"][0]["routing"]["layers"]
    counts = {domain: np.zeros((3, 5)) for domain in tokens_of(world)}
    halves = {domain: np.zeros((2, 3, 5)) for domain in counts}
    pairs = np.zeros((3, 5, 5))
    for domain, documents in tokens_of(world).items():
        for number, ids in enumerate(documents):
            _, _, chosen = plainly(world["moe"], ids)
            for layer, indices in enumerate(chosen):
                for row in indices.tolist():
                    for i in row:
                        counts[domain][layer, i] += 1
                        halves[domain][number % 2, layer, i] += 1
                        for j in row:
                            pairs[layer, i, j] += 1
    whole = sum(counts.values())
    for at, layer in enumerate(layers):
        share = whole[at] / whole[at].sum()
        assert layer["load"] == pytest.approx(share)
        assert layer["max_violation"] == pytest.approx(share.max() * 5 - 1)
        assert layer["load_entropy"] == pytest.approx(-sum(p * math.log(p) for p in share if p) / math.log(5))
        assert layer["dead_experts"] == int((whole[at] == 0).sum())
        for domain, each in counts.items():
            assert layer["domain_load"][domain] == pytest.approx(each[at] / each[at].sum())
        a, b = (each[at] / each[at].sum() for each in counts.values())
        assert layer["domain_distance"] == pytest.approx(plain_jsd(a, b))
        within = [plain_jsd(*(half[at] / half[at].sum() for half in each)) for each in halves.values()]
        assert layer["within_distance"] == pytest.approx(sum(within) / len(within))
        assert layer["overlap"] == pytest.approx(plain_overlap(pairs[at], 2))


def plain_jsd(p: np.ndarray, q: np.ndarray) -> float:
    middle = (p + q) / 2
    return 0.5 * sum(a * math.log2(a / m) for a, m in zip([*p, *q], [*middle, *middle], strict=True) if a > 0)


def plain_overlap(pairs: np.ndarray, top_k: int) -> float:
    tokens = pairs.trace() / top_k
    each = pairs.diagonal() / tokens
    off = [(i, j) for i in range(len(each)) for j in range(len(each)) if i != j]
    total = sum(each[i] * each[j] for i, j in off)
    chance = {(i, j): each[i] * each[j] * top_k * (top_k - 1) / total for i, j in off}
    return sum(abs(pairs[i, j] / tokens - chance[i, j]) for i, j in off) / sum(chance.values())


@pytest.mark.parametrize(("variant", "target", "shared"), ROUTED, ids=[t for _, t, _ in ROUTED])
def test_the_oracle_runs_every_expert(variant: str, target: str, shared: Any, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    moe = convert(dense, tmp_path / "moe", target, shared)
    make_text(tmp_path / "text", 1, documents=2)
    layers = report([moe], [tmp_path / "text"], dtype="float32")["models"][0]["routing"]["layers"]
    sums = np.zeros((2, 4))  # hits, held, best, all
    tokens = 0
    for documents in tokens_of({"moe": moe, "text": tmp_path / "text"}).values():
        for ids in documents:
            _, inputs, chosen = plainly(moe, ids)
            tokens += ids.shape[1]
            loaded = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
            for at, (x, indices) in enumerate(zip(inputs, chosen, strict=True)):
                layer = loaded.model.layers[at]
                experts = (getattr(layer, "mlp", None) or layer.block_sparse_moe).experts
                with torch.no_grad():
                    one = [
                        experts(x, torch.full((len(x), 1), i), torch.ones(len(x), 1)).norm(dim=1) ** 2 for i in range(5)
                    ]
                for score, row in zip(torch.stack(one, 1).tolist(), indices.tolist(), strict=True):
                    best = sorted(range(5), key=lambda i: -score[i])[:2]
                    sums[at] += [
                        len(set(best) & set(row)),
                        sum(score[i] for i in row),
                        sum(score[i] for i in best),
                        sum(score),
                    ]
    for at, layer in enumerate(layers):
        hits, held, best, every = sums[at]
        assert layer["recall_at_k"] == pytest.approx(hits / tokens / 2, abs=1e-6)
        assert layer["captured"] == pytest.approx(held / best, rel=1e-4)
        assert layer["captured_by_chance"] == pytest.approx(every * 0.4 / best, rel=1e-4)
        assert layer["chance_recall"] == 0.4
        assert (layer["shared_norm"] is not None) == bool(shared)
        assert 0 < layer["routed_norm"] < 10


def test_shared_and_routed_norms(found: dict[str, Any], world: dict[str, Path]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(world["moe"], dtype=torch.float32)
    sums = np.zeros((3, 3))
    for documents in tokens_of(world).values():
        for ids in documents:
            _, inputs, _ = plainly(world["moe"], ids)
            for at, x in enumerate(inputs):
                block = loaded.model.layers[at].mlp
                with torch.no_grad():
                    whole = block(x[None])[0] if not isinstance(block(x[None]), tuple) else block(x[None])[0][0]
                    shared = 0.5 * block.shared_expert(x)
                sums[at] += [each.norm(dim=1).sum() for each in (whole - shared, shared, whole)]
    for at, layer in enumerate(found["models"][0]["routing"]["layers"]):
        assert layer["routed_norm"] == pytest.approx(sums[at, 0] / sums[at, 2], rel=1e-4)
        assert layer["shared_norm"] == pytest.approx(sums[at, 1] / sums[at, 2], rel=1e-4)


def test_nothing_depends_on_the_batch(world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def with_batches(tokens: int) -> dict[str, Any]:
        monkeypatch.setattr(report_text.batches, "__defaults__", (tokens,))
        return report([world["moe"]], [world["text"]], dtype="float32")

    one, many = with_batches(1), with_batches(100_000)
    _same(one["models"][0]["scores"], many["models"][0]["scores"])
    _same(one["models"][0]["routing"]["layers"], many["models"][0]["routing"]["layers"])
    assert one["models"][0]["routing"]["passages"] == many["models"][0]["routing"]["passages"]
    assert one["models"][0]["routing"]["top_tokens"] == many["models"][0]["routing"]["top_tokens"]


def _same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-4, abs=1e-6) if isinstance(a, float) else b)


def test_tokens_and_their_experts(found: dict[str, Any], world: dict[str, Path]) -> None:
    routing = found["models"][0]["routing"]
    assert [each["domain"] for each in routing["passages"]] == ["large", "small"]
    for passage in routing["passages"]:
        assert set("".join(passage["tokens"])) <= set("ABCDEFGHabcdefgh")
        assert {len(each) for each in passage["first_expert"]} == {len(passage["tokens"])}
    times: dict[int, dict[str, dict[int, int]]] = {layer: {} for layer in range(3)}
    tokenizer = AutoTokenizer.from_pretrained(world["moe"])
    loaded = AutoModelForCausalLM.from_pretrained(world["moe"], dtype=torch.float32)
    for documents in tokens_of(world).values():
        for ids in documents:
            with torch.no_grad():
                logits = loaded(ids, output_router_logits=True).router_logits
            for layer, each in enumerate(logits):
                for token, first in zip(ids[0].tolist(), each.argmax(-1).tolist(), strict=True):
                    seen = times[layer].setdefault(tokenizer.decode([token]), {})
                    seen[first] = seen.get(first, 0) + 1
    for layer, experts in enumerate(routing["top_tokens"]):
        for expert, rows in enumerate(experts):
            for token, count, share in rows:
                seen = times[layer][token]
                assert count == seen[expert] >= 3
                assert share == pytest.approx(seen[expert] / sum(seen.values()), abs=1e-4)


@pytest.mark.parametrize(("p", "q", "bits"), [((1, 0), (0, 1), 1.0), ((0.5, 0.5), (0.5, 0.5), 0.0)])
def test_js_divergence(p: tuple[float, ...], q: tuple[float, ...], bits: float) -> None:
    assert js_divergence(np.array(p), np.array(q)) == pytest.approx(bits)


def test_overlap_of_independent_and_of_bound_choices() -> None:
    rng = np.random.default_rng(0)
    free = np.zeros((4, 4))
    for _ in range(20_000):
        i, j = rng.choice(4, 2, replace=False)
        for a in (i, j):
            for b in (i, j):
                free[a, b] += 1
    value = overlap(free, 2)
    assert value is not None
    assert value < 0.02
    bound = np.kron(np.eye(2), np.ones((2, 2))) * 100  # 0 always with 1, 2 always with 3
    assert overlap(bound, 2) == pytest.approx(4 / 3)  # 1 in the place of 1/3, twice; 0 in that of 1/3, four times
    assert overlap(np.eye(3), 1) is None


def test_a_dense_model_beside_a_mixture_is_a_control(world: dict[str, Path]) -> None:
    found = report([world["moe"], world["dense"]], [world["text"]], against=world["dense"], max_tokens=64)
    mixture, control = found["models"]
    assert (control["experts"], control["routing"]) == (None, None)
    assert mixture["experts"] is not None
    assert control["difference"]["mean_over_domains"]["loss"] == pytest.approx(0, abs=1e-6)


def test_text_that_a_model_was_fitted_to_is_a_note(world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    used = [document_hash(next(iter(read_documents([world["text"]]))).text)]
    monkeypatch.setattr(fitted_text, "documents_fitted_to", lambda folder: used if folder.name == "moe" else [])
    notes = report([world["moe"]], [world["text"]], against=world["dense"], max_tokens=16)["notes"]
    assert len(notes) == 1
    assert notes[0].startswith(f"{world['moe']} was fitted to 1 of the ")


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_bad_input(world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is a dense model"):
        report([world["dense"]], [world["text"]])
    with pytest.raises(CheckpointError, match="does not exist"):
        report([world["moe"]], [world["text"]], against=tmp_path / "none")
    with pytest.raises(UsageError, match="from 1 to 4"):
        report([], [world["text"]])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(LlamaMoeError):
        report([world["moe"]], [tmp_path / "empty.txt"])
    (tmp_path / "there.html").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        report([world["moe"]], [world["text"]], out=tmp_path / "there.html")
    with pytest.raises(UsageError, match="not a place for a file"):
        report([world["moe"]], [world["text"]], out=tmp_path / "none" / "page.html")
    for keys, message in (
        ({"max_tokens": -5}, "max_tokens is -5"),
        ({"context_length": 0}, "context_length is 0"),
        ({"dtype": "f"}, "dtype is 'f'"),
    ):
        with pytest.raises(UsageError, match=message):
            report([world["moe"]], [world["text"]], **keys)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot both go to"):
        report([world["moe"]], [world["text"]], out=tmp_path / "one", json_out=tmp_path / "one")
    with pytest.raises(UsageError, match="not a training run"):
        report([world["moe"]], [world["text"]], runs=[tmp_path])
    assert (tmp_path / "there.html").read_text() == "mine"


def test_another_tokenizer_is_compared_by_bytes_only(world: dict[str, Path], tmp_path: Path) -> None:
    other = make_dense(tmp_path / "other", vocab_size=100)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = report([world["moe"]], [world["text"]], against=other, dtype="float32")
    assert found["parent"]["comparable"] == "bits_per_byte"
    assert any("only bits per byte" in each for each in found["notes"])


def test_curves_of_the_run_and_of_no_other(tmp_path: Path) -> None:
    from ..training.runs import make_world, recipe_of

    world = make_world(tmp_path / "world", num_experts=4)
    out = tmp_path / "run"
    model = llamamoe.pretrain(recipe_of(world, "steps=2"), out).model
    make_text(tmp_path / "text", 0, documents=2)
    found = report([model], [tmp_path / "text"])
    [run] = found["training"]
    assert found["models"][0]["name"] == "run/model"
    assert [tokens for tokens, _ in run["train"]] == [128, 256]
    assert len(run["validation"]) == 2
    assert set(run["domain_validation"]) == {"large", "small"}
    with pytest.raises(UsageError, match="is the run of another model"):
        report([world["model"]], [tmp_path / "text"], runs=[out])
