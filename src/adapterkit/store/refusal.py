"""Refuse what a file says, whichever way building it goes wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AdapterKitError, StoreError

__all__ = ["refusing"]


@contextmanager
def refusing(source: Path) -> Iterator[None]:
    """Turn whatever a file's content makes the block raise into a StoreError that names the folder.

    A hostile config is valid in form and asks for sizes that no module can have: torch and Python answer with errors of
    many kinds.
    """
    try:
        yield
    except (AdapterKitError, RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:
        raise StoreError(f"the manifest in {str(source)!r} describes no adapter for this model: {error}") from error
