"""Every command and every line of Python of the tutorials and guides runs, in order, on a tiny model in the place of SmolLM2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llamamoe
from tests.dense import make_byte_level, make_dense

from .pages import ROOT, blocks, commands, run

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = [
    "getting-started.md",
    "tutorials/split.md",
    "tutorials/calibrate.md",
    "tutorials/recover.md",
    "tutorials/deploy.md",
    "how-to/memory.md",
    "how-to/data.md",
    "how-to/finer-experts.md",
    "how-to/mix.md",
    "concepts/rescaling.md",
    "concepts/alignment.md",
    "concepts/budgets.md",
]


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name: the model (tiny, under its name on the Hub), a conversion of it, and text."""
    dense = make_dense(tmp_path / MODEL, "llama-tied", max_position_embeddings=2048, vocab_size=300)
    make_byte_level(dense, "smollm")
    (tmp_path / "SOURCE").symlink_to(dense)
    words = np.random.default_rng(0).choice(["assert", "the", "class", "of", "a", "statement", "None", "is"], (40, 60))
    for folder, part in (("texts", words[:30]), ("held-out", words[30:])):
        (tmp_path / folder).mkdir()
        lines = (f'{{"text": "{" ".join(row)}"}}' for row in part)
        (tmp_path / folder / "python.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_every_page_with_commands_is_run() -> None:
    found = {
        file.relative_to(ROOT / "docs").as_posix()
        for file in (ROOT / "docs").rglob("*.md")
        if any(commands(block) for _, block in blocks(file.read_text(encoding="utf-8"), "bash"))
    }
    assert found == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(place: Path, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "llamamoe split HuggingFaceTB/SmolLM2-135M-Instruct my-moe" not in text_of(page):
        llamamoe.split(MODEL, "my-moe", llamamoe.load_recipe(given={"num_experts": 4, "top_k": 2}), verify=False)
    done = 0
    for language, block in blocks(text_of(page), "bash", "python"):
        if language == "python":
            exec(block, {})
        done += 1
        for arguments in commands(block) if language == "bash" else ():
            run(arguments)
            out = next((a for a in arguments[2:3] if arguments[0] == "split"), None)
            assert out is None or Path(out).is_dir() != ("--dry-run" in arguments)
    assert done


def test_the_text_of_the_tutorials_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _, block in blocks(text_of("tutorials/index.md"), "python"):
        exec(block, {})
    texts, held_out = (Path(name, "python.jsonl").read_text().splitlines() for name in ("texts", "held-out"))
    assert len(texts) > 2 * len(held_out) > 20
    assert not set(texts) & set(held_out)


def test_the_splitter_of_the_guide_is_that_of_contributing() -> None:
    """Another test runs that of CONTRIBUTING.md; imports differ, as the guide's is in another package."""
    guide = next(block for _, block in blocks(text_of("how-to/splitter.md"), "python"))
    whole = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    original = next(block for _, block in blocks(whole, "python"))
    code = "    class Options(PluginOptions):"
    assert guide[guide.index(code) :] == original[original.index(code) :]
    exec(guide, {"__name__": "guide"})
