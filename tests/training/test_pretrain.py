"""A run from start to end: what it writes, that it learns, and that a stop changes nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe import plan_pretraining, pretrain, tokenize
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.errors import CheckpointError, LlamaMoeError, RefusedError, StoppedError, UsageError
from llamamoe.training import metrics
from llamamoe.training.ownership import step_of
from llamamoe.training.run_folder import checkpoints, locked

from .runs import BLOCK, lines_of, make_text, make_tokens, make_world, recipe_of, start

EXPERT_KL = {"lm": {"weight": 0.5}, "kl": {"weight": 1.0}}


@pytest.fixture(scope="module")
def finished(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything on, not interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    (Path(world["model"]) / "llamamoe_receipt.json").write_text('{"calibration": {"document_hashes": ["a"]}}')
    pretrain(everything(world), out)
    return out


def everything(world: dict[str, str]) -> Any:
    """Balance, distillation, and a mixture that changes on the way."""
    update = {"data.update": "sheared_llama", "data.reference_losses": "{large: 3.0, small: 1.0}"}
    return recipe_of(
        world,
        *(f"{key}={value}" for key, value in update.items()),
        losses=[{"name": "switch"}, {"name": "z", "coefficient": 0.001}],
        distill=EXPERT_KL,
        gate="jitter",
    )


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_the_result_loads_in_plain_transformers_and_has_learned(finished: Path, world: dict[str, str]) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(finished / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(finished / "model")("ab")["input_ids"]
    validations = [line["loss"] for line in lines_of(finished) if line["kind"] == "validation"]
    assert validations[-1] < validations[0] - 0.5
    assert model.dtype == torch.float32


def test_the_configuration_has_both_spellings_and_our_facts(finished: Path, world: dict[str, str]) -> None:
    config = json.loads((finished / "model" / "config.json").read_text())
    before = json.loads((Path(world["model"]) / "config.json").read_text())
    assert config["rope_theta"] == before["rope_theta"]
    assert config["rope_parameters"] == before["rope_parameters"]
    assert config["torch_dtype"] == "float32"
    assert config["use_cache"] == before.get("use_cache", True)
    assert config["llamamoe"]["trained"]["steps"] == 6
    assert config["llamamoe"]["num_experts"] == 4
    assert (before["llamamoe"]["router_scale"], config["llamamoe"]["router_scale"]) == ("hard", "soft")
    assert not any(key.endswith("experts_implementation") for key in config)
    assert config.get("router_aux_loss_coef") == before.get("router_aux_loss_coef")


def test_the_card_tells_what_was_trained(finished: Path, world: dict[str, str]) -> None:
    told = json.loads((finished / "model" / "llamamoe_training_receipt.json").read_text())
    assert told["document_hashes"] == ["a"], "what the conversion was fitted to"
    receipt = told["trained"]
    card = (finished / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "moe" in head["tags"]
    for part in (Path(world["model"]).name, f"{receipt['steps']:,} steps", f"{receipt['tokens']:,} tokens in all"):
        assert part in card, part
    assert str(Path(world["model"]).parent) not in card, "no place on this machine"
    for name in re.findall(r"[\w.]+\.(?:yaml|json)", card):
        assert (finished / "model" / name).is_file(), name


def test_every_checkpoint_is_a_model_of_its_own(finished: Path) -> None:
    for folder in checkpoints(finished):
        AutoModelForCausalLM.from_pretrained(folder)
        assert not list(folder.glob("*.bin"))
    assert [folder.name for folder in checkpoints(finished)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_the_best_checkpoint_is_kept_beside_the_newest(world: dict[str, str], tmp_path: Path) -> None:
    overrides = (
        "steps=5",
        "save_every=1",
        "evaluate_every=1",
        "keep=1",
        "optimizer.lr=3.0",
        "lr_schedule.min_ratio=1.0",
    )
    result = pretrain(recipe_of(world, *overrides), tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in lines_of(tmp_path / "run") if line["kind"] == "validation"}
    step = min(range(1, 6), key=losses.__getitem__)
    assert step < 5, losses  # such steps are too long
    assert result.best == (tmp_path / "run" / f"checkpoint-{step}", losses[step])
    assert {path.name for path in checkpoints(tmp_path / "run")} == {f"checkpoint-{step}", "checkpoint-5"}


def test_metrics_tell_everything(finished: Path) -> None:
    lines = lines_of(finished)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in train] == [8 * BLOCK * step for step in range(1, 7)]
    last = train[-1]
    assert set(last["terms"]) == {"lm", "kl", "switch", "z"}
    assert set(last["domain_loss"]) == {"large", "small"}
    assert set(last["lr"]) == {"router", "experts", "experts_down", "rest"}
    assert {"max_violation/mean", "dead_experts/worst", "load_entropy_share/first"} <= set(last["routing"])
    assert len(last["layers"]["max_violation"]) == 2
    total = 0.5 * last["terms"]["lm"] + last["terms"]["kl"] + 0.01 * last["terms"]["switch"]
    assert last["loss"] == pytest.approx(total + 0.001 * last["terms"]["z"], rel=1e-5)


def test_the_mixture_follows_the_losses(finished: Path) -> None:
    train = [line["mixture"] for line in lines_of(finished) if line["kind"] == "train"]
    assert train[0] == train[2]
    assert train[3]["small"] > train[0]["small"]  # its loss is further above its reference


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_stop_changes_nothing(stop: int, finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pretrain(everything(world), tmp_path / "run", progress=stopped_after(stop))
    assert not (tmp_path / "run" / "model").exists()
    pretrain(everything(world), tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(finished)
    assert weights(tmp_path / "run") == weights(finished)


def stopped_after(step: int) -> Any:
    """Stops a run as Ctrl-C does."""

    def stopping(progress: Any) -> None:
        if progress.stage == "train" and progress.done == step:
            raise KeyboardInterrupt

    return stopping


@pytest.mark.parametrize("gate", ["noisy_top_k", "gshard", "switch"])
def test_a_stop_changes_nothing_of_what_a_gate_does(gate: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", top_k=1 if gate == "switch" else 2, num_experts=4)
    options: dict[str, Any] = {"name": gate} if gate == "noisy_top_k" else {"name": gate, "capacity_factor": 0.75}
    recipe = recipe_of(world, "steps=5", gate=options, losses=[{"name": "cv_squared"}])
    pretrain(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "run", progress=stopped_after(3))
    pretrain(recipe, tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    if gate == "noisy_top_k":
        gates = [load_file(tmp_path / name / "checkpoint-4" / "llamamoe_gate.safetensors") for name in ("run", "whole")]
        assert all(bool(gates[1][key].any()) for key in gates[1]), "nothing was learned"
        assert all(torch.equal(gates[0][key], gates[1][key]) for key in gates[1])
    else:  # more is asked of the experts than they may take
        dropped = [line["routing"]["dropped_share/mean"] for line in lines_of(tmp_path / "run") if "routing" in line]
        assert all(0 < share < 1 for share in dropped), dropped


def test_resume_after_the_end_only_writes_the_model_again(
    finished: Path, world: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    pretrain(everything(world), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(finished)
    assert lines_of(tmp_path / "run") == lines_of(finished)


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_bytes(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(everything(world).to_yaml())
    out = tmp_path / "run"
    process = start(tmp_path / "recipe.yaml", out)
    while process.poll() is None and not (out / ".partial" / "checkpoint-4" / "trainer_state.json").exists():
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = start(tmp_path / "recipe.yaml", out, "--resume")
    assert again.wait() == 0, again.communicate()
    assert lines_of(out) == lines_of(finished)
    assert weights(out) == weights(finished)


def test_sigterm_ends_after_a_checkpoint_and_resume_goes_on(
    finished: Path, world: dict[str, str], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def told(progress: Any) -> None:
        if progress.stage == "train" and progress.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a supervisor and torchrun may both send one

    with pytest.raises(StoppedError, match="after step 3, whose checkpoint is whole") as found:
        pretrain(everything(world), tmp_path / "run", progress=told)
    assert found.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "run" / "model").exists()
    pretrain(everything(world), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(finished)
    assert lines_of(tmp_path / "run") == lines_of(finished)


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_terms_do_not_depend_on_the_micro_batch(micro: int, world: dict[str, str], tmp_path: Path) -> None:
    losses = [{"name": "z", "coefficient": 0.01}]
    keys: dict[str, Any] = {
        "losses": losses,
        "distill": EXPERT_KL | {"ffn": {"weight": 0.5}, "hidden": {"weight": 0.1}},
    }
    for name, size in (("one", 4), ("two", micro)):
        recipe = recipe_of(world, "steps=3", "save_every=null", micro_batch_size=size, **keys)
        pretrain(recipe, tmp_path / name)
    for ours, theirs in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        if ours["kind"] == "train":
            assert ours["terms"] == pytest.approx(theirs["terms"], rel=2e-5)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)


def test_gradient_checkpointing_changes_nothing(world: dict[str, str], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"losses": [{"name": "switch"}, {"name": "cv_squared"}], "gate": "noisy_top_k"}
    for name in ("false", "true"):
        recipe = recipe_of(world, "steps=3", f"gradient_checkpointing={name}", distill=EXPERT_KL, **keys)
        pretrain(recipe, tmp_path / name)
    assert lines_of(tmp_path / "false") == lines_of(tmp_path / "true")


def test_a_hard_router_is_scaled_up_with_its_ranking(finished: Path) -> None:
    facts = json.loads((finished / "facts.json").read_text())["router_start"]
    assert facts["loss_before"] > 0
    assert facts["loss_after"] != facts["loss_before"]
    start = facts["layers"]
    assert [each["layer"] for each in start] == [0, 1]
    assert all(each["std_before"] < 1e-3 for each in start)
    assert all(each["std_after"] == pytest.approx(0.1) for each in start)


def test_what_is_frozen_and_equal_is_held_once_with_the_parent(world: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(world, "steps=1", freeze=["embeddings", "head"], distill=EXPERT_KL)
    pretrain(recipe, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    tensors = load_file(Path(world["parent"]) / "model.safetensors")
    frozen = tensors["model.embed_tokens.weight"].numel() + tensors["lm_head.weight"].numel()
    assert facts["parent_bytes_shared"] == 4 * frozen


@pytest.mark.parametrize("window", ["micro_batch", "all_ranks"])
def test_the_window_of_a_balance_loss_is_told(
    window: str, world: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = [{"name": "switch", "window": window}, {"name": "z"}]
    with caplog.at_level("INFO", logger="llamamoe"):
        pretrain(recipe_of(world, "steps=1", losses=losses), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["windows"] == {"switch": window}
    expected = {"micro_batch": "one micro-batch, on one rank", "all_ranks": "the micro-batches that all ranks have"}
    assert [line for line in caplog.messages if line.startswith("switch: balanced over") and expected[window] in line]


def test_how_often_to_log_measure_and_save_can_change_on_the_way(world: dict[str, str], tmp_path: Path) -> None:
    before = recipe_of(world, "log_every=6", "evaluate_every=null", "save_every=2")
    with pytest.raises(KeyboardInterrupt):
        pretrain(before, tmp_path / "run", progress=stopped_after(3))
    pretrain(recipe_of(world, "log_every=1", "evaluate_every=1", "save_every=1"), tmp_path / "run", resume=True)
    lines = lines_of(tmp_path / "run")
    for kind in ("train", "validation"):
        assert [line["step"] for line in lines if line["kind"] == kind][-4:] == [3, 4, 5, 6]
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [2, 3, 4, 5, 6]


def test_frozen_groups_stay_and_others_move(world: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(world, "steps=2", freeze=("attention", "embeddings", "head", "norms", "router"))
    out = pretrain(recipe, tmp_path / "run").model
    before = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    softened = {name for name in moved if name.endswith("gate.weight")}
    assert moved - softened == {name for name in after if ".experts." in name}


def test_router_warm_up_moves_routers_only(world: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(world, "steps=2", "save_every=1", router={"warmup_steps": 1})
    pretrain(recipe, tmp_path / "run")
    before = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    for step, others_move in ((1, False), (2, True)):
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}").state_dict()
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert any(name.endswith("gate.weight") for name in moved)
        assert any(".experts." in name for name in moved) is others_move


def test_biases_balance_glm4(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", target="glm4_moe", shared="1x", num_experts=3)
    recipe = recipe_of(world, "steps=1", balancing={"rate": 0.01})  # a second step may take the first one back
    out = pretrain(recipe, tmp_path / "run").model
    model = AutoModelForCausalLM.from_pretrained(out)
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(bool(b.any()) for b in biases)


@pytest.mark.parametrize("target", ["glm4_moe", "ernie4_5_moe"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_biases_resume_exactly_and_are_never_rounded(target: str, adapters: bool, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", target=target, num_experts=3, shared="1x")
    keys: dict[str, Any] = {"balancing": {"rate": 0.0011}, "lora": {"rank": 2} if adapters else None}
    recipe = recipe_of(world, "steps=5", "precision.save=bfloat16", **keys)
    pretrain(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "run", progress=stopped_after(3))
    pretrain(recipe, tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    biases = {name: value for name, value in written.items() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    assert all(value.dtype == torch.float32 for value in biases.values())
    assert all(value.dtype == torch.bfloat16 for name, value in written.items() if name not in biases)
    steps = torch.cat([value.flatten() for value in biases.values()]) / 0.0011
    assert bool(steps.any())
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_adapters_are_merged_and_resume_exactly(world: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = recipe_of(world, "steps=4", lora={"rank": 2}, losses=[{"name": "switch"}])
    whole = pretrain(recipe, tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "run", progress=stopped_after(3))
    pretrain(recipe, tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    before = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    after, info = AutoModelForCausalLM.from_pretrained(whole.model, output_loading_info=True)
    assert not info["unexpected_keys"]
    moved = {name.split(".", 3)[3] for name, v in after.state_dict().items() if not torch.equal(v, before[name])}
    assert {
        "self_attn.q_proj.weight",
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
    } == moved - {
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
    }


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_step_and_text(world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(world["model"], tmp_path / "moe")
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    weights["lm_head.weight"][40] = 3e38  # its logit overflows
    save_file(weights, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    recipe = recipe_of(world, model=str(tmp_path / "moe"))
    with pytest.raises(LlamaMoeError, match=r"step 1, micro-batch 0 \((large|small): block .* NaN .*checkpoint-0"):
        pretrain(recipe, tmp_path / "run")
    [kept] = checkpoints(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(kept)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_whole_checkpoint_is_left_alone_by_a_loss_that_diverges_and_the_hint_works(
    adapters: bool, world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamamoe.training.objective import Objective

    kept, original = tmp_path / "run" / "checkpoint-2", Objective.__call__

    def spoilt(self: Objective, model: Any, inputs: Any, step: int) -> torch.Tensor:
        loss = original(self, model, inputs, step)
        if step < 2:
            return loss
        (kept / "mark").touch()
        return loss * float("nan")

    recipe = recipe_of(world, "save_every=1", "keep=1", lora={"rank": 2} if adapters else None)
    monkeypatch.setattr(Objective, "__call__", spoilt)
    with pytest.raises(LlamaMoeError, match=r"step 3, micro-batch 0 .*The weights before this step") as found:
        pretrain(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert (kept / "mark").exists(), "the checkpoint was written anew"
    assert kept in checkpoints(tmp_path / "run")
    hint = found.value.hint or ""
    assert hint.endswith("a new run, with another --out." if adapters else f"with model={kept} and another --out.")
    if not adapters:
        pretrain(recipe_of(world, f"model={kept}", "steps=1"), tmp_path / "again")


def only_checkpoint_4_is_lost(
    reason: str, world: dict[str, str], finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops with its last checkpoint, and ends as it would have once the disk has room."""
    with pytest.raises(LlamaMoeError, match=rf"checkpoint-4 cannot be written: {reason}.*is checkpoint-2"):
        pretrain(everything(world), folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    pretrain(everything(world), folder, resume=True)
    assert weights(folder) == weights(finished)
    assert lines_of(folder) == lines_of(finished)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "rank-00000.safetensors",
        "schedule.json",
        "llamamoe_training.json",
        "llamamoe_complete.json",
    ],
)
def test_a_full_disk_in_any_file_of_a_checkpoint_leaves_the_last_one(
    name: str, world: dict[str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamamoe.checkpoint import manifest, tensor_file
    from llamamoe.training import dynamics, optimizer_state

    write, replacing = manifest.write_text, tensor_file.replacing

    def full(target: Path) -> None:
        if target.name == name and "checkpoint-4" in target.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_text(target: Path, text: str) -> None:
        full(target)
        write(target, text)

    @contextmanager
    def part_of_it(target: Path) -> Iterator[Any]:
        with replacing(target) as file:
            yield file
            full(target)

    monkeypatch.setattr(tensor_file, "replacing", part_of_it)
    for module in (dynamics, manifest, optimizer_state):
        monkeypatch.setattr(module, "write_text", write_text)
    only_checkpoint_4_is_lost("No space left", world, finished, tmp_path / "run", monkeypatch)


def test_what_is_not_the_disks_is_not_blamed_on_it(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamamoe.training import checkpoints

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error, writev: connection reset by peer")

    monkeypatch.setattr(checkpoints, "pending_weights", broken)
    with pytest.raises(RuntimeError, match="NCCL"):
        pretrain(recipe_of(world), tmp_path / "run")


def test_a_full_disk_under_the_metrics_is_told_and_resumed(
    world: dict[str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = metrics.open_append

    def full(path: Path) -> Any:
        if (path.parent / "checkpoint-4").exists():
            with original(path) as file:
                file.write(b'{"step": 5, "ki')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path)

    monkeypatch.setattr(metrics, "open_append", full)
    with pytest.raises(LlamaMoeError, match=r"step 5: .*metrics.jsonl cannot be written: No space left"):
        pretrain(everything(world), tmp_path / "run")
    monkeypatch.undo()
    pretrain(everything(world), tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(finished)


def test_when_losses_are_measured_decides_the_run_only_if_the_mixture_follows_them(world: dict[str, str]) -> None:
    still, moving = recipe_of(world), everything(world)
    for recipe, same in ((still, True), (moving, False)):
        other = recipe.model_copy(update={"evaluate_every": 2})
        assert (recipe.sha256() == other.sha256()) is same


def test_a_full_disk_leaves_the_last_checkpoint(
    world: dict[str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PretrainedConfig

    original = PretrainedConfig.save_pretrained

    def full(self: Any, folder: Any, **keys: Any) -> None:
        original(self, folder, **keys)
        if str(folder).endswith("checkpoint-4"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PretrainedConfig, "save_pretrained", full)
    only_checkpoint_4_is_lost("No space left", world, finished, tmp_path / "run", monkeypatch)


def test_two_runs_in_one_folder_are_refused(world: dict[str, str], tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(UsageError, match="another run is working"):
        pretrain(recipe_of(world), tmp_path / "run")


def test_a_finished_run_is_not_overwritten(finished: Path, world: dict[str, str]) -> None:
    before = weights(finished)
    with pytest.raises(UsageError, match="holds a run already"):
        pretrain(everything(world), finished)
    assert weights(finished) == before


def test_another_recipe_cannot_go_on(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(RefusedError, match="another recipe"):
        pretrain(recipe_of(world, "steps=7"), tmp_path / "run", resume=True)


def test_another_model_cannot_go_on(finished: Path, world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    (tmp_path / "run" / "facts.json").write_text(json.dumps(facts | {"model": "0" * 64}))
    with pytest.raises(RefusedError, match="model: this is not what the run"):
        pretrain(everything(world), tmp_path / "run", resume=True)


def test_text_of_another_tokenizer_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    from ..dense import make_dense

    other = make_dense(tmp_path / "other", vocab_size=100)
    tokens = make_tokens(tmp_path / "tokens", other, 0)
    with pytest.raises(RefusedError, match="tokenizer"):
        pretrain(recipe_of(world, f"data.train={tokens}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_tokens_are_seen(world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(world["train"], tmp_path / "tokens")
    shard = next((tmp_path / "tokens").rglob("*.bin"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed since"):
        pretrain(recipe_of(world, f"data.train={tmp_path / 'tokens'}"), tmp_path / "run")
    shard.write_bytes(data[:-2])
    with pytest.raises(CheckpointError, match="cut short"):
        pretrain(recipe_of(world, f"data.train={tmp_path / 'tokens'}"), tmp_path / "run")


def test_the_training_text_is_no_validation(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.validation is the text of data\.train"):
        pretrain(recipe_of(world, f"data.validation={world['train']}"), tmp_path / "run")


def test_a_dense_model_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="not a mixture of experts"):
        pretrain(recipe_of(world, model=world["parent"]), tmp_path / "run")


def test_a_dense_control_is_trained_by_the_same_recipe(world: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(world, "steps=2", model=world["parent"], allow_dense=True, losses=[{"name": "switch"}])
    result = pretrain(recipe, tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert "routing" not in lines[1]
    assert set(lines[1]["terms"]) == {"lm"}
    assert AutoModelForCausalLM.from_pretrained(result.model).config.model_type == "llama"


def test_what_does_not_fit_is_told_at_once_before_anything_is_loaded(world: dict[str, str], tmp_path: Path) -> None:
    update = ("data.update=sheared_llama", "data.reference_losses={large: 3.0}")
    keys: dict[str, Any] = {"balancing": {}, "distill": {"ffn": {}, "hidden": {"layers": [0, 7]}}}
    recipe = recipe_of(world, *update, "data.block_length=99999", gate="switch", **keys)
    for attempt in (lambda: pretrain(recipe, tmp_path / "run"), lambda: plan_pretraining(recipe)):
        with pytest.raises(UsageError) as found:
            attempt()
        text = str(found.value)
        for part in (
            "data.mixture: the domain 'large' has the weight 0.5",
            "data.mixture: the domain 'small' has the weight 0.5",
            "data.validation: the largest domain has",
            "data.reference_losses has no small, which data.update = sheared_llama needs",
            "gate = switch routes each token to 1 expert, but the model selects 2",
            "balancing moves correction biases, and the routers of mixtral have none",
            "distill.hidden: there is no layer 7: the model has 2 (0 to 1)",
        ):
            assert part in text, text
    assert not (tmp_path / "run").exists()


def test_a_mixture_that_follows_losses_needs_text_of_every_domain(world: dict[str, str], tmp_path: Path) -> None:
    make_text(tmp_path / "text", 5)
    (tmp_path / "text" / "small.jsonl").unlink()
    given = {"tokenizer": world["parent"], "text": [str(tmp_path / "text")], "workers": 1}
    tokenize(load_tokenize_recipe(given=given), tmp_path / "large")
    update = ("data.update=sheared_llama", "data.reference_losses={large: 3.0, small: 1.0}")
    with pytest.raises(UsageError, match="no text of small is held out"):
        pretrain(recipe_of(world, *update, f"data.validation={tmp_path / 'large'}"), tmp_path / "run")
    with pytest.raises(UsageError, match="follows held-out losses, but no text is held out"):
        pretrain(recipe_of(world, *update, "data.validation=null"), tmp_path / "run")


def test_a_number_of_processes_that_does_not_fit_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"fsdp_size = 2 times dp_replicate_size = 1 must be the number of processes, which is 1"
    ):
        pretrain(recipe_of(world, "distributed.fsdp_size=2"), tmp_path / "run")
    with pytest.raises(UsageError, match=r"cannot be dealt to 3 ranks"):
        plan_pretraining(recipe_of(world), world_size=3)


def test_a_model_that_needs_transformers_5_is_saved_without_the_old_spelling(tmp_path: Path) -> None:
    """4.57 has no ``head_dim`` for qwen2_moe, and yet a run must not be lost at its first checkpoint."""
    world = make_world(tmp_path / "world", variant="llama-head-dim", target="qwen2_moe", num_experts=4)
    model = pretrain(recipe_of(world, "steps=1"), tmp_path / "run").model
    assert AutoModelForCausalLM.from_pretrained(model).config.head_dim == 32
