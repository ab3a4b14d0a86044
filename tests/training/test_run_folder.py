"""The run's folder: it lies apart from what is read, and nothing in it that a run did not write is changed or deleted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamamoe import pretrain
from llamamoe.checkpoint.out_folder import holds
from llamamoe.errors import CheckpointError, LlamaMoeError, RefusedError, UsageError
from llamamoe.training.ownership import begin, check_owned, clear, close_staging, open_staging
from llamamoe.training.run_folder import checkpoints

from ..hostile.conftest import digests
from .runs import lines_of, recipe_of

OVERRIDES = ("steps=4", "save_every=2", "evaluate_every=2")


def refused(
    world: dict[str, str], out: Path, *parts: str, kind: type[LlamaMoeError] = RefusedError, **keys: Any
) -> None:
    """The run is refused with a message that holds ``parts``, and the folder of the world and of ``out`` stay as they are."""
    root = Path(world["model"]).parent
    above = set(root.parents)  # the folders of all tests, some of them with sparse files of many gigabytes
    folders = [root, *(each for each in (out, out.parent) if each.is_dir() and each not in above)]
    before = [digests(folder) for folder in folders]
    with pytest.raises(kind) as caught:
        pretrain(recipe_of(world, *OVERRIDES), out, **keys)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert [digests(folder) for folder in folders] == before


# ---- where OUT may lie --------------------------------------------------------------------------------------------

READ = [("model", "the model"), ("parent", "its parent"), ("train", "data.train"), ("validation", "data.validation")]


@pytest.mark.parametrize("keys", [{}, {"force": True}, {"resume": True}], ids=["plain", "force", "resume"])
@pytest.mark.parametrize(("key", "name"), READ)
def test_out_is_what_is_read(key: str, name: str, keys: dict[str, bool], world: dict[str, str]) -> None:
    refused(world, Path(world[key]), name, "must not contain each other", "Choose an OUT elsewhere", **keys)


@pytest.mark.parametrize(("key", "name"), READ)
def test_out_lies_in_what_is_read_or_holds_it(key: str, name: str, world: dict[str, str]) -> None:
    place = Path(world[key])
    refused(world, place / "a" / "run", name, "must not contain each other")
    refused(world, place.parent, "must not contain each other", force=True)


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
        refused(world, out, "must not contain each other", force=True)
    refused(world, place / ".." / place.name / "run", name)
    linked = world | {key: str(tmp_path / "link")}
    refused(linked, place / "run", name, force=True)


def test_another_name_of_a_folder_does_not_hide_it(tmp_path: Path) -> None:
    """As on file systems that take capitals for small letters; a link that is not followed stands for it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "Model").symlink_to(tmp_path / "model")
    assert holds(tmp_path / "model", tmp_path / "Model" / "new" / "run")
    assert holds(tmp_path / "Model", tmp_path / "model")
    assert not holds(tmp_path / "model", tmp_path)
    assert not holds(tmp_path / "model", tmp_path / "models" / "run")
    assert not holds(tmp_path / "nowhere", tmp_path / "run")


def test_out_is_a_link_or_a_file(world: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused(world, tmp_path / "link", "is a symbolic link", resume=True)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    refused(world, tmp_path / "broken", "broken symbolic link")
    (tmp_path / "file").write_text("mine")
    refused(world, tmp_path / "file", "is not a folder", force=True)
    refused(world, tmp_path / "file" / "run", "is not a folder", force=True)


# ---- what a run did not write -------------------------------------------------------------------------------------

KEYS = [{}, {"force": True}, {"resume": True}]
each_way = pytest.mark.parametrize("keys", KEYS, ids=["plain", "force", "resume"])


@pytest.fixture(scope="module")
def finished(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints and its model; tests work on copies."""
    out = tmp_path_factory.mktemp("finished") / "run"
    pretrain(recipe_of(world, *OVERRIDES), out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def put(folder: Path, name: str = "thesis.tex") -> Path:
    """Something of the user's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    return folder


@each_way
@pytest.mark.parametrize("name", ["checkpoint-500", "checkpoint-0", "model", ".partial"])
def test_a_foreign_folder_is_never_deleted(
    name: str, keys: dict[str, bool], world: dict[str, str], run: Path, tmp_path: Path
) -> None:
    """Neither in a folder without a run, nor in one of a run that knows nothing of it."""
    put(tmp_path / "new" / name)
    refused(world, tmp_path / "new", str(tmp_path / "new" / name), "this run did not write it", "Move it away", **keys)
    shutil.rmtree(run / name, ignore_errors=True)
    put(run / name)
    refused(world, run, str(run / name), "Move it away", **keys)


@each_way
@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "facts.json"])
def test_a_foreign_file_is_never_overwritten(
    name: str, keys: dict[str, bool], world: dict[str, str], tmp_path: Path
) -> None:
    put(tmp_path / "new", name)
    refused(world, tmp_path / "new", name, "this run did not write it", **keys)


@each_way
def test_a_checkpoint_of_another_run_is_foreign(
    keys: dict[str, bool], world: dict[str, str], run: Path, tmp_path: Path
) -> None:
    pretrain(recipe_of(world, *OVERRIDES), tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "checkpoint-4", run / "checkpoint-500")
    refused(world, run, "checkpoint-500 was written by another run", **keys)


@each_way
@pytest.mark.parametrize(
    "name", ["checkpoint-4", "checkpoint-500", "model", ".partial", "metrics.jsonl", "recipe.yaml"]
)
def test_a_link_is_never_followed(
    name: str, keys: dict[str, bool], world: dict[str, str], run: Path, tmp_path: Path
) -> None:
    """Not even one to what the run itself wrote and the user moved away."""
    elsewhere = tmp_path / "elsewhere"
    if (run / name).exists():
        (run / name).rename(elsewhere)
    else:
        put(elsewhere)
    (run / name).symlink_to(elsewhere)
    refused(world, run, str(run / name), "symbolic link", **keys)


def test_other_names_are_left_alone(world: dict[str, str], run: Path) -> None:
    for name in ("checkpoint-abc", "checkpoint-004", "checkpoint-4-copy", "notes", "model.partial"):
        put(run / name)
    (run / "slurm.out").write_text("mine")
    pretrain(recipe_of(world, *OVERRIDES), run, resume=True)
    pretrain(recipe_of(world, *OVERRIDES), run, force=True)
    for name in ("checkpoint-abc", "checkpoint-004", "checkpoint-4-copy", "notes", "model.partial"):
        assert (run / name / "thesis.tex").read_text() == "mine"
    assert (run / "slurm.out").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoint-2", "model"])
def test_what_lies_in_a_folder_of_the_run_is_not_deleted_with_it(name: str, world: dict[str, str], run: Path) -> None:
    put(run / name / "mine")
    refused(world, run, f"{name} also holds 'mine'", "nothing was deleted", force=True)
    if name == "model":
        refused(world, run, "model also holds 'mine'", resume=True)


def test_rotation_deletes_only_what_the_run_wrote(
    world: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever appears while the run is under way."""
    run = tmp_path / "run"

    def mine(progress: Any) -> None:
        if progress.stage == "train" and progress.done == 2:
            put(run / "checkpoint-1" / "evaluated")
            put(run / "checkpoint-0")

    pretrain(recipe_of(world, "steps=4", "save_every=1", "keep=1", "evaluate_every=null"), run, progress=mine)
    assert (run / "checkpoint-1" / "evaluated" / "thesis.tex").read_text() == "mine"
    assert (run / "checkpoint-0" / "thesis.tex").read_text() == "mine"
    assert (run / "checkpoint-1" / "model.safetensors").is_file()
    assert not (run / "checkpoint-2").exists()
    assert any("checkpoint-1 also holds 'evaluated'" in message for message in caplog.messages)


def test_a_name_that_is_taken_meanwhile_ends_the_run(world: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"

    def mine(progress: Any) -> None:
        if progress.stage == "train" and progress.done == 2:
            put(run / "checkpoint-4")

    with pytest.raises(LlamaMoeError, match=r"checkpoint-4 cannot be written.*last good checkpoint is checkpoint-2"):
        pretrain(recipe_of(world, *OVERRIDES), run, progress=mine)
    assert (run / "checkpoint-4" / "thesis.tex").read_text() == "mine"


def test_a_first_checkpoint_that_cannot_be_written_is_told_so(world: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"

    def mine(progress: Any) -> None:
        if progress.stage == "train" and progress.done == 1:
            put(run / "checkpoint-2")

    with pytest.raises(
        LlamaMoeError, match=r"checkpoint-2 cannot be written.*No checkpoint was written before"
    ) as error:
        pretrain(recipe_of(world, *OVERRIDES), run, progress=mine)
    assert "first step" in (error.value.hint or "")


def test_force_replaces_a_run_and_a_kill_on_the_way_does_no_harm(
    world: dict[str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every deletion can be the last: the next command still knows what is its own."""
    original = shutil.rmtree
    for last in range(1, 10):
        run, left = Path(shutil.copytree(finished, tmp_path / str(last))), [last]

        def dying(*args: Any, left: list[int] = left, **keys: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            original(*args, **keys)

        monkeypatch.setattr(shutil, "rmtree", dying)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe_of(world, *OVERRIDES), run, force=True)
        monkeypatch.undo()
        clear(run)
        assert [path.name for path in run.iterdir()] == [".lock"], last
    pretrain(recipe_of(world, *OVERRIDES), run, force=True)
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


def test_a_kill_while_the_staging_folder_is_emptied_does_not_make_it_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in range(1, 9):
        left, run = [last], tmp_path / str(last)
        run.mkdir()
        begin(run)
        for name in ("a", "m", "z"):
            put(run / ".partial" / name)
        put(run / ".partial", "zz")
        with monkeypatch.context() as patch:
            for name, original in (("unlink", os.unlink), ("rmdir", os.rmdir)):

                def dying(*args: Any, left: list[int] = left, real: Any = original, **keys: Any) -> None:
                    left[0] -= 1
                    if not left[0]:
                        raise KeyboardInterrupt
                    real(*args, **keys)

                patch.setattr(os, name, dying)
            with pytest.raises(KeyboardInterrupt):
                close_staging(run)
        check_owned(run)
        open_staging(run)
        assert [path.name for path in (run / ".partial").iterdir()] == ["llamamoe_run.json"]


def test_a_model_without_checkpoints_is_not_trained_over(world: dict[str, str], run: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(run / name)
    refused(world, run, "holds a trained model, but no checkpoint", kind=UsageError, resume=True)


# ---- damage -------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def same_size(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    assert len(old) == len(new)
    path.write_text(text.replace(old, new))


STATE, MANIFEST = "trainer_state.json", "llamamoe_complete.json"
MOMENTS, SCHEDULE = "optimizer/rank-00000.safetensors", "schedule.json"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit of the weights": (
        lambda c: flip(c / "model.safetensors"),
        "model.safetensors was changed after it was written",
    ),
    "bit of the moments": (lambda c: flip(c / MOMENTS, 5000), f"{MOMENTS} was changed after it was written"),
    "bit of the random state": (lambda c: flip(c / MOMENTS), f"{MOMENTS} was changed"),
    "no optimiser": (lambda c: (c / MOMENTS).unlink(), f"{MOMENTS} is missing"),
    "no schedule": (lambda c: (c / SCHEDULE).unlink(), f"{SCHEDULE} is missing"),
    "no state": (lambda c: (c / STATE).unlink(), f"{STATE} is missing"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
    "step": (lambda c: same_size(c / STATE, '"global_step": 4', '"global_step": 3'), f"{STATE} says step 3"),
    "state no JSON": (
        lambda c: same_size(c / STATE, '"global_step": 4', '"global_step"; 4'),
        f"{STATE} is not valid JSON",
    ),
    "ours no JSON": (lambda c: (c / "llamamoe_training.json").write_text("{"), "llamamoe_training.json has 1 bytes"),
    "cut weights": (lambda c: cut(c / "model.safetensors"), "model.safetensors has"),
    "cut moments": (lambda c: cut(c / MOMENTS), f"{MOMENTS} has"),
    "link": (lambda c: relink(c / MOMENTS), f"{MOMENTS} is not a plain file"),
    "pipe": (lambda c: (os.unlink(c / STATE), os.mkfifo(c / STATE)), f"{STATE} is not a plain file"),
    "manifest's step": (lambda c: change(c / MANIFEST, step=2), f"{MANIFEST} says step 2"),
    "manifest's ranks": (
        lambda c: change(c / MANIFEST, ranks=2),
        "optimizer/rank-00001.safetensors is not among its files",
    ),
    "manifest's list": (lambda c: unlist(c, MOMENTS), f"{MOMENTS} is not among its files"),
    "renamed": (lambda c: c.rename(c.with_name("checkpoint-6")), f"{MANIFEST} says step 4"),
}


def relink(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def unlist(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"][name]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_way_out_is_told(damage: str, world: dict[str, str], run: Path) -> None:
    act, told = DAMAGES[damage]
    act(run / "checkpoint-4")
    refused(world, run, "is damaged: ", told, "--resume checkpoint-2 goes on", kind=CheckpointError, resume=True)


@pytest.mark.parametrize("damage", ["bit of the weights", "no optimiser", "cut moments", "link", "renamed"])
def test_the_way_out_ends_with_the_same_bytes(damage: str, world: dict[str, str], run: Path, finished: Path) -> None:
    DAMAGES[damage][0](run / "checkpoint-4")
    for path in run.glob("checkpoint-*/optimizer/moved"):
        path.unlink()  # which the user has put there
    pretrain(recipe_of(world, *OVERRIDES), run, resume="checkpoint-2")
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    assert lines_of(run) == lines_of(finished)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]


def test_without_a_whole_checkpoint_the_way_out_is_another_run(world: dict[str, str], run: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        flip(run / name / "model.safetensors")
    refused(
        world,
        run,
        "checkpoint-4 is damaged",
        "No older checkpoint is whole",
        "begin again in another --out",
        kind=CheckpointError,
        resume=True,
    )
    refused(world, run, "checkpoint-2 is damaged", kind=CheckpointError, resume=str(run / "checkpoint-2"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"a": 3}}', "[" * 100_000, "\udcff"])
def test_a_damaged_manifest(text: str, world: dict[str, str], run: Path) -> None:
    """It alone tells that the run wrote the checkpoint."""
    (run / "checkpoint-4" / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    for keys in KEYS:
        refused(
            world,
            run,
            "checkpoint-4",
            MANIFEST,
            "neither used nor deleted",
            "Move it away",
            kind=CheckpointError,
            **keys,
        )


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("llamamoe_run.json", "", "llamamoe_run.json is not valid JSON"),
        ("llamamoe_run.json", "{}", "llamamoe_run.json names no run"),
        ("llamamoe_run.json", '{"run": "another"}', "was written by another run"),
        ("facts.json", "{", "facts.json is not valid JSON"),
        ("facts.json", "[]", "facts.json must hold a JSON object"),
        ("metrics.jsonl", "nonsense\n", "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", '{"step": 1}\n{"step": "2"}\n', "metrics.jsonl, line 2 is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", "\udcff\n", "metrics.jsonl, line 1 is damaged"),
    ],
)
def test_a_damaged_file_of_the_run(name: str, text: str, told: str, world: dict[str, str], run: Path) -> None:
    (run / name).write_bytes(text.encode(errors="surrogateescape"))
    refused(world, run, told, resume=True)


@pytest.mark.parametrize("name", ["llamamoe_run.json", "facts.json", "metrics.jsonl", "recipe.yaml", ".lock"])
def test_a_file_of_the_run_is_a_folder(name: str, world: dict[str, str], run: Path) -> None:
    (run / name).unlink()
    put(run / name)
    for keys in KEYS:
        refused(world, run, name, "is a folder", **keys)


@pytest.mark.parametrize("how", ["kept", "changed", "lost"])
def test_metrics_that_were_changed_are_told_and_do_not_stop_a_run(
    how: str, world: dict[str, str], run: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "metrics.jsonl"
    if how == "changed":
        same_size(path, '"step": 2, "kind": "validation"', '"step": 1, "kind": "validation"')
    elif how == "lost":
        path.unlink()
    pretrain(recipe_of(world, *OVERRIDES), run, resume="checkpoint-2")
    assert any("metrics.jsonl is not what it was" in message for message in caplog.messages) is (how != "kept")
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    caplog.clear()
    pretrain(recipe_of(world, *OVERRIDES), run, resume=True)
    assert not [each for each in caplog.records if each.name == "llamamoe"], (
        "the next checkpoint notes what stands there now"
    )


def test_facts_that_were_changed(world: dict[str, str], run: Path) -> None:
    change(run / "facts.json", accumulation=7)
    refused(world, run, "facts.json of the run was changed", kind=CheckpointError, resume=True)


@pytest.mark.parametrize(
    "name", ["checkpoint-3", "checkpoint-abc", "../run/checkpoint-3", "/tmp/checkpoint-4", "model", ".", ""]
)
def test_what_is_not_a_checkpoint_cannot_be_resumed(name: str, world: dict[str, str], run: Path) -> None:
    refused(world, run, "is not a checkpoint of the run", "checkpoint-2, checkpoint-4", kind=UsageError, resume=name)


def test_an_empty_folder_of_a_run_begins(world: dict[str, str], finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pretrain(recipe_of(world, *OVERRIDES), tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(finished)
    (tmp_path / "run" / "checkpoint-6").mkdir()
    refused(world, tmp_path / "run", "checkpoint-6: llamamoe_complete.json is missing", resume=True)


class Evil:
    """An object whose pickle runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def relist(checkpoint: Path, name: str) -> None:
    """Put a changed file on the list as if the run had written it."""
    manifest, data = json.loads((checkpoint / MANIFEST).read_text()), (checkpoint / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("resume", [True, "checkpoint-2"])
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "the weights are quantised (bitsandbytes)"),
        ({"quantization_config": {}, "compression_config": "x"}, "the weights are quantised (x)"),
        ({"auto_map": {"AutoModel": "a.B"}}, "brings its own code"),
        ({"model_type": "bert"}, "model_type 'bert' is not a mixture of experts"),
    ],
)
def test_a_checkpoint_is_checked_as_a_model_is(
    keys: dict[str, Any], told: str, resume: bool | str, world: dict[str, str], run: Path
) -> None:
    """Whatever the list says: transformers raised ValueError in the midst of loading."""
    for name in ("checkpoint-2", "checkpoint-4"):
        change(run / name / "config.json", **keys)
        relist(run / name, "config.json")
    refused(world, run, told, kind=LlamaMoeError, resume=resume)


@pytest.mark.parametrize("name", [MOMENTS, "optimizer/.metadata", "optimizer/__0_0.distcp", "rng_state.pth", SCHEDULE])
def test_no_pickle_is_read(name: str, world: dict[str, str], run: Path, tmp_path: Path) -> None:
    """Whatever the list says: neither in the place of a file that is read, nor under the names of torch's own storage."""
    with (run / "checkpoint-2" / name).open("wb") as file:
        torch.save({"state": Evil(tmp_path / "ran")}, file)
    relist(run / "checkpoint-2", name)
    if name in (MOMENTS, SCHEDULE):
        with pytest.raises(CheckpointError, match="holds a state that does not fit this run"):
            pretrain(recipe_of(world, *OVERRIDES), run, resume="checkpoint-2")
        assert (run / "checkpoint-4").is_dir(), "later ones go only when this one is loaded"
    else:
        pretrain(recipe_of(world, *OVERRIDES), run, resume="checkpoint-2")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer-00000.safetensors"])
def test_a_checkpoint_of_an_earlier_version_is_refused_with_the_way_on(
    name: str, world: dict[str, str], run: Path
) -> None:
    checkpoint = run / "checkpoint-4"
    (checkpoint / MOMENTS).rename(checkpoint / name)
    unlist(checkpoint, MOMENTS)
    relist(checkpoint, name)
    way = f"a new run that begins there, with model={checkpoint}, data.skip_tokens={4 * 8 * 16} and another --out"
    refused(world, run, "was written by an earlier version", name, way, resume=True)


def test_every_file_is_listed_with_its_hash(run: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4", "model"):
        manifest = json.loads((run / name / MANIFEST).read_text())
        listed = {file: entry["sha256"] for file, entry in manifest["files"].items()}
        assert listed == {file: digest for file, digest in digests(run / name).items() if file != MANIFEST}
