"""The same run on 1, 2 and 4 processes, data-parallel and sharded: the same batches, the same losses."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamamoe import plan_pretraining, pretrain
from llamamoe.errors import CheckpointError
from llamamoe.training.arguments import training_arguments
from llamamoe.training.ownership import step_of
from llamamoe.training.recipe import PretrainRecipe, load_pretrain_recipe
from llamamoe.training.resuming import optimizer_file
from llamamoe.training.run_folder import checkpoints

from ..hostile.conftest import digests
from .runs import lines_of, make_world, recipe_of, start, start_torchrun
from .test_run_folder import flip

pytestmark = pytest.mark.slow
LONG = ("steps=20", "evaluate_every=5", "save_every=null")
SELDOM = ("save_every=null", "evaluate_every=null", "data.update=static")


def recipe_for(world: dict[str, str], *overrides: str) -> PretrainRecipe:
    return recipe_of(
        world,
        "steps=3",
        "save_every=2",
        "evaluate_every=1",
        "precision.save=bfloat16",
        "data.update=sheared_llama",
        "data.reference_losses={large: 3.0, small: 1.0}",
        *overrides,
        micro_batch_size=2,
        gate="noisy_top_k",
        losses=[{"name": "switch"}, {"name": "cv_squared"}, {"name": "z", "coefficient": 0.001}],
        distill={"lm": {"weight": 0.5}, "kl": {"weight": 1.0}},
    )


@pytest.fixture(scope="module")
def alone(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    pretrain(recipe_for(world), out)
    return out


@pytest.fixture(scope="module")
def alone_for_long(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "long"
    pretrain(recipe_for(world, *LONG), out)
    return out


def run(recipe: PretrainRecipe, out: Path, processes: int, *flags: str) -> None:
    path = out.with_suffix(".yaml")
    path.write_text(recipe.to_yaml())
    process = start(path, out, *flags, processes=processes)
    told, _ = process.communicate()
    assert process.returncode == 0, told[-3000:]


def go_on(whole: Path, out: Path, recipe: PretrainRecipe, processes: int) -> None:
    """Resume a copy of a finished run as if it had been stopped after its second step."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-3")
    shutil.rmtree(out / "model")
    run(recipe, out, processes, "--resume")


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    assert lines_of(ours) == lines_of(theirs)
    file = Path("model", "model.safetensors")
    assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def assert_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for key in {"loss", "grad_norm", "terms", "domain_loss"} & set(b):
            assert a[key] == pytest.approx(b[key], rel=3e-5), (a["step"], key)
        assert a.get("mixture", {}) == pytest.approx(b.get("mixture", {}), rel=1e-4)
        for key, value in b.get("routing", {}).items():
            assert a["routing"][key] == pytest.approx(value, rel=1e-3, abs=2e-3), (a["step"], key)


@pytest.mark.parametrize(
    ("processes", "sharding"),
    [
        (2, {}),
        (4, {}),
        (2, {"fsdp_size": 2}),
        (4, {"fsdp_size": 2, "dp_replicate_size": 2}),
        (2, {"fsdp_size": 2, "ep_size": 2}),
    ],
    ids=["ddp-2", "ddp-4", "fsdp-2", "hsdp-4", "fsdp-ep-2"],
)
def test_losses_agree(
    processes: int, sharding: dict[str, int], world: dict[str, str], alone_for_long: Path, tmp_path: Path
) -> None:
    """For 20 steps, in float32: no token is routed otherwise, and rounding does not grow."""
    overrides = [f"distributed.{key}={value}" for key, value in sharding.items()]
    run(recipe_for(world, *LONG, *overrides), tmp_path / "run", processes)
    assert_equal(lines_of(tmp_path / "run"), lines_of(alone_for_long))
    mixtures = [line["mixture"]["small"] for line in lines_of(alone_for_long) if line["kind"] == "train"]
    assert len(set(mixtures)) == 4, mixtures  # it does move
    facts = [json.loads((out / "facts.json").read_text()) for out in (tmp_path / "run", alone_for_long)]
    assert facts[0]["active_parameters"] == facts[1]["active_parameters"]
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "run", alone_for_long))
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == torch.bfloat16, name
        assert float((ours[name] - value).abs().max()) < 2e-3, name  # Adam's first steps amplify rounding


def test_experts_that_compete_learn_alike(world: dict[str, str], tmp_path: Path) -> None:
    """The loss uses their weights outside of DDP's forward pass, and again in the backward pass."""
    learn = ("save_every=null", "evaluate_every=null", "data.update=static", "gradient_checkpointing=true")
    recipe = recipe_for(world, *learn).model_dump() | {"losses": [{"name": "competitive", "experts": True}]}
    recipe["distill"] = {"lm": {"weight": 0.0}}
    wanted = load_pretrain_recipe(given=recipe)
    pretrain(wanted, tmp_path / "alone")
    run(wanted, tmp_path / "run", 2)
    assert_equal(lines_of(tmp_path / "run"), lines_of(tmp_path / "alone"))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (Path(world["model"]), tmp_path / "run" / "model")
    )
    moved = {
        name.rsplit(".", 2)[-2] for name in before if ".experts." in name and not torch.equal(before[name], after[name])
    }
    assert moved == {"w1", "w2", "w3"}


def test_gradients_are_cut_after_every_micro_batch(world: dict[str, str], tmp_path: Path) -> None:
    """Summed whole on every rank, they would be as large as the model."""
    for sizes, expected in (({"fsdp_size": 2}, True), ({"fsdp_size": 2, "dp_replicate_size": 2}, None), ({}, None)):
        recipe = recipe_for(world, *(f"distributed.{key}={value}" for key, value in sizes.items()))
        args = training_arguments(recipe, tmp_path, "cpu", evaluates=False)
        assert (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch") is expected


@pytest.mark.parametrize("sharding", [{}, {"fsdp_size": 2}], ids=["ddp", "fsdp"])
def test_in_bfloat16_ddp_computes_as_one_process_and_fsdp_otherwise(
    sharding: dict[str, int], world: dict[str, str], tmp_path: Path
) -> None:
    """Autocast keeps the residual stream in float32; FSDP2 gathers weights in bfloat16, and all follows their dtype."""
    keys = ("steps=20", *SELDOM, "precision.compute=bfloat16")
    pretrain(recipe_for(world, *keys), tmp_path / "alone")
    run(
        recipe_for(world, *keys, *(f"distributed.{key}={value}" for key, value in sharding.items())),
        tmp_path / "run",
        2,
    )
    ours, theirs = (
        [line for line in lines_of(tmp_path / name) if line["kind"] == "train"] for name in ("run", "alone")
    )
    errors = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, theirs, strict=True)]
    same = [
        a["layers"]["max_violation"] == pytest.approx(b["layers"]["max_violation"], abs=1e-4)
        for a, b in zip(ours, theirs, strict=True)
    ]
    # Rounding moves a token to another expert after some steps; how soon depends on the processor (8 steps with AMX).
    alike = same.index(False) if False in same else len(same)
    assert (errors[0] > 1e-4) == bool(sharding)
    assert max(errors) < 5e-2
    if sharding:
        assert not all(same), "routed alike"
    else:
        assert alike >= 6
        assert max(errors[:alike]) < 3e-5


def test_a_sharded_run_in_bfloat16_gathers_bfloat16_and_trains_float32(
    world: dict[str, str], alone: Path, tmp_path: Path
) -> None:
    """The same loss to bfloat16's rounding, and float32 weights whose steps bfloat16 could not hold."""
    overrides = ("precision.compute=bfloat16", "precision.save=float32", "optimizer.lr=1e-6", "gate=top_k")
    for name, processes, size in (("whole", 1, 1), ("run", 2, 2)):
        run(recipe_for(world, *overrides, f"distributed.fsdp_size={size}"), tmp_path / name, processes)
    ours, theirs = (lines_of(tmp_path / name) for name in ("run", "whole"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
    before = load_file(Path(world["model"]) / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 3)[-2] for name in moved} >= {"w1", "w2", "w3", "q_proj"}
    for name in moved:
        if ".experts." in name:  # steps of 1e-6 on weights of 0.02: far below bfloat16's spacing
            assert 0 < float((after[name] - before[name]).abs().max()) < 1e-5, name


def test_sigterm_stops_all_ranks_after_the_same_step(world: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_for(world, "steps=400", *SELDOM)
    (tmp_path / "run.yaml").write_text(recipe.to_yaml())
    process = start_torchrun(tmp_path / "run.yaml", tmp_path / "run", processes=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
            break
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to its processes
    told, _ = process.communicate()
    assert process.returncode != 0
    [kept] = checkpoints(tmp_path / "run")
    step = step_of(kept)
    assert f"stopped after step {step}" in told
    assert 0 < step < 400
    shorter = recipe_for(world, f"steps={step + 1}", *SELDOM, f"model={kept}")
    run(shorter, tmp_path / "next", 2)  # a checkpoint is a model of its own


@pytest.mark.parametrize(
    ("processes", "sharding"),
    [
        (2, {"fsdp_size": 2}),
        (4, {"fsdp_size": 2, "dp_replicate_size": 2}),
        (2, {"fsdp_size": 2, "ep_size": 2}),
    ],
    ids=["fsdp-2", "hsdp-4", "fsdp-ep-2"],
)
def test_a_sharded_run_goes_on_exactly(
    processes: int, sharding: dict[str, int], world: dict[str, str], tmp_path: Path
) -> None:
    """From its newest checkpoint, and past a damaged one, which all ranks refuse by one error and without waiting."""
    recipe = recipe_for(world, *(f"distributed.{key}={value}" for key, value in sharding.items()))
    run(recipe, tmp_path / "whole", processes)
    go_on(tmp_path / "whole", tmp_path / "run", recipe, processes)
    assert_same_bytes(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(tmp_path / "run" / "model")
    name = optimizer_file(processes - 1)
    damaged = tmp_path / "run" / "checkpoint-3" / name
    flip(damaged)
    before = digests(tmp_path / "run")
    begin = start_torchrun if sharding == {"fsdp_size": 2} else start  # torchrun has errors of its own to tell
    told, _ = (process := begin(tmp_path / "run.yaml", tmp_path / "run", "--resume", processes=processes)).communicate()
    assert process.returncode != 0
    assert told.count(f"checkpoint-3 is damaged: {name} was changed") == 1
    assert "llamamoe.errors" not in told, "the error is told in a line, not by its traceback"
    assert digests(tmp_path / "run") == before
    way = told.split("--resume ")[1].split()[0]
    run(recipe, tmp_path / "run", processes, "--resume", way)
    assert_same_bytes(tmp_path / "run", tmp_path / "whole")


def test_a_data_parallel_run_goes_on_exactly_and_with_another_number_of_ranks(
    world: dict[str, str], alone: Path, tmp_path: Path
) -> None:
    run(recipe_for(world), tmp_path / "whole", 2)
    for processes in (2, 4):
        out = tmp_path / f"on-{processes}"
        go_on(tmp_path / "whole", out, recipe_for(world), processes)
        assert_equal(lines_of(out), lines_of(alone))
    assert_same_bytes(tmp_path / "on-2", tmp_path / "whole")


SHARDINGS: dict[str, tuple[int, dict[str, int]]] = {
    "alone": (1, {}),
    "ddp-4": (4, {}),
    "fsdp-2": (2, {"fsdp_size": 2}),
    "fsdp-4": (4, {"fsdp_size": 4}),
    "hsdp-4": (4, {"fsdp_size": 2, "dp_replicate_size": 2}),
    "fsdp-ep-2": (2, {"fsdp_size": 2, "ep_size": 2}),
    "fsdp-ep-4": (4, {"fsdp_size": 4, "ep_size": 2}),
}
RANK_FILES = [(f"rank-{rank:05d}.safetensors", f"model-{rank + 1:05d}-of-00004.safetensors") for rank in range(4)]
SIX = ("steps=6", "save_every=2", "evaluate_every=2")


def sharded_as(world: dict[str, str], name: str) -> tuple[int, PretrainRecipe]:
    processes, sizes = SHARDINGS[name]
    return processes, recipe_for(world, *SIX, *(f"distributed.{key}={value}" for key, value in sizes.items()))


def run_of(recipe: PretrainRecipe, out: Path, processes: int, *flags: str) -> None:
    """Run here, or in ranks."""
    if processes > 1:
        run(recipe, out, processes, *flags)
    else:
        pretrain(recipe, out, resume="--resume" in flags)


@pytest.fixture(scope="module")
def long(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Metrics of an uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("long") / "alone"
    pretrain(sharded_as(world, "alone")[1], out)
    return {"lines": lines_of(out)}


@pytest.mark.parametrize(
    "turns",
    [
        ("fsdp-2", "alone", "fsdp-4"),
        ("hsdp-4", "fsdp-2", "alone"),
        ("alone", "hsdp-4", "ddp-4"),
        ("fsdp-ep-4", "alone", "fsdp-ep-2"),
        ("ddp-4", "fsdp-ep-4", "hsdp-4"),
    ],
    ids="-then-".join,
)
def test_a_run_goes_on_with_other_ranks_and_another_sharding(
    turns: tuple[str, ...], world: dict[str, str], long: dict[str, Any], tmp_path: Path
) -> None:
    """Every two steps on other ranks: the same batches, mixture and noise, and losses equal to rounding."""
    out = tmp_path / "run"
    for done, turn in enumerate(turns):
        processes, recipe = sharded_as(world, turn)
        run_of(recipe, out, processes, *(("--resume",) if done else ()))
        last = 2 * (done + 1)
        if last < 6:  # as if it had been stopped there
            for step in range(last + 2, 7, 2):
                shutil.rmtree(out / f"checkpoint-{step}")
            shutil.rmtree(out / "model")
    assert_equal(lines_of(out), long["lines"])
    for step, turn in zip((2, 4, 6), turns, strict=True):
        manifest = json.loads((out / f"checkpoint-{step}" / "llamamoe_complete.json").read_text())
        assert manifest["ranks"] == SHARDINGS[turn][0]


def stored_in(checkpoint: Path) -> dict[str, int]:
    """Return the bytes of every tensor, over all files of a checkpoint; no file holds a part that another has."""
    found: dict[str, int] = {}
    parts = set()
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            offsets = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in file.keys():  # noqa: SIM118
                part = (name, *offsets.get(name, {}).get("saved_offsets", ()))
                assert part not in parts
                parts.add(part)
                found[name] = found.get(name, 0) + file.get_tensor(name).nbytes
    return found


def test_replicas_store_every_byte_once_and_as_many_as_the_plan_says(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", dense={"hidden_size": 192, "intermediate_size": 768})
    keys = {"distributed": {"fsdp_size": 2, "dp_replicate_size": 2}, "micro_batch_size": 2}
    recipe = recipe_of(world, "steps=1", *SELDOM, "precision.save=float32", **keys)
    run(recipe, tmp_path / "run", 4)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    found, weights = stored_in(checkpoint), load_file(tmp_path / "run" / "model" / "model.safetensors")
    moments = {name: nbytes for name, nbytes in found.items() if "/exp_avg" in name}
    assert {name: value.nbytes for name, value in weights.items()} == {
        name: nbytes for name, nbytes in found.items() if name in weights
    }
    assert sum(moments.values()) == 2 * sum(value.nbytes for value in weights.values())
    plan = plan_pretraining(recipe)
    written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert written == pytest.approx(plan.estimate.saving["save_bytes"], rel=0.02)
    sizes = [sum(path.stat().st_size for path in checkpoint.rglob("*") if path.name in names) for names in RANK_FILES]
    assert max(sizes) < 1.7 * plan.estimate.saving["save_bytes_of_a_rank"], sizes  # the embedding is not divided


def test_replicas_write_the_same_bytes_in_the_background(world: dict[str, str], divided: Path, tmp_path: Path) -> None:
    processes, recipe = sharded_as(world, "hsdp-4")
    run(recipe.model_copy(update={"save_in_background": True}), tmp_path / "run", processes)
    for step in (2, 4, 6):
        listed = [
            json.loads((out / f"checkpoint-{step}" / "llamamoe_complete.json").read_text())["files"]
            for out in (tmp_path / "run", divided)
        ]
        for each in listed:
            del each["trainer_state.json"]  # it holds times
        assert listed[0] == listed[1]


@pytest.mark.parametrize("how", ["missing", "short", "changed"])
@pytest.mark.parametrize("name", [optimizer_file(3), "model-00002-of-00004.safetensors"])
def test_a_rank_file_that_is_not_as_written_is_refused(
    name: str, how: str, world: dict[str, str], divided: Path, tmp_path: Path
) -> None:
    """In the plan, before any rank starts: by one error with the file's name."""
    out = Path(shutil.copytree(divided, tmp_path / "run"))
    path = out / "checkpoint-2" / name
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path)
    before = digests(out)
    told = {"missing": "is missing", "short": "but was written with", "changed": "was changed after it was written"}
    with pytest.raises(CheckpointError, match=rf"checkpoint-2 is damaged: {name} .*{told[how]}"):
        pretrain(sharded_as(world, "alone")[1], out, resume="checkpoint-2")
    assert digests(out) == before


@pytest.fixture(scope="module")
def divided(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four processes."""
    out = tmp_path_factory.mktemp("divided") / "run"
    processes, recipe = sharded_as(world, "hsdp-4")
    run(recipe, out, processes)
    return out


def test_a_checkpoint_of_many_files_is_a_model(world: dict[str, str], divided: Path) -> None:
    """As its one-file export is, up to the dtype."""
    config = [json.loads((divided / name / "config.json").read_text()) for name in ("checkpoint-6", "model")]
    assert {key for key, value in config[0].items() if config[1].get(key) != value} == {
        "dtype",
        "torch_dtype",
        "llamamoe",
    }
    ours, whole = (load_model(divided / name) for name in ("checkpoint-6", "model"))
    for name, value in whole.items():
        assert torch.equal(ours[name].bfloat16(), value), name


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.state_dict())


def test_a_sharded_run_is_extended_and_changed(world: dict[str, str], tmp_path: Path) -> None:
    """As one process is: the longer run is the one that was planned so; a change has its effect and is noted once."""
    keys = ("save_every=2", "evaluate_every=null", "lr_schedule.shape=constant", "data.update=static")
    recipes = [recipe_for(world, "distributed.fsdp_size=2", *keys, f"steps={steps}") for steps in (2, 4)]
    run(recipes[1], tmp_path / "whole", 2)
    run(recipes[0], tmp_path / "run", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "changed")
    run(recipes[1], tmp_path / "run", 2, "--resume", "--extend")
    lines = lines_of(tmp_path / "run")
    assert [each for each in lines if each["kind"] == "change"] == [
        {"step": 2, "kind": "change", "changed": {"steps": [2, 4]}}
    ]
    file = Path("model", "model.safetensors")
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    other = recipe_for(world, "distributed.fsdp_size=2", *keys, "steps=4", "optimizer.lr=5e-4")
    run(other, tmp_path / "changed", 2, "--resume", "--allow-change")
    rates = [line["lr"]["rest"] for line in lines_of(tmp_path / "changed") if line["kind"] == "train"]
    assert rates == [2e-3, 2e-3, 5e-4, 5e-4]


def test_a_refusal_reaches_processes_that_were_started_by_hand(world: dict[str, str], tmp_path: Path) -> None:
    """No supervisor ends the others, which would wait for the first one."""
    recipe, out = recipe_for(world, "steps=1", *SELDOM), tmp_path / "run"
    path = out.with_suffix(".yaml")
    path.write_text(recipe.to_yaml())
    told, _ = (first := start(path, out, processes=2, by_hand=True)).communicate()
    assert first.codes == [0, 0], told
    before = digests(out)
    told, _ = (again := start(path, out, processes=2, by_hand=True)).communicate()
    assert again.codes == [2, 1], told
    assert told.count("Error: process 0 did not start, and reports why.") == 1
    assert told.count("Go on with it by --resume") == 1
    path.write_text(recipe_for(world, "steps=1", *SELDOM, f"model={tmp_path / 'nowhere'}").to_yaml())
    told, _ = (other := start(path, out, processes=2, by_hand=True)).communicate()
    assert other.codes == [3, 3], told
    assert digests(out) == before


def test_biases_of_a_sharded_model_move_as_those_of_a_whole_one(tmp_path: Path) -> None:
    """Ernie's bias is a parameter, which FSDP cuts."""
    world = make_world(tmp_path / "world", target="ernie4_5_moe", num_experts=3, shared="1x")
    keys: dict[str, Any] = {"micro_batch_size": 2, "balancing": {"rate": 0.00117}}
    keys["precision"] = {"compute": "bfloat16", "parent": "float32"}
    pretrain(recipe_of(world, "steps=3", **keys), tmp_path / "alone")
    run(recipe_of(world, "steps=3", "distributed.fsdp_size=2", **keys), tmp_path / "run", 2)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "alone"))
    biases = [name for name in theirs if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for name in biases:
        assert ours[name].dtype == torch.float32
        assert bool(theirs[name].any())
        steps = (
            ours[name] / 0.00117
        )  # by signs, which rounding elsewhere may turn; never by what bfloat16 leaves of them
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert float((steps - theirs[name] / 0.00117).abs().mean()) < 1


def test_deepspeed_trains_what_ddp_does_and_goes_on_exactly(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-1 on a CPU, in float32: its bfloat16 is another than autocast's. No extra installs it, so CI skips this."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    shipped = Path(__file__).resolve().parents[2] / "recipes" / "launch" / "deepspeed_zero1.json"
    config = json.loads(shipped.read_text()) | {"bf16": {"enabled": False}}
    (tmp_path / "zero1.json").write_text(json.dumps(config))
    recipe = recipe_for(world, "gate=top_k", f"trainer.deepspeed={tmp_path / 'zero1.json'}")
    run(recipe_for(world, "gate=top_k"), tmp_path / "ddp", 2)
    run(recipe, tmp_path / "zero1", 2)
    assert_equal(lines_of(tmp_path / "zero1"), lines_of(tmp_path / "ddp"))
    go_on(tmp_path / "zero1", tmp_path / "run", recipe, 2)
    assert_same_bytes(tmp_path / "run", tmp_path / "zero1")


def test_a_sharded_run_with_all_states_in_bfloat16_learns_and_goes_on_exactly(
    world: dict[str, str], tmp_path: Path
) -> None:
    """Shards are rounded by draws of their own: not the same as on one rank, but as good, and the same again."""
    precision = ("parameters=bfloat16", "compute=bfloat16", "rounding=stochastic", "save=float32")
    keys = [*(f"precision.{each}" for each in precision), "gate=top_k"]
    recipe = recipe_for(world, *keys, "distributed.fsdp_size=2")
    pretrain(recipe_for(world, *keys), tmp_path / "alone")
    run(recipe, tmp_path / "whole", 2)
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "alone"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    go_on(tmp_path / "whole", tmp_path / "run", recipe, 2)
    assert_same_bytes(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        (("compute=float32",), 3e-5),
        (("compute=bfloat16",), 2e-2),
        (("parameters=bfloat16", "compute=bfloat16"), 2e-2),
    ],
    ids=["float32", "bfloat16", "frozen-bfloat16"],
)
def test_adapters_on_sharded_weights_learn_as_on_whole_ones_and_go_on_exactly(
    precision: tuple[str, ...], tolerance: float, world: dict[str, str], tmp_path: Path
) -> None:
    """The adapters are whole on every rank; what they add is merged into each rank's shards."""
    pytest.importorskip("peft")
    keys = [*(f"precision.{each}" for each in precision), "precision.save=float32", "gate=top_k"]
    keys += ["lora.rank=2", "lora.train_router=false", "data.update=static"]
    recipe = recipe_for(world, *keys, "distributed.fsdp_size=2")
    pretrain(recipe_for(world, *keys), tmp_path / "alone")
    run(recipe, tmp_path / "whole", 2)
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "alone"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "alone"))
    before = load_file(Path(world["model"]) / "model.safetensors")
    adapted = {"w1", "w2", "w3", "q_proj", "k_proj", "v_proj", "o_proj"}
    moved = [name for name in theirs if name.rsplit(".", 2)[-2] in adapted]
    assert all(float((theirs[name] - before[name]).abs().max()) > 1e-3 for name in moved)
    far = torch.cat([(theirs[name] - before[name]).flatten() for name in moved])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in moved])
    assert float(apart.norm() / far.norm()) < (1e-2 if tolerance < 1e-3 else 0.5)
    go_on(tmp_path / "whole", tmp_path / "run", recipe, 2)
    assert_same_bytes(tmp_path / "run", tmp_path / "whole")
