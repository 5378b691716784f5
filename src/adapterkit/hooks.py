"""The hooks that adapterkit registers: instances of these classes, without state, and nothing else.

Each finds what it needs through the module that it is called with, so that copies, replicas and pickles of a model run
their own adapters. They are told apart from anyone else's hooks by their class.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import values
from .patterns import SITE
from .record import Handover, Record
from .sites import sites_of

__all__ = [
    "InputHook",
    "KitHook",
    "OutputHook",
    "forget_compiled",
    "has_hook",
    "remove_hooks",
    "set_hook",
    "sync_site_hooks",
]

# The attribute of a module that holds its StreamPort.
PORT = "_adapterkit_stream"


class KitHook:
    """Base of all hooks of adapterkit. `is_pre`: runs before the module; `always`: also when it raised."""

    is_pre = False
    always = False


class OutputHook(KitHook):
    """Run the site's steps on the host's output."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the adapted output, or None for no change. Shape: as the host's output."""
        site: Any = module._modules[SITE]
        steps = site.output_steps
        if not steps:
            return None
        site.record.activation.check()
        for step in steps:
            output = step(site, module, args, kwargs, output)
        return output


class InputHook(KitHook):
    """Run the site's steps on the host's arguments."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the adapted `(args, kwargs)`, or None for no change. Shape: as the host's arguments."""
        site: Any = module._modules[SITE]
        steps = site.input_steps
        if not steps:
            return None
        site.record.activation.check()
        call = (args, kwargs)
        for step in steps:
            call = step(site, module, args, kwargs, call)
        return call


class StreamPort:
    """Which sites want the stream that enters this module, and which may hold one when it ends."""

    def __init__(self) -> None:
        self.gives: list[Handover] = []
        self.clears: list[Handover] = []


class StreamHook(KitHook):
    """Hand the residual stream, this module's input, to the sites that read it."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Leave the first floating tensor. Shape: (..., hidden)."""
        wanted = [handover for handover in module.__dict__[PORT].gives if handover.is_wanted]
        call = (args, kwargs)
        path = values.find(call) if wanted else None
        if path is not None:
            for handover in wanted:
                handover.give(values.get(call, path))


class ClearHook(KitHook):
    """Let go of streams that no site took, when the module around both ends, by an exception too."""

    always = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Leave the output alone. Shape: any."""
        for handover in module.__dict__[PORT].clears:
            handover.take()


class EncoderHook(KitHook):
    """Keep `nn.TransformerEncoder` off its nested path where an adapter inside it needs gradients.

    It takes that path in eval mode if nothing it looks at needs a gradient; it does not look at adapters, and its
    attention then fails on nested tensors that do. An input that needs a gradient says what the adapters mean.
    """

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with a source that requires grad. Shape: (batch, seq, hidden)."""
        return None if torch.compiler.is_compiling() else require_input_grad((args, kwargs))


def require_input_grad(value: Any) -> Any:
    """The value with its first floating tensor requiring grad, in grad mode; None if there is nothing to change."""
    path = values.find(value) if torch.is_grad_enabled() else None
    if path is None:
        return None
    tensor: Tensor = values.get(value, path)
    if tensor.requires_grad:
        return None
    # A clone: the model may go on to change the tensor in place, which a leaf that requires grad forbids.
    return values.put(value, path, tensor.detach().requires_grad_().clone())


def has_hook(module: nn.Module, kind: type[KitHook] = KitHook) -> bool:
    """Whether a hook of this kind is registered on the module."""
    return any(isinstance(hook, kind) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))


def set_hook(module: nn.Module, kind: type[KitHook], wanted: bool, record: Record) -> None:
    """Register a hook of this kind on the module, or remove it, unless that is how it stands."""
    if wanted == has_hook(module, kind):
        return
    hook: Any = kind()
    if not wanted:
        remove_hooks(module, kind)
    elif kind.is_pre:
        record.last_hook_id = module.register_forward_pre_hook(hook, with_kwargs=True).id
    else:
        record.last_hook_id = module.register_forward_hook(hook, with_kwargs=True, always_call=kind.always).id


def remove_hooks(module: nn.Module, kind: type[KitHook] = KitHook) -> None:
    """Remove our hooks of this kind from the module, found by their class: handles would not survive a copy."""
    flags = (
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    )
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, kind)]:
            for held in (hooks, *flags):
                held.pop(number, None)


def forget_compiled() -> None:
    """Make torch.compile trace anew: a graph that it made before hooks were added would run without them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def sync_site_hooks(model: nn.Module, record: Record) -> None:
    """Register the hooks that the model's sites need, and remove those that none needs any more."""
    modules = dict(model.named_modules())
    ports: dict[str, StreamPort] = {}
    encoders: set[str] = set()
    for path, host, site in sites_of(model):
        specs = [entry.spec for entry in site.entries.values()]
        set_hook(host, OutputHook, any(s is None or s.at == "output" for s in specs), record)
        set_hook(host, InputHook, any(s is not None and s.at == "input" for s in specs), record)
        encoders |= {above for above in _above(path) if isinstance(modules.get(above), nn.TransformerEncoder)}
        for entry in site.entries.values():
            if entry.handover and entry.spec and entry.spec.residual is not None:
                ports.setdefault(entry.spec.residual, StreamPort()).gives.append(entry.handover)
                around = _called_around(entry.spec.residual, path, modules)
                ports.setdefault(around, StreamPort()).clears.append(entry.handover)
    for path, module in modules.items():
        port = ports.get(path)
        set_hook(module, StreamHook, port is not None and bool(port.gives), record)
        set_hook(module, ClearHook, port is not None and bool(port.clears), record)
        set_hook(module, EncoderHook, path in encoders, record)
        if port is not None:
            module.__dict__[PORT] = port
        else:
            module.__dict__.pop(PORT, None)


def _above(path: str) -> list[str]:
    """The path and those of all modules around it, innermost first, the root's '' last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _called_around(one: str, other: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module around both (`one` may be it) that is called when they are: no nn.ModuleList is."""
    around = (path for path in _above(one) if path in _above(other) and path != other)
    return next((path for path in around if not isinstance(modules[path], (nn.ModuleList, nn.ModuleDict))), "")
