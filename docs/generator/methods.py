"""Everything that a recipe can name, read from the registries."""

from __future__ import annotations

from llamamoe_cli.methods import KEYS, TITLES

from llamamoe.catalog import Method, list_methods

from .markdown import code, prose, table

HEAD = """# Methods

`llamamoe methods` prints the same. Every method is a plug-in: one file, found by itself. To add one, see
[Write a splitter](../how-to/splitter.md). Methods that need activations or gradients need calibration text.
"""
KINDS = (
    "splitter",
    "router",
    "shared_by",
    "rescale",
    "repair",
    "loss",
    "gate",
    "update",
    "experts",
    "family",
    "target",
)


def pages() -> dict[str, str]:
    """Return the page."""
    methods = list_methods()
    assert {m.kind for m in methods} == set(KINDS), "a kind of method has no place on the page"
    parts = [HEAD]
    for kind in KINDS:
        found = [m for m in methods if m.kind == kind]
        parts.append(f"## {prose(TITLES[kind])}\n")
        parts.append(
            table(("name", "what it does", "needs"), [(f"`{m.name}`", prose(m.summary), m.needs) for m in found])
        )
        parts += [_details(m) for m in found if m.options or m.reference]
    return {"reference/methods.md": "\n".join(parts)}


def _details(method: Method) -> str:
    lines = [f"### {method.name} {{ #{method.kind}-{method.name} }}\n", prose(method.summary).capitalize() + ".\n"]
    facts = [("Reference", method.reference), ("Parity", method.parity)]
    facts += [(key.replace("_", " ").capitalize(), str(value)) for key, value in method.facts.items()]
    lines += [f"- {name}: {prose(value)}" for name, value in facts if value]
    lines.append("")
    if method.options:
        key = KEYS.get(method.kind, method.kind)
        rows = [(code(f"{key}.{o.name}"), f"{o.type} {' '.join(o.rules)}".replace("<", "&lt;"), code(o.default), prose(o.description))
                for o in method.options]  # fmt: skip
        lines.append(table(("option", "type", "default", "what it does"), rows))
    return "\n".join(lines)
