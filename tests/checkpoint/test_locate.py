"""Finding sources: paths, hub ids and what is downloaded of them. The hub is played by a folder; no network."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llamamoe import push
from llamamoe.checkpoint.locate import check_folder, locate, name_with_run
from llamamoe.checkpoint.reader import INDEX, SafetensorsCheckpoint
from llamamoe.errors import CheckpointError, LlamaMoeError
from llamamoe.models.loading import open_model
from tests.dense import make_dense

COMMIT = "c0ffee" * 6 + "c0ff"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SHARDED = [
    "config.json", INDEX, *SHARDS, "tokenizer.json", "LICENSE", "README.md", "consolidated.safetensors",
    "original/model.safetensors", "original/config.json", "pytorch_model.bin", "extra.json", "onnx/model.onnx",
]  # fmt: skip


class Hub:
    """One repository on the hub, and the cache of this machine."""

    def __init__(self, cache: Path) -> None:
        self.files: list[str] = []
        self.weight_map: Any = dict(enumerate(SHARDS))
        self.cache = cache / "snapshots" / COMMIT
        self.sha = COMMIT
        self.unreachable: Exception | None = None
        self.calls: list[tuple[str, str, str | None]] = []

    def model_info(self, name: str, *, revision: str | None = None) -> Any:
        self.calls.append(("info", name, revision))
        if self.unreachable:
            raise self.unreachable
        return SimpleNamespace(sha=self.sha, siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(
        self, name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        self.calls.append(("cache" if local_files_only else "download", name, revision))
        if local_files_only:
            if not self.cache.exists():
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cache)
        for file in self.files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                target = self.cache / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps({"weight_map": self.weight_map}) if file == INDEX else "{}")
        return str(self.cache)

    def held(self) -> set[str]:
        return {str(p.relative_to(self.cache)) for p in self.cache.rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    fake = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, name, **rest: fake.model_info(name, **rest))
    return fake


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("hf://org/name", "org/name", None),
        ("hf://org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("hf://gpt2", "gpt2", None),
    ],
)
def test_only_what_the_index_names_is_downloaded(hub: Hub, source: str, name: str, revision: str | None) -> None:
    hub.files = SHARDED
    location = locate(source)
    assert (location.path, location.name, location.revision) == (hub.cache, name, COMMIT)
    assert hub.held() == {
        "config.json",
        INDEX,
        *SHARDS,
        "tokenizer.json",
        "LICENSE",
        "README.md",
    }  # the card takes the licence from the README
    assert hub.calls == [("info", name, revision), ("download", name, revision), ("download", name, COMMIT)]


def test_a_single_file(hub: Hub) -> None:
    hub.files = ["config.json", "model.safetensors", "consolidated.safetensors", "original/model.safetensors"]
    locate("org/name")
    assert hub.held() == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["config.json", "pytorch_model.bin"], "stores its weights as pickle (pytorch_model.bin)"),
        (["config.json", "original/consolidated.00.pth"], "weights_only=True"),
        (["config.json", "model.pt\x1b[2J"], "It holds: config.json, model.pt\\x1b[2J"),
        (["model.Q4_0.gguf", "README.md"], "To convert a GGUF file"),
        (["config.json", "consolidated.safetensors", "training_args.bin"], "holds neither model.safetensors nor"),
        (["config.json", INDEX, SHARDS[0]], f"{SHARDS[1]}, which {INDEX} names, is not on the Hub"),
        ([], "It holds: nothing"),
    ],
)
def test_refused_before_any_weights_come(hub: Hub, files: list[str], says: str) -> None:
    hub.files = files
    with pytest.raises(CheckpointError) as caught:
        locate("org/name")
    assert says in str(caught.value)
    assert not [file for file in hub.held() if file.endswith((".safetensors", ".bin", ".pth", ".gguf"))]


def test_an_index_cannot_ask_for_other_files(hub: Hub) -> None:
    hub.files = SHARDED
    hub.weight_map = {"a": "original/model.safetensors", "b": SHARDS[0], "c": "*"}
    with pytest.raises(CheckpointError, match="is not on the Hub"):
        locate("org/name")
    assert not [file for file in hub.held() if file.endswith(".safetensors")]


def test_a_revision_that_moves_is_an_error(hub: Hub) -> None:
    hub.files, hub.sha = SHARDED, "0" * 40
    with pytest.raises(LlamaMoeError, match="changed on the Hub"):
        locate("org/name")
    assert SHARDS[0] not in hub.held()


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), ConnectionError("no route"), RuntimeError("odd")])
def test_offline_takes_the_cache(hub: Hub, error: Exception) -> None:
    hub.files = SHARDED
    online = locate("org/name@main")
    hub.unreachable, hub.calls = error, []
    assert locate("org/name@main") == online
    assert hub.calls[1:] == [("cache", "org/name", "main"), ("cache", "org/name", COMMIT)]


@pytest.mark.parametrize(
    ("offline", "says", "way"),
    [
        (True, "HF_HUB_OFFLINE=1 forbids downloads", "Unset HF_HUB_OFFLINE"),
        (False, "the Hub cannot be reached", "Check the network connection"),
    ],
)
def test_offline_without_a_cache(hub: Hub, offline: bool, says: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    hub.unreachable = OfflineModeIsEnabled("offline") if offline else ConnectionError("no route")
    with pytest.raises(LlamaMoeError, match=says) as caught:
        locate("org/name")
    assert not isinstance(caught.value, CheckpointError)
    assert way in str(caught.value)
    assert "hf download org/name" in str(caught.value)


class Answer(HfHubHTTPError):
    """An answer of the Hub, without the response class that differs between its library's versions."""

    def __init__(self, status: int) -> None:
        Exception.__init__(self, f"{status} from the hub")
        self.response: Any = SimpleNamespace(status_code=status)

    def __str__(self) -> str:
        return str(self.args[0])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_hub_denies_is_refused(hub: Hub, status: int) -> None:
    hub.unreachable = Answer(status)
    with pytest.raises(CheckpointError, match=f"the Hub refuses 'org/name': {status}") as caught:
        locate("org/name")
    assert "hf auth login" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        (GatedRepoError, 401, ("is gated", "Accept the terms on https://huggingface.co/org/name", "hf auth login")),
        (GatedRepoError, 403, ("is gated", "Accept the terms on https://huggingface.co/org/name", "hf auth login")),
        (RepositoryNotFoundError, 401, ("repository on the Hub that you can access", "spelling", "hf auth login")),
        (RepositoryNotFoundError, 404, ("repository on the Hub that you can access", "spelling", "hf auth login")),
        (RevisionNotFoundError, 404, ("no such revision", "leave @revision out")),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_refusal_of_the_hub_names_the_next_step(
    hub: Hub, kind: type, status: int, says: tuple[str, ...], listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gated repository is listed for everyone, and only its files are refused."""
    answer = type("Answer", (Answer, kind), {})(status)

    def denied(*_: Any, **__: Any) -> str:
        raise answer

    hub.files = SHARDED
    if listed:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", denied)
    else:
        hub.unreachable = answer
    with pytest.raises(CheckpointError) as caught:
        locate("org/name@v1")
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_as_good_as_none(hub: Hub, status: int) -> None:
    hub.files = SHARDED
    online = locate("org/name")
    hub.unreachable = Answer(status)
    assert locate("org/name") == online


@pytest.mark.parametrize(("code", "hint"), [(errno.ENOSPC, "set HF_HOME"), (errno.ECONNRESET, "Try again")])
def test_a_download_that_breaks_is_an_error_of_ours(
    hub: Hub, code: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise OSError(code, os.strerror(code))

    hub.files = SHARDED
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(LlamaMoeError, match=os.strerror(code)) as caught:
        locate("org/name")
    assert hint in str(caught.value)


def test_an_id_that_the_hub_finds_invalid(hub: Hub) -> None:
    hub.unreachable = HFValidationError("-- and .. are forbidden")
    with pytest.raises(CheckpointError, match="is not a Hub id: -- and"):
        locate("org/na--me")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "the source is empty"),
        (" \n", "the source is empty"),
        ("hf://", "is not a Hub id"),
        ("hf://a/b/c", "is not a Hub id"),
        ("hf://org/name@", "is not a Hub id"),
        ("hf://../name", "is not a Hub id"),
        ("nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("./org/name", "does not exist"),
        ("/org/name", "does not exist"),
        ("org/name\x1b", "'org/name\\x1b' does not exist"),
    ],
)
def test_bad_sources_never_reach_the_hub(hub: Hub, source: str, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(source)
    assert says in str(caught.value)
    assert "Hub id (org/name)" in str(caught.value)
    assert hub.calls == []


def test_a_path_that_looks_like_a_hub_id_gets_proposals_where_nothing_can_be_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "SmolLM2-135M").mkdir(parents=True)
    (tmp_path / "models" / "SmolLM2-135M" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    hub.unreachable = OfflineModeIsEnabled("offline")
    with pytest.raises(LlamaMoeError, match=r"Did you mean 'models/SmolLM2-135M'\? (Unset|Check)"):
        locate("models/SmolLM2")
    with pytest.raises(LlamaMoeError, match=r"Did you mean 'models/SmolLM2-135M'\? (Unset|Check)"):
        locate("model/SmolLM2")


def test_a_trained_model_is_named_with_its_run(tmp_path: Path) -> None:
    assert name_with_run(tmp_path / "run\x1b" / "model", "model") == "run\\x1b/model"
    assert name_with_run(tmp_path / "moe", "moe") == "moe"


def test_a_missing_source_names_similar_checkpoints_beside_it(hub: Hub, tmp_path: Path) -> None:
    for name in ("SmolLM2-135M", "SmolLM2-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "SmolLM2-135M" / "config.json").touch()
    (tmp_path / "smol.gguf").touch()
    for wrong, right in (("SmolLM-135M", "SmolLM2-135M"), ("smoll.gguf", "smol.gguf")):
        with pytest.raises(CheckpointError) as caught:
            locate(tmp_path / wrong)
        assert f"Did you mean '{tmp_path / right}'? Give" in str(caught.value)
    with pytest.raises(CheckpointError, match="'SmolLM2' does not exist in the current folder"):
        locate("SmolLM2")
    assert hub.calls == []


@pytest.mark.parametrize("source", ["C:\\models\\x", "C:/models/x", "models\\x", ".\\x"])
def test_a_source_with_backslashes_is_told_what_separates_folders(hub: Hub, source: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(source)
    assert "folders are separated by /" in str(caught.value)
    assert hub.calls == []
    with pytest.raises(CheckpointError, match="folders are separated by /"):
        check_folder(Path(source))


def test_a_gguf_file_in_place_of_a_folder_is_told_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "moe.gguf").touch()
    with pytest.raises(CheckpointError, match=r"the folder that the GGUF file was exported from(.|\n)*llamamoe split"):
        check_folder(tmp_path / "moe.gguf")
    with pytest.raises(CheckpointError, match="exported from"):
        push(tmp_path / "moe.gguf", "me/moe")


def test_a_folder_with_a_backslash_in_its_name_is_found(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a\\b").mkdir()
    assert locate("a\\b").name == "a\\b"


def test_a_path_never_reaches_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name").revision is None
    assert hub.calls == []


@pytest.mark.parametrize("make", [lambda p: None, lambda p: (p / "config.json").write_text("{}")])
def test_odd_file_names_are_escaped(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "a\x1b[2J\n").touch()
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsCheckpoint(tmp_path)
    assert "It holds: a\\x1b[2J\\n" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("source", ["org/model", "hf://org/model@v1", "org/model@v1"])
def test_a_model_that_is_only_run_is_found_as_a_source_is(
    hub: Hub, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_dense(tmp_path / "dense")
    monkeypatch.setattr("llamamoe.checkpoint.locate.download", lambda text, near: dense)
    opened = open_model(source)
    assert opened.name == source
    assert opened.options == {
        "pretrained_model_name_or_path": str(dense), "local_files_only": True, "trust_remote_code": False
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(Path("org/model"))
