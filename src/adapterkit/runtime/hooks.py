"""The hooks that adapterkit registers: instances of these classes, without state, and nothing else.

Each finds what it needs through the module that it is called with, so that copies, replicas and pickles of a model run
their own adapters. They are told apart from anyone else's hooks by their class.
"""

import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.call import CallSlot, taken_off
from ..heads.plan import root_of
from ..placement.patterns import SITE, ancestors
from ..structure import pytree as values
from ..structure.pytree import Argument, argument_path
from .site import AdapterSite, located, sites_of
from .state import Handover, Record
from .weight_swap import put_weights, take_weights

__all__ = [
    "InputHook",
    "KitHook",
    "OutputHook",
    "WeightEndHook",
    "WeightHook",
    "forget_compiled",
    "has_hook",
    "remove_hooks",
    "set_hook",
    "sync_site_hooks",
]

# The attribute of a module that holds its StreamPort.
PORT = "_adapterkit_stream"


class KitHook:
    """Base of all hooks of adapterkit.

    `is_pre`: runs before the module; `is_first`: before hooks that were there; `always`: also when the module raised.
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
        steps = site.output_steps
        if not steps:
            return None
        if not site.record.activation.check(steps[0].adapter):
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
        steps = site.input_steps
        if not steps:
            return None
        if not site.record.activation.check(steps[0].adapter):
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
        steps = site.weight_steps
        if not steps or not site.record.activation.check(steps[0].adapter):
            return
        changed: dict[tuple[nn.Module, str], Tensor] = {}
        for step in steps:
            changed = step(site, module, args, kwargs, changed)
        if torch.compiler.is_compiling():
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
        for step in site.weight_steps:
            for owner, leaf in step.places(module):
                owner.__dict__.pop(leaf, None)


class CallHook(KitHook):
    """Take off the model's call what is for the heads on its output: labels, which the model need not know."""

    is_pre = True
    is_first = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments that are left, or None for no change. Shape: as given; choices are made rows."""
        is_changed = False
        for slot in module.__dict__[PORT].calls:
            if slot.wants is not None:
                args, kwargs, call = taken_off(slot.wants, module, args, kwargs)
                slot.give(call)
                is_changed = True
        return (args, kwargs) if is_changed else None


class StreamPort:
    """What leaves this module's call for sites: the stream, labels; and what is let go of when it ends."""

    def __init__(self) -> None:
        self.gives: list[tuple[Handover, Argument | None]] = []
        self.calls: list[CallSlot] = []
        self.clears: list[Handover | CallSlot] = []


class StreamHook(KitHook):
    """Hand the residual stream, this module's input, to the sites that read it."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Leave the first floating tensor. Shape: (..., hidden)."""
        call = (args, kwargs)
        for handover, argument in module.__dict__[PORT].gives:
            path = (argument_path(call, argument) if argument else values.find(call)) if handover.is_wanted else None
            if path is not None:
                handover.give(values.get(call, path))


class ClearHook(KitHook):
    """Let go of streams and labels that no site took, when the module around both ends, by an exception too."""

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


def require_input_grad(value: Any, path: values.Path | None = None) -> Any:
    """The value with one tensor (its first floating one) requiring grad, in grad mode; None for no change."""
    path = values.find(value) if path is None else path
    if path is None or not torch.is_grad_enabled():
        return None
    tensor: Tensor = values.get(value, path)
    if tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
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
        record.last_hook_id = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=kind.is_first).id
    else:
        flags: dict[str, bool] = {"with_kwargs": True, "prepend": kind.is_first, "always_call": kind.always}
        record.last_hook_id = module.register_forward_hook(hook, **flags).id


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
    ports: dict[str, StreamPort] = defaultdict(StreamPort)
    encoders: set[str] = set()
    for path, host, site in sites_of(model):
        _sync_host_hooks(host, site, record)
        _open_ports(path, site, modules, ports)
        encoders |= {above for above in ancestors(path) if isinstance(modules.get(above), nn.TransformerEncoder)}
    for path, module in modules.items():
        port = ports.get(path, StreamPort())
        set_hook(module, CallHook, bool(port.calls), record)
        _set_pre_hook(module, StreamHook, bool(port.gives), record)
        set_hook(module, ClearHook, bool(port.clears), record)
        set_hook(module, EncoderHook, path in encoders, record)
        if path in ports:
            module.__dict__[PORT] = port
        else:
            module.__dict__.pop(PORT, None)


def _sync_host_hooks(host: nn.Module, site: AdapterSite, record: Record) -> None:
    """Register the hooks of one host that its site needs, and remove those that it does not."""
    places = {"output" if e.spec is None else e.spec.at for entries in site.entries.values() for e in entries}
    set_hook(host, OutputHook, "output" in places, record)
    _set_pre_hook(host, WeightHook, "weight" in places, record)
    _set_pre_hook(host, InputHook, "input" in places, record)
    set_hook(host, WeightEndHook, "weight" in places, record)
    if {"output", "weight"} <= places:
        remove_hooks(host, OutputHook)  # so that it comes first again
        set_hook(host, OutputHook, True, record)


def _open_ports(path: str, site: AdapterSite, modules: dict[str, nn.Module], ports: dict[str, StreamPort]) -> None:
    """Say at which modules streams and calls are taken for a site, and where what nobody took is let go."""
    entries = [entry for entries in site.entries.values() for entry in entries]
    for entry in entries:
        spec = located(entry.spec, path) if entry.spec else None
        if entry.handover and spec and spec.residual is not None:
            ports[spec.residual].gives.append((entry.handover, spec.input))
            ports[_called_around(spec.residual, path, modules)].clears.append(entry.handover)
    for root in {root_of(path, entry) for entry in entries if entry.head is not None and entry.head.above is not None}:
        ports[root].calls.append(site.call)
        ports[root].clears.append(site.call)


def _set_pre_hook(module: nn.Module, kind: type[KitHook], wanted: bool, record: Record) -> None:
    """`set_hook` of one that runs in this order among ours, whichever adapter came first.

    An adapter at the input may run the host on it (a norm), with the weights that it will have; a stream is what the
    module takes.
    """
    order = (WeightHook, InputHook, StreamHook)
    is_new = wanted and not has_hook(module, kind)
    set_hook(module, kind, wanted, record)
    for later in order[order.index(kind) + 1 :] if is_new else ():
        if has_hook(module, later):
            remove_hooks(module, later)
            set_hook(module, later, True, record)


def _called_around(one: str, other: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module around both (`one` may be it) that is called when they are: no nn.ModuleList is."""
    around = (path for path in ancestors(one) if path in ancestors(other) and path != other)
    return next((path for path in around if not isinstance(modules[path], (nn.ModuleList, nn.ModuleDict))), "")
