"""Whether a saved adapter's sites are those that its config means in this model, where its structure decides that."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..config.union import Config
from ..errors import CompatibilityError, TargetError
from ..lifecycle.add import find_sites, needs_structure
from ..placement.spec import SiteSpec
from ..structure.tracing.forward import ExampleInputs

__all__ = ["SitesNotCheckedWarning", "check_places"]

_SHOWN = 3


class SitesNotCheckedWarning(UserWarning):
    """An adapter was loaded whose places depend on the model's structure, and the model could not be traced."""


def check_places(
    model: nn.Module,
    config: Config,
    saved: Sequence[SiteSpec],
    example_inputs: ExampleInputs | None,
    source: Path,
) -> None:
    """Raise unless the config, resolved anew, leads to the saved sites. Of a model that cannot be traced, warn.

    Names and shapes do not tell a pre-norm block from a post-norm one; where an adapter belongs in them does.

    Raises:
        CompatibilityError: it leads elsewhere, or nowhere; says where.
    """
    if not needs_structure(config):
        return
    try:
        found = find_sites(model, config, example_inputs)
    except CompatibilityError as error:
        warnings.warn(
            f"the places of the adapter in {str(source)!r} could not be checked against this {type(model).__name__}, which "
            f"tracing cannot run; if it is built otherwise than the saved one, they are wrong. {error}",
            SitesNotCheckedWarning,
            stacklevel=4,
        )
        return
    except TargetError as error:
        raise _misfit(model, source, str(error)) from error
    unknown = {site.path for site in saved if site.norm is None}
    found = [replace(site, norm=None) if site.path in unknown else site for site in found]
    here, there = ({_key(site): _place(site) for site in sites} for sites in (found, saved))
    differing = [path for path in (there | here) if here.get(path) != there.get(path)]
    if differing:
        pairs = [(path, there.get(path, "no site"), here.get(path, "no site")) for path in differing[:_SHOWN]]
        shown = [f"{path!r}: saved {then}; here {now}" for (path, *_), then, now in pairs]
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise _misfit(model, source, "; ".join(shown) + more)


def _key(site: SiteSpec) -> tuple[str, object]:
    """The host, and which of an adapter's sites there."""
    return site.path, (site.member, site.tag, site.at, site.parameters)


def _place(site: SiteSpec) -> str:
    """Which tensor at the host is adapted, and what is read, in words."""
    part = f" {site.output}" if site.output else ""
    beside = f" with the stream at {site.residual!r}" if site.residual is not None else ""
    norm = f", in a block of norm {site.norm!r}" if site.norm is not None else ""
    parts = f", its parts {[name for name, _ in site.slices]} at {[at for _, at in site.slices]}" if site.slices else ""
    return f"its {site.at}{part}, reading {site.reads}{beside}{norm}{parts}"


def _misfit(model: nn.Module, source: Path, what: str) -> CompatibilityError:
    return CompatibilityError(
        f"the adapter in {str(source)!r} was trained on a model of another structure than this {type(model).__name__}: "
        f"{what}. If the model is the same, give it inputs that run all of it: ak.wrap(model, example_inputs=batch)"
    )
