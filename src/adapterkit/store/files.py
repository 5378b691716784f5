"""Reading and writing the files of a saved adapter, safely.

Writing. The manifest names its tensors by hash, so the two files need not change at one instant: the new tensors are
written beside the old ones, under a name made from their hash; the manifest is replaced (this is the moment of the
change); then the tensors take their final name. A kill in between leaves a manifest whose tensors lie under one of two
names, and a reader looks under both.
"""

import contextlib
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import StoreError

__all__ = [
    "CARD",
    "CARD_MARK",
    "MANIFEST",
    "TENSORS",
    "check_folder",
    "read_inside",
    "read_manifest_bytes",
    "read_tensors_bytes",
    "replace_adapter",
]

MANIFEST, TENSORS, CARD = "adapter.json", "adapter.safetensors", "README.md"
MAX_MANIFEST_BYTES = 64 * 2**20
CARD_MARK = "<!-- Written by adapterkit at each save. Remove this line to keep your own text. -->"


def replace_adapter(directory: Path, manifest: bytes, tensors: bytes, card: bytes) -> None:
    """Write the files of an adapter into a directory, over an older adapter if there is one.

    Raises:
        StoreError: the path is a file, or cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _only_saver(directory):
            for leftover in directory.glob(".adapter-*.tmp"):  # of saves that were killed
                leftover.unlink(missing_ok=True)
            pending = directory / _pending_name(hashlib.sha256(tensors).hexdigest())
            # The order matters (see above): a kill after any of these lines leaves the old adapter or the new one.
            _write(pending, tensors)
            _write(directory / MANIFEST, manifest)
            os.replace(pending, directory / TENSORS)
            # After the final name is in place: until then a pending file may be the one that the manifest means.
            for leftover in directory.glob(".adapter-*.safetensors"):
                leftover.unlink(missing_ok=True)
            if _is_ours(directory / CARD):
                _write(directory / CARD, card)
            _sync_directory(directory)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot save an adapter in {str(directory)!r}: {error}") from error


def _is_ours(card: Path) -> bool:
    """Tell whether a card may be written: there is none, or it is one that no person took over."""
    return not card.exists() or (card.is_file() and CARD_MARK.encode() in card.read_bytes())


@contextlib.contextmanager
def _only_saver(directory: Path) -> Iterator[None]:
    """Let one process at a time save here. The lock is on the directory itself, and ends with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl  # noqa: PLC0415 (POSIX only)

    handle = os.open(directory, os.O_RDONLY)
    try:
        # It waits for the other saver. Closing the handle lets go of the lock, as does a kill.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_folder(directory: Path) -> None:
    """Raise StoreError unless there is a folder of this path."""
    try:
        exists = directory.is_dir()
    except (OSError, ValueError):  # a name too long, or with a null character
        exists = False
    if not exists:
        raise StoreError(f"no adapter in {str(directory)!r}: there is no such directory")


def read_manifest_bytes(directory: Path) -> bytes:
    """Return the manifest's bytes. Raises StoreError as `read_inside`."""
    return read_inside(directory, MANIFEST, MAX_MANIFEST_BYTES, what="a manifest")


def read_inside(directory: Path, name: str, limit: int, *, what: str) -> bytes:
    """Return the bytes of a file in a folder.

    Args:
        directory: The folder.
        name: The file's name in it.
        limit: How large the file may be, in bytes.
        what: What the file is, for the message: "a manifest".

    Raises:
        StoreError: there is no such folder or file, it is larger than the limit, or it is a link out of the folder.
    """
    check_folder(directory)
    path = directory / name
    if not path.exists():
        raise StoreError(f"no adapter in {str(directory)!r}: it has no {name}")
    size = _check_inside(path, directory)
    if size > limit:
        raise StoreError(f"{str(path)!r} has {size:,} bytes; {what} has at most {limit:,}")
    return _read(path)


def read_tensors_bytes(directory: Path, sha256: str, size_bytes: int) -> bytes:
    """Return the bytes of the tensors file that a manifest means: under its own name, or still under that of a killed save.

    Raises:
        StoreError: missing, or its size or hash is not the manifest's: damaged, or not the file that was saved.
    """
    found = []
    # The size first: it costs no read, and tells most wrong files.
    for path in (directory / TENSORS, directory / _pending_name(sha256)):
        if not path.exists():
            continue
        size = _check_inside(path, directory)
        if size != size_bytes:
            found.append(f"{path.name} has {size:,} bytes, not {size_bytes:,}")
            continue
        # These very bytes are hashed and returned, so that nobody can exchange the file in between.
        content = _read(path)
        actual = hashlib.sha256(content).hexdigest()
        if actual == sha256:
            return content
        found.append(f"{path.name} has SHA-256 {actual[:12]}…, not {sha256[:12]}…")
    raise StoreError(
        f"the tensors in {str(directory)!r} are not those of its manifest: {'; '.join(found) or f'no {TENSORS}'}. "
        "The file is damaged or incomplete; fetch or save the adapter again"
    )


def _read(path: Path) -> bytes:
    """Return the bytes of a file. Raises StoreError: it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {str(path)!r}: {error}") from error


def _pending_name(sha256: str) -> str:
    """Return the name under which the tensors of this hash wait beside the old ones."""
    return f".adapter-{sha256[:32]}.safetensors"


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step, on disk before this returns."""
    temporary = path.with_name(f".adapter-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            # On disk before it gets its name: after a power cut the name may be there, and the content not.
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException:  # a KeyboardInterrupt, too
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    """Have the names in a directory reach the disk, too: without this a new name may be lost with the power."""
    if os.name == "posix":  # elsewhere a directory cannot be opened
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_inside(path: Path, directory: Path) -> int:
    """Return the size in bytes of a file that must lie in the directory, or in the blobs of its Hugging Face cache."""
    # Both resolved: the folder itself may be reached through a link, which is the user's own doing.
    real, home = path.resolve(), directory.resolve()
    # A snapshot in that cache is a folder of links into "blobs", beside the folder "snapshots".
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and blobs not in real.parents:
        raise StoreError(f"{str(path)!r} is a link to {str(real)!r}, outside the adapter's directory; it is not followed")
    try:
        status = real.stat()
    except FileNotFoundError:  # another process saves here, and has just given the file its name, or another one
        raise StoreError(f"{str(path)!r} went away while it was read") from None
    # A pipe or a device would block a read, or never end it.
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{str(path)!r} is not a regular file")
    return status.st_size
