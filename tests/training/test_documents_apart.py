"""Documents of a block kept apart: every document as if it were alone, in the model, in the parent and in a run's losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe import UsageError, pretrain
from llamamoe.data.shards import TokenCorpus
from llamamoe.training.batches import model_inputs
from llamamoe.training.parent import load_parent

from .runs import BLOCK, lines_of, make_world, recipe_of
from .tiny_moe import ARCHITECTURES, tiny_moe

EOS = 2
PACKED = [[5, 6, 7, EOS, 9, 8, EOS, EOS, 11, 12, 13, 14], [EOS, 4, 5, EOS, 20, 21, 22, 23, 24, 25, 26, EOS]]


def documents(ids: list[int], separator: int = EOS) -> Iterator[tuple[int, list[int]]]:
    """Yield each document with the place where it begins, its separator included."""
    begin = 0
    for place, token in enumerate(ids):
        if token == separator or place == len(ids) - 1:
            yield begin, ids[begin : place + 1]
            begin = place + 1


def test_positions_begin_again_after_each_separator() -> None:
    found = model_inputs(np.array(PACKED), EOS)["position_ids"].tolist()
    assert found == [[i for _, each in documents(row) for i in range(len(each))] for row in PACKED]
    assert set(model_inputs(np.array(PACKED))) == {"input_ids"}


RUNS = [(name, attention) for name in (*ARCHITECTURES, "sliding") for attention in ("sdpa", "eager")]
RUNS.remove(("granitemoe_swa", "sdpa"))  # its class has no sdpa
RUNS = [run for run in RUNS if run[0] != "qwen3_5_moe_text"]  # see the next test


@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_logits_are_those_of_each_document_alone(name: str, attention: str) -> None:
    keys = {"sliding_window": 3} if name == "sliding" else {}
    model = tiny_moe("mixtral" if name == "sliding" else name, **keys).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        packed = model(**model_inputs(np.array(PACKED), EOS), use_cache=False).logits
        joined = model(**model_inputs(np.array(PACKED)), use_cache=False).logits
        for row, ids in enumerate(PACKED):
            for begin, document in documents(ids):
                alone = model(torch.tensor([document]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, begin : begin + len(document)], alone, rtol=1e-4, atol=1e-5)
    assert float((packed - joined).abs().max()) > 1e-2


def test_they_are_not_kept_apart_where_layers_have_no_attention(tmp_path: Path) -> None:
    world = make_world(tmp_path, variant="qwen3_5_text", target="qwen3_5_moe_text")
    recipe = recipe_of(world, "data.documents=apart")
    with pytest.raises(UsageError, match="documents = apart needs attention in all layers"):
        pretrain(recipe, tmp_path / "run")


def losses_alone(student: Any, parent: Any, ids: list[int], separator: int) -> tuple[float, float]:
    """Cross entropy and distance to the parent, summed over a block, from runs of single documents."""
    nll = kl = 0.0
    for begin, document in documents(ids, separator):
        with torch.no_grad():
            log_q, log_p = (each(torch.tensor([document])).logits[0].log_softmax(-1) for each in (student, parent))
        targets = ids[begin + 1 : begin + 1 + len(document)]  # the last predicts the first token of the next document
        scored = range(len(targets))
        nll -= sum(float(log_q[i, targets[i]]) for i in scored)
        kl += sum(float((log_p[i].exp() * (log_p[i] - log_q[i])).sum()) for i in scored)
    return nll, kl


@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_run_trains_and_measures_documents_alone(attention: str | None, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    keys: dict[str, Any] = {"attn_implementation": attention, "gradient_checkpointing": True}
    recipe = recipe_of(
        world, "steps=1", "data.documents=apart", "router.start_std=null", "data.validation_blocks=null",
        distill={"kl": {}}, **keys,
    )  # fmt: skip
    pretrain(recipe, tmp_path / "run")
    student = AutoModelForCausalLM.from_pretrained(world["model"], dtype=torch.float32).eval()
    parent = load_parent(Path(world["parent"]), Path(world["model"]), dtype="float32").model
    before, step = (line for line in lines_of(tmp_path / "run")[:2])
    held_out = TokenCorpus(world["validation"])
    separator = held_out.index.eos_token_id
    for domain, loss in before["domain_loss"].items():
        blocks = [held_out.block(domain, i, BLOCK).tolist() for i in range(held_out.num_blocks(domain, BLOCK))]
        assert any(separator in ids[:-1] for ids in blocks)
        expected = sum(losses_alone(student, parent, ids, separator)[0] for ids in blocks) / len(blocks) / (BLOCK - 1)
        assert loss == pytest.approx(expected, rel=1e-5)
    from llamamoe.training.mixtures.sampler import MixtureSampler
    from llamamoe.training.mixtures.weights import mixture_weights

    corpus = TokenCorpus(world["train"])
    sizes = {name: corpus.num_blocks(name, BLOCK) for name in corpus.domains}
    weights = mixture_weights("proportional", {name: corpus.tokens(name) for name in corpus.domains})
    drawn = MixtureSampler(sizes, weights, recipe.batch_size, recipe.seed).batch(0)
    batch = corpus.gather(drawn.domain_B, drawn.block_B, BLOCK).tolist()
    nll, kl = (
        sum(each) for each in zip(*(losses_alone(student, parent, ids, separator) for ids in batch), strict=True)
    )
    assert step["terms"]["lm"] == pytest.approx(nll / 8 / (BLOCK - 1), rel=1e-5)
    assert step["terms"]["kl"] == pytest.approx(kl / 8 / (BLOCK - 1), rel=1e-4, abs=1e-6)
