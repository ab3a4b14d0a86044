"""Small hostile inputs that once went wrong, one for each kind of fault, through the command that met them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from llamamoe_cli.main import root

import llamamoe
from llamamoe.checkpoint.readme import parent_metadata
from tests.dense import make_dense
from tests.paths import SHARED_DATA

from .conftest import Edit, Refused, recipe

CASES = SHARED_DATA.parent / "cases"


def edit_json(path: Path, change: Edit) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def named_b(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "Ax", "type_id": 0}}],
                                   "pair": [], "special_tokens": {}}  # fmt: skip


def text_as_id(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["&"] = "\x1b[31m"


def one_id_twice(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["G"] = tokenizer["model"]["vocab"]["F"]


@pytest.mark.parametrize("change", [named_b, text_as_id, one_id_twice])
def test_a_broken_tokenizer_is_refused_in_the_plan(change: Edit, source: Path, refused: Refused) -> None:
    edit_json(source / "tokenizer.json", change)
    refused(source, "tokenizer.json")


@pytest.mark.parametrize("value", [[1], {"a": 1}, "x", 1.5])
def test_a_broken_generation_configuration_is_refused_in_the_plan(value: Any, source: Path, refused: Refused) -> None:
    edit_json(source / "generation_config.json", lambda data: data.update(pad_token_id=value))
    refused(source, "generation_config.json", "pad_token_id")


ALIASES = "x0: &a0 [xxxxxxxxxx]\n" + "".join(f"x{i}: &a{i} [{','.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 10))
CARDS = {
    "a date that does not exist": "license: 2024-13-45",
    "a date": "license: 2024-12-24",
    "aliases": ALIASES + "license: *a9",
    "nested": "license: " + "[" * 2000 + "]" * 2000,
    "a number": "license: 0x" + "f" * 9000,
    "half a character": 'license: "\\ud800"',
    "an object": "license: !!python/object/apply:os.system [ls]",
    "no yaml": "license: [",
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_that_says_nothing_usable_is_passed_over(kind: str, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(f"---\n{CARDS[kind]}\n---\n# A model\n")
    result = llamamoe.split(source, tmp_path / "out", recipe(), verify=False)
    assert "license" not in parent_metadata(result.out)


# ---- the collected files themselves, where they are ----------------------------------------------------------------

needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not there")
FILES = sorted(path.name for path in (CASES / "fuzz").glob("*.json")) if CASES.is_dir() else []


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(root, [str(each) for each in arguments], prog_name="llamamoe")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "traceback" not in result.stderr.lower()
    return result.exit_code, result.stderr


@needs_cases
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("config", "tok", "gen"))])
def test_a_collected_source_is_refused_in_the_plan_or_right(name: str, tmp_path: Path) -> None:
    data = json.loads((CASES / "fuzz" / name).read_text())
    variant = {"phi3": "phi3-partial", "gemma": "gemma"}.get(data.get("model_type", ""), "llama")
    source = make_dense(tmp_path / "dense", variant)
    place = {"config": "config.json", "tok": "tokenizer.json", "gen": "generation_config.json"}[name.split("-")[0]]
    shutil.copyfile(CASES / "fuzz" / name, source / place)
    dtype = ["--dtype", "float32"] if variant == "gemma" else []
    code, error = run("split", source, tmp_path / "out", "--experts", "4", "--method", "random", *dtype)
    if name == "config-21-13.json":  # leaves out rms_norm_eps, whose default is the family's own
        assert code == 0, error
        return
    assert code == 3, error
    assert place in error
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@needs_cases
@pytest.mark.parametrize("verb", ["inspect", "retop", "fix-config"])
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("out")])
def test_a_collected_output_is_one_error(name: str, verb: str, source: Path, tmp_path: Path) -> None:
    config = (CASES / "fuzz" / name).read_text()
    target = json.loads(config)["model_type"]
    shared = ["--shared", "40"] if target == "qwen2_moe" else []
    out = tmp_path / "made"
    code, error = run("split", source, out, "--experts", "4", "--method", "random", "--target", target, *shared)
    assert code == 0, error
    (out / "config.json").write_text(config)
    again = tmp_path / "again"
    code, error = run(verb, out, *([again, "--top-k", "3"] if verb == "retop" else []))
    messages = sum(line.startswith("Error: ") for line in error.splitlines())
    assert (code, messages) in ((0, 0), (2, 1), (3, 1)), error
    assert again.exists() == (verb == "retop" and code == 0)


@needs_cases
def test_collected_recipes_and_text_are_one_error(tmp_path: Path) -> None:
    code, error = run("evaluate", "MODEL", "--recipe", CASES / "fuzz" / "recipe-41-213-eval.yaml")
    assert (code, error.count("Error: ")) == (2, 1)
    source = make_dense(tmp_path / "dense")
    given = ["--calibration", CASES / "fuzz" / "bomb.jsonl.zst", "--method", "token_clusters", "--experts", "4"]
    code, error = run("split", source, tmp_path / "out", *given)
    assert (code, error.count("Error: ")) == (1, 1), error
    assert "bomb.jsonl.zst:1" in error
