"""Sites at modules that run: a Parameter that is read around the module that holds it has the reader for its host."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .config.base import AdapterConfig
from .errors import TargetError
from .hosts import host_type
from .patterns import ancestors
from .reads import reads_around
from .sites import SiteSpec
from .structure.trace import ExampleInputs, observe, runs_around

__all__ = ["at_running_hosts"]


def at_running_hosts(
    model: nn.Module, sites: Sequence[SiteSpec], config: AdapterConfig, inputs: ExampleInputs
) -> list[SiteSpec]:
    """The sites, those at Parameters that are read around the modules that hold them with the reader for their host.

    Raises:
        TargetError: a projection never runs, or a Parameter that targets name is never read, on the inputs.
    """
    calls = observe(model, inputs, dict.fromkeys(site.path for site in sites), lambda *_: None)
    idle = {site.path: site for site in sites if not calls[site.path]}
    if not idle:
        return list(sites)
    held = {id(_parameter(model, site)): model.get_submodule(path) for path, site in idle.items() if site.parameters}
    readers = reads_around(model, held, inputs)
    kept = []
    for site in sites:
        reader = readers.get(id(_parameter(model, site))) if site.path in idle and site.parameters else None
        if reader is not None:
            site = _moved(site, reader, model)  # noqa: PLW2901  # the same site, elsewhere
        elif site.path in idle and (not site.parameters or "targets" in config.model_fields_set):
            raise TargetError(_never(site, model, inputs))
        kept.append(site)
    return kept


def _never(site: SiteSpec, model: nn.Module, inputs: ExampleInputs) -> str:
    """The message for a site that does nothing on the inputs."""
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


def _parameter(model: nn.Module, site: SiteSpec) -> nn.Parameter | None:
    """The Parameter that a site adapts, if it is at one."""
    return model.get_submodule(site.path).get_parameter(site.parameters[0]) if site.parameters else None


def _moved(site: SiteSpec, reader: str, model: nn.Module) -> SiteSpec:
    """The site with the innermost module around both its host and a reader for its host."""
    host = next(path for path in ancestors(reader) if path in ancestors(site.path))
    below = site.path.removeprefix(host).lstrip(".")
    names = tuple(f"{below}.{name}".lstrip(".") for name in site.parameters)
    return replace(site, path=host, host=host_type(model.get_submodule(host)), parameters=names)
