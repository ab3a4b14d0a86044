"""``llamamoe format-chats``."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Run


def test_format_chats(tmp_path: Path, run: Run) -> None:
    rows = [{"instruction": "do", "output": "done"}, {"instruction": "do"}, {"input": "a", "target": "b"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run("format-chats", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl").stdout
    for words in ("2 conversations", "Alpaca", "Firefly", "Left out: 1 row", "in.jsonl:2: unknown fields instruction"):
        assert words in " ".join(text.split())
    assert (
        "already exists" in run("format-chats", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", code=3).stderr
    )
    found = json.loads(
        run("format-chats", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--force", "--json").stdout
    )
    assert (found["rows"], found["left_out"], found["kind"]) == (2, 1, "conversations")
