"""Open and load models for `evaluate`.

Shapes: B windows, T tokens of the longest, P scored tokens of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..architectures.dense_checkpoint import DenseModel
from ..checkpoint.base import Checkpoint
from ..checkpoint.json_files import read_json
from ..checkpoint.locate import check_folder, locate, open_checkpoint
from ..checkpoint.paths import inside, refuse_pointers
from ..checkpoint.reader import SIDE_FILES, check_side_file
from ..checkpoint.text_part import is_whole
from ..checkpoint.unmapped import unmapped
from ..errors import CheckpointError, UsageError
from ..lazy import accelerate, check_transformers, torch, transformers
from .experts.grouped_mm import ROW_BYTES, rows_fit
from .loadable import check_config_file

LOGITS_AT_ONCE = 1 << 24  # fp32 logits held at once: 64 MiB, whatever the vocabulary
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Opened:
    """A model's configuration and tokenizer; its weights are still on disk.

    Attributes:
        name: Its name as given by the caller.
        options: Arguments of every ``from_pretrained`` of this model; empty for a GGUF file.
        config: The transformers configuration of the text model.
        tokenizer: The transformers tokenizer.
        bos: The token that the tokenizer itself adds before a text, or None.
        dense: The dense model of a GGUF file; None for models that transformers reads itself.
        notes: Sentences for the user, which `load_weights` adds.
    """

    name: str
    options: dict[str, Any]
    config: Any
    tokenizer: Any
    bos: int | None
    dense: DenseModel | None = None
    notes: list[str] = field(default_factory=list)


def open_models(names: Sequence[str | Path], *, tokenizer: str | Path | None = None) -> list[Opened]:
    """Open models without their weights; see `open_model`.

    Args:
        names: Folders, GGUF files or Hub ids.
        tokenizer: A folder whose tokenizer replaces that of every GGUF file among them.

    Raises:
        UsageError: ``tokenizer`` is given and none of them is a GGUF file.
        CheckpointError: See `open_model`.
    """
    files = [is_gguf(name) for name in names]
    if tokenizer is not None and not any(files):
        raise UsageError("--tokenizer is for GGUF files: a folder has its own tokenizer, which is used.")
    found = [open_model(name, tokenizer=tokenizer if file else None) for name, file in zip(names, files, strict=True)]
    for folder in (Path(each.options["pretrained_model_name_or_path"]) for each in found if each.dense is None):
        _check_files(folder, sorted(path.name for path in folder.glob("*.safetensors")))
    return found


def is_gguf(name: str | Path) -> bool:
    """Return whether a path is a GGUF file on this machine."""
    path = Path(name).expanduser()
    return path.suffix == ".gguf" and path.is_file()


def open_model(name: str | Path, *, tokenizer: str | Path | None = None) -> Opened:
    """Open a model without its weights and without remote code. A path never causes network access.

    Args:
        name: A folder, a ``.gguf`` file, ``org/name`` or ``hf://org/name@revision``. A `Path` is never treated as a Hub
            id.
        tokenizer: For a GGUF file, a folder whose tokenizer is used instead of the one in the file.

    Raises:
        CheckpointError: The model does not exist, is not a model, or has no tokenizer that transformers can load.
    """
    if isinstance(name, Path) and not name.expanduser().exists():
        check_folder(name)
    location = locate(name)
    if location.path.is_file():
        from ..architectures.dense_checkpoint import understand

        return _open_gguf(str(name), understand(open_checkpoint(location, tokenizer=tokenizer)))
    return _open_folder(str(name), location.path)


def _open_folder(name: str, folder: Path) -> Opened:
    from ..checkpoint.infilling import open_tokenizer
    from ..checkpoint.tokenizer_loading import of_any_length

    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        hint = f"To use a GGUF file, name the file itself: {files[0]}" if files else "Name a model's folder."
        raise CheckpointError(f"'{name}' is not a model: it has no config.json.", hint=hint)
    _check_files(folder, ("config.json", *SIDE_FILES))
    try:
        check_config_file(folder)
        for path in (folder / file for file in SIDE_FILES if (folder / file).exists()):
            check_side_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"'{name}' is not a model: {error.message}", hint=error.hint) from None
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder),
        "local_files_only": True,
        "trust_remote_code": False,
    }
    check_transformers()
    with _refusing(f"'{name}' has no configuration that transformers can load without remote code"):
        config = transformers.AutoConfig.from_pretrained(**options).get_text_config()
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise CheckpointError(
            f"'{name}' has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}.",
            hint="Copy the tokenizer's files from the model that it was made from.",
        )
    with _refusing(f"The tokenizer of '{name}' cannot be loaded"):
        tokenizer = of_any_length(open_tokenizer(folder))
        bos = _leading_bos(tokenizer)
    return Opened(name, options, config, tokenizer, bos)


def _check_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse links out of the folder and Git LFS pointers among the existing ones of these files."""
    there = [folder / name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    refuse_pointers(inside(folder, path.name) for path in there)


def _open_gguf(name: str, dense: DenseModel) -> Opened:
    from .streaming import computing_keys

    config = transformers.AutoConfig.for_model(**computing_keys(dense.checkpoint.config))
    tokenizer = gguf_tokenizer(dense.checkpoint)
    return Opened(name, {}, config, tokenizer, _leading_bos(tokenizer), dense)


def gguf_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer of a GGUF file, or of the folder given instead.

    Raises:
        CheckpointError: There is no tokenizer, or transformers cannot load it.
    """
    from ..checkpoint.tokenizer_loading import needed_tokenizer

    return needed_tokenizer(
        checkpoint,
        f"'{checkpoint.path}' holds no vocabulary, so no text can be turned into its tokens.",
        "Name a folder that holds the model's tokenizer with --tokenizer.",
    )


def _leading_bos(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer itself adds before a text, or None."""
    first, bos = tokenizer("a")["input_ids"][:1], tokenizer.bos_token_id
    return bos if bos is not None and first == [bos] else None


def load_weights(opened: Opened, dtype: str, device: str) -> Any:
    """Load the model for scoring; experts run one by one where transformers' default product of experts would fail.

    Args:
        opened: The opened model.
        dtype: ``"auto"`` or a dtype's name.
        device: A torch device; ``"spread"``: its layers over all GPUs and, if they do not fit, the CPU.

    Raises:
        CheckpointError: Weights are missing, broken, of other shapes, or not safetensors.
    """
    if opened.dense is not None:
        with _refusing(f"The weights of '{opened.name}' cannot be loaded"):
            return _load_gguf(opened.name, opened.dense, dtype, device)

    folder = Path(opened.options["pretrained_model_name_or_path"])
    whole = is_whole(read_json(folder / "config.json"))
    loader: Any = transformers.AutoModelForMultimodalLM if whole else transformers.AutoModelForCausalLM
    with _refusing(f"The weights of '{opened.name}' cannot be loaded", folder), _no_progress_bars(), unmapped():
        model, info = loader.from_pretrained(
            **opened.options,
            dtype=dtype,
            device_map="auto" if device == "spread" else device,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would continue with random numbers in their place
        raise CheckpointError(
            f"'{opened.name}' lacks {len(missing)} tensors that its config.json requires, such as {missing[0]}.",
            hint="Download or convert it again.",
        )
    _mend_experts(model, opened)
    return model.eval()


def _mend_experts(model: Any, opened: Opened) -> None:
    """Set the experts implementation ``eager``, with a note, if rows are too short for transformers' default."""
    chosen = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if chosen != "grouped_mm" or rows_fit(model):
        return
    model.set_experts_implementation("eager")
    note = (
        f"{opened.name}: the rows of its experts' matrices are not a multiple of {ROW_BYTES} bytes in {str(model.dtype).removeprefix('torch.')}, "
        "so transformers' default product of experts fails; they run one by one here (elsewhere: from_pretrained(..., "
        'experts_implementation="eager")).'
    )
    if note not in opened.notes:
        opened.notes.append(note)


def _load_gguf(name: str, dense: DenseModel, dtype: str, device: str) -> Any:
    """Load the model of a GGUF file by transformers' own loading, layer by layer, so that it is held once.

    ``"auto"`` is the dtype that `llamamoe.split` would write.
    """
    from ..architectures.dense_checkpoint import stored_dtype
    from ..checkpoint.tensors import torch_dtype
    from .streaming import StreamedModel

    kind: torch.dtype = torch_dtype(stored_dtype(dense)) if dtype == "auto" else getattr(torch, dtype)
    streamed = StreamedModel.of_dense(dense, dtype=kind, device="cpu" if device == "spread" else device)
    model = streamed.whole()
    model.name_or_path = model.config.name_or_path = name
    if device == "spread":
        kept = {"no_split_module_classes": list(model._no_split_modules or ())}
        model = accelerate.dispatch_model(
            model, accelerate.infer_auto_device_map(model, accelerate.utils.get_balanced_memory(model, **kept), **kept)
        )
    return model


def free_memory() -> None:
    """Free the memory of a model whose last reference was just deleted, before the next one is loaded."""
    gc.collect()  # models contain reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _refusing(message: str, folder: Path | None = None) -> Iterator[None]:
    """Turn any exception of a loader into one kind of error, since foreign files can fail in any way.

    Args:
        message: The message of the error.
        folder: Folder of weights for which llamamoe's own reader may give a better message.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if folder is not None:
            from ..checkpoint.reader import SafetensorsCheckpoint

            try:
                SafetensorsCheckpoint(folder)
            except CheckpointError as found:
                raise CheckpointError(f"{message}: {found.message}", hint=found.hint) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{message}: {reason[0]}") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
