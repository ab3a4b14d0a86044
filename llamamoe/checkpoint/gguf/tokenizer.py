"""Write the tokenizer inside a GGUF file as the ``tokenizer.json`` that it was made from.

A GGUF file holds the vocabulary, but only the name of its pre-tokenizer (``tokenizer.ggml.pre``). A pre-tokenizer
that differs from the parent's gives other tokens without any error, so an unknown name is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..files import copy_file, write_text
from ..paths import inside
from ..reader import SIDE_FILES, check_side_file, refuse_tokenizer_code
from ..tokenizer_ids import beyond_embedding
from .config import token_ids
from .cuts import CUTS
from .header import GgufHeader

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""


def check(header: GgufHeader, folder: Path | None, vocab_size: int) -> list[str]:
    """Return notes about the tokenizer; refuse one that could not be saved.

    Raises:
        CheckpointError: The vocabulary is broken, or its pre-tokenizer is unknown, and no folder is given instead;
            or the folder holds no tokenizer, a link out of it, or a tokenizer with its own code.
    """
    if folder is not None:
        if not folder.is_dir():
            raise CheckpointError(
                f"--tokenizer: '{folder}' is not a folder.", hint="Give a folder that holds the model's tokenizer.json."
            )
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json).")
        for path in files(folder):
            check_side_file(path)
        refuse_tokenizer_code(folder)
        return beyond_embedding(folder, vocab_size)
    model = header.metadata.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return ["the GGUF file holds no tokenizer; the output has none"]
    arch = header.metadata.get("general.architecture")
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if model not in ("gpt2", "llama") or (model == "llama" and arch == "gemma"):
        _refuse(header, f"a tokenizer of kind {model!r} (architecture {arch!r}) cannot be rebuilt exactly")
    if model == "gpt2" and pre not in CUTS:
        _refuse(
            header, f"its pre-tokenizer (tokenizer.ggml.pre = {pre!r}) is unknown ({', '.join(CUTS)} are supported)"
        )
    _check_vocabulary(header, vocab_size)
    return []


def files(folder: Path) -> list[Path]:
    """Return the tokenizer's files in a folder.

    Raises:
        CheckpointError: A file is a link out of the folder.
    """
    return [inside(folder, name) for name in SIDE_FILES if (folder / name).is_file()]


def save(header: GgufHeader, folder: Path | None, out: Path) -> list[str]:
    """Write the tokenizer's files and ``generation_config.json`` into ``out``; return their names."""
    if folder is not None:
        given = files(folder)
        names = [path.name for path in given]
        for path in given:
            copy_file(path, out / path.name)
    elif header.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        names = []
    else:
        names = ["tokenizer.json", "tokenizer_config.json"]
        _write(out / names[0], _tokenizer_json(header))
        _write(out / names[1], _tokenizer_config(header))
    if "generation_config.json" not in names:
        names.append("generation_config.json")
        _write(out / "generation_config.json", _generation_config(header.metadata))
    return names


def _refuse(header: GgufHeader, reason: str) -> None:
    raise CheckpointError(
        f"{header.path}: {reason}.",
        hint="Give a folder with the original tokenizer (tokenizer.json) with --tokenizer.",
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def _check_vocabulary(header: GgufHeader, vocab_size: int) -> None:
    metadata = header.metadata
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    sizes = {"token_type": types}
    if metadata["tokenizer.ggml.model"] == "llama":
        sizes["scores"] = metadata.get("tokenizer.ggml.scores")
    elif not isinstance(metadata.get("tokenizer.ggml.merges"), list):
        _refuse(header, "tokenizer.ggml.merges is missing")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        _refuse(header, "tokenizer.ggml.tokens is missing")
        return
    for name, values in sizes.items():
        if not isinstance(values, list) or len(values) != len(tokens):
            _refuse(header, f"tokenizer.ggml.{name} is missing or not as long as the vocabulary")
    if len(tokens) > vocab_size:
        _refuse(header, f"its vocabulary has {len(tokens)} tokens, but its embedding only {vocab_size} rows")
    if len(set(tokens)) != len(tokens) or any("\udc80" <= c <= "\udcff" for token in tokens for c in token):
        _refuse(header, "its vocabulary has a token twice, or one that is not UTF-8")
    for name, value in token_ids(metadata).items():
        if value is not None and (not isinstance(value, int) or not 0 <= value < vocab_size):
            _refuse(header, f"its {name} token has the invalid id {value!r}")


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[dict[str, int], list[int]]:
    """Return token to id, and the type of each, without tokens at the end that only fill the embedding."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    count = len(tokens)
    while count and types[count - 1] == UNUSED:
        count -= 1
    return {token: index for index, token in enumerate(tokens[:count])}, types[:count]


def _adds(metadata: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether bos and eos are added around a text, with llama.cpp's defaults for missing keys."""
    ids = token_ids(metadata)
    default = metadata["tokenizer.ggml.model"] == "llama" or CUTS[metadata["tokenizer.ggml.pre"]].add_bos
    bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default)) and ids["bos"] is not None
    return bos, bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and ids["eos"] is not None


def _tokenizer_json(header: GgufHeader) -> dict[str, Any]:
    metadata = header.metadata
    vocab, types = _vocabulary(metadata)
    parts = (
        _sentencepiece(metadata, vocab, types)
        if metadata["tokenizer.ggml.model"] == "llama"
        else _byte_level(metadata, vocab)
    )
    special = {token_ids(metadata)[name] for name in ("bos", "eos", "unk", "pad")}
    added = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[index] != USER_DEFINED,
        }
        for token, index in vocab.items()
        if types[index] in (CONTROL, UNKNOWN, USER_DEFINED) or index in special
    ]  # fmt: skip
    template = _template(metadata)
    if template and parts["post_processor"]:
        template = {"type": "Sequence", "processors": [parts["post_processor"], template]}
    parts["post_processor"] = template or parts["post_processor"]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


def _template(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the post-processor that adds bos and eos around a text."""
    tokens, ids = metadata["tokenizer.ggml.tokens"], token_ids(metadata)
    used = [name for name, on in zip(("bos", "eos"), _adds(metadata), strict=True) if on]
    if not used:
        return None

    def around(text: str, segment: int) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = [{"Sequence": {"id": text, "type_id": segment}}]
        for name in used:
            item = {"SpecialToken": {"id": tokens[ids[name]], "type_id": segment}}
            items = [item, *items] if name == "bos" else [*items, item]
        return items

    names = dict.fromkeys((tokens[ids[name]], ids[name]) for name in used)
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in names},
    }


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    """Return a tokenizer of GPT-2's kind: text is split, its bytes become printable characters, merged by rank."""
    cut = CUTS[metadata["tokenizer.ggml.pre"]]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": cut.regex is None,
        "use_regex": cut.regex is None,
    }
    first: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if cut.digits else []
    if cut.regex:
        first = [{"type": "Split", "pattern": {"Regex": cut.regex}, "behavior": "Isolated", "invert": False}]
    return {
        "normalizer": {"type": "NFC"} if cut.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, level]} if first else level,
        "post_processor": {**level, "trim_offsets": False, "use_regex": True},
        "decoder": {**level, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocab, metadata["tokenizer.ggml.merges"], ignore_merges=cut.whole_words),
    }


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> dict[str, Any]:
    """Return a SentencePiece BPE: spaces become a visible character, unknown characters their bytes."""
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]  # fmt: skip
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    merges = merges_of_scores(vocab, types, metadata["tokenizer.ggml.scores"])
    unknown = token_ids(metadata)["unk"]
    token = metadata["tokenizer.ggml.tokens"][unknown] if unknown is not None else None
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
        if prefix
        else spaces,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocab, merges, unk_token=token, fuse_unk=True, byte_fallback=True),
    }


def _bpe(vocab: dict[str, int], merges: list[str] | list[list[str]], **settings: Any) -> dict[str, Any]:
    plain = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {**plain, **settings, "vocab": vocab, "merges": merges}


def merges_of_scores(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[list[str]]:
    """Return merges by rank that are equivalent to SentencePiece's scores, of which the best union is joined first."""
    usable = {token for token, index in vocab.items() if types[index] in (NORMAL, USER_DEFINED, UNUSED)}
    found: list[tuple[float, int, int, str, str]] = []
    for token in usable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                found.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _tokenizer_config(header: GgufHeader) -> dict[str, Any]:
    metadata = header.metadata
    tokens, ids = metadata["tokenizer.ggml.tokens"], token_ids(metadata)
    add_bos, add_eos = _adds(metadata)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is instead of rebuilding it
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
    }
    config |= {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
    context = metadata.get(f"{metadata['general.architecture']}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    templates = _chat_templates(metadata)
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return config


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    pattern = re.compile(r"tokenizer\.chat_template(?:\.(.+))?")
    found = ((pattern.fullmatch(key), value) for key, value in metadata.items())
    return {match.group(1) or "default": value for match, value in found if match and isinstance(value, str)}


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ids = token_ids(metadata)
    stops = [i for i in (ids["eos"], metadata.get("tokenizer.ggml.eot_token_id")) if isinstance(i, int)]
    stops = list(dict.fromkeys(stops))
    values = {
        "bos_token_id": ids["bos"],
        "eos_token_id": stops if len(stops) > 1 else ids["eos"],
        "pad_token_id": ids["pad"],
    }
    return {key: value for key, value in values.items() if value is not None}
