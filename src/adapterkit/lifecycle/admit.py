"""The one door through which adapters and fusions enter a model: drafted, built, attached; all or nothing.

`add`, `load`, `combine` and `add_fusion` differ in where a draft and the values of its modules come from, nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..config.fusion import FusionConfig
from ..config.union import Config
from ..heads.find import FoundHead, check_apart, check_names
from ..placement.spec import SiteSpec
from ..runtime.lookup import fusions_of
from ..structure.tracing.row_layout import SeenRows
from .activate import check_plans
from .attach import attach, detach, state_of
from .build import BuiltModule, build_fusion_modules, build_head_modules, build_modules

__all__ = ["AdapterDraft", "admit", "modules_for"]


@dataclass(frozen=True)
class AdapterDraft:
    """An adapter, or a fusion, before it is in the model.

    Attributes:
        name: Its name, which no other adapter has.
        config: Its config; a FusionConfig makes it a fusion.
        sites: Where its modules go, in the order in which they are built.
        heads: The heads that it owns.
        layouts: What was seen of where rows lie in the model's tensors; None if nothing was looked at.
    """

    name: str
    config: Config | FusionConfig
    sites: Sequence[SiteSpec]
    heads: Sequence[FoundHead] = ()
    layouts: SeenRows | None = None


def modules_for(model: nn.Module, draft: AdapterDraft, *, meta: bool = False) -> list[BuiltModule]:
    """Check that the parts of a draft go together, and build its modules; the model is not touched.

    Args:
        meta: Build what is new without memory or values, for a file or a sum to fill.

    Raises:
        ConfigError: two heads have one name, or one place.
        TargetError: a site or head lies in a head that is replaced, or a module cannot be built at its site.
    """
    replaced = [head.path for head in draft.heads if head.is_in_place]
    check_names([head.spec for head in draft.heads], replaced)
    check_apart([site.path for site in draft.sites], replaced)
    if isinstance(draft.config, FusionConfig):
        modules = build_fusion_modules(model, draft.config, draft.sites, meta=meta)
    else:
        modules = build_modules(model, draft.config, draft.sites, meta=meta)
    # Sites first, in the draft's order: `combine` pairs them with their tensors by position.
    return modules + build_head_modules(model, draft.heads, meta=meta)


def admit(model: nn.Module, draft: AdapterDraft, modules: Sequence[BuiltModule] | None = None) -> None:
    """Attach a draft: after this the model has the adapter, or an error was raised and the model is as it was.

    Args:
        modules: What `modules_for` made of the draft, with the values that they are to have; built anew if not given.

    Raises:
        AdapterNameError: the name is taken, or cannot be a name.
        CompatibilityError: parts of the model were wrapped apart, what is active could not run any more, or the adapters
            that a fusion weighs cannot act together.
    """
    attach(model, draft.name, draft.config, modules_for(model, draft) if modules is None else modules, draft.layouts)
    if isinstance(draft.config, FusionConfig):
        # Not before: a plan of the fusion needs its modules, which must be in the sites.
        try:
            check_plans(model, state_of(model), fusions_of(model)[draft.name])
        except BaseException:  # an interrupt must not leave the fusion there either
            detach(model, draft.name)
            raise
