"""Write a ``tokenizer.json`` as GGUF metadata: the inverse of `llamamoe.checkpoint.gguf.tokenizer`.

llama.cpp has its own pre-tokenizers, which the file refers to by name. The name for a tokenizer's rules is found
by comparing them one by one; a tokenizer that none matches is refused, since it would give other tokens without
any error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, LlamaMoeError
from ...lazy import gguf, tokenizers
from ..json_files import read_json
from . import tokenizer as kinds
from .cuts import CUTS, Cut, cut_of
from .header import require_gguf

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"


@dataclass(frozen=True)
class GgufVocabulary:
    """The metadata ``tokenizer.ggml.*``.

    Attributes:
        model: ``"gpt2"`` (byte-level BPE), ``"llama"`` (SentencePiece BPE) or ``"none"``.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: One for each row of the embedding; rows without a token are filled.
        types: llama.cpp's type of each token.
        scores: SentencePiece only: tokens with higher scores are merged earlier.
        merges: Byte-level only: the merges by rank.
        special: Ids by llama.cpp's names (``bos``, ``eos``, ``pad``, ``unk``, ``eot``).
        adds: Whether bos and eos are added around a text.
        space_prefix: SentencePiece only: whether a text begins with a space.
        chat_template: The chat template of the folder.
        notes: Cases in which llama.cpp splits text differently.
    """

    model: str
    pre: str = ""
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    adds: tuple[bool, bool] = (False, False)
    space_prefix: bool = True
    chat_template: str | Sequence[Mapping[str, str]] | None = None
    notes: tuple[str, ...] = ()

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the vocabulary to the file's metadata."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        else:
            writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.adds[0])
        writer.add_add_eos_token(self.adds[1])
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, vocab_size: int, *, pre: str | None = None) -> GgufVocabulary:
    """Read the tokenizer of a checkpoint's folder in llama.cpp's form.

    Args:
        folder: The checkpoint; its files have been checked to be inside it.
        vocab_size: Rows of the embedding.
        pre: llama.cpp's name of the pre-tokenizer, for a byte-level tokenizer that is not recognised.

    Raises:
        CheckpointError: There is a tokenizer, but llama.cpp would split text differently, or its pre-tokenizer is
            unknown.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
            raise CheckpointError(
                f"{folder} has a tokenizer, but no tokenizer.json, which is required.",
                hint=f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...) writes one.",
            )
        return GgufVocabulary("none")
    try:
        return _read(path, vocab_size, pre)
    except LlamaMoeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:  # foreign files
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {str(error)[:200]}).",
            hint="Copy tokenizer.json, tokenizer_config.json and generation_config.json from the original model.",
        ) from error


def _read(path: Path, vocab_size: int, pre: str | None) -> GgufVocabulary:
    content = read_json(path, vocabulary=True)
    model, added = content["model"], list(content.get("added_tokens") or [])
    ids = {**model["vocab"], **{each["content"]: each["id"] for each in added}}
    _check_model(path, model)
    wrong = next((i for i in ids.values() if not isinstance(i, int) or not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise CheckpointError(f"{path} has the token {wrong!r}, but the embedding has {vocab_size} rows.")
    byte_level = cut_of(content)
    kind = "llama" if byte_level is None and model.get("byte_fallback") else "gpt2"
    if kind == "gpt2" and pre is None:
        pre = _name_of(path, byte_level)
    merges = [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    tokens, types = _tokens(ids, added, model, vocab_size, kind)
    special, template = _special(path.parent, vocab_size)
    if kind == "gpt2" and "eos" not in special:
        raise CheckpointError(
            f"{path.parent} names no end-of-sequence token, and llama.cpp would use token 11.",
            hint="Name one as eos_token in tokenizer_config.json.",
        )
    stripping = _stripping(added)
    prefix, notes = _space_prefix(path, content) if kind == "llama" else (True, _composed(byte_level))
    return GgufVocabulary(
        model=kind,
        pre=pre or "default",
        tokens=tokens,
        types=types,
        scores=_scores(path, tokens, types, merges, model["vocab"]) if kind == "llama" else [],
        merges=[" ".join(each) for each in merges] if kind == "gpt2" else [],
        special=special,
        adds=_adds(path, special),
        space_prefix=prefix,
        chat_template=template,
        notes=(*notes, *stripping),
    )


def _check_model(path: Path, model: Mapping[str, Any]) -> None:
    """Refuse features that llama.cpp does not support."""
    if model.get("type", "BPE") != "BPE":
        raise _refused(path, f"its model is {model.get('type')!r}, not BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refused(path, f"its model has {name} = {model[name]!r}")
    if model.get("byte_fallback") and model.get("ignore_merges"):
        raise _refused(path, "it both falls back to bytes and ignores merges")


def _composed(cut: Cut | None) -> tuple[str, ...]:
    if cut is None or not cut.nfc:
        return ()
    return ("llama.cpp does not compose characters (NFC) as this tokenizer does: decomposed text is split differently",)


def _stripping(added: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    names = [each["content"] for each in added if any(each.get(flag) for flag in ("lstrip", "rstrip", "single_word"))]
    if not names:
        return ()
    return (
        f"{len(names)} special tokens absorb spaces or line ends beside them, or match whole words only ({names[0]}): "
        "llama.cpp does not support this, so text beside them may be split differently",
    )


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {reason}, so llama.cpp might split text differently.",
        hint="If you know llama.cpp's name of its pre-tokenizer, give it with --pre; convert_hf_to_gguf.py of llama.cpp "
        "supports more of them.",
    )


# ---- how text is cut ---------------------------------------------------------------------------------------------


def _name_of(path: Path, cut: Cut | None) -> str:
    """Return llama.cpp's name for a pre-tokenizer."""
    for name, known in CUTS.items():
        if cut is not None and replace(known, add_bos=False) == cut:
            return name
    raise _refused(path, f"its pre-tokenizer has no known name ({', '.join(CUTS)} are known)")


def _space_prefix(path: Path, content: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a SentencePiece tokenizer adds a space before text, and cases where llama.cpp differs."""
    normalizer, pre = content.get("normalizer") or {}, content.get("pre_tokenizer")
    steps = [s for s in normalizer.get("normalizers", [normalizer]) if s]
    plain = pre is not None and pre.get("type") == "Metaspace" and pre.get("replacement", _SPACE) == _SPACE
    if pre is not None and plain and not steps and not pre.get("split", True):
        if pre.get("prepend_scheme", "always") == "never":
            return False, ()
        return True, (
            "llama.cpp adds a space before every text and after every special token, this tokenizer only before a text "
            "that begins with none: such texts are split differently",
        )
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None and steps and steps[-1] == spaces and steps[:-1] in ([], [{"type": "Prepend", "prepend": _SPACE}]):
        return len(steps) == 2, ()
    raise _refused(path, "its treatment of spaces is not supported")


# ---- tokens --------------------------------------------------------------------------------------------------------


def _tokens(
    ids: Mapping[str, int], added: Sequence[Mapping[str, Any]], model: Mapping[str, Any], vocab_size: int, kind: str
) -> tuple[list[str], list[int]]:
    """Return the text and llama.cpp's type of each row of the embedding."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [kinds.UNUSED] * vocab_size
    for token, index in ids.items():
        tokens[index] = token
        types[index] = kinds.BYTE if kind == "llama" and _BYTE_TOKEN.fullmatch(token) else kinds.NORMAL
    for each in added:
        types[each["id"]] = kinds.CONTROL if each.get("special") else kinds.USER_DEFINED
    unknown = model.get("unk_token")
    if kind == "llama" and isinstance(unknown, str) and unknown in ids:
        types[ids[unknown]] = kinds.UNKNOWN
    return tokens, types


def _scores(
    path: Path, tokens: list[str], types: list[int], merges: Sequence[tuple[str, ...]], vocab: dict[str, int]
) -> list[float]:
    """Return scores that make llama.cpp join the same neighbours in the same order as the merges' ranks do.

    llama.cpp joins any two neighbours whose union is a token, best score first. This is equivalent to the ranks if they
    are grouped by their result, and if every such pair is among them.

    Raises:
        CheckpointError: A condition does not hold.
    """
    order = [token for token, _ in groupby("".join(each) for each in merges)]
    if len(set(order)) != len(order):
        raise _refused(path, "its merges are not ordered by the token that they make")
    present = {token for token, kind in zip(tokens, types, strict=True) if kind == kinds.BYTE}
    if len(present) < 256:
        raise _refused(path, f"it falls back to bytes, but has tokens for {len(present)} of 256 only")
    scores = [-float(len(order) + 1)] * len(tokens)  # tokens that no merge produces are joined last
    for rank, token in enumerate(order, start=1):
        scores[vocab[token]] = -float(rank)
    found = kinds.merges_of_scores(vocab, types, scores)
    if {tuple(each) for each in found} != set(merges):
        raise _refused(path, "two of its tokens could be joined without a merge for them")
    return scores


def _special(folder: Path, vocab_size: int) -> tuple[dict[str, int], Any]:
    """Return ids of special tokens, and the chat template, read as llama.cpp's own package reads them."""
    require_gguf()

    # It warns of templates that it does not understand; tokens around a text are found by trying, see `_adds`.
    gguf.vocab.logger.setLevel("ERROR")
    _check_links(folder / "additional_chat_templates", folder)
    found = gguf.vocab.SpecialVocab(folder, load_merges=False, n_vocab=vocab_size)
    ids = {name: int(index) for name, index in found.special_token_ids.items() if name in ("bos", "eos", "pad", "unk")}
    generation = folder / "generation_config.json"
    stops = read_json(generation).get("eos_token_id") if generation.is_file() else None
    stops = stops if isinstance(stops, list) else [stops]
    for index in stops:
        if isinstance(index, int) and 0 <= index < vocab_size and index not in ids.values():
            ids["eot" if "eos" in ids else "eos"] = index
            break
    if wrong := next((f"{n} = {i}" for n, i in ids.items() if not 0 <= i < vocab_size), None):
        raise CheckpointError(f"{folder} names the special token {wrong}, but the embedding has {vocab_size} rows.")
    return ids, found.chat_template


def _check_links(templates: Path, folder: Path) -> None:
    """Refuse templates that are links out of the checkpoint: their text would become part of the file."""
    root = folder.resolve()
    for path in [templates, *templates.glob("*")]:
        if not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path} is a symbolic link out of the folder: refused.", hint="Copy what it names.")


def _adds(path: Path, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Return whether the tokenizer adds bos before a text and eos after it, by encoding one."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare exceptions
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    plain, full = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    before, after = (full[:start], full[start + len(plain) :]) if start is not None else (full, [])
    adds = (bool(before), bool(after))
    if before != [special.get("bos")] * adds[0] or after != [special.get("eos")] * adds[1]:
        raise _refused(path, f"it adds the tokens {before + after} around a text, which are not bos and eos")
    return adds
