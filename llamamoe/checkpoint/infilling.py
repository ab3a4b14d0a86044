"""``CodeLlamaTokenizer`` rewrites text around ``<FILL_ME>`` in Python, which ``tokenizer.json`` cannot express.

It turns the text into an infilling prompt and raises if the text contains ``<FILL_ME>`` twice, such as code about
infilling. So infilling is switched off: all other text gets the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..lazy import transformers
from .json_files import read_json

CLASSES = ("CodeLlamaTokenizer", "CodeLlamaTokenizerFast")


def open_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder as transformers does, without infilling; no code of the folder is run."""
    found = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if type(found).__name__ not in CLASSES:
        return found
    return transformers.AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, fill_token=None
    )


def infilling_warnings(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """List what a conversion drops from the tokenizer of a folder, from its files alone.

    Args:
        folder: The parent's folder.
        config: The parent's configuration.
    """
    path = folder / "tokenizer_config.json"
    named = read_json(path).get("tokenizer_class") if path.is_file() else None
    if (named or config.get("tokenizer_class")) not in CLASSES:
        return []
    return [
        "`<FILL_ME>` infilling of CodeLlamaTokenizer is not carried over: to the output's tokenizer it is plain text; ids of "
        "all other text are the same. For infilling, tokenize with the parent's folder: its ids are also the output's"
    ]
