"""The run's folder: it lies apart from what is read, and nothing in it that a run did not write is changed or deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamamoe import pretrain
from llamamoe.errors import LlamaMoeError, RefusedError

from ..hostile.conftest import digests
from .runs import make_world, recipe_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_world(tmp_path_factory.mktemp("world"))


def refused(
    world: dict[str, str], out: Path, *parts: str, kind: type[LlamaMoeError] = RefusedError, **keys: Any
) -> None:
    """The run is refused with a message that holds ``parts``, and the folder of the world and of ``out`` stay as they are."""
    folders = [Path(world["model"]).parent, *(each for each in (out, out.parent) if each.is_dir())]
    before = [digests(folder) for folder in folders]
    with pytest.raises(kind) as caught:
        pretrain(recipe_of(world), out, **keys)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert [digests(folder) for folder in folders] == before


# ---- where OUT may lie --------------------------------------------------------------------------------------------

READ = [("model", "the model"), ("parent", "its parent"), ("train", "data.train"), ("validation", "data.validation")]


@pytest.mark.parametrize("keys", [{}, {"force": True}, {"resume": True}], ids=["plain", "force", "resume"])
@pytest.mark.parametrize(("key", "name"), READ)
def test_out_is_what_is_read(key: str, name: str, keys: dict[str, bool], world: dict[str, str]) -> None:
    refused(world, Path(world[key]), name, "must not lie in one another", "Choose an OUT elsewhere", **keys)


@pytest.mark.parametrize(("key", "name"), READ)
def test_out_lies_in_what_is_read_or_holds_it(key: str, name: str, world: dict[str, str]) -> None:
    place = Path(world[key])
    refused(world, place / "a" / "run", name, "must not lie in one another")
    refused(world, place.parent, "must not lie in one another", force=True)


@pytest.mark.parametrize(("key", "name"), READ)
def test_links_and_dots_do_not_hide_it(key: str, name: str, world: dict[str, str], tmp_path: Path) -> None:
    place = Path(world[key])
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "above").symlink_to(place.parent)
    for out in (
        tmp_path / "link",
        tmp_path / "link" / "run",
        tmp_path / "above" / place.name,
        tmp_path / "x" / ".." / "link",
    ):
        refused(world, out, "must not lie in one another", force=True)
    refused(world, place / ".." / place.name / "run", name)
    linked = world | {key: str(tmp_path / "link")}
    refused(linked, place / "run", name, force=True)


def test_out_is_a_link_or_a_file(world: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused(world, tmp_path / "link", "is a symbolic link", resume=True)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    refused(world, tmp_path / "broken", "broken symbolic link")
    (tmp_path / "file").write_text("mine")
    refused(world, tmp_path / "file", "is not a folder", force=True)
    refused(world, tmp_path / "file" / "run", "is not a folder", force=True)
