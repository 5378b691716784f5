"""Settings of AdapterFusion."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from .settings import DType, Int, Probability, Settings

__all__ = ["FusionConfig"]


class FusionConfig(Settings):
    """How a fusion weighs its adapters.

    With q what it reads, x the tensor at the site, u_i what child i adds:

        alpha = softmax_i((Wk u_i) . (Wq q + bq) / temperature)
        x becomes x + Wv sum_i alpha_i u_i

    Two options of other implementations change nothing and are left out: a bias of the keys adds the same to every score,
    and Wv may stand before or after the sum.

    Args:
        query: Have Wq and bq; without them q itself.
        key: Have Wk; without it u_i itself.
        value: Have Wv; without it (static fusion) u_i itself.
        query_reads: "adapter": q is what the first child reads at the place; "site": the tensor there, before any norm.
        residual_before: Add x to each u_i before Wv, not after the sum.
        value_init: Of Wv, "identity" or "normal" (0.02).
        regularization: Of `kit.fusion_loss()`: this times the squared distance of Wv to the identity.
        temperature: Of the softmax; above 1 the attention is more even.
        temperature_step: How much `kit.anneal_fusion` lowers the temperature, down to 1.
        dropout: Probability of dropping a child at a token in training, in [0, 1).
        children: What is weighed, in JSON; filled in by `kit.add_fusion`.
        seed: Seed of the initialisation; torch's global generator if not given.
        dtype: Of the fusion's parameters; float32 if not given (float64 on a float64 host).

    Reference: Pfeiffer et al. 2021, arXiv:2005.00247.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dynamic": {},
        "static": {"value": False, "regularization": 0.0},
    }

    # No adapter method: the name tells a fusion's file from an adapter's.
    method: Literal["fusion"] = "fusion"
    query: bool = True
    key: bool = True
    value: bool = True
    query_reads: Literal["adapter", "site"] = "adapter"
    residual_before: bool = False
    value_init: Literal["identity", "normal"] = "identity"
    regularization: Annotated[float, Field(ge=0)] = 0.01
    temperature: Annotated[float, Field(gt=0)] = 1.0
    temperature_step: Annotated[float, Field(ge=0)] = 0.0
    dropout: Probability = 0.0
    # As `composition.nodes.to_json` writes them, e.g. ("a", {"type": "Stack", "children": ["b", "c"]}).
    children: tuple[Any, ...] = ()
    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = None
    # `torch.float32` is kept as "float32", which JSON has.
    dtype: Annotated[DType | None, BeforeValidator(lambda dtype: None if dtype is None else str(dtype).split(".")[-1])] = (
        None
    )

    @model_validator(mode="after")
    def _has_effect(self) -> "FusionConfig":
        """Refuse settings that would do nothing."""
        # `value_init` has no value that means "none", so what counts is whether it was given.
        if not self.value and (self.regularization or "value_init" in self.model_fields_set):
            raise ValueError(
                "value=False has no Wv to regularise or initialise: give regularization=0, and no value_init; found "
                f"regularization={self.regularization}, value_init={self.value_init!r}"
            )
        if self.temperature_step and self.temperature <= 1:
            raise ValueError(f"temperature_step lowers a temperature above 1; found temperature={self.temperature}")
        return self
