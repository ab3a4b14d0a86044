"""Carry over a parent's tokenizer so that the same text gives the same ids.

transformers picks the class of a tokenizer by the model's type and ``tokenizer_config.json``, and some
classes rebuild the tokenizer instead of reading ``tokenizer.json``. A conversion changes the type. So the parent's
tokenizer is opened once as transformers opens it, and the result is written as a ``tokenizer.json`` with the one class
that transformers 4.57 and 5 both take literally. Then both are compared (see `tokenizer_difference`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..lazy import tokenizers, transformers
from .base import Checkpoint
from .files import copy_file, make_folder, unsynced, write_bytes, write_text
from .json_files import read_json
from .quiet import quiet_transformers
from .reader import VOCABULARIES
from .text_part import TextPart
from .tokenizer_difference import chat_template, difference
from .tokenizer_loading import holds_vocabulary, load, one_error, staged

LITERAL_CLASS = "PreTrainedTokenizerFast"
"""The class that reads ``tokenizer.json`` as it is, in transformers 4.57 and 5, whatever the model's type."""
_NEW_CLASS = "TokenizersBackend"
"""The name of `LITERAL_CLASS` in transformers 5, which 4.57 does not have."""
REWRITTEN = frozenset({
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"
}) - {"tokenizer.model"}  # fmt: skip
"""Files whose content is in the two that are written; if copied, they would change how transformers reads those."""


@dataclass(frozen=True)
class CarriedFiles:
    """The files that an output takes over from its parent: tokenizer, generation configuration and licence.

    Attributes:
        contents: Their bytes by name.
    """

    contents: Mapping[str, bytes]

    def write(self, out: Path) -> list[str]:
        """Write the files into a folder, and return their names."""
        for name, data in self.contents.items():
            make_folder((out / name).parent)
            write_bytes(out / name, data)
        return list(self.contents)


def carried_files(checkpoint: Checkpoint, config: Mapping[str, Any]) -> CarriedFiles:
    """Load the files that are carried over beside the weights, and return them as they are to be written.

    Args:
        checkpoint: The parent.
        config: The configuration of the output.

    Raises:
        CheckpointError: transformers cannot load the tokenizer or the generation configuration, gets other ids from the
            tokenizer beside the new configuration, or the tokenizer has no fast form.
    """
    with staged(checkpoint) as folder, tempfile.TemporaryDirectory(prefix="llamamoe-") as name, unsynced():
        _check_generation(checkpoint, folder)
        tokenizer = load(folder, f"the tokenizer of '{checkpoint.path}'") if holds_vocabulary(folder) else None
        out = Path(name)
        write_text(out / "config.json", json.dumps(dict(config)))
        if isinstance(checkpoint, TextPart):  # the model's type does not change
            names = checkpoint.save_tokenizer(out)
        else:
            names = _copy_others(folder, tokenizer, out)
            if tokenizer is not None:
                names = sorted([*names, *_write_tokenizer(checkpoint, folder, tokenizer, out)])
        return CarriedFiles({each: (out / each).read_bytes() for each in names})


def _check_generation(checkpoint: Checkpoint, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        with one_error(f"generation_config.json of '{checkpoint.path}'", folder), quiet_transformers():
            transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)


def _copy_others(folder: Path, tokenizer: Any | None, out: Path) -> list[str]:
    """Copy the files that are neither the configuration nor `REWRITTEN`; return their names."""
    names = []
    for path in sorted(folder.iterdir()):
        kept = path.is_file() and path.name != "config.json" and path.name not in REWRITTEN
        if kept and not (path.name == "chat_template.jinja" and isinstance(chat_template(tokenizer), dict)):
            copy_file(path, out / path.name)
            names.append(path.name)
    return names


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, tokenizer: Any, out: Path) -> tuple[str, str]:
    """Write the tokenizer in two files beside the output's configuration, compare both, and return the files' names."""
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"the tokenizer of '{checkpoint.path}' ({type(tokenizer).__name__}) has no fast form, so it cannot be "
            "carried over exactly.",
            hint="Save it once as a fast tokenizer, so that there is a tokenizer.json.",
        )
    write_text(out / "tokenizer.json", _tokenizer_json(tokenizer, folder / "tokenizer.json"))
    config = _tokenizer_config(tokenizer, template_file=(out / "chat_template.jinja").is_file())
    write_text(out / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    found = difference(tokenizer, load(out))
    if found:
        model_type = read_json(out / "config.json").get("model_type")
        raise CheckpointError(
            f"the tokenizer of '{checkpoint.path}' cannot be carried over exactly: beside a model of type {model_type}, "
            f"{found}.",
            hint=f"{type(tokenizer).__name__} does in Python what tokenizer.json cannot express. Convert a copy of the folder "
            "without the tokenizer's files: then the output has none.",
        )
    return "tokenizer.json", "tokenizer_config.json"


def _tokenizer_json(tokenizer: Any, given: Path) -> str:
    """Return the tokenizer as JSON: the parent's own text if it is equivalent."""
    now = tokenizer.backend_tokenizer.to_str()
    if given.is_file():
        text = given.read_text(encoding="utf-8")
        there = tokenizers.Tokenizer.from_str(text).to_str()
        if there == now or json.loads(there) == json.loads(now):
            return text
    return json.dumps(json.loads(now), ensure_ascii=False, indent=2) + "\n"


def _tokenizer_config(tokenizer: Any, *, template_file: bool) -> dict[str, Any]:
    """Return the settings that are not in ``tokenizer.json``, in keys that transformers 4.57 and 5 both read."""
    plain, full = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    config: dict[str, Any] = {
        "tokenizer_class": LITERAL_CLASS,
        "model_input_names": list(tokenizer.model_input_names),
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
        # for other readers; the post-processor in tokenizer.json takes effect
        "add_bos_token": bos is not None and full[:1] == [bos] and plain[:1] != [bos],
        "add_eos_token": eos is not None and full[-1:] == [eos] and plain[-1:] != [eos],
    }
    pre = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    if isinstance(pre.get("add_prefix_space"), bool):  # 4.57 sets the pre-tokenizer accordingly
        config["add_prefix_space"] = pre["add_prefix_space"]
    config |= {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or []]
    if extra:
        config["additional_special_tokens"] = extra
    template = chat_template(tokenizer)
    if isinstance(template, dict):
        config["chat_template"] = [{"name": name, "template": text} for name, text in sorted(template.items())]
    elif template is not None and not template_file:
        config["chat_template"] = template
    return config


def older_config(folder: Path) -> dict[str, Any] | None:
    """Return a ``tokenizer_config.json`` that 4.57 reads, for a folder in which transformers 5 saved one that it refuses.

    Transformers 5 saves `LITERAL_CLASS` under a new name, and more special tokens as a list; 4.57 raises for both.

    Args:
        folder: The folder, which has a ``config.json``.

    Returns:
        The whole content; None if 4.57 reads the existing file. Chat templates are left in place.

    Raises:
        CheckpointError: The tokenizer cannot be loaded, or transformers 5 would get other ids from the result.
    """
    path = folder / "tokenizer_config.json"
    now = read_json(path) if path.is_file() else {}
    new = now.get("tokenizer_class") == _NEW_CLASS or isinstance(now.get("extra_special_tokens"), list)
    if not new or not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = load(folder)
    config = _tokenizer_config(tokenizer, template_file=True)
    config.pop("chat_template", None)
    config |= {"chat_template": now["chat_template"]} if "chat_template" in now else {}
    with tempfile.TemporaryDirectory(prefix="llamamoe-") as name, unsynced():
        trial = Path(name)
        for each in ("config.json", "tokenizer.json"):
            copy_file(folder / each, trial / each)
        write_text(trial / path.name, json.dumps(config))
        found = difference(tokenizer, load(trial), templates=False)
    if found:
        raise CheckpointError(
            f"the tokenizer of '{folder}' cannot be written for transformers 4.57: {found}.",
            hint="Remove the tokenizer's files from the folder, or copy those of the parent into it.",
        )
    return config
