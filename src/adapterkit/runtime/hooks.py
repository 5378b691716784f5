"""The hooks that adapterkit registers on modules: instances of `KitHook`, and nothing else.

Each finds what it needs through the module that it is called with, or is given it when made. Either way it is copied with
the model, so that copies, replicas and pickles run their own adapters. They are told apart from anyone else's hooks by
their class.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..structure import pytree
from ..structure.paths import SITE
from ..structure.pytree import Argument, argument_path
from .handover import Handover
from .state import ModelState
from .weight_swap import put_weights, take_weights

__all__ = [
    "PORT",
    "ClearHook",
    "EncoderHook",
    "InputHook",
    "KitHook",
    "OutputHook",
    "StreamHook",
    "StreamPort",
    "WeightEndHook",
    "WeightHook",
    "has_hook",
    "keep_hook",
    "remove_hooks",
    "require_input_grad",
    "set_hook",
    "update_hook",
]

# The attribute of a module that holds its StreamPort.
PORT = "_adapterkit_stream"


class KitHook:
    """Base of all hooks of adapterkit.

    Attributes:
        is_pre: It runs before the module.
        is_first: It runs before the hooks that were there when it was registered.
        always: It runs even if the module raised.
    """

    is_pre = False
    is_first = False
    always = False


class OutputHook(KitHook):
    """Run the site's steps on the host's output: before other hooks, which are to see what the module returns."""

    is_first = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the adapted output, or None for no change. Shape: as the host's output."""
        site: Any = module._modules[SITE]
        steps = site.steps.get("output")
        if not steps:
            return None
        if not site.state.activation.check(steps[0].adapter):
            return None
        for step in steps:
            output = step(site, module, args, kwargs, output)
        return output


class InputHook(KitHook):
    """Run the site's steps on the host's arguments."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the adapted `(args, kwargs)`, or None for no change. Shape: as the host's arguments."""
        site: Any = module._modules[SITE]
        steps = site.steps.get("input")
        if not steps:
            return None
        if not site.state.activation.check(steps[0].adapter):
            return None
        call = (args, kwargs)
        for step in steps:
            call = step(site, module, args, kwargs, call)
        return call


class WeightHook(KitHook):
    """Let the host run with changed Parameters: what it reads under their names, until `WeightEndHook` takes it away.

    The Parameters stay where they are; the changed tensors lie in front of them, in the `__dict__` of the modules that
    hold them. Meanwhile other threads wait at this host.
    """

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Put the changed Parameters there. Shape: as the Parameters."""
        site: Any = module._modules[SITE]
        steps = site.steps.get("weight")
        if not steps or not site.state.activation.check(steps[0].adapter):
            return
        # Map the module that holds a Parameter, and its name there, to the tensor that the host is to read.
        changed: dict[tuple[nn.Module, str], Tensor] = {}
        for step in steps:
            changed = step(site, module, args, kwargs, changed)
        if torch.compiler.is_compiling():
            # A compiler can trace neither locks nor thread-locals. It sees the attribute set and removed in one graph.
            for (owner, leaf), tensor in changed.items():
                owner.__dict__[leaf] = tensor
        else:
            put_weights(module, changed)


class WeightEndHook(KitHook):
    """Take away what `WeightHook` put there, after an exception, too.

    After `OutputHook`, whose steps see the weights that the host ran with; before the hooks of others, which see its own.
    """

    is_first = True
    always = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Leave the output alone. Shape: any."""
        if not torch.compiler.is_compiling():
            take_weights(module)
            return
        site: Any = module._modules[SITE]
        for step in site.steps.get("weight", ()):
            for owner, leaf in step.places(module):  # as `WeightHook` put them: without `put_weights`
                owner.__dict__.pop(leaf, None)


class StreamPort:
    """What a module's call hands to sites, and what is let go of when that call ends.

    Attributes:
        gives: Handovers of the residual stream that the module takes, each with the argument that it is.
        clears: Handovers, of a stream or of labels, that nobody needs once the module has ended.
    """

    def __init__(self) -> None:
        self.gives: list[tuple[Handover[Tensor], Argument | None]] = []
        self.clears: list[Handover[Any]] = []


class StreamHook(KitHook):
    """Hand the residual stream, this module's input, to the sites that read it."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Leave the first floating tensor. Shape: (..., hidden)."""
        call = (args, kwargs)
        for handover, argument in module.__dict__[PORT].gives:
            path = (argument_path(call, argument) if argument else pytree.find(call)) if handover.wanted else None
            if path is not None:
                handover.give(pytree.get(call, path))


class ClearHook(KitHook):
    """Let go of streams and labels that no site took, when the module around both ends, even if it raised."""

    always = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Leave the output alone. Shape: any."""
        for handover in module.__dict__[PORT].clears:
            handover.drop()


class EncoderHook(KitHook):
    """Keep `nn.TransformerEncoder` off its nested path where an adapter inside it needs gradients.

    It takes that path in eval mode if nothing it looks at needs a gradient; it does not look at adapters, and its
    attention then fails on nested tensors that do. An input that needs a gradient says what the adapters mean. In
    training mode, by which it means that of its first layer, it never does.
    """

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with a source that requires grad. Shape: (batch, seq, hidden)."""
        if torch.compiler.is_compiling() or module.layers[0].training:  # type: ignore[index,union-attr]  # a ModuleList
            return None
        return require_input_grad((args, kwargs))


def require_input_grad(value: Any, path: pytree.Path | None = None) -> Any:
    """Return the value with one tensor, its first floating one, requiring grad; None if nothing is to change."""
    path = pytree.find(value) if path is None else path
    if path is None or not torch.is_grad_enabled():
        return None
    tensor: Tensor = pytree.get(value, path)
    # torch.func refuses `requires_grad_` on the tensors that it transforms.
    if tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    # A clone: the model may go on to change the tensor in place, which a leaf that requires grad forbids.
    return pytree.put(value, path, tensor.detach().requires_grad_().clone())


def has_hook(module: nn.Module, kind: type[KitHook] = KitHook) -> bool:
    """Tell whether a hook of this kind is registered on the module."""
    return any(isinstance(hook, kind) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))


def set_hook(module: nn.Module, hook: KitHook, state: ModelState) -> None:
    """Register a hook on the module, replacing any of the same class."""
    remove_hooks(module, type(hook))
    called: Any = hook
    if hook.is_pre:
        handle = module.register_forward_pre_hook(called, with_kwargs=True, prepend=hook.is_first)
    else:
        flags: dict[str, bool] = {"with_kwargs": True, "prepend": hook.is_first, "always_call": hook.always}
        handle = module.register_forward_hook(called, **flags)
    state.last_hook_id = handle.id  # see `ModelState.__setstate__`


def update_hook(module: nn.Module, hook: KitHook, state: ModelState) -> None:
    """Register a hook on the module; one of the same class that is there gives it its place in the order."""
    hooks = module._forward_pre_hooks if hook.is_pre else module._forward_hooks
    for number, there in hooks.items():
        if isinstance(there, type(hook)):
            hooks[number] = hook
            return
    set_hook(module, hook, state)


def keep_hook(module: nn.Module, kind: type[KitHook], state: ModelState, *, is_wanted: bool) -> None:
    """Register a hook of this kind, which needs no arguments, if it is wanted and not there; else remove it.

    A hook that is there stays as it is: registering it anew would change its order among other people's hooks.
    """
    if is_wanted and not has_hook(module, kind):
        set_hook(module, kind(), state)
    elif not is_wanted:
        remove_hooks(module, kind)


def remove_hooks(module: nn.Module, kind: type[KitHook] = KitHook) -> None:
    """Remove our hooks of this kind from the module, found by their class: handles would not survive a copy."""
    flags = (
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    )
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, kind)]:
            for held in (hooks, *flags):  # torch keeps a hook's flags by its number, apart from it
                held.pop(number, None)
