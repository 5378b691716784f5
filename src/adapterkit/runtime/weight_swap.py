"""Changed tensors in the way of Parameters, while a module runs."""

import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .this_call import THIS_CALL

__all__ = ["put_weights", "take_weights"]

_NOTHING = object()
# A host with changed weights is one thread's at a time: others would read them, or lose theirs when they are taken away.
_gates: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_gates_lock = threading.Lock()


def put_weights(host: nn.Module, changed: Mapping[tuple[nn.Module, str], Tensor]) -> None:
    """Make modules read these tensors under the names of their Parameters until `take_weights`; other threads wait.

    Args:
        host: The module that is about to run.
        changed: Map (module, name of its Parameter) to the tensor that it is to read.
    """
    with _gates_lock:  # two threads must not make a gate each
        gate = _gates.setdefault(host, threading.RLock())
    gate.acquire()
    THIS_CALL.swapped.append((host, {(owner, leaf): owner.__dict__.get(leaf, _NOTHING) for owner, leaf in changed}))
    for (owner, leaf), tensor in changed.items():
        owner.__dict__[leaf] = tensor
    for owner in {owner for owner, _ in changed if isinstance(owner, nn.RNNBase)}:  # these read a list of their own
        THIS_CALL.swapped[-1][1][owner, "_flat_weights"] = owner._flat_weights
        owner.__dict__["_flat_weights"] = [getattr(owner, name, None) for name in owner._flat_weights_names]


def take_weights(host: nn.Module) -> None:
    """Undo the last `put_weights` of this thread, if it was for this host."""
    # The hook that calls this runs after every call of the host, also where no step was active.
    if not THIS_CALL.swapped or THIS_CALL.swapped[-1][0] is not host:
        return
    for (owner, leaf), before in THIS_CALL.swapped.pop()[1].items():
        if before is _NOTHING:
            del owner.__dict__[leaf]
        else:
            owner.__dict__[leaf] = before
    _gates[host].release()
