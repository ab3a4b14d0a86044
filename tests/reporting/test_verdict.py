"""The verdict on a conversion: what it lost and gained, and what to do next."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llamamoe.reporting.page_values import series_of
from llamamoe.reporting.page_verdict import Verdict, verdicts
from llamamoe.reporting.page_words import ffn_share, undecided

from .sample import Size, report


def judged(
    factor: float, *, tokens: int | None = 65536, trained: bool = False, share: float = 0.5, interval: bool = True
) -> Verdict:
    """The verdict on a model with that perplexity over the parent's and share of the FFN."""
    found = report(Size(models=1))
    (model,) = found["models"]
    loss = math.log(factor)
    model["difference"]["mean_over_domains"] |= {
        "loss": loss,
        "loss_interval": [loss - 0.01, loss + 0.01] if interval else None,
    }
    model["provenance"] |= {"calibration_tokens": tokens, "trained": trained}
    whole = found["parent"]["cost"]["parts"]["dense_ffn"]["total"]
    for part in ("router", "routed", "dense_ffn"):
        model["cost"]["parts"][part]["active"] = 0
    model["cost"]["parts"]["shared"]["active"] = int(share * whole)
    (verdict,) = verdicts(series_of(found))
    return verdict


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"factor": 1.0}, "next to nothing"),
        ({"factor": 1.5}, "usual for half of the FFN"),
        ({"factor": 1.5, "share": 0.25}, "For comparison: with half of the FFN"),
        ({"factor": 3.4, "tokens": 4096}, "calibrated on only 4\u202f096 tokens"),
        ({"factor": 3.4}, "more than usual for half of the FFN"),
        ({"factor": 3.4, "trained": True}, "whether more training still helps"),
        ({"factor": 1e6, "tokens": None}, "not usable as it is"),
    ],
)
def test_the_loss_is_judged(given: dict[str, Any], words: str) -> None:
    assert words in judged(**given).lost


def test_the_interval_is_of_the_factor() -> None:
    assert "3.40 times the parent’s (95 % interval: 3.37 to 3.43)" in judged(3.4).lost
    assert "too small for an interval: measure on more" in judged(3.4, interval=False).lost
    assert "too small" not in judged(3.4).lost


def test_without_an_interval_domains_of_one_document_are_named() -> None:
    found = report(Size(models=1))
    (model,) = found["models"]
    model["difference"]["mean_over_domains"]["loss_interval"] = None
    first, *_ = model["scores"]["domains"]
    model["scores"]["domains"][first]["documents"] = 1
    (verdict,) = verdicts(series_of(found))
    assert f"because of “{first}” only one document was measured: give more documents" in verdict.lost


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({"factor": 3.4, "tokens": 4096}, "`--calibration-tokens 65536`"),
        ({"factor": 3.4, "tokens": None}, "`--calibration texts/`"),
        ({"factor": 3.4}, "more and narrower experts (`--prefer quality`)"),
        ({"factor": 1.5}, "then `llamamoe pretrain --recipe smollm2_cpu --model "),
        ({"factor": 1.2, "trained": True}, "Compare it with static pruning"),
    ],
)
def test_the_next_step_is_the_most_useful_one(given: dict[str, Any], first: str) -> None:
    steps = judged(**given).next
    assert first in steps[0]
    assert "export-gguf" in steps[-1]


@pytest.mark.parametrize("made", ["mix", "resplit"])
def test_what_split_did_not_make_alone_is_not_to_be_split_again(made: str) -> None:
    found = report(Size(models=1))
    found["models"][0]["provenance"] |= {"calibration_tokens": None, "block": {"target": "mixtral", made: {}}}
    (verdict,) = verdicts(series_of(found))
    text = " ".join(verdict.next)
    assert "`llamamoe pretrain" in text
    assert "Convert again" not in text
    assert "--method static" not in text


def test_the_share_is_of_what_a_token_uses_in_a_parent_that_is_a_mixture() -> None:
    found = report(Size(models=1))
    (model,) = found["models"]
    assert ffn_share(model, model) == 1.0


@pytest.mark.parametrize(
    ("parameters", "recipe"), [(1e8, "smollm2_cpu"), (7e9, "recover_distill"), (7e10, "recover_70b --model healed")]
)
def test_the_recipe_of_training_fits_the_size(parameters: float, recipe: str) -> None:
    found = report(Size(models=1))
    found["parent"]["cost"]["total_parameters"] = parameters
    (verdict,) = verdicts(series_of(found))
    assert any(f"`llamamoe pretrain --recipe {recipe} " in step for step in verdict.next)


@pytest.mark.parametrize(
    ("target", "runs", "words"),
    [
        ("mixtral", True, "`llamamoe export-gguf smollm2-moe "),
        ("qwen2_moe", True, "A trained qwen2_moe does not run in llama.cpp"),
        ("glm4_moe", False, "llama.cpp does not compute this model"),
    ],
)
def test_llama_cpp_is_advised_where_it_computes_the_model(target: str, runs: bool, words: str) -> None:
    found = report(Size(models=1))
    found["models"][0] |= {"target": target, "llama_cpp": runs}
    (verdict,) = verdicts(series_of(found))
    text = " ".join(verdict.next)
    assert words in text
    assert ("granitemoeshared" in text) == (target != "mixtral")
    assert ("export-gguf" in text) == runs
    assert ("--program llama.cpp" in verdict.gained) == runs


@pytest.mark.parametrize(
    ("pruned", "words"), [(0.3, "loses no more (1.35 times)"), (0.6, "the router is worth its cost")]
)
def test_a_pruned_model_beside_it_is_the_control(pruned: float, words: str) -> None:
    found = report(Size(models=2))
    first, control = found["models"]
    first["difference"]["mean_over_domains"]["loss"] = 0.4
    control |= {"name": "pruned", "experts": None, "routing": None}
    control["difference"]["mean_over_domains"]["loss"] = pruned
    (verdict,) = verdicts(series_of(found))
    assert any(words in step and "pruned" in step for step in verdict.next)
    assert not any("Compare it with static pruning" in step for step in verdict.next)


def test_without_a_parent_there_is_no_verdict() -> None:
    assert verdicts(series_of(report(parent=False))) == []


@pytest.mark.parametrize(("lowest", "hard"), [(0.9995, True), (0.99, False)])
def test_a_router_whose_experts_tie_is_found(lowest: float, hard: bool) -> None:
    (model, _) = report()["models"]
    for layer in model["routing"]["layers"]:
        layer["router_entropy"] = 0.9999
    model["routing"]["layers"][0]["router_entropy"] = lowest
    assert undecided(model) is hard


def test_commands_take_the_models_as_they_were_given() -> None:
    found = report(Size(models=1))
    (model,) = found["models"]
    model["place"], found["parent"]["place"] = "out/my-moe", "models/dense"
    model["difference"]["mean_over_domains"]["loss"] = 1.0
    (verdict,) = verdicts(series_of(found))
    assert "`llamamoe bench out/my-moe --against models/dense --experts llamamoe_auto`" in verdict.gained
    assert "`llamamoe bench out/my-moe --against models/dense --program llama.cpp`" in verdict.gained
    assert any("--model out/my-moe --parent models/dense " in step for step in verdict.next)
    assert any("`llamamoe export-gguf out/my-moe " in step for step in verdict.next)


def test_a_parent_that_llama_cpp_does_not_run_is_not_measured_there() -> None:
    found = report(Size(models=1))
    found["parent"]["llama_cpp"] = False
    (verdict,) = verdicts(series_of(found))
    assert "`llamamoe bench smollm2-moe --program llama.cpp`" in verdict.gained
