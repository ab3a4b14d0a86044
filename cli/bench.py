"""``llamamoe bench``: how fast a converted model is beside its parent, measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._format import amount, size
from ._output import Output, output_options
from ._plan import print_warnings
from ._style import COUNT, Command, flag, model_options, tokenizer_option
from ._tables import bullets, facts, heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.evaluation.bench import Benchmark
    from llamamoe.evaluation.speeds import ModelSpeed, Speed
    from llamamoe.studies.speed.bench_llama_cpp import LlamaCppSpeeds

HELP = """Measure the speed of prefill and decoding of MODEL, and of its dense parent with --against.

Both are measured with a KV cache at several batch sizes; each number is the median of the repeats. The parent is measured
before and after the model, which shows whether other load changed the speed meanwhile. The speedups expected from model
sizes are printed too.

With --program llama.cpp both are exported to temporary GGUF files in their own dtype, or read as they are if they are .gguf
files, and measured in alternating turns (extra clients).
"""
EXAMPLES = """
llamamoe bench OUT --against SOURCE --experts llamamoe_auto
llamamoe bench OUT --against SOURCE --program llama.cpp --batch-sizes 1,4
llamamoe bench OUT --against SOURCE --batch-sizes 1,8,64 --dtype bfloat16 --experts llamamoe_auto
"""
WHAT, HOW = "Measurement", "Execution"
PROGRAMS = ("transformers", "llama.cpp")


def _sizes(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,8,64.") from None


@click.command(cls=Command, section="Measure", rank=2, short_help="Measure prefill and decoding speed against the parent.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@flag("--against", group=WHAT, metavar="PARENT", text="The dense parent, measured the same way.")
@flag("--batch-sizes", group=WHAT, metavar="B,B", default="1,4,16", show_default=True, callback=_sizes,
       text="Batch sizes to measure.")  # fmt: skip
@flag(
    "--prompt",
    group=WHAT,
    type=COUNT,
    key="prompt_tokens",
    metavar="N",
    default=128,
    show_default=True,
    text="Number of tokens per prompt.",
)
@flag(
    "--new-tokens",
    group=WHAT,
    type=COUNT,
    metavar="N",
    default=16,
    show_default=True,
    text="Number of tokens to decode.",
)
@flag(
    "--repeats",
    group=WHAT,
    type=int,
    metavar="N",
    default=3,
    show_default=True,
    text="Number of repeats of each measurement.",
)
@flag(
    "--program",
    group=HOW,
    type=click.Choice(PROGRAMS),
    default=PROGRAMS[0],
    show_default=True,
    text="What runs the models.",
)
@flag("--experts", group=HOW, metavar="NAME",
       text="Experts implementation: grouped_mm, batched_mm, eager, llamamoe_auto, ...  [default: chosen by transformers]")  # fmt: skip
@tokenizer_option(HOW)
@model_options(HOW)
@output_options
def command(
    model: str,
    against: str | None,
    batch_sizes: list[int],
    prompt: int,
    new_tokens: int,
    repeats: int,
    program: str,
    experts: str | None,
    tokenizer: str | None,
    dtype: str,
    device: str,
    output: Output,
) -> None:
    """Parse, measure, print."""
    measured: dict[str, Any] = {
        "against": against,
        "batch_sizes": batch_sizes,
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    if program != PROGRAMS[0]:
        given = {"--experts": experts, "--tokenizer": tokenizer}
        given |= {"--dtype": dtype.removeprefix("auto"), "--device": device.removeprefix("auto")}
        _in_llama_cpp(model, measured, [flag for flag, value in given.items() if value], output)
        return
    from llamamoe import bench

    with output.progress() as report:
        benchmark = bench(
            model,
            **measured,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            experts_implementation=experts,
            progress=report,
        )
    output.result(benchmark.to_json(), lambda: _print(benchmark))


def _in_llama_cpp(model: str, how: dict[str, Any], without: list[str], output: Output) -> None:
    if without:
        raise click.UsageError(f"{' and '.join(without)} mean nothing to --program llama.cpp.")
    from llamamoe import bench_llama_cpp

    with output.progress() as report:
        found = bench_llama_cpp(model, **how, progress=report)
    output.result(found.to_json(), lambda: _print_llama_cpp(found))


def _print_llama_cpp(found: LlamaCppSpeeds) -> None:
    echo(bold(f"{found.model} in llama.cpp, {found.facts['threads']} threads"))
    heading("Tokens per second")
    parent = found.parent_rates or {}
    rows = []
    for task, rate in found.rates.items():
        beside = (
            (f"{parent[task].tokens_per_second:,.1f}", f"{rate.ratio:.2f} ({rate.lowest:.2f}-{rate.highest:.2f})")
            if parent
            else ("", "")
        )
        rows.append((task, f"{rate.tokens_per_second:,.1f}", *beside))
    table(("", found.model, found.against or "", "x parent" if parent else ""), rows, right=range(1, 4))
    echo()
    paragraph(
        f"Medians of {found.repeats} turns in which the models alternate. `x parent` is the median of the turns' ratios with the smallest "
        "and largest, and not the ratio of the medians: other load changes both models of a turn. `decode` with a number is that of so "
        "many sequences together; prompts and continuations are random tokens."
    )
    if any(rate.highest > _WIDE * rate.lowest for rate in found.rates.values() if parent):
        echo()
        paragraph(_NOISY)


def _print(benchmark: Benchmark) -> None:
    from llamamoe.models.experts import PREFIX

    sides = [benchmark.model, *([benchmark.against] if benchmark.against else [])]
    where = f"{benchmark.device}, {benchmark.threads} threads" if benchmark.device == "cpu" else benchmark.device
    echo(bold(f"{benchmark.model.name} on {where}, {benchmark.model.dtype}"))
    facts([(side.name, _size(side)) for side in sides])
    heading("Tokens per second")
    table(("batch", "prefill", "x parent", "decode", "x parent"), _rows(benchmark), right=range(5))
    if benchmark.against is not None:
        echo()
        paragraph(_RANGES.format(benchmark.repeats))
        heading("By sizes alone")
        flops = benchmark.against.prefill_flops_per_token / benchmark.model.prefill_flops_per_token
        read = benchmark.against.active_bytes / benchmark.model.active_bytes
        facts([("prefill", f"{flops:.3g} x, by operations"), ("decode, batch 1", f"{read:.3g} x, by bytes read")])
        echo()
        paragraph(_LIMITS)
        upto = (
            f"up to batch {benchmark.faster_up_to}" if benchmark.faster_up_to else "at none of the measured batch sizes"
        )
        if any(
            _wide(theirs, mine) for theirs, mine in zip(benchmark.against.speeds, benchmark.model.speeds, strict=True)
        ):
            echo()
            paragraph(_NOISY)
        if benchmark.steady:
            echo()
            paragraph(
                f"Decoding is faster than the parent's {upto}. The parent was measured again at the end: its decoding steps took "
                f"{benchmark.drift:.3g} times as long as at the start."
            )
        else:
            heading("Warnings")
            bullets([_UNSTEADY.format(benchmark.drift)], mark="!")
    used = benchmark.model.experts_implementation
    # "eager" by default: the class in transformers (JetMoE's) has one implementation only, or grouped_mm would fail
    if benchmark.device == "cpu" and used not in (None, "eager") and not str(used).startswith(PREFIX):
        echo()
        paragraph(_OWN.format(used))
    print_warnings(benchmark.warnings)


_WIDE = 1.3
"""Ratio of the largest and the smallest from which a range says little."""
_NOISY = (
    "Some ranges are wide, so other programs took part of the machine: stop them and repeat it with more --repeats and --new-tokens before you "
    "rely on a ratio."
)
_RANGES = (
    "Medians of {} runs. In brackets: the smallest and the largest ratio between single runs of the two models. These numbers hold on this "
    "machine; other programs disturb them."
)
_LIMITS = "These are limits, reached where matrices are large. Choosing and calling experts takes time of its own, which outweighs the gain in small models."
_UNSTEADY = (
    "These ratios are not usable: when the parent was measured again at the end, its decoding steps took {:.2g} times as long as at the "
    "start, so other load on the machine changed meanwhile. Stop other programs and repeat it, with more --repeats."
)


_OWN = (
    "The experts ran by transformers' own implementation, {}. On a CPU those of llamamoe are usually faster: repeat it with "
    "--experts llamamoe_auto."
)


def _size(side: ModelSpeed) -> str:
    experts = f", experts by {side.experts_implementation}" if side.experts_implementation else ""
    return (
        f"{amount(side.flops_per_token)} operations per token, {size(side.active_bytes)} of {size(side.weights_bytes)} of weights read to "
        f"decode one; {size(side.memory_bytes)} of memory in all, caches and activations included{experts}"
    )


def _rows(benchmark: Benchmark) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for at, mine in enumerate(benchmark.model.speeds):
        theirs = benchmark.against.speeds[at] if benchmark.against else None
        rows.append(
            (
                str(mine.batch_size),
                f"{mine.prefill_tokens_per_second:,.1f}",
                _ratio(theirs.prefill_seconds, theirs.prefill_range, mine.prefill_seconds, mine.prefill_range)
                if theirs
                else "",
                f"{mine.decode_tokens_per_second:,.1f}",
                _ratio(theirs.decode_seconds, theirs.decode_range, mine.decode_seconds, mine.decode_range)
                if theirs
                else "",
            )
        )
    return rows


def _wide(theirs: Speed, mine: Speed) -> bool:
    return theirs.spread * mine.spread > _WIDE


def _ratio(theirs: float, their_range: tuple[float, float], mine: float, my_range: tuple[float, float]) -> str:
    lowest, highest = their_range[0] / my_range[1], their_range[1] / my_range[0]
    return f"{theirs / mine:.2f} ({lowest:.2f}-{highest:.2f})"
