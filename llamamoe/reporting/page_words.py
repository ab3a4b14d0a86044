"""Summarise the report's numbers in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .page_values import DASH, Series, exp, get, known, mean, number, percent, ratio, signed, times

FFN_PARTS = ("router", "routed", "shared", "stub", "dense_ffn")
_APART = 1.5  # deep over shallow excess distance from which they count as different
_UNDECIDED = 0.999  # entropy of a router's probabilities, as a share of an even distribution's, from which they tie
_TOLD = 8  # experts of attention whose heads are named
_NOISE = 1.25  # distance over its noise floor from which domains count as apart


def measure_of(series: Sequence[Series]) -> str:
    """Return the comparable measure: perplexity, or bits per byte if any tokenizer differs from the parent's."""
    differs = any(get(one.model, "comparable") == "bits_per_byte" for one in series)
    return "bits_per_byte" if differs else "perplexity"


def parent_of(series: Sequence[Series]) -> Mapping[str, Any] | None:
    """Return the dense model, if it was measured."""
    return series[0].model if series and series[0].place == 0 else None


def ffn_share(model: Mapping[str, Any], parent: Mapping[str, Any] | None) -> float | None:
    """Return the FFN parameters that a token uses over those that it uses in the parent, or over all of its own."""
    active = _ffn_parameters(model, "active")
    whole = _ffn_parameters(parent, "active") if parent else _ffn_parameters(model, "total")
    return ratio(active or None, whole)


def _ffn_parameters(model: Mapping[str, Any], key: str) -> float:
    parts = get(model, "cost", "parts") or {}
    return sum(get(parts, part, key) or 0 for part in FFN_PARTS)


def undecided(model: Mapping[str, Any]) -> bool:
    """Return whether the router gives all experts the same probability, as a hard one does by design."""
    entropies = known(get(each, "router_entropy") for each in get(model, "routing", "layers") or [])
    return bool(entropies) and min(entropies) > _UNDECIDED


def routes_attention(model: Mapping[str, Any]) -> bool:
    """Return whether attention is a mixture of experts, too."""
    return get(model, "routing", "attention") is not None


def times_parent(model: Mapping[str, Any], *path: str) -> float | None:
    """Return perplexity over the parent's, if the two are comparable."""
    if get(model, "comparable") == "bits_per_byte":
        return None
    return exp(get(model, "difference", *path, "loss"))


def summaries(series: Sequence[Series], domains: Sequence[str]) -> list[tuple[str, str]]:
    """Return the name and a summary of each converted model."""
    parent = parent_of(series)
    converted = [one for one in series if one.place]
    return [(one.name, _uses(one.model, parent) + _quality(one.model, parent, domains)) for one in converted]


def _uses(model: Mapping[str, Any], parent: Mapping[str, Any] | None) -> str:
    experts = get(model, "experts")
    chosen = ""
    if experts:
        moe, dense = len(get(experts, "moe_layers") or []), len(get(experts, "dense_layers") or [])
        where = f"in {moe} of {moe + dense} layers" if dense else f"in all {moe} layers"
        sizes = f"{_or_dash(experts, 'top_k')} of {_or_dash(experts, 'num_experts')}"
        heads = f"; of attention, {sizes} query heads of each key/value head" if routes_attention(model) else ""
        chosen = f" ({sizes} experts {where}{heads})"
    whose = "the parent’s" if parent else "its own"
    flops = ratio(get(model, "cost", "flops_per_token"), get(parent, "cost", "flops_per_token"))
    compute = f", {percent(flops)} of its FLOPs" if flops is not None else ""
    share = ffn_share(model, parent)
    if share is None:
        return ""
    return f"uses {percent(share)} of {whose} FFN for a token{chosen}{compute}. "


def _or_dash(node: Any, key: str) -> str:
    value = get(node, key)
    return DASH if value is None else str(value)


def _quality(model: Mapping[str, Any], parent: Mapping[str, Any] | None, domains: Sequence[str]) -> str:
    over = f"Over {len(domains)} domains" if len(domains) > 1 else "On this text"
    perplexity = get(model, "comparable") != "bits_per_byte"
    measure, name = ("perplexity", "perplexity") if perplexity else ("bits_per_byte", "bits per byte")
    verb = "is" if perplexity else "are"
    path = ("scores", "mean_over_domains", measure)
    here, there = get(model, *path), get(parent, *path)
    if here is None:
        return f"Its {name} {'was' if perplexity else 'were'} not measured."
    text = f"{over} its {name} {verb} {number(here)}"
    if there is None:
        return text + "."
    text += f" against {number(there)}"
    if perplexity:
        factor = times_parent(model, "mean_over_domains") or ratio(here, there)
        return f"{text} ({times(factor)})." if factor is not None else f"{text}."
    return f"{text} ({signed(here - there)})."


def depth_sentence(name: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """State whether shallow layers route domains alike and deep ones apart, judged above the noise floor."""
    found = [(get(each, "domain_distance"), get(each, "within_distance") or 0.0) for each in layers]
    measured = [(distance, floor) for distance, floor in found if distance is not None]
    if len(measured) < 3:
        return f"{name}: too few layers were measured to compare shallow with deep ones."
    third = max(len(measured) // 3, 1)
    (shallow, low), (deep, high) = _third(measured[:third]), _third(measured[-third:])
    numbers = (
        f"domains are {number(shallow, 2)} bits apart in the shallowest {_layers(third)} "
        f"and {number(deep, 2)} in the deepest (noise floor {number(low, 2)} and {number(high, 2)})"
    )
    return f"{name}: {numbers}. {_judgement(shallow, low, deep, high)}"


def _judgement(shallow: float, low: float, deep: float, high: float) -> str:
    if shallow <= _NOISE * low and deep <= _NOISE * high:
        return "That is not clearly more than chance in any layer: its experts do not follow domains."
    above, below = deep - high, shallow - low
    if above > _APART * max(below, 0.0):
        return "Shallow layers route domains more alike than deep ones, as LLaMA-MoE found."
    if below > _APART * max(above, 0.0):
        return "This is the opposite of what LLaMA-MoE found: the shallow layers separate domains more."
    return "Shallow and deep layers differ little: LLaMA-MoE’s finding is not confirmed here."


def _third(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    distances, floors = zip(*measured, strict=True)
    return sum(distances) / len(distances), sum(floors) / len(floors)


def _layers(count: int) -> str:
    return "layer" if count == 1 else f"{count} layers"


def load_sentence(name: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """State the balance of experts: the mean entropy, the busiest expert, and number and layers of dead ones."""
    violations = [(v, get(each, "layer")) for each in layers if (v := get(each, "max_violation")) is not None]
    dead = [(get(each, "layer"), d) for each in layers if (d := get(each, "dead_experts"))]
    entropy = mean(get(each, "load_entropy") for each in layers)
    said = [] if entropy is None else [f"the load’s entropy is {percent(entropy)} of an even load’s"]
    if violations:
        worst, where = max(violations, key=lambda pair: pair[0])
        said.append(f"the busiest expert (layer {where}) takes {number(1 + worst)} times its even share")
    if known(get(each, "dead_experts") for each in layers):
        total = sum(d for _, d in dead)
        places = ", ".join(str(layer) for layer, _ in dead[:6]) + ("…" if len(dead) > 6 else "")
        whole = sum(len(get(each, "load") or ()) for each in layers)
        of = f" of {whole:,} experts" if whole else (" expert" if total == 1 else " experts")
        without = f"{total}{of} got no token of this text (layer {places}), which is usual for little text"
        said.append(without if dead else "every expert got tokens")
    return f"{name}: {'; '.join(said) or 'its load was not measured'}."


def head_sentence(name: str, model: Mapping[str, Any]) -> str | None:
    """Name the query heads of each expert of attention; None if the routing is that of FFNs."""
    heads = get(model, "routing", "query_heads")
    if not heads:
        return None
    told = [f"{expert} is heads {', '.join(map(str, of))}" for expert, of in enumerate(heads)]
    return (
        f"{name}: an expert is one query head of each key/value head, in the parent’s numbers: expert {'; '.join(told[:_TOLD])}"
        f"{'; and so on' if len(told) > _TOLD else ''}."
    )


def router_sentence(name: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """State the share of the oracle's choice and contribution that the router finds, averaged over layers."""
    recall, chance = mean(get(x, "recall_at_k") for x in layers), mean(get(x, "chance_recall") for x in layers)
    captured = mean(get(x, "captured") for x in layers)
    if recall is None and captured is None:
        return f"{name}: the router was not compared with the oracle."
    by_chance = mean(get(x, "captured_by_chance") for x in layers)
    return (
        f"{name}: its router finds {percent(recall)} of the experts that the oracle would choose (chance {percent(chance)}) "
        f"and {percent(captured)} of the contribution that the oracle captures (chance {percent(by_chance)})."
    )
