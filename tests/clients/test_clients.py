"""Other programs treat our checkpoints as the table says (`llamamoe.architectures.targets.clients`).

Needs an interpreter with these programs, named by ``LLAMAMOE_CLIENTS_PYTHON`` (``make test-clients`` makes it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamamoe.architectures.targets.clients import CLIENTS

from .cases import CASES, build
from .loading import PYTHON, run_client

pytestmark = pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_CLIENTS_PYTHON names no interpreter")

RUNNERS = {"mlx-lm": "run_mlx_lm.py", "llama.cpp": "run_llama_cpp.py", "mistral.rs": "run_mistralrs.py"}
NAMES = list(RUNNERS)
SAME = {"mlx-lm": 2e-5, "llama.cpp": 2e-5, "mistral.rs": 5e-3}
"""Largest difference over the largest logit; mistral.rs rounds dense models alike."""
DIFFERENT = 0.05
REFUSALS = {
    "mlx-lm": (
        "Model type granitemoeshared not supported",
        "Model type granitemoe_swa not supported",
        "Model type flex_olmo not supported",
        "Model type cohere2_moe not supported",
        "Model type qwen3_5_moe_text not supported",
        "Model type hunyuan_v1_moe not supported",
        "Model type jetmoe not supported",
    ),
    "llama.cpp": ("a GGUF file can be written for", "norm_topk_prob is true", "jetmoe routes attention, too"),
    "mistral.rs": ("Unsupported Hugging Face Transformers -CausalLM model class", "shape mismatch"),
}
"""The refusal of each program; any other error is a fault of the test itself, such as a broken install."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def found(folders: list[Path]) -> dict[str, Any]:
    """Return the results of each program for every case; those without a GGUF file are refused by `export_gguf`."""
    files = [folder for folder in folders if (folder / "model.gguf").is_file()]
    said = {name: run_client(script, files if name == "llama.cpp" else folders) for name, script in RUNNERS.items()}
    for folder in folders:
        if folder not in files:
            said["llama.cpp"]["found"][folder.name] = {"refused": (folder / "refused.txt").read_text()}
    return said


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_the_version_is_the_one_of_the_table(found: dict[str, Any], client: Any) -> None:
    assert found[client.name]["version"] == client.version


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_it_makes_of_the_output_what_the_table_says(found: dict[str, Any], client: Any, name: str) -> None:
    result, wanted = found[client.name]["found"][name], client.results[CASES[name].kind].outcome
    if wanted == "refused":
        assert any(words in result.get("refused", "") for words in REFUSALS[client.name]), result
    elif wanted == "same":
        assert "refused" not in result, result
        assert result["error"] <= SAME[client.name]
        assert result["greedy"]
    else:
        assert result["error"] > DIFFERENT, "it computes the same now: say so in the table"


def test_every_entry_of_the_table_is_tested() -> None:
    for client in CLIENTS:
        assert set(client.results) == {case.kind for case in CASES.values()}


GGUF = [name for name, case in CASES.items() if CLIENTS[NAMES.index("llama.cpp")].results[case.kind].outcome == "same"]


@pytest.mark.parametrize(("kind", "limit"), [("F32", 1e-5), ("Q8_0", 0.5), ("Q4_K_M", 2.5)])
@pytest.mark.parametrize("name", GGUF)
def test_llama_cpp_computes_what_it_quantised(found: dict[str, Any], name: str, kind: str, limit: float) -> None:
    # Random weights lose much by rounding, and a router's choices with them; predictions of another model are 5 away.
    quantised = found["llama.cpp"]["found"][name]["quantised"]
    assert quantised[kind]["divergence"] < limit
    assert quantised[kind]["perplexity"] < (1 + limit) * quantised["transformers"]["perplexity"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("name", GGUF)
def test_every_matrix_but_the_routers_is_quantised(found: dict[str, Any], name: str, kind: str) -> None:
    kinds = found["llama.cpp"]["found"][name]["quantised"][kind]["kinds"]
    assert kinds.pop("F32", 0) == (0 if name == "dense" else 2), "the routers of two layers"
    assert all(each.startswith("Q") for each in kinds)
