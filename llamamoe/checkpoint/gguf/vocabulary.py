"""A ``tokenizer.json`` as the metadata of a GGUF file: the way back from `llamamoe.checkpoint.gguf.tokenizer`.

llama.cpp cuts text by rules of its own, which the file calls by a name. Which name stands for a tokenizer's own rules is
decided by comparing them one by one; a tokenizer that none matches is refused, since it would give other tokens without
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
    """What ``tokenizer.ggml.*`` says.

    Attributes:
        model: ``"gpt2"`` (byte-level BPE), ``"llama"`` (SentencePiece BPE) or ``"none"``.
        pre: llama.cpp's name of the way text is cut.
        tokens: One for each row of the embedding; rows that no token has are filled up.
        types: llama.cpp's kind of each token.
        scores: SentencePiece only: the higher, the earlier a token is made of its halves.
        merges: Byte-level only, by rank.
        special: Ids by llama.cpp's names (``bos``, ``eos``, ``pad``, ``unk``, ``eot``).
        adds: Whether bos and eos are put around a text.
        space_prefix: SentencePiece only: whether a text begins with a space.
        chat_template: As the folder has it.
        notes: Where llama.cpp cuts text in another way.
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
        """Put it among the file's metadata."""
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
    """The tokenizer of a checkpoint's folder, as llama.cpp wants it.

    Args:
        folder: The checkpoint; its files have been checked to lie in it.
        vocab_size: Rows of the embedding.
        pre: llama.cpp's name of the way text is cut, for a byte-level tokenizer that is not recognised.

    Raises:
        CheckpointError: There is a tokenizer, but llama.cpp would cut text in another way, or nothing says how.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
            raise CheckpointError(
                f"{folder} has a tokenizer, but no tokenizer.json, which is what is read here.",
                hint=f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...) writes one.",
            )
        return GgufVocabulary("none")
    try:
        return _read(path, vocab_size, pre)
    except LlamaMoeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:  # files of others
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read here ({type(error).__name__}: {str(error)[:200]}).",
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
            f"{path.parent} names no end-of-sequence token, and llama.cpp would take token 11 for it.",
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
    """Refuse what llama.cpp has no notion of."""
    if model.get("type", "BPE") != "BPE":
        raise _refused(path, f"its model is {model.get('type')!r}, not BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refused(path, f"its model has {name} = {model[name]!r}")
    if model.get("byte_fallback") and model.get("ignore_merges"):
        raise _refused(path, "it falls back to bytes and ignores merges at once")


def _composed(cut: Cut | None) -> tuple[str, ...]:
    if cut is None or not cut.nfc:
        return ()
    return (
        "llama.cpp does not compose characters (NFC) as this tokenizer does: decomposed text is cut in another way",
    )


def _stripping(added: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    names = [each["content"] for each in added if any(each.get(flag) for flag in ("lstrip", "rstrip", "single_word"))]
    if not names:
        return ()
    return (
        f"{len(names)} special tokens take spaces or line ends beside them along, or stand as whole words only ({names[0]}): "
        "llama.cpp does not know of it, so text beside them may be cut in another way",
    )


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {reason}, so llama.cpp might cut text in another way.",
        hint="If you know llama.cpp's name of its pre-tokenizer, give it with --pre; convert_hf_to_gguf.py of llama.cpp "
        "knows more of them.",
    )


# ---- how text is cut ---------------------------------------------------------------------------------------------


def _name_of(path: Path, cut: Cut | None) -> str:
    """llama.cpp's name for a cut."""
    for name, known in CUTS.items():
        if cut is not None and replace(known, add_bos=False) == cut:
            return name
    raise _refused(path, f"how it cuts text has no name that is known here ({', '.join(CUTS)} are)")


def _space_prefix(path: Path, content: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a SentencePiece tokenizer puts a space before the text, and where llama.cpp does it otherwise."""
    normalizer, pre = content.get("normalizer") or {}, content.get("pre_tokenizer")
    steps = [s for s in normalizer.get("normalizers", [normalizer]) if s]
    plain = pre is not None and pre.get("type") == "Metaspace" and pre.get("replacement", _SPACE) == _SPACE
    if pre is not None and plain and not steps and not pre.get("split", True):
        if pre.get("prepend_scheme", "always") == "never":
            return False, ()
        return True, (
            "llama.cpp puts a space before every text and after every special token, this tokenizer only before a text "
            "that begins with none: such texts are cut in another way",
        )
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None and steps and steps[-1] == spaces and steps[:-1] in ([], [{"type": "Prepend", "prepend": _SPACE}]):
        return len(steps) == 2, ()
    raise _refused(path, "how it writes spaces is not known here")


# ---- tokens --------------------------------------------------------------------------------------------------------


def _tokens(
    ids: Mapping[str, int], added: Sequence[Mapping[str, Any]], model: Mapping[str, Any], vocab_size: int, kind: str
) -> tuple[list[str], list[int]]:
    """The text and llama.cpp's type of each row of the embedding."""
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
    """Scores that make llama.cpp join the same neighbours in the same order as the ranks of merges do.

    llama.cpp joins any two neighbours whose union is a token, best score first. That is what the ranks say if they are
    grouped by what comes out, and if every such pair is among them.

    Raises:
        CheckpointError: They are not, or it is not.
    """
    order = [token for token, _ in groupby("".join(each) for each in merges)]
    if len(set(order)) != len(order):
        raise _refused(path, "its merges are not ordered by the token that they make")
    present = {token for token, kind in zip(tokens, types, strict=True) if kind == kinds.BYTE}
    if len(present) < 256:
        raise _refused(path, f"it falls back to bytes, but has tokens for {len(present)} of 256 only")
    scores = [-float(len(order) + 1)] * len(tokens)  # what no merge makes is joined last
    for rank, token in enumerate(order, start=1):
        scores[vocab[token]] = -float(rank)
    found = kinds.merges_of_scores(vocab, types, scores)
    if {tuple(each) for each in found} != set(merges):
        raise _refused(path, "two of its tokens may join though no merge says so")
    return scores


def _special(folder: Path, vocab_size: int) -> tuple[dict[str, int], Any]:
    """Ids of special tokens, and the chat template. The files are read as llama.cpp's own package reads them."""
    require_gguf()

    # It warns of templates that it does not understand; what is put around a text is found by trying, see `_adds`.
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
    """Refuse templates that are links out of the checkpoint: their text would stand in the file."""
    root = folder.resolve()
    for path in [templates, *templates.glob("*")]:
        if not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path} is a symbolic link out of the folder: refused.", hint="Copy what it names.")


def _adds(path: Path, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text and eos after it: it is tried."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # its errors have no class of their own
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    plain, full = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    before, after = (full[:start], full[start + len(plain) :]) if start is not None else (full, [])
    adds = (bool(before), bool(after))
    if before != [special.get("bos")] * adds[0] or after != [special.get("eos")] * adds[1]:
        raise _refused(path, f"it puts the tokens {before + after} around a text, which are not bos and eos")
    return adds
