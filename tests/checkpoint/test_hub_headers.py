"""Planning for a checkpoint on the Hub, of which only the headers are read. The Hub is played by a folder; no network."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from llamamoe_cli.main import root
from safetensors import safe_open
from safetensors.torch import save_file

from llamamoe import CheckpointError, LlamaMoeError, inspect, load_recipe, plan_conversion
from llamamoe.checkpoint.locate import locate, locate_headers
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.conversion.plan import SplitPlan
from tests.dense import make_byte_level, make_dense

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """A repository with the files of a folder, and the cache of this machine."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache / COMMIT
        self.headers: list[str] = []

    def model_info(self, *_: Any, **__: Any) -> Any:
        files = [str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(self, *_: Any, allow_patterns: list[str], local_files_only: bool, **__: Any) -> str:
        for file in self.folder.rglob("*"):
            name = str(file.relative_to(self.folder))
            if not local_files_only and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.cache / name)
        return str(self.cache)

    def header(self, _: Any, name: str, file: str, *, revision: str) -> Any:
        assert revision == COMMIT
        self.headers.append(file)
        with (self.folder / file).open("rb") as opened:
            found = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        found.pop("__metadata__", None)
        return SimpleNamespace(tensors={name: SimpleNamespace(**each) for name, each in found.items()})

    def weights(self) -> list[Path]:
        return list(self.cache.rglob("*.safetensors"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = make_dense(tmp_path / "name")
    make_byte_level(folder, "smollm")
    fake = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fake.model_info)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "parse_safetensors_file_metadata", lambda *args, **keys: fake.header(*args, **keys)
    )
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "scratch")
    return fake


def never(*_: Any) -> None:
    raise AssertionError("a plan reads no tensor")


def assert_same(found: SplitPlan, wanted: SplitPlan) -> None:
    assert found.source == "org/name"
    assert found.to_json() == wanted.to_json() | {"source": "org/name"}


def test_a_plan_is_the_folders_and_no_weights_are_downloaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 400)
    monkeypatch.setattr(SafetensorsCheckpoint, "read", never)
    for given in ({"method": "random"}, {"calibration": [str(text)], "calibration_tokens": 512}):
        recipe = load_recipe(given={"num_experts": 4, "top_k": 2, **given})
        assert_same(plan_conversion("org/name", recipe), plan_conversion(hub.folder, recipe))
    assert not hub.weights()
    assert not list((tmp_path / "scratch").iterdir())


def test_an_inspection_is_the_folders(hub: Hub) -> None:
    found, wanted = inspect("org/name@main").to_json(), inspect(hub.folder).to_json()
    assert (found.pop("path"), found.pop("revision"), found.pop("name")) == ("org/name@main", COMMIT, "org/name")
    nbytes = found.pop("bytes_on_disk")
    assert found == {key: wanted[key] for key in found}
    assert nbytes == pytest.approx(wanted["bytes_on_disk"], abs=2000), "headers are written anew"
    assert not hub.weights()


def test_every_shard_of_an_index_is_read(hub: Hub) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with safe_open(hub.folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    places = {name: names[index % 2] for index, name in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key, place in places.items() if place == name}, hub.folder / name)
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(plan_conversion("org/name"), plan_conversion(hub.folder))
    assert hub.headers == names


def test_weights_in_the_cache_are_used(hub: Hub) -> None:
    cached = locate("org/name")
    with locate_headers("org/name") as location:
        assert location == cached
    assert not hub.headers


def test_a_conversion_downloads(hub: Hub) -> None:
    with locate_headers("org/name") as location:
        assert location.path.name == COMMIT
        assert location.path != hub.cache
    assert not location.path.exists()
    assert locate("org/name").path == hub.cache
    assert hub.weights()


@pytest.mark.parametrize(
    ("broken", "error", "says"),
    [
        (lambda hub: setattr(hub, "header", None), LlamaMoeError, "downloading 'org/name' failed"),
        (lambda hub: _header(hub, [-8, 0]), CheckpointError, "sizes must be whole numbers"),
        (lambda hub: _header(hub, [0, 12]), CheckpointError, "12 bytes do not hold F32"),
        (lambda hub: _header(hub, [0, 2**70]), LlamaMoeError, "downloading 'org/name' failed"),
    ],
)
def test_a_bad_header_is_refused(
    hub: Hub, broken: Callable[[Hub], None], error: type[LlamaMoeError], says: str, tmp_path: Path
) -> None:
    broken(hub)
    with pytest.raises(error, match=says):
        plan_conversion("org/name")
    assert not list((tmp_path / "scratch").iterdir())


def _header(hub: Hub, offsets: list[int]) -> None:
    info = SimpleNamespace(dtype="F32", shape=[2], data_offsets=offsets)
    hub.header = lambda *_, **__: SimpleNamespace(tensors={"a": info})  # type: ignore[method-assign]


@pytest.mark.parametrize("command", ["split org/name out --dry-run", "inspect org/name"])
def test_commands_name_the_repository_and_no_folder_of_ours(hub: Hub, command: str) -> None:
    result = CliRunner().invoke(root, command.split())
    assert result.exit_code == 0, result.output
    assert "org/name" in result.stdout
    assert "scratch" not in result.output
    assert not hub.weights()
