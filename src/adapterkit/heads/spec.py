"""What a head is, and where."""

from __future__ import annotations

from dataclasses import dataclass

from .config import HeadConfig

__all__ = ["HeadSpec"]


@dataclass(frozen=True)
class HeadSpec:
    """What a head is, and where.

    Attributes:
        config: Its settings, its name among them.
        above: Of a head on a model's output, how many modules around the host, which is the last of nested nn.Sequentials,
            lie in that model: 0 where the host is the model itself. None for a head in the host's place.
        width: Of a head on the output, features that it reads.
        takes_mask: Whether it is called with the mask, too.
        embedding: Path, from the model on, of an embedding whose weight it reads.
    """

    config: HeadConfig
    above: int | None = None
    width: int = 0
    takes_mask: bool = True
    embedding: str | None = None
