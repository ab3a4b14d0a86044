"""The README is short, its links lead somewhere, and its commands and Python run on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.dense import make_byte_level, make_dense

from .pages import ROOT, blocks, commands, run
from .test_tutorials import MODEL

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", README)
    assert links
    for link, heading in links:
        if not link.startswith("https://"):
            page = ROOT / link
            assert page.exists(), link
            titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
            assert not heading or heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_the_makefile_has_the_targets_that_it_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:`|^)make ([\w-]+)", README, re.MULTILINE)
    assert {"demo", "docs", "test"} <= set(named)
    for name in named:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_everything_that_it_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / MODEL, tmp_path / "demo-output" / "dense"):
        make_byte_level(make_dense(folder, "llama-tied", max_position_embeddings=2048, vocab_size=300), "smollm")
    words = np.random.default_rng(0).choice(["assert", "the", "class", "of", "a", "statement", "None", "is"], (6, 300))
    for name, part in (("calibration", words[:4]), ("evaluation", words[4:])):
        (tmp_path / "demo-output" / "text" / name).mkdir(parents=True)
        for number, row in enumerate(part):
            (tmp_path / "demo-output" / "text" / name / f"{number}.txt").write_text(" ".join(row))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    verbs = []
    for language, block in blocks(README, "bash", "python"):
        if language == "python":
            exec(block, {})
        for arguments in commands(block) if language == "bash" else ():
            if arguments[0] == "split" and Path(arguments[2]).exists():
                arguments.append("--force")
            run(arguments)
            verbs.append(arguments[0])
    made = [
        "split",
        "export-gguf",
        "inspect",
        "split",
        "verify",
        "evaluate",
        "report",
        "tokenize",
        "tokenize",
        "pretrain",
    ]
    assert verbs == made
    assert capsys.readouterr().out.startswith("Experts are")
    assert Path("my-run", "model", "config.json").is_file()
