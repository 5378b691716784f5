"""Try on random input whether a host with merged weights returns what it does with the adapters beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.functional.projections import Projection, random_input
from ...placement.projections import projection_of
from ...runtime.acting import acting_at
from ...runtime.site import AdapterSite, SiteEntry
from ...runtime.state import without_adapters
from ...runtime.steps import Step
from ...runtime.weight_swap import put_weights, take_weights
from ...structure import pytree
from ...structure.hosts import described_projection
from ...structure.paths import SITE
from ...structure.tracing.forward import untouched

__all__ = ["difference", "needs_trial"]

# How far the two outputs may differ: in parts of what the adapters add, and, for rounding, of what the host returns.
_OF_DELTA, _OF_OUTPUT = 1e-4, 1e-6


class _Bare(nn.Module):
    """A host's own forward, without hooks."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the host computes. Shape: as the host's."""
        return self.host.forward(*args, **kwargs)


def needs_trial(host: nn.Module, entries: Sequence[SiteEntry]) -> bool:
    """Tell whether merging these must be tried, because the algebra alone does not show that it is right.

    It does for one module beside a layer of torch with torch's own forward. A forward of the user's own, or of a layer that
    a package describes, may do more than multiply by the weight, or lay the weight out in another way than the description
    says. Several modules at one host may depend on one another.

    Args:
        host: The host.
        entries: All modules that are merged into it.
    """
    beside = [entry for entry in entries if entry.spec.at != "weight"]
    projection = projection_of(host)
    is_known = projection is not None and not projection.has_own_forward and described_projection(host) is None
    is_torchs = is_known and "forward" not in host.__dict__
    return bool(beside) and (not is_torchs or len(entries) > 1)


def difference(
    host: nn.Module,
    site: AdapterSite,
    held: Sequence[tuple[str, SiteEntry]],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> str | None:
    """Explain how a host with merged weights differs from the host with the adapters beside it; return None if it does not.

    Args:
        host: The host.
        site: The site that holds the adapters' modules.
        held: The modules at the host's input and output: the adapter's name and what the site knows of the module.
        before: Map the names of the host's tensors to their values without these modules.
        after: Map the same names to their values with them.
    """
    projection = projection_of(host)
    if projection is None:
        return f"{type(host).__name__} is no projection that is known, so it cannot be tried on an input"
    # In double precision a small change stands out, whatever the host's own dtype is.
    dtype = torch.float32 if before["weight"].device.type == "mps" else torch.float64
    with untouched(host), without_adapters():
        host.eval()  # dropout would make the runs differ; `untouched` restores the mode
        rest = {name: tensor.to(dtype) for name, tensor in _own_tensors(host) if tensor.is_floating_point()}
        before, after = ({**rest, **{n: t.to(dtype) for n, t in tensors.items()}} for tensors in (before, after))
        z = _some_input(projection, before["weight"], after["weight"])
        try:
            plain, merged = (_run(host, tensors, (z,), {}) for tensors in (before, after))
            beside = _run_beside(host, site, held, before, z)
        except Exception as error:  # a forward that is not known may raise anything
            return f"its own forward could not be tried: {type(error).__name__}: {error}"
    added, wrong = (beside - plain).abs().max(), (beside - merged).abs().max()
    if wrong <= _OF_DELTA * added + _OF_OUTPUT * plain.abs().max():  # false for NaN, which is a difference
        return None
    return (
        f"{type(host).__name__} does more than multiply by its weight, or the modules at it depend on one another: merged, "
        f"its output would differ by {float(wrong):.2g} where they add up to {float(added):.2g}"
    )


def _step(site: AdapterSite, entry: SiteEntry, name: str) -> Step:
    """Make the step that the module of an entry would run as, were its adapter active alone."""
    return acting_at(entry.spec.at).step(entry, name, site.get_submodule(entry.key))


def _run_beside(
    host: nn.Module, site: AdapterSite, held: Sequence[tuple[str, SiteEntry]], tensors: Mapping[str, Tensor], z: Tensor
) -> Tensor:
    """Return the host's output with the adapters beside it, as hooks run them. Shape: (..., out).

    Args:
        host: The host.
        site: The site that holds the adapters' modules.
        held: The modules, as in `difference`.
        tensors: Map the names of the host's tensors to the values to run it with.
        z: The host's input.
    """
    args: tuple[Any, ...] = (z,)
    kwargs: dict[str, Any] = {}
    for name, entry in held:
        if entry.spec.at == "input":
            args, kwargs = _step(site, entry, name)(site, host, args, kwargs, (args, kwargs))
    output = _run(host, tensors, args, kwargs)
    # A module at the output may read the host's weight (DoRA its norm): it must see the same values.
    put_weights(host, {(host, name): tensors[name] for name in tensors if name in host._parameters})
    try:
        for name, entry in held:
            if entry.spec.at == "output":
                output = _step(site, entry, name)(site, host, args, kwargs, output)
    finally:
        take_weights(host)
    return output


def _run(host: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the host's output with other tensors under its names. Shape: (..., out)."""
    named = {f"host.{name}": tensor for name, tensor in tensors.items()}
    output = torch.func.functional_call(_Bare(host), named, args, kwargs)
    path = pytree.find(output)
    tensor: Tensor = output if path is None else pytree.get(output, path)
    return tensor


def _own_tensors(host: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a host's parameters and buffers with their names, without those of its adapters."""
    for name, tensor in (*host.named_parameters(), *host.named_buffers()):
        if SITE not in name.split("."):
            yield name, tensor


def _some_input(projection: Projection, before: Tensor, after: Tensor) -> Tensor:
    """Make an input that shows a change of the weight. Shape: (2, 3, in), (2, in, *spatial) or ids (rows)."""
    if projection.kind == "embedding":
        # The rows that change most: of an adapter that was trained on a few ids, no others change at all.
        rows = (after - before).abs().amax(1)
        return rows.topk(min(8, len(rows))).indices
    return random_input(projection, before)
