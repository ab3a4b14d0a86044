"""``llamamoe pretrain``: continue pretraining a converted model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._format import amount, duration, plural, size
from ._output import Interrupted, Output, output_options
from ._recipe_options import RecipeName, recipe_file
from ._style import Command, check_resume_or_force, flag
from ._tables import bullets, facts, heading, paragraph, table
from ._text import bold, echo, styled

if TYPE_CHECKING:
    from llamamoe.training.estimate.estimate import Estimate
    from llamamoe.training.plan import PretrainPlan
    from llamamoe.training.pretrain import PretrainResult
    from llamamoe.training.recipe import PretrainRecipe

HELP = """Continue pretraining a converted model, to recover what the conversion lost.

The recipe names the model, the tokens (written by `llamamoe tokenize`), the objective and the optimiser. The recipe,
metrics.jsonl and checkpoints are written to the folder --out, and at the end the trained model to its folder model/,
which plain transformers loads. With the key teacher.tokens the parent is first trained on the same text, in the folder
teacher/, and then distilled.

After an interruption, the same command with --resume continues from the newest checkpoint; weights and metrics are the
same as without the interruption. All files of the checkpoint are verified against the SHA-256 recorded when they were
written; if one is damaged, --resume CHECKPOINT continues from an older checkpoint. Only files that the run wrote are
replaced or deleted; others with the same name are refused. The recipe may differ in keys that do not affect the weights
(logging, saving, paths to the same model and text, gradient_checkpointing, ...), with --extend in its length, and with
--allow-change in the optimiser, losses and the like. On SIGTERM (sent by schedulers before a time limit) the
current step is finished, a checkpoint is written and the exit code is 143. To use several processes, start the command
with torchrun or accelerate launch.
"""
EXAMPLES = """
llamamoe pretrain --recipe smollm2_cpu --model OUT --parent SOURCE --set data.train=DIR --dry-run
llamamoe pretrain --recipe smollm2_cpu --out run          # the model and tokens of `make demo`
llamamoe pretrain --recipe smollm2_cpu --out run --set tokens=null --set steps=10
llamamoe pretrain --recipe my.yaml --set optimizer.lr=1e-4 --out run --resume
torchrun --nproc_per_node 8 -m llamamoe_cli pretrain --recipe recover_distill
"""
RECIPE, RUN, PAPER = "Recipe", "Run", "Hardware assumed by --dry-run"
_COUNTED = {"active": "active per token"}
"""Numbers of parameters by the words that `split` and `inspect` have for them."""
NEWEST = ""
"""The value of ``--resume`` without a checkpoint name."""


@click.command(cls=Command, section="Train", rank=2, short_help="Continue pretraining a converted model.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@flag("--recipe", group=RECIPE, metavar="FILE|NAME", required=True, type=RecipeName("pretrain"),
       text="A YAML file, or the name of a recipe that ships with llamamoe.")  # fmt: skip
@flag("--set", "overrides", group=RECIPE, metavar="KEY=VALUE", multiple=True,
       text="Set one key of the recipe, such as optimizer.lr=1e-4; may be repeated.")  # fmt: skip
@flag("--model", group=RECIPE, metavar="PATH", text="The converted model, instead of the recipe's.")
@flag(
    "--parent",
    group=RECIPE,
    metavar="PATH",
    text="The dense model that it was converted from, instead of the recipe's.",
)
@flag("--out", group=RUN, metavar="DIR", default="pretrain-run", show_default=True, text="The folder of the run.")
@flag("--resume", group=RUN, is_flag=False, flag_value=NEWEST, default=None, metavar="[CHECKPOINT]",
       text="Continue from the newest checkpoint in the folder of the run, or from the named one; later ones are deleted "
            "and written again.")  # fmt: skip
@flag(
    "--extend",
    group=RUN,
    is_flag=True,
    text="With --resume: allow more steps or tokens; schedules follow the new length.",
)
@flag(
    "--allow-change",
    group=RUN,
    is_flag=True,
    text="With --resume: allow other values for the optimiser, losses and the like; recorded in metrics.jsonl.",
)
@flag(
    "--force", group=RUN, is_flag=True, text="Delete an existing run in the folder; other files in it are left alone."
)
@flag("--profile", group=RUN, type=click.IntRange(1), metavar="STEPS",
       text="Write a trace of so many steps by torch's profiler, after the first step, to the folder of the run.")  # fmt: skip
@flag(
    "--dry-run",
    group=RUN,
    is_flag=True,
    text="Check everything and estimate memory, time and disk without loading the model.",
)
@flag(
    "--world-size",
    group=PAPER,
    type=click.IntRange(1),
    metavar="N",
    text="Number of processes.  [default: as many as the recipe's sharding needs]",
)
@flag("--device-memory", group=PAPER, type=float, metavar="GB", text="Memory of one device in GB.")
@flag("--peak-tflops", group=PAPER, type=float, metavar="X", text="Peak bfloat16 throughput of one device in TFLOPS.")
@flag("--memory-bandwidth", group=PAPER, type=float, metavar="GB/s", text="Memory bandwidth of one device in GB/s.")
@flag("--disk-rate", group=PAPER, type=float, default=1.0, show_default=True, metavar="GB/S",
       text="Throughput of the file system in GB per second, of all processes together.")  # fmt: skip
@output_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    model: str | None,
    parent: str | None,
    out: str,
    resume: str | None,
    extend: bool,
    allow_change: bool,
    force: bool,
    profile: int | None,
    dry_run: bool,
    world_size: int | None,
    device_memory: float | None,
    peak_tflops: float | None,
    memory_bandwidth: float | None,
    disk_rate: float,
    output: Output,
) -> None:
    """Parse, then plan or train, then print."""
    check_resume_or_force(resume is not None, force)
    if resume is None and (extend or allow_change):
        raise click.UsageError("--extend and --allow-change require --resume.")
    where: dict[str, Any] = {"resume": resume is not None if resume in (None, NEWEST) else resume, "force": force}
    where |= {"extend": extend, "allow_change": allow_change}
    complete = _recipe(recipe, {"model": model, "parent": parent}, overrides)
    if dry_run:
        from llamamoe import plan_pretraining

        plan = plan_pretraining(
            complete,
            out=out,
            **where,
            world_size=world_size,
            device_memory=None if device_memory is None else device_memory * 1e9,
            peak_flops=None if peak_tflops is None else peak_tflops * 1e12,
            bandwidth=None if memory_bandwidth is None else memory_bandwidth * 1e9,
            disk_rate=disk_rate * 1e9,
        )
        output.result({"dry_run": True, **plan.to_json()}, lambda: _print_plan(plan))
        return
    result = _train(complete, out, {**where, "profile": profile or 0}, output)
    if int(os.environ.get("RANK", "0")) == 0:
        output.result(result.to_json(), lambda: _print(result), summary=True)


def _recipe(recipe: str, given: dict[str, Any], overrides: tuple[str, ...]) -> PretrainRecipe:
    from llamamoe.training.recipe import load_pretrain_recipe

    with recipe_file(recipe, "pretrain") as path:
        assert path is not None
        return load_pretrain_recipe(path, given=given, overrides=overrides)


def _train(recipe: PretrainRecipe, out: str, where: dict[str, Any], output: Output) -> PretrainResult:
    from llamamoe import pretrain

    if int(os.environ.get("RANK", "0")) != 0:
        return pretrain(recipe, out, **where)
    try:
        with _warnings_on_stderr(), output.progress() as report:
            return pretrain(recipe, out, **where, progress=report)
    except KeyboardInterrupt:
        raise Interrupted.leaving(Path(out).expanduser(), _left(Path(out).expanduser())) from None


def _left(out: Path) -> str:
    """Return how an interrupted run can be resumed."""
    from llamamoe.training.ownership import TEACHER, named_checkpoints
    from llamamoe.training.teacher import finished_teacher

    there = named_checkpoints(out) or named_checkpoints(out / TEACHER)
    where = "starts over: it has no checkpoint yet"
    if there:
        where = f"continues from its newest checkpoint, {there[-1].relative_to(out)}"
    elif finished_teacher(out) is not None:
        where = "continues with the trained parent"
    return f"{out} is kept, --resume {where}"


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print warnings that the library logs as soon as they occur."""

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            echo(styled("Warning:", fg="yellow"), f" {record.getMessage()}", err=True)

    logger, handler = logging.getLogger("llamamoe"), Echo(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _print_plan(plan: PretrainPlan) -> None:
    estimate = plan.estimate
    echo(bold(f"{plan.model}: {plan.recipe.max_steps:,} steps, {amount(estimate.tokens)} tokens"))
    facts(
        [
            ("parameters", ", ".join(f"{amount(n)} {_COUNTED.get(name, name)}" for name, n in estimate.parameters.items() if n)),
            ("step", f"{amount(estimate.tokens_per_step)} tokens, {plural(estimate.accumulation, 'micro-batch', 'es')} a rank"),
            ("text", f"{amount(sum(n for n, _ in plan.domains.values()))} tokens, read {plan.epochs:.2g} times at most"),
            ("held out", f"{amount(plan.held_out)} tokens" if plan.held_out else "nothing"),
        ]
    )  # fmt: skip
    heading("Mixture")
    rows = [(name, f"{100 * share:.1f} %", f"{amount(n)} tokens") for name, (n, share) in plan.domains.items()]
    table(("domain", "share", "there are"), rows, right=(1, 2))
    heading("Memory of one device")
    table(("", ""), [(name, size(nbytes)) for name, nbytes in estimate.lines], right=(1,))
    heading("Time and disk")
    times = [(f"operations per token, {name}", amount(n)) for name, n in estimate.operations.items() if n]
    times += [(f"moved in a step, {name}", size(n)) for name, n in estimate.moved.items() if n]
    times += _times(plan)
    times += [(f"disk, {name}", size(n)) for name, n in estimate.disk.items() if n]
    saving = {key: size(int(n)) if "bytes" in key else duration(n) for key, n in estimate.saving.items()}
    meanwhile = ", copied to main memory first" if plan.recipe.save_in_background else ""
    times += [
        (
            "save",
            f"{saving['save_bytes']} ({saving['save_bytes_of_a_rank']} a rank), {saving['save_seconds']}{meanwhile}",
        ),
        ("resume", f"{saving['resume_bytes']} read, {saving['resume_seconds']}"),
    ]
    facts(times)
    if plan.teacher is not None:
        _print_teacher(plan.teacher.estimate)
    if plan.warnings:
        heading("Warnings")
        bullets(plan.warnings, mark="!")
    echo()
    paragraph(
        "An estimate from shapes alone: 2 operations per parameter that a token uses forward, twice as many backward, and the "
        "products of attention. Nothing was loaded or written."
    )


def _times(plan: PretrainPlan) -> list[tuple[str, str]]:
    estimate, rate = plan.estimate, plan.estimate.operations_per_second
    if estimate.seconds is None or estimate.seconds_per_step is None or rate is None:
        return [("time", "unknown: give --peak-tflops of the device")]
    steps = f"{duration(estimate.seconds)} ({duration(estimate.seconds_per_step)} a step)"
    assumed = f"{100 * estimate.utilisation:.0f} % of " + (
        "this machine's products, measured" if plan.timed else "the peak"
    )
    times = [("time of the steps", f"{steps}, at {amount(rate)} operations per second: {assumed}")]
    if plan.validation_seconds is not None and plan.validations:
        each = duration(plan.validation_seconds)
        times.append(("held-out losses", f"{amount(plan.measured)} tokens, {plan.validations} times: {each} each"))
        total = duration(estimate.seconds + plan.validations * plan.validation_seconds)
        times.append(("time in all", f"{total}, without saving"))
    return times


def _print_teacher(estimate: Estimate) -> None:
    heading("The parent, trained first")
    rows = [("tokens", f"{amount(estimate.tokens)} in {plural(estimate.steps, 'step')}")]
    rows.append(("memory at the peak", size(estimate.peak)))
    if estimate.seconds is not None:
        rows.append(("time", duration(estimate.seconds)))
    facts([*rows, ("disk", size(estimate.disk_bytes))])


def _print(result: PretrainResult) -> None:
    echo(bold(f"{result.steps:,} steps, {amount(result.tokens)} tokens"))
    rows = []
    if result.teacher_tokens:
        rows.append(("before", f"the parent was trained on {amount(result.teacher_tokens)} tokens"))
    if result.first is not None and result.last is not None:
        rows.append(("validation loss", f"{result.first['loss']:.4f} -> {result.last['loss']:.4f}"))
        rows.append(("perplexity", f"{result.first['perplexity']:.4g} -> {result.last['perplexity']:.4g}"))
    if result.best is not None and result.last is not None and result.best[1] < result.last["loss"]:
        rows.append(("best", f"{result.best[1]:.4f}, kept in {result.best[0]}"))
    rows.append(("model", str(result.model)))
    rows.append(("metrics", str(result.out / "metrics.jsonl")))
    facts(rows)
