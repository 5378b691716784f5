"""Checkpoints of adapted models: what `state_dict` and `load_state_dict` do about adapters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..structure.paths import SITE
from .this_call import THIS_CALL

__all__ = ["LoadLog", "forgive_absent_adapters", "warn_if_saved_as_base"]


class LoadLog:
    """Which adapters one `load_state_dict` call has met.

    A file with none of an adapter's tensors (a base checkpoint) loads strictly; one with some of them is an error.
    """

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing  # the list is torch's own, one for each load_state_dict call
        self.present: set[str] = set()
        self.absent: dict[str, list[str]] = {}
        self.forgiven: dict[str, list[str]] = {}

    @classmethod
    def of(cls, missing: list[str]) -> LoadLog:
        """Return the log of the `load_state_dict` call that collects these missing keys."""
        # torch hands one list through a whole call: another list means another call.
        log = THIS_CALL.loading
        if not isinstance(log, cls) or log.missing is not missing:
            log = THIS_CALL.loading = cls(missing)
        return log

    def settle(self) -> None:
        """Take the absent adapters' keys out of the missing ones; put them back if the adapter turned up after all."""
        # After each site, in turn: a later one may have tensors of an adapter that the earlier ones missed.
        for name, starts in self.absent.items():
            if name in self.present:
                self.missing.extend(self.forgiven.pop(name, []))
                continue
            gone = [key for key in self.missing if key.startswith(tuple(starts))]
            self.forgiven.setdefault(name, []).extend(gone)
            self.missing[:] = [key for key in self.missing if key not in gone]


def warn_if_saved_as_base(destination: Mapping[str, Any]) -> None:
    """Warn inside a `save_pretrained` that a person called: `from_pretrained` would drop the adapters without a word.

    Not inside that of a Trainer's checkpoint, which is loaded into the adapted model again.

    Args:
        destination: What the call of `state_dict` has collected so far. Only the first site that it meets warns.
    """
    # e.g. "encoder._adapterkit.sst2.down_weight": a site came before this one, and has warned.
    if any(SITE in key.split(".") for key in destination):
        return
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name != "save_pretrained":
        frame = frame.f_back
    # What calls `save_pretrained`: `_save` is the Trainer's.
    if frame.f_back is not None and frame.f_back.f_code.co_name != "_save":
        warnings.warn(
            "save_pretrained is writing adapters into the base model's file, where from_pretrained will not find them. "
            "Call it inside `with kit.base_checkpoint():`, and save the adapters with kit.save.",
            stacklevel=3,
        )


def forgive_absent_adapters(_site: nn.Module, incompatible: Any) -> None:
    """Let a file without any of an adapter's tensors, such as a base checkpoint, load strictly."""
    LoadLog.of(incompatible.missing_keys).settle()
