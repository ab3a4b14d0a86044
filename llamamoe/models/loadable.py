"""Open a result as transformers will before it is published: configuration, model, generation, tokenizer."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..architectures.config_values import MOST_LABELS, check_value, check_values
from ..architectures.expert_weighting import EXPERT_KEYS, TOP_K_KEYS, check_top_k
from ..architectures.sources import SOURCES
from ..architectures.targets import TARGETS
from ..checkpoint.base import TensorInfo
from ..checkpoint.files import copy_file, unsynced, write_text
from ..checkpoint.json_files import read_json
from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.reader import SIDE_FILES
from ..checkpoint.text_part import is_whole
from ..checkpoint.tokenizer_loading import holds_vocabulary, load, one_error
from ..errors import CheckpointError
from ..lazy import torch, transformers

_MOST_LAYERS = 10_000
_HINT = "Download config.json again, or correct it."


def check_counts(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None) -> None:
    """Refuse a configuration with more layers or experts than the files can hold, before anything is built for each.

    Other values over which transformers would fail only when running the model are refused too.

    Args:
        config: ``config.json``.
        tensors: The tensors in the files; None if there are no weights.

    Raises:
        CheckpointError: A count is too large, or a value is not a number.
    """
    labels = config.get("num_labels", 0)
    if not isinstance(labels, int) or labels > MOST_LABELS:
        raise CheckpointError(
            f"config.json: num_labels = {labels!r}, but it must be at most {MOST_LABELS:,}.", hint=_HINT
        )
    check_value(config, "sliding_window")
    if not isinstance(config.get("is_causal", True), bool):
        raise CheckpointError(
            f"config.json: is_causal = {config['is_causal']!r}, but it must be true or false.", hint=_HINT
        )
    known = config.get("model_type") in [*TARGETS.names(), *SOURCES.names()]  # a list: the value may be of any type
    if known:
        check_values(config)
    layers = _MOST_LAYERS if tensors is None else len(tensors)
    experts = max(layers, max((size for info in (tensors or {}).values() for size in info.shape), default=0))
    for key, most in (("num_hidden_layers", layers), *((key, experts) for key in (*EXPERT_KEYS, *TOP_K_KEYS))):
        value = config.get(key)
        if value is None or (value == 0 and not known):  # class of a mixture without experts, in another family
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {key} = {value!r}, but it must be a whole number above 0.", hint=_HINT)
        if value > most:
            raise CheckpointError(
                f"config.json: {key} = {value}, but the files hold only {most}: config and weights disagree."
                if tensors is not None
                else f"config.json: {key} = {value}, but at most {most:,} are read without weights.",
                hint=_HINT,
            )
    if known:
        check_top_k(config)


def check_config_file(folder: Path) -> None:
    """Check ``config.json`` for values with which transformers would need unbounded memory, before it is loaded.

    Raises:
        CheckpointError: See `check_counts` and `llamamoe.checkpoint.json_files.read_json`.
    """
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    for each in (config, nested if isinstance(nested, dict) else {}):
        check_counts(each, None)


def check_model(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Load a model as transformers would, with its configuration and tensors of the right shapes without data.

    Needs no memory for weights and reads no file: a few milliseconds per layer.

    Args:
        config: ``config.json``; its layers and experts have been checked (see `check_counts`).
        tensors: Name to shape of all tensors in the files.

    Raises:
        CheckpointError: transformers cannot build it, or reports a missing, unexpected or misshapen tensor.
    """
    with _no_collection():
        _check_model(config, tensors)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector, which takes a fifth of the time of a large import."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_model(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    given = copy.deepcopy(
        {key: value for key, value in config.items() if key != "llamamoe"}
    )  # transformers modifies it
    empty = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
    with one_error("the model of config.json"), quiet_transformers():
        built = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(given)
        kinds = (
            transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
            if is_whole(given)
            else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        )
        cls: Any = kinds[type(built)]
        keys = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
        _, info = cls.from_pretrained(None, config=built, state_dict=empty, attn_implementation="eager", **keys)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(kind) or ()))
        if found:
            more = f" and {len(found) - 2} more" if len(found) > 2 else ""
            raise CheckpointError(
                f"config and weights disagree: transformers reports {kind.replace('_', ' ')}: {', '.join(found[:2])}{more}.",
                hint=_HINT,
            )


def check_loads(folder: Path, name: Path | None = None) -> None:
    """Load configuration, generation configuration and tokenizer of a folder that is about to be published.

    Args:
        folder: The folder.
        name: Its name in an error, if it is a copy.

    Raises:
        CheckpointError: transformers cannot load one of them.
    """
    called = name or folder
    with one_error(f"config.json of '{called}'"), quiet_transformers():
        transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():
        with one_error(f"generation_config.json of '{called}'"), quiet_transformers():
            transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    if holds_vocabulary(folder):
        load(folder, f"the tokenizer of '{called}'")


def check_loads_with(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that a folder would load with another ``config.json``, without changing it.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    with tempfile.TemporaryDirectory(prefix="llamamoe-") as name, unsynced():
        staged = Path(name)
        for each in SIDE_FILES:
            if (folder / each).is_file():
                copy_file(folder / each, staged / each)
        write_text(staged / "config.json", json.dumps(dict(config)))
        check_loads(staged, folder)
