"""``llamamoe inspect``: what a checkpoint is, and what it costs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ._format import amount, duration, error, plural, size
from ._output import Output, output_options
from ._style import Command
from ._tables import bullets, facts, heading, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.architectures.inspect import Inspection
    from llamamoe.architectures.stored_experts import Experts

HELP = """Show the architecture, size and cost of the checkpoint PATH, from file headers only.

PATH is a dense model or a mixture of experts, converted by llamamoe or not: a folder with config.json and safetensors
files, a .gguf file or a Hub id, of which the headers are read over the network and no weights are downloaded.

-v adds the parameters by part and, for an output of llamamoe, the whole record of how it was made.
"""


@click.command(cls=Command, section="Inspect and verify", rank=0, short_help="Show the architecture, size and cost of a checkpoint.",
               help=HELP, examples="llamamoe inspect OUT\nllamamoe inspect model.gguf --json")  # fmt: skip
@click.argument("path")
@output_options
def command(path: str, output: Output) -> None:
    """Parse, inspect, print."""
    from llamamoe.architectures.inspect import inspect

    inspection = inspect(path)
    output.result(inspection.to_json(), lambda: _print(inspection, verbose=output.verbose))


def _print(inspection: Inspection, *, verbose: bool) -> None:
    kind = "mixture of experts" if inspection.kind == "moe" else "dense"
    echo(bold(inspection.name), f": {kind}, {inspection.model_type or 'no model_type'}")
    facts(_facts(inspection))
    if inspection.experts is not None:
        heading("Experts")
        facts(_experts(inspection.experts))
    heading("Costs")
    _costs(inspection, verbose=verbose)
    if inspection.provenance is not None:
        heading("Converted by llamamoe")
        facts(_provenance(inspection.provenance, inspection.receipt, verbose=verbose))
    if inspection.notes:
        heading("Notes")
        bullets(inspection.notes, mark="!")
    if inspection.kind == "dense":
        echo()
        if inspection.refusal is None:
            echo(f"It can be split: llamamoe split {shlex.quote(str(inspection.path))} OUT --dry-run")
        else:
            echo(f"It cannot be split: {inspection.refusal}")


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    from llamamoe.architectures.expert_weighting import routes_attention

    sizes = dict(inspection.sizes)
    ffn = (
        [("FFN", f"{inspection.intermediate_size:,} neurons")]
        if inspection.experts is None and inspection.intermediate_size
        else []
    )
    total = sum(inspection.dtypes.values()) or 1
    kinds = ", ".join(f"{k} {100 * n / total:.0f} %" if n < total else k for k, n in inspection.dtypes.items())
    return [
        ("class", inspection.architecture or "not named"),
        ("layers", f"{sizes.get('num_hidden_layers', '?')}, hidden size {_number(sizes.get('hidden_size'))}"),
        *ffn,
        ("heads", _heads(sizes, inspection.experts if routes_attention(inspection.target) else None)),
        ("vocabulary", _number(sizes.get("vocab_size")) + (", head tied to the embedding" if inspection.tied else "")),
        ("context", _number(sizes.get("max_position_embeddings"))),
        (
            "files",
            f"{inspection.format}, {plural(inspection.files, 'file')}, {size(inspection.bytes_on_disk)}, {kinds}",
        ),
        *([("revision", inspection.revision)] if inspection.revision else []),
    ]


def _heads(sizes: Mapping[str, int], routed: Experts | None) -> str:
    """Return the heads of attention; ``routed`` are the experts that the query heads are, where attention is routed, too."""
    keys, width = sizes.get("num_key_value_heads"), sizes.get("head_dim")
    count = sizes.get("num_attention_heads") or (keys * routed.num_experts if keys and routed else "?")
    shown = (
        f"{count}"
        + (f", each of {width} dimensions" if width else "")
        + (f"; {keys} for keys and values" if keys else "")
    )
    if routed is None:
        return shown
    return f"{shown}; attention is routed, too: a token uses {routed.top_k} of the {routed.num_experts} query heads of each"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _experts(experts: Experts) -> list[tuple[str, str]]:
    rows = [
        ("experts", f"{experts.num_experts} in each of {plural(len(experts.moe_layers), 'layer')}"),
        ("selected", f"{experts.top_k} per token"),
        ("expert width", f"{experts.expert_width:,} neurons"),
    ]
    if experts.shared_width:
        stub = " (zeros: the architecture needs one)" if experts.shared_is_stub else ""
        rows.append(("shared expert", f"{experts.shared_width:,} neurons{stub}"))
    if experts.dense_layers:
        rows.append(("dense layers", ", ".join(map(str, experts.dense_layers)) + f", {experts.dense_width} neurons"))
    return rows


def _costs(inspection: Inspection, *, verbose: bool) -> None:
    cost = inspection.cost
    active = f", {amount(cost.active_parameters)} active per token" if inspection.experts is not None else ""
    rows = [
        ("parameters", amount(cost.total_parameters) + active),
        ("FLOPs per token", f"{amount(cost.flops_per_token)}, without attention scores"),
        ("memory", f"{size(cost.nbytes)} of weights once loaded"),
    ]
    if inspection.kv_bytes_per_token:
        rows.append(("cache", f"{size(inspection.kv_bytes_per_token)} per token in 16 bits"))
    facts(rows)
    if verbose:
        heading("Parameters by part")
        parts = [(part.replace("_", " "), f"{n:,}", f"{cost.active[part]:,}") for part, n in cost.total.items()]
        table(("", "total", "active"), parts, right=(1, 2))


_LABELS = {
    "parity": "equal to parent",
    "factor": "factor in config",
    "baked_factor": "factor in weights",
}
"""Labels of keys in the provenance block that do not explain themselves: conditions of parity, and factors of the experts' sum."""
_ELSEWHERE = ("num_experts", "top_k", "expert_width")
"""Keys of the block whose values are shown as they are in the files."""
_MOST_NAMED = 8
"""Values of a list that are shown without ``-v``."""


def _provenance(made: Mapping[str, Any], receipt: Mapping[str, Any] | None, *, verbose: bool) -> list[tuple[str, str]]:
    shown = made if verbose else _short(made, leave_out=_ELSEWHERE)
    rows = [
        (_LABELS.get(key, str(key).replace("_", " ")), _plain(value))
        for key, value in shown.items()
        if value is not None
    ]
    if receipt is None:
        return rows
    if not receipt.get("verified"):
        return [*rows, ("verified", "no")]
    parts = ["yes" if receipt.get("passed") else "failed"]
    for key, name in (("equal_weights", "at equal weights"), ("as_stored", "as stored")):
        if receipt.get(key) is not None:
            parts.append(f"{error(receipt[key])} {name}")
    rows.append(("verified", ", ".join(parts)))
    if receipt.get("finished"):
        rows.append(("finished", f"{receipt['finished']} after {duration(receipt.get('seconds', 0.0))}"))
    return rows


def _short(made: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Return a record without hashes and, in the steps that followed, without what nests deeper."""
    found = {}
    for key, value in made.items():
        if key in leave_out or "sha256" in key or "hashes" in key:
            continue
        if isinstance(value, list) and value and all(isinstance(step, Mapping) for step in value):
            value = [_step(step) for step in value]
        found[key] = _step(value) if isinstance(value, Mapping) else value
    return found


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a step, two numbers as what was before and after it."""
    found = {}
    for key, value in _short(step).items():
        values = value if isinstance(value, list) else [value]
        if len(values) > _MOST_NAMED or any(isinstance(each, Mapping | list) for each in values):
            continue
        pair = len(values) == 2 and all(isinstance(each, int) for each in values)
        found[key.replace("_", " ")] = f"{values[0]} to {values[1]}" if pair else value
    return found


def _plain(value: Any) -> str:
    """A value of the provenance block on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)
