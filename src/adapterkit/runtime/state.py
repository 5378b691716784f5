"""The plain objects that all sites of a model share: which adapter is active, and what adapterkit changed.

A `ModelState` hangs on the root module and on every site. It holds values only, so it is copied with `deepcopy`, pickled
with the model, and found again by `ak.wrap`.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle

from ..composition.nodes import Composition, names_always, names_in
from ..errors import ActivationError
from ..structure.tracing.row_layout import SeenRows
from .this_call import THIS_CALL

__all__ = ["ACTIVATION_LOCK", "STATE", "Activation", "Frozen", "ModelState", "without_adapters"]

# The attribute of the root module that holds its ModelState.
STATE = "_adapterkit_state"

# Held while activation changes, until every site has its new steps. One for all models: a lock cannot be copied.
ACTIVATION_LOCK = threading.RLock()
_HISTORY = 4096  # changes of activation that a backward may still look back on


def _sequence_number() -> int:
    """Return the number that autograd will give to the next node made in this thread."""
    return torch._C._autograd._get_sequence_nr()


class Activation:
    """Which adapter or composition is active in a model, who asked for it, and since when.

    Activation belongs to the model, not to a thread. What is kept here beside the name lets two mistakes be errors that
    would otherwise give wrong numbers: another thread changed the adapter under a running one, and the adapter changed
    between a forward under gradient checkpointing and the recomputation in its backward.

    Its changes are made under ACTIVATION_LOCK.
    """

    def __init__(self, active: Composition | None = None) -> None:
        self.active = active
        self._default = active  # what is active outside of every scope
        self._scopes: list[tuple[threading.Thread, Composition | None]] = []
        # Weak keys: a thread that has ended expects nothing any more.
        self._expected: WeakKeyDictionary[threading.Thread, Composition | None] = WeakKeyDictionary()
        self._crowded = False  # more than one thread has asked for an adapter
        self._weights = 0  # how often adapters were merged into the weights, or taken out of them
        # (autograd's sequence number at the change, thread that made it, adapter and count of weights from then on)
        self._history: deque[tuple[int, object, tuple[Composition | None, int]]] = deque(maxlen=_HISTORY)

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active}  # a copy runs what the original ran at that moment, and is in no scope

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # fresh locks and scopes, on purpose

    def switch(self, name: Composition | None) -> None:
        """Make an adapter active (None: the base alone) until the next switch, or the end of the scope it is in.

        Raises:
            ActivationError: another thread is inside a scope with another adapter.
        """
        self._refuse_under_others(name)
        mine = [i for i, (thread, _) in enumerate(self._scopes) if thread is threading.current_thread()]
        if mine:
            self._scopes[mine[-1]] = (threading.current_thread(), name)
        else:
            self._default = name
        self._set(name, expected=name)

    def forget(self, name: str) -> None:
        """Make this adapter, which is to be removed, active nowhere, now or after any scope.

        Raises:
            ActivationError: another thread is inside a scope with it.
        """
        self.check_forgettable(name)
        self._scopes = [(thread, None if name in names_in(held) else held) for thread, held in self._scopes]
        self._default = None if name in names_in(self._default) else self._default
        for thread, expected in list(self._expected.items()):
            self._expected[thread] = None if name in names_in(expected) else expected
        if name in names_in(self.active):
            self._set(None, expected=None)

    def check_forgettable(self, name: str) -> None:
        """Raise ActivationError if another thread is inside a scope with this adapter."""
        if any(name in names_in(held) for _, held in self._scopes):
            self._refuse_under_others(None)

    def enter(self, name: Composition | None) -> None:
        """Open a scope of this thread in which an adapter is active.

        Raises:
            ActivationError: another thread is inside a scope with another adapter.
        """
        self._refuse_under_others(name)
        self._scopes.append((threading.current_thread(), name))
        self._set(name, expected=name)

    def leave(self) -> None:
        """Close this thread's innermost scope: what was active before it is active again.

        Threads inside other scopes keep their adapter; this one then may not run the model meanwhile.
        """
        me = threading.current_thread()
        # Not the last of all: other threads may have opened scopes since.
        del self._scopes[max(i for i, (thread, _) in enumerate(self._scopes) if thread is me)]
        mine = next((name for thread, name in reversed(self._scopes) if thread is me), self._default)
        # While another thread is in a scope, what is active and what this thread expects may differ: then `check` raises.
        self._set(self._scopes[-1][1] if self._scopes else self._default, expected=mine)

    @property
    def scheduled(self) -> tuple[Composition | None, ...]:
        """Return what is active now, and what will be as the open scopes end."""
        return (self.active, self._default, *(held for _, held in self._scopes))

    def stays(self, name: str) -> bool:
        """Tell whether this adapter is active, and still will be when every open scope has ended."""
        return all(name in names_always(composition) for composition in self.scheduled)

    def change_weights(self) -> None:
        """Note that the base's weights are others from now on, though the same adapter is active."""
        self._change(self.active, self._weights + 1)

    @property
    def was_used(self) -> bool:
        """Tell whether an adapter has ever been active: then running without one may be a mistake, too."""
        return self.active is not None or bool(self._history)

    def check(self, running: Composition | None) -> bool:
        """Tell whether a hook is to run its steps now: not while this thread looks at the base alone.

        Args:
            running: The adapter or composition that the steps are of; None for the base alone.

        Raises:
            ActivationError: the numbers would not be those that the caller asked for; see the class.
        """
        if torch.compiler.is_compiling():
            return True
        if torch._C._current_graph_task_id() >= 0:  # inside a backward: checkpointing recomputes a forward
            self._check_recomputation()
            return True
        if THIS_CALL.without_adapters:
            return False
        THIS_CALL.ran = id(self), (running, self._weights)  # for `_check_recomputation`
        # With one thread nothing can overtake it, and each hook is spared the look-up.
        if self._crowded:
            # A thread that never activated anything takes what is active.
            expected = self._expected.get(threading.current_thread(), self.active)
            if not expected == self.active == running:
                raise ActivationError(
                    f"this thread activated {expected!r}, but another thread has since activated {self.active!r} in the "
                    "same model. Hold a lock around activation and forward, or give each thread its own copy."
                )
        return True

    def _refuse_under_others(self, name: Composition | None) -> None:
        """Raise ActivationError if another thread is inside a scope with another adapter than this one."""
        for thread, held in self._scopes:
            if thread is not threading.current_thread() and held != name:
                raise ActivationError(
                    f"cannot activate {name!r}: thread {thread.name!r} is running this model with {held!r}. "
                    "Hold a lock around activation and forward, or give each thread its own copy."
                )

    def _set(self, name: Composition | None, *, expected: Composition | None) -> None:
        """Make an adapter active, and note what this thread expects to run from now on."""
        self._expected[threading.current_thread()] = expected
        self._crowded = len(self._expected) > 1
        if name != self.active:
            self._change(name, self._weights)

    def _change(self, name: Composition | None, weights: int) -> None:
        """Write a change into the history, which a backward looks back on, and make it."""
        if not self._history:
            # What was active until now, for forwards that ran before this first change: no node has a number below 0.
            self._history.append((-1, THIS_CALL.thread_key, (self.active, self._weights)))
        self._history.append((_sequence_number(), THIS_CALL.thread_key, (name, weights)))
        self.active, self._weights = name, weights

    def _check_recomputation(self) -> None:
        """Compare with the adapter that was active when the forward being recomputed first ran.

        Autograd numbers its nodes in the order of their making, so the number of the node that asks for the
        recomputation tells when its forward ran. Numbers are counted by thread: changes made by another Python thread
        say nothing here, but a device's backward thread (which Python did not start) serves the thread that made them.
        """
        node = torch._C._current_autograd_node()
        if node is None or not self._history:
            return
        me = THIS_CALL.thread_key
        started_by_python = not isinstance(threading.current_thread(), threading._DummyThread)
        changes = [(n, state) for n, thread, state in self._history if thread is me or not started_by_python]
        # The last of these was active when the forward made its node.
        then = [state for number, state in changes if number <= node._sequence_nr()]
        now = self.active, self._weights
        if not changes:  # only other threads have changed it: compare with what this one ran last
            whose, ran = THIS_CALL.ran or (id(self), now)
            then = [ran if whose == id(self) else now]
        if then and then[-1][0] == self.active and then[-1] != now:
            raise ActivationError(
                f"an adapter was merged or unmerged between forward and backward: a checkpointed forward of {now[0]!r} "
                "would be recomputed with other weights. Call backward first."
            )
        if not then or then[-1] != now:
            was = repr(then[-1][0]) if then else "another adapter"
            raise ActivationError(
                f"the active adapter changed between forward and backward: a checkpointed forward ran with {was}, its "
                f"recomputation would run with {self.active!r}. Call backward before you activate another adapter."
            )


@contextmanager
def without_adapters() -> Iterator[None]:
    """Run models as if no adapter were active, in this thread and within the block; nothing is activated or deactivated."""
    THIS_CALL.without_adapters += 1
    try:
        yield
    finally:
        THIS_CALL.without_adapters -= 1


@dataclass(frozen=True)
class Frozen:
    """What `freeze` found in the base.

    Attributes:
        requires_grad: The flag of each parameter.
        digests: A digest of each parameter and buffer.
        own_mode: The train/eval flag of each norm that differed from the module around it.
    """

    requires_grad: dict[str, bool]
    digests: dict[str, str]
    own_mode: dict[str, bool]


class ModelState:
    """Hold, as plain values, what adapterkit changed in a model beside adding sites.

    Attributes:
        activation: Which adapter is active.
        frozen: What `freeze` found; None when the base is not frozen.
        omit_adapters: `state_dict()` leaves adapters out.
        last_hook_id: The highest id among hooks registered here.
        hosts: Where each adapter was attached.
        layouts: Where rows of a batch lie in what each module takes and returns, by its path; or why that was not seen.
        merged: The adapters that are merged into the weights, in order, each with the flags `requires_grad` that its
            parameters had before; the original weights lie in the sites.
    """

    def __init__(self) -> None:
        self.activation = Activation()
        self.frozen: Frozen | None = None
        self.omit_adapters = False
        self.last_hook_id = -1
        self.hosts: dict[str, tuple[str, ...]] = {}
        self.layouts = SeenRows()
        self.merged: dict[str, tuple[bool, ...]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, omit_adapters=False)  # a copy made in `base_checkpoint()` is not in that block
        # Hook ids are pickled as they are, but a new process counts from 0 again: without this, the next hook that
        # anyone registers would take the place of one of ours.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.last_hook_id + 1)
