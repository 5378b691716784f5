"""Read what objects of other people's classes say of themselves: asking may run their code, and that may raise anything."""

from typing import Any

__all__ = ["attribute"]


def attribute(holder: object, name: str) -> Any:
    """Return an attribute; None if there is none, or if the property that stands for it raises."""
    try:
        return getattr(holder, name, None)
    except Exception:  # it then says nothing; who asks goes on with what else there is, or says what is missing
        return None
