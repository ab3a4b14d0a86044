"""Gradients of the dense parent's loss at the output of every FFN, with one decoder layer in memory.

In the forward pass every layer's input is saved to a file; backward, from the last layer to the first, a layer is
loaded again, run again on its saved input, and the gradient is propagated through it. Files are written in order and
read through memory maps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..architectures.dense_checkpoint import DenseModel
from ..checkpoint.files import make_folder, remove_temporaries, replacing, write_text
from ..errors import LlamaMoeError
from ..lazy import torch
from ..methods.layer import BATCH_TOKENS
from ..models.streaming import LayerRunner, StreamedModel
from ..progress import Progress, ProgressCallback, ignore_progress

DONE_FILE = "gradients.json"


@dataclass(frozen=True)
class GradientStore:
    """Gradients at the FFN outputs, one file per layer.

    Attributes:
        folder: Folder of the files.
        num_layers: Layers of the model.
        num_tokens: ``T``, in the given order, sequence by sequence.
        hidden_size: ``H``.
        dtype: Dtype of the stored values.
        key: Identifies model, tokens and dtype.
    """

    folder: Path
    num_layers: int
    num_tokens: int
    hidden_size: int
    dtype: torch.dtype
    key: str

    def read(self, layer: int) -> torch.Tensor:
        """Return ``[T, H]``, memory-mapped: dL/dy of the layer's FFN output y, where L sums the losses in nats."""
        return self._map(self.path(layer))

    @property
    def loss(self) -> float:
        """The parent's mean loss per predicted token, in nats."""
        return float(json.loads((self.folder / DONE_FILE).read_text(encoding="utf-8"))["loss"])

    def path(self, layer: int) -> Path:
        """Return the path of a layer's file, which is complete if it exists."""
        return self.folder / f"gradients.{layer}.bin"

    def whole(self) -> bool:
        """Return whether an earlier call with the same key finished."""
        done = self.folder / DONE_FILE
        size = self.num_tokens * self.hidden_size * self.dtype.itemsize
        paths = [self.path(layer) for layer in range(self.num_layers)]
        if not done.is_file() or not all(path.is_file() and path.stat().st_size == size for path in paths):
            return False
        try:
            return bool(json.loads(done.read_text(encoding="utf-8"))["key"] == self.key)
        except (ValueError, KeyError, TypeError):
            return False

    def remove(self) -> None:
        """Delete the files, and the folder if nothing else is in it."""
        remove_gradients(self.folder)

    def _map(self, path: Path) -> torch.Tensor:
        count = self.num_tokens * self.hidden_size
        flat = torch.from_file(str(path), shared=False, size=count, dtype=self.dtype)
        return flat.view(self.num_tokens, self.hidden_size)


def remove_gradients(folder: Path) -> None:
    """Delete the files of a `GradientStore`, whole or not, and the folder if nothing else is in it."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for pattern in (DONE_FILE, "gradients.*.bin", "hidden.*.bin"):
        for path in folder.glob(pattern):
            path.unlink()
    remove_temporaries(folder)
    with suppress(OSError):
        folder.rmdir()


def ffn_gradients(
    model: DenseModel,
    ids_ST: torch.Tensor,
    *,
    folder: Path,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    batch_sequences: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> GradientStore:
    """Compute the gradient of the parent's loss with respect to every FFN's output, in transformers' own classes.

    The loss is the sum over all predicted tokens of their negative log-likelihood: each token of a sequence but the
    first, given those before it in the same sequence. With ``y = sum_j h_j down_:j`` the gradient at neuron j follows
    as ``dL/dh_j = down_:j . dL/dy``, so that ``[T, H]`` per layer is enough. Nothing depends on ``batch_sequences``
    except for rounding.

    Every layer runs forward twice and backward once. Memory: one decoder layer, embedding and head, and the
    activations of one layer on one batch; logits are made a few tokens at a time. On disk: at most ``layers + 3``
    times ``T H`` values, in the end ``layers`` times. A finished result with the same model, tokens and dtype is
    reused, an unfinished one is not.

    Args:
        model: The dense parent.
        ids_ST: int64 ``[S, T]``, S sequences of T >= 2 tokens, no padding.
        folder: Folder of the files; files of an earlier call are replaced unless they are the same finished result.
        device: Device of the computation.
        compute_dtype: Dtype of layers, hidden states and gradients; None for float32. In float16 small
            gradients vanish.
        batch_sequences: Sequences at once; None for about `BATCH_TOKENS` tokens.
        progress: Called after every layer.

    Raises:
        ValueError: The token ids have the wrong shape or are out of range.
        LlamaMoeError: Hidden states, loss or a gradient are not finite; the message names the layer.
        OSError: Writing failed.
    """
    spec = model.spec
    if ids_ST.ndim != 2 or len(ids_ST) == 0 or ids_ST.shape[1] < 2:
        raise ValueError(f"need sequences [S, T] of at least two tokens, not {list(ids_ST.shape)}")
    if ids_ST.min() < 0 or ids_ST.max() >= spec.vocab_size:
        raise ValueError(f"token ids must lie in 0..{spec.vocab_size - 1}")
    dtype = compute_dtype or torch.float32
    key = _key(model, ids_ST, dtype)
    store = GradientStore(folder, spec.num_layers, ids_ST.numel(), spec.hidden_size, dtype, key)
    if store.whole():
        return store
    store.remove()
    make_folder(folder)
    runner = LayerRunner(StreamedModel.of_dense(model, dtype=dtype, device=device), ids_ST.shape[1])
    batch = batch_sequences or max(1, BATCH_TOKENS // ids_ST.shape[1])
    job = _Pass(runner, ids_ST, store, torch.device(device), batch, progress)
    with torch.no_grad():
        job.forward()
    loss = job.head(spec.vocab_size)
    job.backward()
    write_text(folder / DONE_FILE, json.dumps({"key": key, "loss": loss}) + "\n")
    return store


def _key(model: DenseModel, ids_ST: torch.Tensor, dtype: torch.dtype) -> str:
    facts = json.dumps([model.checkpoint.fingerprint(), list(ids_ST.shape), str(dtype)])
    return hashlib.sha256(facts.encode() + ids_ST.contiguous().numpy().tobytes()).hexdigest()


@dataclass
class _Pass:
    """One forward and backward pass: ``S`` sequences of a batch, ``T`` tokens of each, ``P`` tokens per loss chunk."""

    runner: LayerRunner
    ids_ST: torch.Tensor
    store: GradientStore
    device: torch.device
    batch_sequences: int
    progress: ProgressCallback
    _hidden: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        # the input of every layer, and the output of the last one
        self._hidden = [self.store.folder / f"hidden.{layer}.bin" for layer in range(self.runner.num_layers + 1)]

    def forward(self) -> None:
        """Write the input of every layer, and the output of the last one."""
        with _row_file(self._hidden[0]) as file:
            for rows in self._batches():
                file.write(self._finite(self.runner.embed(self.ids_ST[rows]), "the embeddings"))
        for layer in range(self.runner.num_layers):
            with self.runner.layer(layer) as module, _row_file(self._hidden[layer + 1]) as file:
                for rows in self._batches():
                    output = self.runner.run(layer, module, self._rows(self._hidden[layer], rows))
                    file.write(self._finite(output, f"the hidden states after layer {layer}"))
            self.progress(Progress("gradients: forward", layer + 1, self.runner.num_layers, "layer"))

    def head(self, vocab_size: int) -> float:
        """Replace the last layer's output by the loss's gradient with respect to it; return the mean loss."""
        from ..models.loading import LOGITS_AT_ONCE

        last, total = self._hidden[-1], 0.0
        step = max(1, LOGITS_AT_ONCE // vocab_size)
        with _row_file(last) as file:
            for rows in self._batches():
                loss, gradient = self._head_batch(self.ids_ST[rows], self._rows(last, rows), step)
                file.write(self._finite(gradient, "the loss's gradient at the last hidden states"))
                total += loss
        return total / (self.ids_ST.numel() - len(self.ids_ST))

    def _head_batch(self, ids_ST: torch.Tensor, hidden_STH: torch.Tensor, step: int) -> tuple[float, torch.Tensor]:
        gradient_STH = torch.zeros_like(hidden_STH)
        scored_PH = hidden_STH[:, :-1].flatten(0, 1)
        targets_P = ids_ST[:, 1:].flatten().to(self.device)
        pieces, total = [], 0.0
        for hidden_PH, targets in zip(torch.split(scored_PH, step), torch.split(targets_P, step), strict=True):
            leaf = hidden_PH.detach().requires_grad_()
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(self.runner.logits(leaf), targets, reduction="sum")
            pieces.append(torch.autograd.grad(loss, leaf)[0])
            total += float(loss.detach())
        gradient_STH[:, :-1] = torch.cat(pieces).view_as(gradient_STH[:, :-1])
        return total, gradient_STH

    def backward(self) -> None:
        """Write the gradients at the FFN outputs, from the last layer to the first; remove the saved inputs."""
        for layer in reversed(range(self.runner.num_layers)):
            with ExitStack() as stack:
                module = stack.enter_context(self.runner.layer(layer))
                here, flow = self._hidden[layer], self._hidden[layer + 1]
                gradients = stack.enter_context(_row_file(self.store.path(layer)))
                below = stack.enter_context(_row_file(here))
                for rows in self._batches():
                    at_ffn, at_input = self._through(layer, module, self._rows(here, rows), self._rows(flow, rows))
                    gradients.write(self._finite(at_ffn, f"the gradient at the FFN of layer {layer}"))
                    below.write(at_input)
            flow.unlink()
            done = self.runner.num_layers - layer
            self.progress(Progress("gradients: backward", done, self.runner.num_layers, "layer"))
        self._hidden[0].unlink()

    def _through(
        self, layer: int, module: torch.nn.Module, input_STH: torch.Tensor, flow_STH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients at the FFN's output and at the layer's input, from that at the layer's output."""
        outputs: list[torch.Tensor] = []
        handle = module.mlp.register_forward_hook(lambda _, args, output: outputs.append(output))  # type: ignore[union-attr]
        try:
            leaf = input_STH.requires_grad_()
            with torch.enable_grad():
                result = self.runner.run(layer, module, leaf)
            at_ffn, at_input = torch.autograd.grad(result, (outputs[0], leaf), flow_STH)
        finally:
            handle.remove()
        return at_ffn, at_input

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.ids_ST), self.batch_sequences):
            yield slice(start, start + self.batch_sequences)

    def _rows(self, path: Path, rows: slice) -> torch.Tensor:
        """Copy sequences of a file to the device as ``[S, T, H]``."""
        mapped = self.store._map(path).view(*self.ids_ST.shape, -1)[rows]
        return mapped.to(self.device, copy=True)

    def _finite(self, values: torch.Tensor, what: str) -> torch.Tensor:
        if not values.isfinite().all():
            raise LlamaMoeError(
                f"{what} of the dense parent contain NaN or infinite values on the calibration text.",
                hint="Try --compute-dtype float32; if that does not help, the parent's weights are broken.",
            )
        return values


class _RowFile:
    """A file that is written sequentially."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, values: torch.Tensor) -> None:
        """Append values in row-major order, in their own dtype."""
        self._file.write(values.detach().cpu().contiguous().view(torch.uint8).numpy().data)


@contextmanager
def _row_file(path: Path) -> Iterator[_RowFile]:
    """Open a file that gets its name once complete. Not synced: a resumed run computes the gradients again."""
    with replacing(path, sync=False) as file:
        yield _RowFile(file)
