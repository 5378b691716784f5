"""Run a model once on example inputs, look at what its modules take and return, and leave it as it was."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ...errors import AdapterKitError, CompatibilityError
from ..paths import ancestors
from .snapshot import Snapshot
from .surroundings import not_compiled, surroundings_kept

__all__ = [
    "ExampleInputs", "call_with", "forward", "fresh", "observe", "outside_inference_mode", "runs_around", "untouched",
]  # fmt: skip

ExampleInputs = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
T = TypeVar("T")


def call_with(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Call the model and return its output: a mapping by keyword, a tuple by position, else as the only argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def fresh(inputs: ExampleInputs) -> ExampleInputs:
    """Return a copy of the inputs, for a model may fill a cache that it is given, or change a tensor in place."""
    try:
        return copy.deepcopy(inputs)
    except RuntimeError:
        # A tensor in the middle of a graph cannot be copied. Such inputs are handed over as they are: what a model does to
        # them is then seen by their owner, as it would be in any other call.
        return inputs


def observe(
    model: nn.Module,
    inputs: ExampleInputs,
    paths: Iterable[str],
    look: Callable[[str, nn.Module, Any, Any, Any], T],
    *,
    within: AbstractContextManager[Any] | None = None,
    training: bool = False,
) -> dict[str, list[T]]:
    """Run the model once and map each path to what `look(path, module, args, kwargs, output)` returned for its calls.

    Modules that do not run have an empty list. For the other arguments see `forward`.

    Raises:
        CompatibilityError: the model does not run on these inputs.
    """
    seen: dict[str, list[T]] = {path: [] for path in paths}
    modules, me = dict(model.named_modules()), threading.get_ident()
    with ExitStack() as stack:
        for path, calls in seen.items():

            def hook(
                module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path, calls: list[T] = calls
            ) -> None:
                if threading.get_ident() == me:  # another thread may run the same modules meanwhile
                    calls.append(look(path, module, args, kwargs, output))

            stack.callback(modules[path].register_forward_hook(hook, with_kwargs=True).remove)
        forward(model, inputs, within=within, training=training)
    return seen


def runs_around(model: nn.Module, inputs: ExampleInputs, paths: Iterable[str]) -> dict[str, str]:
    """Map the path of each module that never runs on the inputs to the innermost module around it that does.

    Raises:
        CompatibilityError: the model does not run on these inputs.
    """
    around = {path: ancestors(path)[1:] for path in paths}
    calls = observe(model, inputs, {outer for outers in around.values() for outer in outers}, lambda *_: None)
    return {path: next(outer for outer in outers if calls[outer]) for path, outers in around.items() if outers}


def forward(
    model: nn.Module,
    inputs: ExampleInputs,
    *,
    within: AbstractContextManager[Any] | None = None,
    training: bool = False,
) -> Any:
    """Run the model and return its output, without gradients. Modules and random state are as before afterwards.

    Args:
        within: A context to run it in.
        training: In training mode; else in eval mode.

    Raises:
        CompatibilityError: the model does not run on these inputs.
    """
    with untouched(model):
        inputs = fresh(inputs)
        try:
            with within or nullcontext():
                model.train(training)  # a class may have its own, which returns nothing
                return call_with(model, inputs)
        except AdapterKitError:  # ours says more than the line below would
            raise
        except Exception as error:
            raise CompatibilityError(
                f"{type(model).__name__} does not run on example_inputs: {type(error).__name__}: {error}"
            ) from error


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients, after which modules hold what they did, and random state and settings are as before.

    What modules hold: their mode, hooks, children, buffers and attributes; see `Snapshot`. Under autocast the block runs
    without its cache of cast weights, which would hide casts from a trace. It runs outside of inference mode, so that it
    may ask for gradients, unless the model was itself made inside.
    """
    snapshots = [Snapshot(module, model) for module in model.modules()]
    held = (tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor))
    made_inside = any(tensor.is_inference() for tensor in held)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # The fused path of nn.TransformerEncoder runs no modules inside it, so a trace would see nothing there.
    fast_path, casts_cached = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_autocast_cache_enabled(False)
    try:
        mode = nullcontext() if made_inside else outside_inference_mode()
        with mode, not_compiled(), surroundings_kept(), torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(casts_cached)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for snapshot in snapshots:
            snapshot.restore()


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Run a block whose tensors may require gradients, if it is in inference mode or not."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield
