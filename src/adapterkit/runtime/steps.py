"""The steps that hooks run: add a delta to a tensor, or change a weight. Those of heads are in `heads/`.

A step acts on what a hook is given, a whole output or call. Those that add to one tensor of it can also act on that tensor
alone, or on some of its rows or tokens (a `View`): compositions make use of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..composition.nodes import Composition
from ..errors import CompatibilityError
from ..placement.spec import SiteSpec
from ..structure import pytree
from .handover import Handover
from .site import AdapterSite

__all__ = ["AdaptWeight", "AddDelta", "AddProjected", "AddsToTensor", "Pass", "Step", "View", "plus"]


class View(NamedTuple):
    """The tensors that adapters at one site read and change: all of their rows and tokens, or some.

    Attributes:
        x: The site's tensor, as the adapters before have left it.
        bare: The site's tensor, as the host made it.
        taken: What the host takes; None where no adapter reads that.
        streams: What each adapter that reads a residual stream reads, by its name among the site's children.
        axis: That of the rows.
        per_row: How many indices of that axis each row has.
        in_turn: Not one after the other: each of them comes after one of every other row.
    """

    x: Tensor
    bare: Tensor
    taken: Tensor | None
    streams: dict[str, Tensor]
    axis: int
    per_row: int = 1
    in_turn: bool = False

    @property
    def row_count(self) -> int:
        """Return the number of rows."""
        return self.x.shape[self.axis] // self.per_row

    def map(self, function: Callable[[Tensor], Tensor]) -> View:
        """Return a view with this function applied to each tensor."""
        streams = {key: function(stream) for key, stream in self.streams.items()}
        taken = None if self.taken is None else function(self.taken)
        return self._replace(x=function(self.x), bare=function(self.bare), taken=taken, streams=streams)

    def narrow(self, axis: int, start: int, size: int) -> View:
        """Return a part of an axis: some tokens, all rows."""
        return self.map(lambda tensor: tensor.narrow(axis, start, size))

    def indices(self, rows: Sequence[int]) -> Tensor:
        """Return where these rows lie on their axis. Shape: (rows * per_row,)."""
        where = torch.tensor(rows, device=self.x.device)
        if self.per_row == 1:
            return where
        # Rows [0, 2] of 3 indices each lie at [0, 1, 2, 6, 7, 8].
        within = torch.arange(self.per_row, device=self.x.device)
        if self.in_turn:
            return (where + within[:, None] * self.row_count).flatten()
        return (where[:, None] * self.per_row + within).flatten()

    def select(self, where: Tensor) -> View:
        """Return these indices of the axis of rows: some rows."""
        return self.map(lambda tensor: tensor.index_select(self.axis, where))

    def put(self, where: Tensor, changed: Tensor) -> Tensor:
        """Return the tensor x with others at these indices. Shape: as x."""
        return self.x.index_copy(self.axis, where, changed)


class Step:
    """One thing that a hook does to the tensors of a call. Immutable; finds its module through the site.

    Attributes:
        adapter: The adapter or composition that was active when the step was made.
    """

    adapter: Composition | None

    @property
    def module_keys(self) -> tuple[str, ...]:
        """The names, among the site's children, of the modules that the step runs; no heads."""
        return ()

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return `value` (the host's output, or its `(args, kwargs)`) with tensors of shape (..., width) replaced."""
        raise NotImplementedError

    def places(self, host: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """Yield the Parameters that it changes, each as the module that holds it and its name there."""
        yield from ()


def plus(x: Tensor, delta: Tensor) -> Tensor:
    """Return x + delta, in x's dtype. Shape: both the same."""
    # Out of place: the host may have saved x for its backward, or hand it to others.
    return x + (delta if delta.dtype is x.dtype else delta.to(x.dtype))


def _has_hooks(module: nn.Module) -> bool:
    """Tell whether someone has registered hooks on a module, which calling its forward alone would pass by."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@runtime_checkable
class AddsToTensor(Protocol):
    """A step that adds to one tensor of what a hook is given."""

    key: str
    spec: SiteSpec

    def locate(self, value: Any, *, in_call: bool) -> pytree.Path:
        """Return the path of the tensor in the host's output, or in its `(args, kwargs)`."""
        ...

    def delta(self, module: Any, host: nn.Module, view: View) -> Tensor:
        """Return what `module` adds, in the dtype that it computes in. Shape: as `view.x`."""
        ...


@dataclass(frozen=True)
class AddDelta(Step):
    """Add what the adapter computes to the site's tensor.

    Args:
        key: The adapter's name among the site's children.
        adapter: The active adapter or composition.
        spec: The site.
        handover: Where the residual stream is left, if the adapter reads it.
        is_fused: The module adds its delta itself: see `nn.fused`.
    """

    key: str
    adapter: Composition | None
    spec: SiteSpec
    handover: Handover[Tensor] | None = None
    is_fused: bool = False

    @property
    def module_keys(self) -> tuple[str, ...]:
        """The one module that it runs."""
        return (self.key,)

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return the output (or the arguments) with its tensor x, shape (..., width), replaced by x + delta."""
        # The usual output is a tensor alone, and is spared the search in containers.
        if isinstance(value, Tensor) and self.spec.output is None:
            return self._adapt(site, host, value)
        path = self.locate(value, in_call=self.spec.at == "input")
        return pytree.put(value, path, self._adapt(site, host, pytree.get(value, path)))

    def delta(self, module: Any, host: nn.Module, view: View) -> Tensor:
        """Return module(z, x) for the tensors of a view. Shape: as `view.x`."""
        return self._delta(module, self.read(host, view), view.x)

    def read(self, host: nn.Module, view: View) -> Tensor:
        """Return what the adapter reads. Shape: (..., input_width)."""
        return view.x if self.spec.reads == "site" else self._read(host, view.x, view.streams.get(self.key))

    def _adapt(self, site: AdapterSite, host: nn.Module, x: Tensor) -> Tensor:
        """Return x + delta, in x's dtype. Shape: (..., width), the features on `spec.axis`."""
        spec = self.spec
        module: Any = site._modules[self.key]
        z = x if spec.reads == "site" else self._read(host, x, self.handover.take() if self.handover else None)
        if self.is_fused and spec.axis == -1 and not x.is_nested and not _has_hooks(module):
            if x.shape[-1] != spec.width or z.shape[-1] != spec.input_width:
                raise self._wrong_shape(z, x)
            return module.added(z, x, host)  # type: ignore[no-any-return]  # a tensor, by its protocol
        if not x.is_nested:
            return plus(x, self._delta(module, z, x))
        # The nested tensors of nn.TransformerEncoder's padded inference: few functions take one, so row by row.
        rows = zip(z.unbind(), x.unbind(), strict=True)
        return torch.nested.as_nested_tensor([plus(b, self._delta(module, a[None], b[None])[0]) for a, b in rows])

    def _delta(self, module: Any, z: Tensor, x: Tensor) -> Tensor:
        """Return module(z, x). Shape: z (..., input_width), x (..., width), the features on `spec.axis`."""
        spec, shape = self.spec, x.shape
        axis = spec.axis
        if axis != -1 and not -x.dim() <= axis < x.dim():
            raise self._wrong_shape(z, x)
        if shape[axis] != spec.width or (z is not x and z.shape[axis] != spec.input_width):
            raise self._wrong_shape(z, x)
        dtype = module.compute_dtype
        if z.dtype is not dtype:
            z = z.to(dtype)
        # Straight to forward where calling the module would do no more than that: it costs as much as a small kernel.
        run = module if _has_hooks(module) else module.forward
        delta: Tensor = run(z, x) if axis == -1 else run(z.movedim(axis, -1), x.movedim(axis, -1)).movedim(-1, axis)
        if delta.shape != shape:
            raise self._wrong_shape(z, x)
        return delta

    def _read(self, host: nn.Module, x: Tensor, stream: Tensor | None) -> Tensor:
        """Return what the adapter reads, where that is not the tensor at the site. Shape: (..., input_width)."""
        reads = self.spec.reads
        if reads == "norm":
            return host.forward(x)  # type: ignore[no-any-return]  # not __call__: that would run this hook again
        if stream is None:
            raise CompatibilityError(
                f"adapter {self.adapter!r} at {self.spec.path!r} reads what enters {self.spec.residual!r}, which has not "
                "run before it in this forward; name another `residual`"
            )
        if reads == "residual":
            return stream
        if stream.shape != x.shape:
            raise self._wrong_shape(stream, x)
        return x + stream

    def locate(self, value: Any, *, in_call: bool) -> pytree.Path:
        """Return the path of the tensor to adapt, in `(args, kwargs)` or in an output."""
        spec = self.spec
        try:
            if in_call:
                path = pytree.argument_path(value, spec.input) if spec.input else pytree.find(value)
            else:
                path = spec.output or pytree.find(value)
            if path is not None and isinstance(pytree.get(value, path), Tensor):
                return path
        # The message below says more: what was found in the place of a tensor.
        except LookupError:
            pass
        found = [type(item).__name__ for item in value[0]] if in_call else type(value).__name__
        raise CompatibilityError(
            f"adapter {self.adapter!r} finds no tensor at the {'input' if in_call else 'output'} of {spec.path!r}, which "
            f"is {found}; name it with `{'input' if in_call else 'output'}=`"
        )

    def _wrong_shape(self, z: Tensor, x: Tensor) -> CompatibilityError:
        spec = self.spec
        return CompatibilityError(
            f"adapter {self.adapter!r} at {spec.path!r} reads {spec.input_width} features and adds to {spec.width} on "
            f"axis {spec.axis}, but read a tensor of shape {tuple(z.shape)} and would add to one of shape "
            f"{tuple(x.shape)}; set `channel_axis`, `output` or `input`, or add it anew with example_inputs"
        )


@dataclass(frozen=True)
class AddProjected(Step):
    """Add to the host's output what the adapter makes of the host's input: the effect of a changed weight, without one.

    Args:
        key: The adapter's name among the site's children.
        adapter: The active adapter or composition.
        spec: The site.
        is_fused: The module adds its delta itself: see `nn.fused`.
    """

    key: str
    adapter: Composition | None
    spec: SiteSpec
    is_fused: bool = False

    @property
    def module_keys(self) -> tuple[str, ...]:
        """The one module that it runs."""
        return (self.key,)

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return the output with its tensor x, shape (..., width), replaced by x + delta."""
        module: Any = site._modules[self.key]
        path, z = self.locate(value, in_call=False), self.taken(args, kwargs)
        x: Tensor = pytree.get(value, path)
        if self.is_fused and self.spec.axis == -1 and not x.is_nested and not _has_hooks(module):
            self._check_width(x)
            return pytree.put(value, path, module.added(z, x, host))
        if not x.is_nested:
            return pytree.put(value, path, plus(x, self._delta(module, z, x, host)))
        # The nested tensors of nn.TransformerEncoder's padded inference: few functions take one, so row by row.
        rows = [plus(b, self._delta(module, a, b, host)) for a, b in zip(z.unbind(), x.unbind(), strict=True)]
        return pytree.put(value, path, torch.nested.as_nested_tensor(rows))

    def _by_keyword(self, kwargs: Any) -> Any:
        """Return the host's first argument where it is called by keyword; None if it is not there."""
        name = self.spec.input[1] if self.spec.input else None
        return kwargs.get(name) if name in kwargs else next(iter(kwargs.values()), None)

    def locate(self, value: Any, *, in_call: bool) -> pytree.Path:
        """Return the path of the output's first floating-point tensor."""
        path = () if isinstance(value, Tensor) else pytree.find(value)
        if path is None:
            raise CompatibilityError(
                f"adapter {self.adapter!r} at {self.spec.path!r} adds to what a weight makes, but the host returned "
                f"{type(value).__name__}; exclude this host"
            )
        return path

    def taken(self, args: Any, kwargs: Any) -> Tensor:
        """Return what the host takes: its first argument. Shape: any."""
        z = args[0] if args else self._by_keyword(kwargs)
        if not isinstance(z, Tensor):
            raise CompatibilityError(
                f"adapter {self.adapter!r} at {self.spec.path!r} changes a weight that is applied to the first argument, "
                f"but found {type(z).__name__} there; exclude this host"
            )
        return z

    def delta(self, module: Any, host: nn.Module, view: View) -> Tensor:
        """Return what is added for a view: a change of what the host itself returned. Shape: as `view.x`."""
        if view.taken is None:
            raise CompatibilityError(f"what {self.spec.path!r} takes was not kept for adapter {self.adapter!r}")
        return self._delta(module, view.taken, view.bare, host)

    def _delta(self, module: Any, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """Return what is added to x. Shape: z as the host takes, x as it returns."""
        dtype = module.compute_dtype
        self._check_width(x)
        if z.dtype is not dtype and z.is_floating_point():  # the ids of an embedding stay integers
            z = z.to(dtype)
        run = module if _has_hooks(module) else module.forward
        delta: Tensor = run(z, x, host)
        return delta

    def _check_width(self, x: Tensor) -> None:
        """Raise CompatibilityError unless the host returned as many features as it did when the adapter was added."""
        spec = self.spec
        if x.shape[spec.axis] != spec.width:
            raise CompatibilityError(
                f"adapter {self.adapter!r} at {spec.path!r} adds to {spec.width} features on axis {spec.axis}, but the "
                f"host returned a tensor of shape {tuple(x.shape)}: it is not what it was; remove the adapter, add it anew"
            )


@dataclass(frozen=True)
class AdaptWeight(Step):
    """Have the host run with a changed Parameter.

    Args:
        key: The adapter's name among the site's children.
        adapter: The active adapter or composition.
        owners: Where the Parameter lies: for each module that holds it, the way there from the host, and its name there.
    """

    key: str
    adapter: Composition | None
    owners: tuple[tuple[tuple[str, ...], str], ...]

    @property
    def module_keys(self) -> tuple[str, ...]:
        """The one module that it runs."""
        return (self.key,)

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Add to `value`, which maps (owner, name) to a tensor, the changed Parameter that the host is to read.

        Shape: as the Parameter.
        """
        module: Any = site._modules[self.key]
        before: Any = None
        for owner, leaf in self.places(host):
            weight: Any = value.get((owner, leaf))
            if weight is None:  # not by getattr, which may find what another thread runs with
                # Replicas of nn.DataParallel hold tensors among their attributes.
                weight = owner._parameters[leaf] if leaf in owner._parameters else owner.__dict__[leaf]
            if weight is not before:  # under another name it is the same one
                before, changed = weight, module.adapted(weight)
                changed = changed if changed.dtype is weight.dtype else changed.to(weight.dtype)
            value[owner, leaf] = changed
        return value

    def places(self, host: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """Yield each module that holds the Parameter, and the Parameter's name there."""
        for way, leaf in self.owners:
            owner: Any = host
            for name in way:
                owner = owner._modules[name]
            yield owner, leaf


@dataclass(frozen=True)
class Pass(Step):
    """Change nothing, where the active adapter has no module.

    A hook that has a step makes the checks that come before steps: another thread, or a backward, may be in its way.
    """

    adapter: Composition | None

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return the value. Shape: any."""
        return value
