"""Proposals for a name that does not exist: typing errors only, and never a list that fills the screen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llamamoe.architectures.dense_checkpoint import understand
from llamamoe.architectures.sources import SOURCES
from llamamoe.architectures.targets import TARGETS
from llamamoe.errors import CheckpointError, near_misses
from llamamoe.methods.splitters import SPLITTERS


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("kmean", "kmeans"), ("KMeans", "kmeans"), ("token-clusters", "token_clusters"), ("rand", "random"),
        ("coactivations", "coactivation"), ("clustershared", "cluster_shared"),
    ],
)  # fmt: skip
def test_typing_errors_are_recognised(typed: str, meant: str) -> None:
    assert near_misses(typed, SPLITTERS.names()).startswith(f"Did you mean '{meant}'")


@pytest.mark.parametrize("typed", ["stablelm", "moe", "banana", "x", "", "svd", "pca", "clip", "graphs"])
def test_other_words_bring_no_proposal(typed: str) -> None:
    for names in (SPLITTERS.names(), TARGETS.names()):
        assert near_misses(typed, names) == f"Known: {', '.join(names)}."


@pytest.mark.parametrize("model_type", ["stablelm", "llama4", "qwen2_vl", "mistral3", "phi", "gemma2", "granitemoe"])
def test_another_family_is_not_a_typing_error(model_type: str, tmp_path: Path) -> None:
    checkpoint = SimpleNamespace(path=tmp_path, config={"model_type": model_type}, tensors={}, notes=[])
    with pytest.raises(CheckpointError) as error:
        understand(checkpoint)  # type: ignore[arg-type]
    assert error.value.hint == f"Known: {', '.join(SOURCES.names())}."


def test_thousands_of_names_are_counted() -> None:
    names = [f"task_{number}" for number in range(5000)]
    assert near_misses("task_77x", names).startswith("Did you mean 'task_77'")
    assert len(near_misses("task_77x", names)) < 120
    assert near_misses("hellaswag", names) == "5,000 names are known."
