"""Load models in transformers without mapping their files into memory.

A mapped file that another process truncates kills the reader with SIGBUS; a short read is an error that can be
reported. Mapped weights also stay tied to the file while they are used: writing to it changes them.

Safetensors can read files by ``pread`` instead, but transformers and accelerate request that on few systems only (and
transformers' ``disable_mmap`` reads each file into memory whole, beside the weights). Both ask `safetensors.safe_open`,
which is temporarily replaced in their modules.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..lazy import safetensors, torch

_NAME = "safe_open"
_PACKAGES = ("safetensors", "transformers", "accelerate", "peft")
_LOCK = threading.Lock()
_users = 0
_later: ContextVar[bool] = ContextVar("later", default=False)


@contextmanager
def unmapped(*, later: bool = False) -> Iterator[None]:
    """Read the safetensors files that transformers, accelerate and peft open meanwhile by ``pread``.

    Other threads also read by ``pread`` during that time; they get the same values.

    Args:
        later: Whether slices read in this thread give NaN instead of values: for a model
            whose weights stay on disk. Transformers opens its files, reads names, shapes and slices, and drops the
            values; accelerate reads whole tensors when they are used, which must not happen under ``later``.
    """
    _count(1)
    token = _later.set(later)
    try:
        yield
    finally:
        _later.reset(token)
        _count(-1)


def _count(change: int) -> None:
    """Replace the function for the first user, and restore it after the last."""
    global _users
    with _LOCK:
        before, _users = _users, _users + change
        if 0 in (before, _users):
            old, new = (_mapping(), _open) if _users else (_open, _mapping())
            for name, module in list(sys.modules.items()):
                if name.partition(".")[0] in _PACKAGES and vars(module).get(_NAME) is old:
                    setattr(module, _NAME, new)


@functools.cache
def _mapping() -> Any:
    """Return the original function; called before it is replaced."""
    return safetensors.safe_open


def _open(filename: Any, framework: str, device: Any = "cpu", **_: Any) -> Any:
    file = _mapping()(filename, framework=framework, device=device, backend="pread")
    return _Unread(file) if _later.get() else file


class _Unread:
    """An open file whose slices have shapes but no values."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> _Unknown:
        return _Unknown(self._file.get_slice(name))


class _Unknown:
    """A slice that is NaN everywhere and takes no memory, because all elements share one."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.tensor(torch.nan).expand(self._stored.get_shape())[index]
