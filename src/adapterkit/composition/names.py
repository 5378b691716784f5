"""What can name an adapter: almost anything. `runtime.site` spells it as the name of a module."""

from ..errors import AdapterNameError

__all__ = ["MAX_LENGTH", "check_name"]

MAX_LENGTH = 128


def check_name(name: object) -> str:
    """Return `name` if it can name an adapter.

    Raises:
        AdapterNameError: not a string, empty, longer than 128 characters, with unprintable characters, or with spaces
            at its ends.
    """
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"an adapter's name is a non-empty string; found {name!r}")
    if len(name) > MAX_LENGTH:
        raise AdapterNameError(f"an adapter's name has at most {MAX_LENGTH} characters; {name[:20]!r}… has {len(name)}")
    # A name stands in messages and tables, where "a" and "a " would look the same.
    if not name.isprintable() or name != name.strip():
        raise AdapterNameError(f"an adapter's name has printable characters only and no spaces at its ends; found {name!r}")
    return name
