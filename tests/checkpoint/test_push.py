"""Uploading a checkpoint: what is sent, in one commit, and what is refused. The Hub is played by an object; no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from llamamoe import CheckpointError, LlamaMoeError, RefusedError, UsageError, load_recipe, push, split

from ..dense import make_dense

NAME = "someone/my-moe"


class Hub:
    """One repository, and what was asked of it."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.private: bool | None = None
        self.sent: list[str] = []
        self.commits: list[tuple[dict[str, bytes], set[str]]] = []
        self.failing: Callable[[str], None] = lambda call: None

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.failing("create_repo")
        assert (name, exist_ok) == (NAME, True)
        self.private = private

    def list_repo_files(self, name: str) -> list[str]:
        return sorted(self.files)

    def preupload_lfs_files(self, name: str, *, additions: list[Any]) -> None:
        self.failing("preupload_lfs_files")
        self.sent += [each.path_in_repo for each in additions]

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> Any:
        self.failing("create_commit")
        added = {o.path_in_repo: o for o in operations if isinstance(o, huggingface_hub.CommitOperationAdd)}
        deleted = {o.path_in_repo for o in operations if isinstance(o, huggingface_hub.CommitOperationDelete)}
        self.commits.append(({n: Path(str(o.path_or_fileobj)).read_bytes() for n, o in added.items()}, deleted))
        self.files = (self.files | added.keys()) - deleted
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: fake)
    return fake


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion in several shards, with a parent that states its licence."""
    root = tmp_path_factory.mktemp("push")
    dense = make_dense(root / "dense", num_hidden_layers=2)
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (dense / "LICENSE").write_text("the licence")
    recipe = load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, "shard_size": "100KB"})
    return split(dense, root / "moe", recipe, verify=False).out


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    out = tmp_path / "moe"
    out.mkdir()
    for path in written.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_the_checkpoint_appears_in_one_commit_and_nothing_else(hub: Hub, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "report.html").write_text("<p>")
    seen: list[tuple[int, int]] = []
    found = push(folder, NAME, progress=lambda step: seen.append((step.done, step.total)))
    ((added, deleted),) = hub.commits
    assert added == {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("notes.txt", "report.html")}
    assert {"config.json", "README.md", "LICENSE", "llamamoe_receipt.json", "tokenizer.json"} < added.keys()
    assert not deleted
    assert hub.sent == list(added)
    assert hub.private
    assert seen == [(i + 1, len(added)) for i in range(len(added))]
    assert found.left_out == ("notes.txt", "report.html")
    assert found.nbytes == sum(map(len, added.values()))
    assert found.url == f"https://hub/{NAME}/commit/1"


def test_a_public_repository_is_asked_for(hub: Hub, folder: Path) -> None:
    push(folder, NAME, public=True)
    assert hub.private is False


def test_a_dry_run_asks_nothing_of_the_hub(hub: Hub, folder: Path) -> None:
    def fail(call: str) -> None:
        raise AssertionError(call)

    hub.failing = fail
    found = push(folder, NAME, dry_run=True)
    assert found.url is None
    assert set(found.files) == {path.name for path in folder.iterdir()}
    assert json.loads(json.dumps(found.to_json()))["bytes"] == found.nbytes


def test_files_there_are_replaced_only_by_force(hub: Hub, folder: Path) -> None:
    hub.files = {".gitattributes", "model.safetensors", "picture.png", "README.md"}
    with pytest.raises(RefusedError, match="holds 3 files already") as refused:
        push(folder, NAME)
    assert "--force" in str(refused.value.hint)
    assert not hub.commits
    found = push(folder, NAME, force=True)
    assert found.deleted == ("model.safetensors",), "a shard of the earlier one; what is not a checkpoint's stays"
    assert {".gitattributes", "picture.png"} < hub.files


@pytest.mark.parametrize("trained", [True, False])
def test_the_recipe_of_an_earlier_training_goes_with_its_receipt(trained: bool, hub: Hub, folder: Path) -> None:
    hub.files = {"README.md", "recipe.yaml"} | ({"llamamoe_training_receipt.json"} if trained else set())
    found = push(folder, NAME, force=True)
    assert found.deleted == (("llamamoe_training_receipt.json", "recipe.yaml") if trained else ())


def test_a_failed_upload_can_be_repeated(hub: Hub, folder: Path) -> None:
    def fail(call: str) -> None:
        if call == "preupload_lfs_files" and len(hub.sent) == 2:
            raise ConnectionError("gone")

    hub.failing = fail
    with pytest.raises(LlamaMoeError, match="ConnectionError: gone") as failed:
        push(folder, NAME)
    assert "Repeat the command" in str(failed.value.hint)
    assert not hub.files
    hub.failing = lambda call: None
    assert push(folder, NAME).url


def refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("no", response=response)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (LocalTokenNotFoundError("no token"), "none is logged in", "hf auth login"),
        (refusal(401), r"does not let this account write to someone/my-moe \(401\)", "hf auth login"),
        (refusal(403), "does not let this account write", "member of the organisation"),
        (refusal(500), "the Hub refuses the upload", None),
    ],
)
def test_answers_of_the_hub_name_the_next_step(
    hub: Hub, folder: Path, error: Exception, message: str, hint: str | None
) -> None:
    def fail(call: str) -> None:
        raise error

    hub.failing = fail
    with pytest.raises(LlamaMoeError, match=message) as told:
        push(folder, NAME)
    assert hint is None or hint in str(told.value.hint)


def test_what_is_no_checkpoint_of_ours_is_refused(hub: Hub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the name of a repository"):
        push(folder, "my-moe")
    with pytest.raises(CheckpointError, match="was not written by llamamoe"):
        push(make_dense(tmp_path / "dense"), NAME)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=shard.name):
        push(folder, NAME)
    assert not hub.commits


def test_a_link_is_not_followed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match=r"README\.md"):
        push(folder, NAME)
    assert not hub.commits


def test_a_missing_licence_and_paths_of_this_machine_are_told(hub: Hub, folder: Path) -> None:
    assert push(folder, NAME, dry_run=True).notes == ()
    (folder / "LICENSE").unlink()
    (folder / "README.md").write_text("# a model\n")
    recipe = folder / "llamamoe_recipe.yaml"
    recipe.write_text(recipe.read_text() + "calibration: [/home/me/texts]\n")
    notes = push(folder, NAME, dry_run=True).notes
    assert len(notes) == 2
    assert "licence" in notes[0]
    assert "paths of this machine" in notes[1]
