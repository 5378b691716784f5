"""The formats of saved adapters that can be loaded. A new one is a file with its Reader, and a line in READERS."""

from itertools import islice
from pathlib import Path

from ..errors import StoreError
from .files import check_folder
from .own_format import OwnFormat
from .saved_adapter import Reader, SavedAdapter

__all__ = ["READERS", "read_adapter"]

# The first that knows a folder reads it.
READERS: tuple[Reader, ...] = (OwnFormat(),)

_SHOWN = 5
_LISTED = 1000  # of a folder with more entries, what is shown need not be the first by name


def read_adapter(directory: Path) -> SavedAdapter:
    """Read a saved adapter of any format that is known.

    Raises:
        StoreError: there is no such folder, it is of no known format, or its reader refuses it.
    """
    check_folder(directory)
    try:
        reader = next((reader for reader in READERS if reader.reads(directory)), None)
    except OSError as error:  # a folder that may be listed, and not entered
        raise StoreError(f"cannot read {str(directory)!r}: {error}") from error
    if reader is not None:
        return reader.read(directory)
    signs = " and ".join(f"has no {reader.sign} (the format of {reader.format})" for reader in READERS)
    raise StoreError(f"no adapter in {str(directory)!r}: it {signs}. Found: {_found_in(directory)}")


def _found_in(directory: Path) -> str:
    """Return the first names in a folder, for a message."""
    try:
        # `iterdir` has no order. At most `_LISTED` are read: a mistaken path may be a folder with millions of files.
        names = sorted(path.name for path in islice(directory.iterdir(), _LISTED))
    except OSError as error:
        return f"nothing that can be read ({error})"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(map(repr, names[:_SHOWN])) or "nothing") + more
