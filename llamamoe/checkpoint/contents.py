"""Fingerprint weights by samples, independent of the machine and of when and where the files were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .base import TensorInfo

_SAMPLES = 64
_SAMPLE_BYTES = 16 * 1024


def content_fingerprint(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str:
    """Return a SHA-256 over names, shapes, dtypes, the configuration, and 64 samples of 16 KiB spread over each file.

    Unlike `Checkpoint.fingerprint` it does not depend on the files' times, so that results can be carried to another
    machine. At most 1 MiB of each file is read, whatever its size: training, casting or quantising change the samples,
    an edit of a few rows by hand may not.
    """
    digest = hashlib.sha256()
    facts = [[name, info.dtype, list(info.shape), info.file.name] for name, info in sorted(tensors.items())]
    digest.update(json.dumps([facts, dict(config)], sort_keys=True).encode())
    for path in sorted({info.file for info in tensors.values()}):
        size = path.stat().st_size
        last = max(0, size - _SAMPLE_BYTES)
        with path.open("rb") as file:
            for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        digest.update(str(size).encode())
    return digest.hexdigest()
