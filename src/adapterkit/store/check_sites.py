"""Check that a saved adapter's sites are those that its config means in this model, where its structure decides that."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..config.fusion import FusionConfig
from ..errors import CompatibilityError, TargetError
from ..lifecycle.add import find_sites, needs_structure
from ..placement.spec import SiteSpec
from ..structure.tracing.forward import ExampleInputs
from .saved_adapter import SavedAdapter

__all__ = ["SitesNotCheckedWarning", "check_sites"]

_SHOWN = 3


class SitesNotCheckedWarning(UserWarning):
    """An adapter was loaded whose places depend on the model's structure, and the model could not be traced."""


def check_sites(model: nn.Module, saved: SavedAdapter, example_inputs: ExampleInputs | None) -> None:
    """Raise unless the config, resolved anew, leads to the saved sites. Warn of a model that cannot be traced.

    Names and shapes do not tell a pre-norm block from a post-norm one; where an adapter belongs in them does.

    Raises:
        CompatibilityError: it leads elsewhere, or nowhere; says where.
    """
    config = saved.config
    # A fusion's sites follow from those of its adapters; sites that no file named were found in this very model.
    if isinstance(config, FusionConfig) or saved.sites is None or not needs_structure(config):
        return
    try:
        found = find_sites(model, config, example_inputs)
    except CompatibilityError as error:
        warnings.warn(
            f"the places of the adapter in {str(saved.source)!r} could not be checked against this {type(model).__name__}, "
            f"which tracing cannot run; if it is built otherwise than the saved one, they are wrong. {error}",
            SitesNotCheckedWarning,
            stacklevel=4,  # the line that calls kit.load
        )
        return
    except TargetError as error:
        raise _misfit(model, saved, str(error)) from error
    differing = _differences(found, [site.spec for site in saved.sites])
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise _misfit(model, saved, "; ".join(differing[:_SHOWN]) + more)


def _differences(found: Sequence[SiteSpec], saved: Sequence[SiteSpec]) -> list[str]:
    """Return a text for each site that is in one of the two alone, or reads or adapts another tensor in one of them."""
    # The first files, and sites of which a config did not need the norm, know none: there it is not compared.
    unknown = {site.path for site in saved if site.norm is None}
    found = [replace(site, norm=None) if site.path in unknown else site for site in found]
    here, there = ({_which(site): site for site in sites} for sites in (found, saved))
    return [
        f"{key[0]!r}: saved {_text(there.get(key))}; here {_text(here.get(key))}"
        # A dict of both: a site that only one of them has is None in the other, and so differs.
        for key in there | here
        if _same_as(here.get(key)) != _same_as(there.get(key))
    ]


def _which(site: SiteSpec) -> tuple[str, object]:
    """Return the host's path, and which of an adapter's sites there this is."""
    return site.path, (site.member, site.tag, site.at, site.parameters)


def _same_as(site: SiteSpec | None) -> object:
    """Return what two sites of one host share if they adapt, and read, the same tensors in the same kind of block."""
    # Whether an argument is given by position or by name is up to the inputs, and no matter of the structure.
    return None if site is None else (replace(site.location, input=None), site.norm, site.slices)


def _text(site: SiteSpec | None) -> str:
    """Say which tensor at the host is adapted, and what is read."""
    if site is None:
        return "no site"
    part = f" {site.output}" if site.output else ""
    beside = f" with the stream at {site.residual!r}" if site.residual is not None else ""
    norm = f", in a block of norm {site.norm!r}" if site.norm is not None else ""
    parts = f", its parts {[name for name, _ in site.slices]} at {[at for _, at in site.slices]}" if site.slices else ""
    return f"its {site.at}{part}, reading {site.reads}{beside}{norm}{parts}"


def _misfit(model: nn.Module, saved: SavedAdapter, what: str) -> CompatibilityError:
    """Return the error for a model of another structure."""
    return CompatibilityError(
        f"the adapter in {str(saved.source)!r} was trained on a model of another structure than this "
        f"{type(model).__name__}: {what}. If the model is the same, give it inputs that run all of it: "
        "ak.wrap(model, example_inputs=batch)"
    )
