"""IA3 as a method."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import nn

from ..config.settings import AdapterConfig, Targets
from ..errors import TargetError
from ..nn import ia3  # the module: its class is called IA3, as the method is
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from ..placement.weights import projection_at

__all__ = ["IA3", "IA3Config"]


class IA3Config(AdapterConfig):
    """Scale activations by trained vectors, one at first: keys and values, and what is between the feed-forward's layers.

    Args:
        targets: Projections whose output is scaled; the papers': the attention's key and value. Of a projection that is
            fused for query, key and value, the role names a slice. () for none.
        feedforward_targets: Projections whose input is scaled: the last of each feed-forward. () for none. Beside
            targets of your own the default may match nothing: outside of transformers it does.

    Every other setting: see `AdapterConfig`.

    Reference: Liu et al. 2022, arXiv:2205.05638.
    """

    method: Literal["ia3"] = "ia3"
    targets: Targets = ("@attention.k", "@attention.v")
    feedforward_targets: Targets = ("@feedforward.last",)

    @property
    def names_targets_alone(self) -> bool:
        """Tell whether the targets are others than the papers', and the feed-forward's are not."""
        # By value: which settings were given is not in a file.
        is_default = {name: getattr(self, name) == field.default for name, field in type(self).model_fields.items()}
        return is_default["feedforward_targets"] and not is_default["targets"]

    @model_validator(mode="after")
    def _check(self) -> "IA3Config":
        if not self.targets and not self.feedforward_targets:
            raise ValueError("targets=() and feedforward_targets=() leave nothing to scale; name some in either")
        return self


class IA3:
    """Trained scales of activations."""

    name = "ia3"
    config_type = IA3Config
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ia3": {}}
    neutral = 1.0  # a scale of one leaves an activation as it is: see `LinearInParameters`

    def placements(self, config: IA3Config) -> tuple[Placement, ...]:
        """Place modules on the output of targets, and on the input of feed-forward targets."""
        outputs = Placement(level="projection", tag="output")
        # Whoever names targets need not have a transformer: then the default finds no feed-forward, and that is no error.
        inputs = Placement(
            at="input",
            level="projection",
            targets=tuple(config.feedforward_targets),
            is_optional=config.names_targets_alone,
            tag="input",
        )
        # An empty list of targets makes no placement: a tuple times False is ().
        return (outputs,) * bool(config.targets) + (inputs,) * bool(config.feedforward_targets)

    def build(self, config: IA3Config, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> ia3.IA3:
        """Build a vector of the site's width, or of that of its slices."""
        # e.g. `in_proj_weight` of an nn.MultiheadAttention: its keys and values are never the output of a module.
        if site.parameters:
            raise TargetError(
                f"IA3 scales what {site.path!r} computes from {site.parameters[0]!r} and a bias inside itself, where "
                "no hook reaches it; use LoRA there, or target the feed-forward alone"
            )
        scales: Literal["output", "input"] = "input" if site.at == "input" else "output"
        return ia3.IA3(site.width, scales=scales, projection=projection_at(site, host), slices=site.slices, dtype=dtype)
