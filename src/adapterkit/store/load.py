"""Load an adapter: read it, check it against the model, admit it. The model is touched last, or not at all."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..lifecycle.admit import admit, modules_for
from ..lifecycle.attach import check_free
from ..structure.tracing.forward import ExampleInputs
from .check_base import warn_of_other_base
from .check_heads import check_heads
from .check_sites import check_sites
from .check_structure import check_structure
from .draft import draft_of, with_layouts
from .fill import fill
from .readers import read_adapter
from .refusal import refusing

__all__ = ["load_adapter"]


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    heads: bool | Mapping[str, nn.Module] = True,
    any_base: bool = False,
    example_inputs: ExampleInputs | None = None,
) -> str:
    """Attach a saved adapter, without activating it, and return its name.

    Args:
        model: The model that it is for.
        directory: A folder of any format in `readers.READERS`.
        name: Another name than it was saved under.
        heads: Bring its heads as well; as a mapping, with these modules, by the heads' names, for those that a file cannot
            hold: `CustomHead`s, which are filled with the file's tensors.
        any_base: Say nothing if the model's weights are not those it was trained on (its structure must be, always); let
            a fusion weigh adapters of the names that it knows, whatever they hold.
        example_inputs: Inputs to trace the model with, where its structure decides on the sites; else tiny ones are made.

    Raises:
        StoreError: the files are missing, damaged, hostile or too new, or have a head whose module was not given.
        CompatibilityError: the model's structure differs at the adapter's sites, or its config leads to others; or an
            adapter that a fusion weighs is not there. Says which.
        TargetError: its gate, or its stochastic depth, would take another axis for that of the rows.
        AdapterNameError: the name is taken.
    """
    saved = read_adapter(Path(directory))
    name = saved.name if name is None else name
    # Cheap, so it comes before all that looks at the model.
    check_free(model, name)
    if heads is False:
        saved = saved.without_heads()
    # What the model has comes first: that an adapter is for another model explains most of what would go wrong below.
    check_structure(model, saved)
    found = check_heads(model, saved, heads if isinstance(heads, Mapping) else {})
    draft = draft_of(model, saved, name, any_base=any_base, example_inputs=example_inputs)
    draft = replace(draft, heads=found)
    with refusing(saved.source):
        # On the meta device: whatever sizes a hostile config asks for, no memory is taken. `fill` compares the shapes.
        modules = modules_for(model, draft, meta=True)
    # This may trace the model, which costs forwards: after all that names and types can refuse.
    check_sites(model, saved, example_inputs)
    draft = with_layouts(model, draft, example_inputs)
    fill(model, modules, saved)
    # Before the model is touched: a filter may turn the warning into an error.
    if not any_base:
        warn_of_other_base(model, saved)
    admit(model, draft, modules)
    return name
