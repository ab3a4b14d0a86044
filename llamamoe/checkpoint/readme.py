"""Read the README.md of a parent safely, and write that of a model made from others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .._version import __version__
from ..errors import CheckpointError
from .paths import inside

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
INHERITED = ("license", "license_name", "license_link", "language")
"""Keys of a parent's metadata that also apply to models made from it."""
_HEAD_BYTES, _CARD_BYTES = 2**16, 2**20
_MOST_NESTED = 16
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""


def parent_metadata(folder: Path) -> dict[str, Any]:
    """Return the plain strings in the YAML block of the parent's model card; empty if there is none.

    A card is untrusted: only its first bytes are read, from a regular file inside the folder, without aliases and
    without deep nesting.
    """
    try:
        text = read_card(folder, _HEAD_BYTES)
        found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        data = yaml.safe_load(found[1]) if found and _is_plain(found[1]) else {}
    except (ValueError, yaml.YAMLError):  # ValueError: a date that does not exist
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: value for key, value in data.items() if isinstance(key, str) and _is_text(value)}


def read_card(folder: Path, limit: int = _CARD_BYTES) -> str:
    """Return the first bytes of a folder's README.md as text; empty if it is missing or not a regular file."""
    try:
        with inside(folder, "README.md").open("rb") as file:
            return file.read(limit).decode("utf-8", "ignore").replace("\r\n", "\n")
    except (OSError, CheckpointError):
        return ""


def _is_plain(text: str) -> bool:
    """Return whether YAML has no aliases and little nesting, from its events alone, without building it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MOST_NESTED:
            return False
    return True


def _is_text(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(each, str) and each.isprintable() for each in texts)


def derived_card(
    folders: Sequence[Path], names: Sequence[str], title: str, story: str, warnings: tuple[str, ...], *, moe: str | None
) -> str:
    """Return the README.md of a checkpoint that was made from others.

    Args:
        folders: Folders of the models it was made from; licence and language are those of the first that names them.
        names: Names of these models; hub ids become ``base_model``.
        title: The headline.
        story: How it was made, in sentences.
        warnings: Sentences for the section "Good to know".
        moe: The ``model_type`` of a mixture of experts, else None.
    """
    heads = [parent_metadata(folder) for folder in folders]
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    data["tags"] = ["llamamoe"] if moe is None else ["moe", "llamamoe", moe]
    for key in INHERITED:
        found = next((head[key] for head in heads if key in head), None)
        data |= {key: found} if found is not None else {}
    bases = [name for name in names if HUB_ID.fullmatch(name)]
    data |= {"base_model": bases[0] if len(bases) == 1 else bases} if bases else {}
    parts = [
        "---\n" + yaml.safe_dump(data, sort_keys=False).strip() + "\n---",
        f"# {title}",
        f"Made by llamamoe {__version__}. {story}",
        USE,
    ]
    if warnings:
        parts.append("## Good to know\n\n" + "\n".join(f"- {each}" for each in warnings))
    licences = sorted({str(head["license"]) for head in heads if "license" in head})
    more = f" They state: {', '.join(licences)}." if len(licences) > 1 else ""
    parts.append(f"## Licence\n\nThe licence of the models that it was made from applies.{more}")
    return "\n\n".join(parts) + "\n"
