"""What one thread keeps while it runs a model: the one home of everything that belongs to "this call".

Several threads may run one model at once, so a hook may leave nothing on a module for another hook to find. It leaves it
here, where each thread sees its own. `torch.compile` cannot trace a thread-local that changes: what a compiled call needs
lies on a plain attribute instead, set and cleared within one graph (see `Handover`).
"""

import threading
from typing import Any

__all__ = ["THIS_CALL", "ThisCall"]


class ThisCall(threading.local):
    """What this thread keeps; every thread has its own values under these names.

    Attributes:
        thread_key: Stands for the thread. Not its number, which a later thread may get.
        ran: What it ran last: the `id` of an Activation, and what was active there.
        without_adapters: How many `without_adapters()` blocks it is in.
        handed: What hooks left for sites, by the `id` of the Handover.
        batches: Batches of the models that it runs, by the `id` of the model's state, the innermost last.
        first_rows: Whether the blocks that it is in compute the first rows alone, the innermost last.
        swapped: Hosts that run with changed weights, innermost last, each with what lay in their way before.
        loading: What the `load_state_dict` call that it is in has met.
    """

    def __init__(self) -> None:
        self.thread_key = object()
        self.ran: tuple[int, Any] | None = None
        self.without_adapters = 0
        self.handed: dict[int, Any] = {}
        self.batches: dict[int, list[Any]] = {}
        self.first_rows: list[bool] = []
        self.swapped: list[tuple[Any, dict[tuple[Any, str], Any]]] = []
        self.loading: Any = None


THIS_CALL = ThisCall()
