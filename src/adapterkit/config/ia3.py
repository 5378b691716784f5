"""Settings of IA3."""

from typing import Literal

from pydantic import model_validator

from .base import AdapterConfig, Targets

__all__ = ["IA3Config"]


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
        """Whether the targets are others than the papers', and the feed-forward's are not."""
        # By value: which settings were given is not in a file.
        is_default = {name: getattr(self, name) == field.default for name, field in type(self).model_fields.items()}
        return is_default["feedforward_targets"] and not is_default["targets"]

    @model_validator(mode="after")
    def _check(self) -> "IA3Config":
        if not self.targets and not self.feedforward_targets:
            raise ValueError("targets=() and feedforward_targets=() leave nothing to scale; name some in either")
        return self
