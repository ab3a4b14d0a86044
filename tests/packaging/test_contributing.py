"""The splitter that CONTRIBUTING.md shows works, in our folder's place and as another package's entry point."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llamamoe.methods.layer import FfnWeights, LayerContext
from llamamoe.methods.splitters.base import Splitter
from llamamoe.plugins import Registry

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
HIDDEN, INTERMEDIATE, EXPERTS = 6, 14, 4


def block(language: str) -> str:
    """The first code block of this language."""
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found.group(1)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[Splitter]:
    """A registry that meets the example as an installed package with the entry point that the page declares."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    code = block("python")
    for dots, place in (("...", "llamamoe."), ("..", "llamamoe.methods."), (".", "llamamoe.methods.splitters.")):
        code = code.replace(f"from {dots}", f"from {place}")
    (package / "dealt.py").write_text(code)
    metadata = tmp_path / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    group, entry = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(.+)\n', block("toml")).groups()  # type: ignore[union-attr]
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return Registry("splitter", Splitter, "llamamoe.methods.splitters")  # type: ignore[type-abstract]


@pytest.mark.parametrize("rank_by", ["gate", "up"])
@pytest.mark.parametrize("num_shared", [0, 3])
def test_example_splitter_deals_equal_strength(registry: Registry[Splitter], rank_by: str, num_shared: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, INTERMEDIATE, HIDDEN, generator=generator)
    ffn = FfnWeights(gate, up, torch.randn(HIDDEN, INTERMEDIATE, generator=generator), torch.ones(HIDDEN))
    width = -(-(INTERMEDIATE - num_shared) // EXPERTS)
    context = LayerContext(layer=0, num_experts=EXPERTS, top_k=2, expert_width=width, seed=0)
    cls = registry.get("dealt")

    partition = cls(cls.Options(rank_by=rank_by)).split(ffn, np.arange(num_shared), context)

    partition.check(INTERMEDIATE)
    norms = (gate if rank_by == "gate" else up).norm(dim=1).numpy()
    sums = [norms[expert[expert >= 0]].sum() for expert in partition.experts]
    assert max(sums) - min(sums) <= norms[num_shared:].max()


def test_example_splitter_is_listed_beside_ours(registry: Registry[Splitter]) -> None:
    assert {"dealt", "random"} <= set(registry.names())


def test_example_splitter_runs_in_our_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llamamoe.methods import splitters

    (tmp_path / "dealt.py").write_text(block("python"))
    monkeypatch.setattr(splitters, "__path__", [*splitters.__path__, str(tmp_path)])
    found = Registry("splitter", Splitter, "llamamoe.methods.splitters")  # type: ignore[type-abstract]
    assert found.get("dealt").__module__ == "llamamoe.methods.splitters.dealt"
