"""Check the heads of a saved adapter, and give them the modules that a file cannot hold."""

from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import ConfigError, StoreError
from ..heads.config import CustomHead, HeadConfig, OwnHead, head_from
from ..heads.find import FoundHead
from ..heads.spec import HeadSpec
from .saved_adapter import SavedAdapter, SavedHead

__all__ = ["check_heads"]


def check_heads(model: nn.Module, saved: SavedAdapter, given: Mapping[str, nn.Module]) -> list[FoundHead]:
    """Return the heads of a saved adapter, each with its module if one was given for it.

    Args:
        given: Map the name of each CustomHead to the module that is to be filled.

    Raises:
        StoreError: a head is none, or needs a module that was not given; a module is given for none that needs one.
    """
    source = str(saved.source)
    found = [_found(head, given, source) for head in saved.heads]
    _check_given(model, [str(head.spec.config.name) for head in found if _is_custom(head)], given, source)
    # Two heads on the output may live at one host, each under its name; in a module's place there is room for one.
    replaced = [head.path for head in found if head.is_in_place]
    if len(set(replaced)) < len(replaced):
        raise StoreError(f"the adapter in {source!r} names a head twice: {sorted(replaced)}")
    return found


def _found(head: SavedHead, given: Mapping[str, nn.Module], source: str) -> FoundHead:
    """Return one head, after checking that its settings agree with its place."""
    config = _config_of(head, source)
    # What takes the place of a module says which; all other heads are on the output.
    target = config.target if isinstance(config, (OwnHead, CustomHead)) else None
    if target != (head.path if head.above is None else None):
        raise StoreError(f"the head {config.name!r} in {source!r} contradicts its place, {head.path!r}")
    spec = HeadSpec(config, head.above, head.width, head.takes_mask, head.embedding)
    module = given.get(str(config.name)) if isinstance(config, CustomHead) else None
    return FoundHead(head.path, spec, module, head.vocabulary)


def _config_of(head: SavedHead, source: str) -> HeadConfig:
    """Return the settings of a head. Raises StoreError: they are none."""
    try:
        # Before there were kinds of heads, each was a copy of the model's own.
        return OwnHead(head.path, name=head.path) if head.config is None else head_from(head.config)
    except ConfigError as error:
        raise StoreError(f"the adapter in {source!r} has a head that is none: {error}") from error


def _is_custom(head: FoundHead) -> bool:
    return isinstance(head.spec.config, CustomHead)


def _check_given(model: nn.Module, custom: Sequence[str], given: Mapping[str, nn.Module], source: str) -> None:
    """Raise StoreError unless the modules that are given are those that the heads called `custom` need."""
    missing, unknown = sorted(set(custom) - given.keys()), sorted(given.keys() - set(custom))
    if missing:
        raise StoreError(
            f"the heads {missing} of the adapter in {source!r} are modules of someone's own, which files do not hold: "
            f"give them, kit.load(…, heads={{{missing[0]!r}: MyModule()}}), or leave all heads out with heads=False"
        )
    if unknown:
        raise StoreError(f"heads={unknown}: the adapter in {source!r} takes modules for {sorted(custom) or 'none'}")
    # A given module is filled in place: one that is already in the model would be written over.
    theirs = {id(p) for p in model.parameters()}
    for name, module in given.items():
        if not isinstance(module, nn.Module) or any(id(p) in theirs for p in module.parameters()):
            raise StoreError(f"heads={{{name!r}: …}} takes a module that the model has not; found {type(module).__name__}")
