"""Read a repository on the Hub: all of it into the Hub's cache, or the headers of its weights only."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path

from ..errors import CheckpointError, LlamaMoeError, printable
from ..lazy import huggingface_hub
from .files import copy_file, make_folder, open_update, unsynced
from .reader import (
    ADAPTER,
    CHAT_TEMPLATES,
    INDEX,
    LICENSE_FILES,
    PICKLES,
    PROCESSOR_FILES,
    SIDE_FILES,
    SINGLE,
    pickle_refusal,
    read_weight_map,
)
from .scratch import scratch_folder

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[\w.-]+(@[\w./-]+)?")
LOGIN = "log in with: hf auth login (or set HF_TOKEN)"
_SMALL = [
    "config.json",
    ADAPTER,
    INDEX,
    *SIDE_FILES,
    *PROCESSOR_FILES,
    f"{CHAT_TEMPLATES}/*.jinja",
    *LICENSE_FILES,
    "README.md",
    "llamamoe_*.json",
]


def download(text: str, near: Callable[[], str]) -> Path:
    """Download a commit into the Hub's cache (small files first, then the weights in the index); return its folder.

    Args:
        text: ``org/name`` or ``org/name@revision``.
        near: Returns a sentence with what else may have been meant, if nothing can be downloaded.

    Raises:
        CheckpointError: The Hub does not have it, or its content is refused.
        LlamaMoeError: The Hub cannot be reached, or the download failed.
    """
    name, _, revision = text.partition("@")
    with _explained(text, near):
        path, shards, offline = _small_files(name, revision or None)
        return _weights(name, path, shards, offline)


def headers_only(text: str, near: Callable[[], str], stack: ExitStack) -> Path:
    """Return a folder with the commit's small files and the headers of its weights, named like the commit.

    It is the cache's if that has the weights or the Hub cannot be reached, else a new one that ``stack`` deletes. The
    files in that have their size and no data.

    Raises:
        CheckpointError, LlamaMoeError: See `download`.
    """
    name, _, revision = text.partition("@")
    with _explained(text, near), unsynced():
        path, shards, offline = _small_files(name, revision or None)
        if offline or all((path / file).exists() for file in shards):
            return _weights(name, path, shards, offline)
        folder = stack.enter_context(scratch_folder()) / path.name
        for pattern in _SMALL:
            for file in path.glob(pattern):
                target = folder / file.relative_to(path)
                make_folder(target.parent)
                copy_file(file, target)
        for shard in shards:
            _write_header(name, path.name, folder / shard)
        return folder


def _write_header(name: str, commit: str, file: Path) -> None:
    found = huggingface_hub.HfApi().parse_safetensors_file_metadata(name, file.name, revision=commit)
    header = {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for tensor, info in found.tensors.items()
    }
    text = json.dumps(header).encode()
    with open_update(file) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + max((info.data_offsets[1] for info in found.tensors.values()), default=0))


@contextmanager
def _explained(text: str, near: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of the Hub's library into ours."""
    name = text.partition("@")[0]
    try:
        yield
    except LlamaMoeError:
        raise
    except huggingface_hub.errors.HFValidationError as error:
        raise CheckpointError(f"{text!r} is not a Hub id: {error}") from None
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise _unreachable(text, name, near()) from None
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise _denied(text, name, error) from None
    except Exception as error:  # versions of the hub's library differ in the transport errors that they let through
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise LlamaMoeError(
            f"downloading {text!r} failed: {type(error).__name__}: {error}",
            hint="Free some space, or set HF_HOME to a folder on another disk."
            if full
            else "Try again: files that are complete are not downloaded twice.",
        ) from error


def _unreachable(text: str, name: str, near: str) -> LlamaMoeError:
    """Return the error for a checkpoint that is neither here nor in the cache, while nothing can be downloaded."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE=1 forbids downloads" if offline else "the Hub cannot be reached"
    way = "Unset HF_HUB_OFFLINE" if offline else "Check the network connection"
    return LlamaMoeError(
        f"{text!r} is neither a local folder nor in the local Hub cache, and {why}.",
        hint=f"{near}{way}, or download it on another machine (hf download {name} --local-dir FOLDER) and give its folder.",
    )


def _denied(text: str, name: str, error: huggingface_hub.errors.HfHubHTTPError) -> CheckpointError:
    """Return the error for an answer of the Hub that is a refusal, with what the user can do about it."""
    kinds = huggingface_hub.errors
    if isinstance(error, kinds.GatedRepoError):
        page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
        return CheckpointError(
            f"{text!r} is gated: only accounts that accepted its terms may download it.",
            hint=f"Accept the terms on {page}, then {LOGIN}.",
        )
    if isinstance(error, kinds.RevisionNotFoundError):
        return CheckpointError(
            f"{text!r}: the repository on the Hub has no such revision.",
            hint="Give a branch, tag or commit, or leave @revision out for the main branch.",
        )
    if isinstance(error, kinds.RepositoryNotFoundError):
        return CheckpointError(
            f"{text!r} is neither a local folder nor a repository on the Hub that you can access.",
            hint=f"Check the spelling; for a private repository, {LOGIN}.",
        )
    return CheckpointError(
        f"the Hub refuses {text!r}: {error}",
        hint=f"Check the name and the revision; for a private repository, {LOGIN}.",
    )


def _small_files(name: str, revision: str | None) -> tuple[Path, list[str], bool]:
    """Download what is small; return its folder, the names of the files of weights, and whether only the cache is left."""
    listed = _listing(name, revision)
    offline = listed is None
    if listed is not None:
        _check_listing(name, listed[1])
    # Requested by revision, not by commit, so that the cache stores the name and can resolve it offline.
    path = Path(
        huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_SMALL, local_files_only=offline)
    )
    commit = path.name
    if listed is not None and commit != listed[0]:
        raise LlamaMoeError(f"{name} changed on the Hub while it was read.", hint="Run the command again.")
    shards = [SINGLE]
    single = (path / SINGLE).exists() if listed is None else SINGLE in listed[1]
    if not single and (path / INDEX).exists():  # the single file before the index, as transformers does
        shards = sorted({file for file in read_weight_map(path / INDEX).values() if Path(file).name == file})
    if listed is not None and not listed[1].issuperset(shards):
        missing = min(set(shards) - listed[1])
        raise CheckpointError(f"{name}: {printable(missing)}, which {INDEX} names, is not on the Hub.")
    return path, shards, offline


def _weights(name: str, path: Path, shards: list[str], offline: bool) -> Path:
    patterns = [escape(file) for file in shards]
    huggingface_hub.snapshot_download(name, revision=path.name, allow_patterns=patterns, local_files_only=offline)
    return path


def _listing(name: str, revision: str | None) -> tuple[str, frozenset[str]] | None:
    """Return the commit and its files; None if the hub cannot be reached, so that only the cache is left."""
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision)
    except huggingface_hub.errors.HFValidationError:
        raise
    except huggingface_hub.errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 500)
        if status < 500 and status != 429:
            raise
        return None
    except Exception:  # no network, offline mode: versions of the hub's library differ in their errors
        return None
    return str(info.sha), frozenset(file.rfilename for file in info.siblings or ())


def _check_listing(name: str, files: frozenset[str]) -> None:
    """Refuse a commit by the names of its files, before anything is downloaded."""
    held = ", ".join(printable(file) for file in sorted(files)[:6]) or "nothing"
    hint = f"It holds: {held}."
    if any(file.endswith(".gguf") for file in files):
        hint = "To convert a GGUF file, download it and give its path."
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise pickle_refusal(name, pickles[0])
    if ADAPTER in files:
        raise CheckpointError(
            f"{name} contains a PEFT adapter ({ADAPTER}): transformers would apply it, but only a model can be read.",
            hint="Merge it first: AutoPeftModelForCausalLM.from_pretrained(ID).merge_and_unload().save_pretrained(NEW)",
        )
    if "config.json" not in files:
        raise CheckpointError(f"{name} holds no config.json, so it is not a transformers checkpoint.", hint=hint)
    if not files & {SINGLE, INDEX}:
        raise CheckpointError(f"{name} holds neither {SINGLE} nor {INDEX}.", hint=hint)
