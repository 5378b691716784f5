"""Sites at modules that run: a Parameter that is read around the module that holds it has the reader for its host."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from ..config.settings import AdapterConfig
from ..errors import TargetError
from ..structure.base_tensors import owner_at
from ..structure.hosts import host_type
from ..structure.paths import ancestors
from ..structure.tracing.forward import ExampleInputs, observe, runs_around
from ..structure.tracing.reads import CallStack, Holder, reads_around
from .spec import SiteSpec

__all__ = ["at_running_hosts"]


def at_running_hosts(
    model: nn.Module,
    sites: Sequence[SiteSpec],
    config: AdapterConfig,
    inputs: ExampleInputs,
    resting: Collection[str] = (),
) -> list[SiteSpec]:
    """Return the sites, each at a host that runs: where a Parameter is read around its host, the reader becomes the host.

    Args:
        sites: At projections and Parameters.
        config: Where its targets are a method's own default, Parameters that are never read are left as they are.
        inputs: Inputs that the model runs on.
        resting: Modules that are known to run on other inputs: experts that no token chose.

    Raises:
        TargetError: a projection never runs, or a Parameter that targets name is never read, on the inputs.
    """
    # Nothing is looked at but how often each host runs: a list with one None for each call.
    calls = observe(model, inputs, dict.fromkeys(site.path for site in sites), lambda *_: None)
    readers = _readers(model, sites, inputs)
    running = {site for site in sites if calls[site.path] or readers[site]}
    # A host that does not run on these inputs, but holds a Parameter that others read, may run on other inputs.
    read = {id(_parameter_of(model, site)) for site in running if site.parameters}
    names_parameters = "targets" in config.model_fields_set
    for site in sites:
        is_idle = site not in running and id(_parameter_of(model, site)) not in read
        if is_idle and site.path not in resting and (not site.parameters or names_parameters):
            raise TargetError(_never_ran(site, model, inputs))
    return _one_for_each_host(
        model, [_with_reader_as_host(site, readers[site], model) if readers[site] else site for site in sites]
    )


def _one_for_each_host(model: nn.Module, sites: Sequence[SiteSpec]) -> list[SiteSpec]:
    """Join sites that have come to the same host at the same Parameter: one site there, under all of its names."""
    kept: dict[object, SiteSpec] = {}
    for site in sites:
        # e.g. an attention that reads one tied Parameter as "a.weight" and as "b.weight": one change, under both names.
        key = (site.path, id(_parameter_of(model, site))) if site.parameters else site
        there = kept.get(key)
        kept[key] = replace(there, parameters=there.parameters + site.parameters) if there else site
    return list(kept.values())


def _readers(model: nn.Module, sites: Sequence[SiteSpec], inputs: ExampleInputs) -> dict[SiteSpec, list[CallStack]]:
    """Map each site → what ran each time that its Parameter was read while the site's host did not run."""
    held: list[tuple[SiteSpec, Holder]] = []
    for site in sites:
        host = model.get_submodule(site.path)
        owners = (owner_at(host, name) for name in site.parameters)
        held += [(site, Holder(owner, leaf, host)) for owner, leaf in owners if owner is not None]
    readers: dict[SiteSpec, list[CallStack]] = {site: [] for site in sites}
    found = reads_around(model, [holder for _, holder in held], inputs) if held else []
    for (site, _), stacks in zip(held, found, strict=True):
        readers[site] += stacks
    return readers


def _never_ran(site: SiteSpec, model: nn.Module, inputs: ExampleInputs) -> str:
    """Write the message for a site that does nothing on the inputs."""
    if site.parameters:
        return (
            f"the Parameter {site.parameters[0]!r} of {site.path!r} was never read on the example inputs; exclude it, or "
            f"wrap the model with inputs that run it: ak.wrap(model, example_inputs=batch)"
        )
    around = runs_around(model, inputs, [site.path])[site.path]
    return (
        f"{site.path!r} never ran on the example inputs: skipped, or its weight is read around it. If {around!r} reads it, "
        f"name the Parameter ({site.path + '.weight'!r}), which is adapted wherever it is read; else exclude it"
    )


def _parameter_of(model: nn.Module, site: SiteSpec) -> nn.Parameter | None:
    """Return the Parameter that a site adapts, if it is at one."""
    return model.get_submodule(site.path).get_parameter(site.parameters[0]) if site.parameters else None


def _with_reader_as_host(site: SiteSpec, readers: Sequence[CallStack], model: nn.Module) -> SiteSpec:
    """Return the site at the innermost module around its host that runs whenever the Parameter is read.

    Args:
        readers: What ran at each of these reads, from the outside in.
    """
    # By `id`, for a module may run under another of its paths than the one that its name here has.
    running = set.intersection(*({id(module) for _, module in stack} for stack in readers))
    # Innermost first. The model itself ("") always runs.
    host = next((path for path in ancestors(site.path) if id(model.get_submodule(path)) in running), "")
    # The names are from the host on, and the host has moved outwards: "weight" at "decoder" becomes "decoder.weight" at "".
    below = site.path.removeprefix(host).lstrip(".")
    names = tuple(f"{below}.{name}".lstrip(".") for name in site.parameters)
    return replace(site, path=host, host=host_type(model.get_submodule(host)), parameters=names)
