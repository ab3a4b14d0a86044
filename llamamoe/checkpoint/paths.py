"""Which files of a folder may be read: plain names, and no link that leads out of the folder."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..plain_text import printable


_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a file that Git LFS left in the place of the real one.

    Args:
        path: The file, for the message.
        start: Its first bytes.

    Raises:
        CheckpointError: It is such a pointer.
    """
    if start.startswith(_POINTER):
        raise CheckpointError(
            f"{path.name} is a Git LFS pointer, not the file itself.",
            hint=f"Fetch the files: cd {path.parent} && git lfs pull",
        )


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a folder; links may lead out of it only into the blobs of a hub cache.

    Raises:
        CheckpointError: The name is no plain file name, the file is missing, or it is a link out of the folder.
    """
    path, root = folder / name, folder.resolve()
    if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise CheckpointError(f"the index names {name!r}, which is not a plain file name in the folder: refused.")
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be found ({error}).", hint="Copy the file into the folder.") from None
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{name} is a symbolic link out of the folder (to {printable(str(real))}): refused.",
            hint="Copy the file into the folder.",
        )
    if not real.is_file():
        raise CheckpointError(f"{name} is missing from {folder}.", hint="Download the checkpoint again.")
    return path
