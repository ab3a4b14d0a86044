"""A parent's tokenizer, carried over so that the same text gives the same ids.

transformers picks the class of a tokenizer by the model's type and by what ``tokenizer_config.json`` says, and some
classes build the tokenizer anew instead of reading ``tokenizer.json``. A conversion changes the type. So the parent's
tokenizer is opened once as transformers opens it, and what came out is written as a ``tokenizer.json`` with the one class
that transformers 4.57 and 5 both take literally. Then both are compared (see `difference`).
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, VerificationError
from ..lazy import tokenizers, transformers
from .base import Checkpoint
from .files import copy_file, unsynced, write_text
from .infilling import infilling_warnings, open_tokenizer
from .json_files import read_json
from .paths import refuse_pointers
from .reader import SIDE_FILES, VOCABULARIES
from .tokenizer_ids import beyond_embedding

LITERAL_CLASS = "PreTrainedTokenizerFast"
"""Takes ``tokenizer.json`` as it is, in transformers 4.57 and 5, whatever the model's type."""
_NEW_CLASS = "TokenizersBackend"
"""What ``save_pretrained`` of transformers 5 calls `LITERAL_CLASS`, a name that 4.57 does not have."""
REWRITTEN = frozenset({
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"
}) - {"tokenizer.model"}  # fmt: skip
"""Files whose content stands in the two that are written; copied, they would change what transformers makes of those."""
PROBES = (
    "",
    " ",
    "a",
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces   lead and   trail  ",
    "1234567890 3.14159 1,000 007 x86_64",
    "line\nline\r\n\n\n\tend\n",
    "I'M, don't, we'll, THEY'RE",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # O(n)",
    "Ünï­cödé naïve cafe\u0301 ﬁ ½ \u00a0\u200b",
    "Привет, мир! 専門家が答える。 안녕하세요 مرحبا नमस्ते ไทย",
    "😀👩‍👩‍👧 🇩🇪 \U0001f600 \x00\x07 \ufffd",
    "[INST] <s> </s> <unk> <pad> <|endoftext|> <|im_start|>user\nhi<|im_end|>",
)
"""What is tokenised to compare two tokenizers; each one's special tokens are added."""
_MOST_SPECIAL = 64
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
"""How a file of tiktoken begins; else ``tokenizer.model`` is one of SentencePiece."""
_NAMES = (
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
)


# ---- opening ------------------------------------------------------------------------------------------------------


@contextmanager
def one_error(what: str, folder: Path | None = None, by: str = "transformers") -> Iterator[None]:
    """Report whatever a library raises over files of others, panics of Rust included, as one error.

    Args:
        what: The file or model that it cannot load.
        folder: Where a tokenizer lies, to find out whether only a package is missing.
        by: The library.

    Raises:
        CheckpointError: Names all three.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics are no Exception at all
        lacking = _lacking(folder) if folder else []
        if lacking:  # transformers tries one reader after another, and tells what the last of them lacks
            raise CheckpointError(
                f"{what} cannot be loaded by {by}: tokenizer.model needs {' and '.join(lacking)}, not installed here.",
                hint=f"pip install {' '.join(lacking)}, or save it once with a tokenizer.json beside the others.",
            ) from None
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{what} cannot be loaded by {by}: {type(error).__name__}: {text[:300]}",
            hint="Mend the file, or copy it again from where the model comes from.",
        ) from None


def _lacking(folder: Path) -> list[str]:
    """The packages without which transformers cannot read a vocabulary that stands in ``tokenizer.model`` alone."""
    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return []
    with path.open("rb") as file:
        wanted = ("tiktoken",) if _TIKTOKEN.match(file.read(1024)) else ("sentencepiece", "protobuf")
    return [name for name in wanted if not _installed(name)]


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def load(folder: Path, what: str | None = None) -> Any:
    """The tokenizer of a folder with a ``config.json``, as transformers opens it; no code of the folder is run.

    Args:
        folder: Where its files lie.
        what: Its name in an error.

    Raises:
        CheckpointError: transformers cannot load it, or Git LFS left pointers in the place of its files.
    """
    from .quiet import quiet_transformers

    refuse_pointers(folder / name for name in ("config.json", *SIDE_FILES))
    with one_error(what or f"the tokenizer of '{folder}'", folder), quiet_transformers():
        tokenizer = open_tokenizer(folder)
        tokenizer("a")
        return of_any_length(tokenizer)


def of_any_length(tokenizer: Any) -> Any:
    """Keep transformers from remarking that a text is longer than the model's positions: texts are cut later."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


@contextmanager
def _staged(checkpoint: Checkpoint) -> Iterator[Path]:
    """A copy of the checkpoint's small files: only those that were checked can be read, and none is a link or a pipe."""
    with tempfile.TemporaryDirectory(prefix="llamamoe-") as name:
        folder = Path(name)
        with unsynced():
            checkpoint.save_tokenizer(folder)
            write_text(folder / "config.json", json.dumps(dict(checkpoint.config)))
        yield folder


def parent_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer of a folder or a GGUF file as transformers opens it; None if there is none.

    Raises:
        CheckpointError: There is one, but transformers cannot load it.
    """
    with _staged(checkpoint) as folder:
        if not holds_vocabulary(folder):
            return None
        return load(folder, f"the tokenizer of '{checkpoint.path}'")


def holds_vocabulary(folder: Path) -> bool:
    """Whether transformers finds a vocabulary there."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def check_parent(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any | None:
    """Load what is carried over beside the weights, and carry it once on trial, before anything is written.

    Args:
        checkpoint: The parent.
        config: The configuration of what is to be written.

    Returns:
        The tokenizer, or None.

    Raises:
        CheckpointError: transformers cannot load the tokenizer or the generation configuration, or makes other ids of
            the tokenizer beside the new configuration.
    """
    from .quiet import quiet_transformers

    with _staged(checkpoint) as folder:
        if (folder / "generation_config.json").is_file():
            with one_error(f"generation_config.json of '{checkpoint.path}'", folder), quiet_transformers():
                transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        found = load(folder, f"the tokenizer of '{checkpoint.path}'") if holds_vocabulary(folder) else None
    if found is not None:
        with tempfile.TemporaryDirectory(prefix="llamamoe-") as name, unsynced():
            folder = Path(name)
            write_text(folder / "config.json", json.dumps(dict(config)))
            carry(checkpoint, found, folder)
    return found


# ---- writing ------------------------------------------------------------------------------------------------------


def carry(checkpoint: Checkpoint, tokenizer: Any | None, out: Path) -> list[str]:
    """Write tokenizer, generation configuration and licence into a folder that has its ``config.json``.

    Args:
        checkpoint: The parent.
        tokenizer: Its tokenizer, from `check_parent`; None if it has none.
        out: The folder.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: transformers makes other ids of what was written, or the tokenizer has no fast form.
    """
    names = []
    with _staged(checkpoint) as folder:
        for path in sorted(folder.iterdir()):
            kept = path.is_file() and path.name != "config.json" and path.name not in REWRITTEN
            if kept and not (path.name == "chat_template.jinja" and isinstance(_template(tokenizer), dict)):
                copy_file(path, out / path.name)
                names.append(path.name)
        if tokenizer is None:
            return names
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(
                f"the tokenizer of '{checkpoint.path}' ({type(tokenizer).__name__}) has no fast form, so it cannot be "
                "carried over exactly.",
                hint="Save it once as a fast tokenizer, so that there is a tokenizer.json.",
            )
        write_text(out / "tokenizer.json", _tokenizer_json(tokenizer, folder / "tokenizer.json"))
    config = _tokenizer_config(tokenizer, template_file="chat_template.jinja" in names)
    write_text(out / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    found = difference(tokenizer, load(out))
    if found:
        model_type = read_json(out / "config.json").get("model_type")
        raise CheckpointError(
            f"the tokenizer of '{checkpoint.path}' cannot be carried over exactly: beside a model of type {model_type}, "
            f"{found}.",
            hint=f"{type(tokenizer).__name__} does in Python what no tokenizer.json can hold. Convert a copy of the folder "
            "without the tokenizer's files: then the output has none.",
        )
    return sorted([*names, "tokenizer.json", "tokenizer_config.json"])


def _tokenizer_json(tokenizer: Any, given: Path) -> str:
    """What the tokenizer does, as JSON: the parent's own text where that says the same."""
    now = json.loads(tokenizer.backend_tokenizer.to_str())
    if given.is_file():
        text = given.read_text(encoding="utf-8")
        if json.loads(tokenizers.Tokenizer.from_str(text).to_str()) == now:
            return text
    return json.dumps(now, ensure_ascii=False, indent=2) + "\n"


def _template(tokenizer: Any | None) -> str | dict[str, str] | None:
    return getattr(tokenizer, "chat_template", None)


def _tokenizer_config(tokenizer: Any, *, template_file: bool) -> dict[str, Any]:
    """What does not stand in ``tokenizer.json``, in words that transformers 4.57 and 5 both know."""
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
        # for other readers; the post-processor in tokenizer.json is what does it
        "add_bos_token": bos is not None and full[:1] == [bos] and plain[:1] != [bos],
        "add_eos_token": eos is not None and full[-1:] == [eos] and plain[-1:] != [eos],
    }
    pre = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    if isinstance(pre.get("add_prefix_space"), bool):  # 4.57 sets the pre-tokenizer to what this says
        config["add_prefix_space"] = pre["add_prefix_space"]
    config |= {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or []]
    if extra:
        config["additional_special_tokens"] = extra
    template = _template(tokenizer)
    if isinstance(template, dict):
        config["chat_template"] = [{"name": name, "template": text} for name, text in sorted(template.items())]
    elif template is not None and not template_file:
        config["chat_template"] = template
    return config


def older_config(folder: Path) -> dict[str, Any] | None:
    """Return a ``tokenizer_config.json`` that 4.57 reads, for a folder in which transformers 5 saved one that it refuses.

    Transformers 5 saves `LITERAL_CLASS` under a new name, and more special tokens as a list; 4.57 raises for both.

    Args:
        folder: It has a ``config.json``.

    Returns:
        The whole content; None if 4.57 reads what is there. Chat templates stay where they are.

    Raises:
        CheckpointError: The tokenizer cannot be loaded, or transformers 5 would make other ids of what is returned.
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
            hint="Take the tokenizer's files out of the folder, or copy those of the parent into it.",
        )
    return config


# ---- comparing ----------------------------------------------------------------------------------------------------


def _probes(tokenizer: Any) -> list[str]:
    added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().__getitem__)[:_MOST_SPECIAL]
    return [*PROBES, "".join(added), "".join(f" a {token} b" for token in added)]


def _behaviour(tokenizer: Any, probes: list[str]) -> dict[str, Any]:
    """Ids and text of the probes, and ids of special tokens, as plain data."""
    found: dict[str, Any] = {name.removesuffix("_id"): getattr(tokenizer, name, None) for name in _NAMES}
    for text in probes:
        full = list(tokenizer(text).input_ids)
        plain = list(tokenizer(text, add_special_tokens=False).input_ids)
        decoded = [tokenizer.decode(full, skip_special_tokens=skip) for skip in (False, True)]
        found[f"the text {text[:60]!r}"] = [full, plain, decoded]
    return found


def _model(tokenizer: Any) -> list[Any]:
    """Vocabulary and, of a fast tokenizer, merges or scores: what decides ids of text that is not among the probes."""
    if not getattr(tokenizer, "is_fast", False):
        return [sorted(tokenizer.get_vocab().items())]
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [each.split(" ") if isinstance(each, str) else list(each) for each in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else None
    return [sorted(tokenizer.get_vocab().items()), merges, scores]


def difference(parent: Any, other: Any, *, templates: bool = True) -> str | None:
    """What two tokenizers do differently, in words; None if they make the same ids.

    Compared are vocabulary and merges, special tokens, chat templates, and the ids of probe text, with special tokens
    and without, and what becomes of them when decoded.

    Args:
        parent: A tokenizer of transformers.
        other: Another.
        templates: Whether chat templates count, which change no ids of text.
    """
    if _model(parent) != _model(other):
        return "the vocabulary or its merges differ"
    if templates and _template(parent) != _template(other):
        return "the chat template differs"
    probes = _probes(parent)
    ours, theirs = _behaviour(parent, probes), _behaviour(other, probes)
    for what, value in ours.items():
        if theirs[what] != value:
            return f"{what} becomes {str(theirs[what])[:200]} where the parent has {str(value)[:200]}"
    return None


def check_same(parent: Any, other: Any, name: str) -> None:
    """Refuse a tokenizer that does not do what its parent's does.

    Raises:
        VerificationError: See `difference`.
    """
    found = difference(parent, other)
    if found:
        raise VerificationError(
            f"the tokenizer of {name} is not its parent's: {found}.",
            hint="Files that changed since the conversion do this; otherwise please report it.",
        )


def ids_sha256(tokenizer: Any) -> str:
    """A hash that two tokenizers share if they make the same ids: of vocabulary, merges, and the ids of probe text."""
    facts = [_model(tokenizer), _behaviour(tokenizer, _probes(tokenizer))]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


# ---- the plan -----------------------------------------------------------------------------------------------------


def _check_unique(name: str, data: Mapping[str, Any]) -> None:
    """Refuse a vocabulary in which two tokens share an id: which of them is decoded changes from run to run."""
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping):
        return
    first: dict[Any, str] = {}
    for token, index in vocab.items():
        if first.setdefault(index, token) != token:
            raise CheckpointError(
                f"{name}: the tokens {first[index]!r} and {token!r} share the id {index}.",
                hint="Mend the file, or copy it again from where the model comes from.",
            )


def plan_warnings(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> list[str]:
    """What is to be said of the tokenizer of a folder before anything is written; neither torch nor transformers is used.

    Args:
        folder: The parent's.
        vocab_size: Rows of its embedding.
        config: Its configuration.

    Raises:
        CheckpointError: ``tokenizer.json`` or ``generation_config.json`` is broken.
    """
    _check_generation(folder)
    if not holds_vocabulary(folder):
        other = " (tekken.json alone is not enough)" if (folder / "tekken.json").exists() else ""
        return [f"the source has no tokenizer that transformers can load{other}: the output has none"]
    path, vocabulary = folder / "tokenizer.json", None
    if path.is_file():
        with one_error(f"{path.name} of '{folder}'", folder, "tokenizers"):
            tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        vocabulary = read_json(path, vocabulary=True)
        _check_unique(path.name, vocabulary)
    return [*beyond_embedding(folder, vocab_size, config, vocabulary), *infilling_warnings(folder, config)]


def _check_generation(folder: Path) -> None:
    """Ids in ``generation_config.json`` are integers; only the end of sequence may be several."""
    path = folder / "generation_config.json"
    data = read_json(path) if path.is_file() else {}
    for key in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        value = data.get(key)
        several = (
            value
            if isinstance(value, list) and value and key in ("eos_token_id", "decoder_start_token_id")
            else [value]
        )
        if value is not None and not all(isinstance(each, int) and not isinstance(each, bool) for each in several):
            raise CheckpointError(
                f"generation_config.json: {key} is {value!r}, but must be an integer.",
                hint="Mend it, or remove the file.",
            )
