"""State what a conversion lost and gained, whether that is usual, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .page_values import Series, exp, get, number, percent, ratio, size, whole
from .page_words import ffn_share, parent_of, routes_attention, times_parent

LARGE_TEXT = 65_536
"""Calibration tokens from which more text helps little; the default."""
_MEASURED = "SmolLM2-135M loses a factor of 1.4 to 1.7 layer by layer, and 1.28 to 1.33 if all layers learn jointly"
"""BENCHMARKS.md, "SmolLM2-135M, beside measured speed"."""
_CLOSE, _USUAL, _BROKEN = 1.05, 1.75, 10.0
"""Perplexity over the parent's up to which nothing is lost, up to which a calibrated half of an FFN is usual
(BENCHMARKS.md: 1.51 to 1.69 after 65,536 tokens, depending on the shape, 1.44 after 196,608, for SmolLM2-135M), and
from which a model is not usable."""


_HALF = (0.4, 0.6)
_SMALL, _LARGE = 1e9, 30e9
"""Parameters of a parent up to which `smollm2_cpu` is the nearest recipe, and from which `recover_70b` is."""


@dataclass(frozen=True)
class Verdict:
    """The first statements of the page about one converted model.

    Attributes:
        name: The model.
        lost: The loss of quality, and whether that is usual.
        gained: The smaller cost of a token, and the larger memory.
        next: What to do, most useful first.
    """

    name: str
    lost: str
    gained: str
    next: Sequence[str]


def verdicts(series: Sequence[Series]) -> list[Verdict]:
    """Return a verdict on each mixture of experts that was compared with its parent."""
    parent, pruned = parent_of(series), [one for one in series if one.place and not get(one.model, "experts")]
    if parent is None:
        return []
    return [
        Verdict(
            one.name,
            _lost(one.model, parent),
            _gained(one, series[0]),
            list(_next(one, series[0], pruned[0] if pruned else None)),
        )
        for one in series
        if one.place and get(one.model, "experts")
    ]


def _lost(model: Mapping[str, Any], parent: Mapping[str, Any]) -> str:
    factor = times_parent(model, "mean_over_domains")
    if factor is None:
        more = get(model, "difference", "mean_over_domains", "bits_per_byte")
        return "The loss was not measured." if more is None else f"{number(more)} bits per byte more than the parent."
    interval = [number(exp(each)) for each in get(model, "difference", "mean_over_domains", "loss_interval") or []]
    known = len(interval) == 2
    between = f" (95 % interval: {interval[0]} to {interval[1]})" if known else ""
    few = "" if known else _too_few(model)
    return f"The perplexity is {number(factor)} times the parent’s{between}.{few} {_usual(model, factor, ffn_share(model, parent))}"


def _too_few(model: Mapping[str, Any]) -> str:
    """Return why there is no interval, which needs two documents of every domain."""
    scores = get(model, "scores", "domains") or {}
    single = [f"“{domain}”" for domain, score in scores.items() if get(score, "documents") == 1]
    if not single:
        return " The text is too small for an interval: measure on more (`--text`, `--max-tokens`)."
    which = f"of {' and '.join(single)} only one document was measured"
    return f" There is no interval, because {which}: give more documents (`--text`) or a larger `--max-tokens`."


def _usual(model: Mapping[str, Any], factor: float, share: float | None) -> str:
    if factor <= _CLOSE:
        return "That is next to nothing."
    if factor > _BROKEN:
        return "The model is not usable as it is."
    if _trained(model):
        return "It was trained after the conversion: the curve below shows whether more training still helps."
    if routes_attention(model):
        return f"For comparison: with half of the FFN, all of attention and no training {_MEASURED}."
    if share is None or not _HALF[0] <= share <= _HALF[1]:
        return f"For comparison: with half of the FFN and no training {_MEASURED}."
    if factor <= _USUAL:
        return f"That is usual for half of the FFN without training: {_MEASURED}."
    tokens = _tokens(model)
    if tokens is not None and tokens < LARGE_TEXT // 2:
        return (
            f"That is more than needed: it was calibrated on only {whole(tokens)} tokens. With {whole(8192)} tokens of web text SmolLM2-135M "
            f"with half of its FFN loses a factor of 2.1 in 88 narrow experts with the first layer dense, and more in wider ones; with "
            f"{whole(LARGE_TEXT)}, 1.5 in those and 1.7 in the default's."
        )
    return f"That is more than usual for half of the FFN: {_MEASURED}."


def _gained(one: Series, dense: Series) -> str:
    model, parent = one.model, dense.model
    share, flops = ffn_share(model, parent), ratio(_cost(model, "flops_per_token"), _cost(parent, "flops_per_token"))
    here, there = _cost(model, "bytes"), _cost(parent, "bytes")
    text = f"A token computes {percent(share)} of the parent’s FFN, router and padding included, and {percent(flops)} of its operations."
    if here is not None and there is not None and here > there:
        text += f" All experts stay in memory: {size(here)} of weights against {size(there)}."
    experts = "" if routes_attention(model) else " --experts llamamoe_auto"
    bench = f"llamamoe bench {_place(one)}"
    pair = f"{bench} --against {_place(dense)}"
    elsewhere = f", `{pair if get(parent, 'llama_cpp') else bench} --program llama.cpp` in llama.cpp (extra `clients`)"
    return text + (
        " Fewer operations are not yet a gain in speed, which depends on program, machine and size, and is small in a model as small as "
        f"SmolLM2-135M: `{pair}{experts}` measures it in transformers{elsewhere if get(model, 'llama_cpp') else ''}."
    )


def _cost(model: Mapping[str, Any], key: str) -> float | None:
    found: float | None = get(model, "cost", key)
    return found


def _next(one: Series, dense: Series, pruned: Series | None) -> Iterator[str]:
    model, parent = one.model, dense.model
    factor, tokens, split = (
        times_parent(model, "mean_over_domains"),
        _tokens(model),
        _by_split_alone(model) and not get(parent, "experts"),
    )
    if factor is not None and factor > _CLOSE and not _trained(model):
        if split and tokens is None and get(model, "provenance", "block") is not None:
            yield "Convert again with calibration text (`--calibration texts/`), which builds experts that a router can tell apart."
        elif split and tokens is not None and tokens < LARGE_TEXT:
            yield f"Convert again with more calibration text: `--calibration-tokens {LARGE_TEXT}`, the default."
        if routes_attention(model):
            yield "Convert FFNs alone (another `--target`), which loses less at as many active parameters."
        elif tokens is not None and factor > _USUAL:
            yield (
                "Try more and narrower experts (`--prefer quality`), and look for layers that should stay dense (`llamamoe budget "
                f"{_place(dense)}`, not for llama.cpp): both lose less and cost speed."
            )
        yield _training(one, dense)
    if pruned is None and split:
        yield (
            "Compare it with static pruning, which keeps the same neurons for every token and is faster: convert with `--method static "
            f"--shared {ffn_share(model, parent) or 0.5:.2f}` and the same text, and name both models to `llamamoe report`."
        )
    elif (
        pruned is not None
        and (here := times_parent(pruned.model, "mean_over_domains")) is not None
        and factor is not None
    ):
        if here <= factor:
            yield f"Prefer {pruned.name}: pruning loses no more ({number(here)} times), and is faster."
        else:
            yield f"{pruned.name}, without experts, loses more ({number(here)} times): the router is worth its cost."
    yield _serving(one)


def _serving(one: Series) -> str:
    """Return the programs that run the model."""
    model = one.model
    if routes_attention(model):
        return (
            f"Serve it with transformers: no other program that we know runs {get(model, 'target')}. `llamamoe densify {_place(one)} dense` makes a "
            "dense model of it for others."
        )
    if get(model, "llama_cpp"):
        return f"Serve it: transformers and vLLM load the folder, `llamamoe export-gguf {_place(one)} model.gguf` writes a file for llama.cpp."
    text = "Serve it: transformers and vLLM load the folder. llama.cpp does not compute this model as transformers does"
    if not _by_split_alone(model):
        return f"{text}."
    return f"{text}: convert with `--target granitemoeshared` or `--target mixtral`, without dense layers, to run it there."


def _training(one: Series, dense: Series) -> str:
    """Return the command that trains the model, with the shipped recipe that is nearest to its size."""
    size = _cost(dense.model, "total_parameters") or 0.0
    attention = routes_attention(one.model)
    recipe = "smollm2_cpu" if size < _SMALL else "recover_distill" if size < _LARGE or attention else "recover_70b"
    heal = f"`llamamoe heal {_place(one)} healed --parent {_place(dense)}`, " if recipe == "recover_70b" else ""
    models = "--model healed" if heal else f"--model {_place(one)} --parent {_place(dense)}"
    keys = " --set device=auto" if recipe == "smollm2_cpu" else ""
    if attention:  # neither is supported by the class in transformers
        keys += f" --set {'experts_implementation=null' if recipe == 'smollm2_cpu' else 'gradient_checkpointing=false --set distributed.fsdp_size=1'}"
    text = (
        f"Train it, which recovers a part of the loss: {heal}`llamamoe tokenize`, then `llamamoe pretrain --recipe {recipe} {models} "
        f"--set data.train=TOKENS --set data.validation=HELD_OUT_TOKENS{keys} --out RUN`."
    )
    if get(one.model, "target") != "qwen2_moe":
        return text
    return f"{text} A trained qwen2_moe does not run in llama.cpp: convert with `--target granitemoeshared` first, if it is to run there."


def _place(one: Series) -> str:
    """Return the model as a command takes it: its path as it was given, or its name in the place of an absolute one."""
    return get(one.model, "place") or one.name


def _tokens(model: Mapping[str, Any]) -> int | None:
    """Return the number of calibration tokens; None if there were none or the number is unknown."""
    found: int | None = get(model, "provenance", "calibration_tokens")
    return found


def _by_split_alone(model: Mapping[str, Any]) -> bool:
    """Return whether another call of `split` could make a model like it: not a mix of models, or experts split again."""
    return not {"mix", "resplit"} & set(get(model, "provenance", "block") or ())


def _trained(model: Mapping[str, Any]) -> bool:
    return bool(get(model, "provenance", "trained"))
