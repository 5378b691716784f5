"""Fill the empty modules of an adapter with the tensors of a file."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import StoreError
from ..heads.config import CustomHead, OwnHead
from ..lifecycle.build import BuiltModule, device_near
from ..placement.spec import SiteSpec
from ..structure.tracing.forward import outside_inference_mode
from .compare_tensors import check_same
from .saved_adapter import SavedAdapter
from .tensors import dtype_name, tensor_key

__all__ = ["fill"]


class _Share(NamedTuple):
    """One module, and the tensors of the file that are its own.

    Attributes:
        built: The module.
        keys: Map the name of each of its tensors to the tensor's name in the file.
    """

    built: BuiltModule
    keys: Mapping[str, str]

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the module's state dict."""
        return {tensor: tensors[key] for tensor, key in self.keys.items()}


@outside_inference_mode()
def fill(model: nn.Module, modules: Sequence[BuiltModule], saved: SavedAdapter) -> None:
    """Give the empty modules of an adapter its tensors, on their hosts' devices, after checking that all match.

    Raises:
        StoreError: a tensor is missing, unknown, or of another shape than the config asks for; or those of a module are not
            of one floating-point dtype.
    """
    tensors = {**saved.tensors, **saved.head_tensors}
    shares = [_share(built, saved) for built in modules]
    wanted = {key: shape for share in shares for key, shape in _shapes(share).items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    check_same(found, wanted, f"the adapter in {str(saved.source)!r}", "its config")
    for share in shares:
        _check_dtypes(share, share.state(tensors), saved)
    # A user's own module is filled in place: only now, when nothing can fail any more.
    for share in shares:
        _put(model, share.built, share.state(tensors))


def _share(built: BuiltModule, saved: SavedAdapter) -> _Share:
    """Return a module with the names of its tensors in the file."""
    names = built.module.state_dict()
    return _Share(built, {name: saved.key_in_file(tensor_key(built.spec, built.path, name)) for name in names})


def _shapes(share: _Share) -> dict[str, tuple[int, ...]]:
    """Map the names in the file of a module's tensors to the shapes that they must have."""
    return {share.keys[name]: tuple(tensor.shape) for name, tensor in share.built.module.state_dict().items()}


def _check_dtypes(share: _Share, state: Mapping[str, Tensor], saved: SavedAdapter) -> None:
    """Raise StoreError unless the tensors of a module that we build are of one floating-point dtype."""
    spec = share.built.spec
    is_theirs = not isinstance(spec, SiteSpec) and isinstance(spec.config, (OwnHead, CustomHead))  # may hold integers
    dtypes = {dtype_name(tensor) for tensor in state.values()}
    if not is_theirs and (len(dtypes) > 1 or not all(tensor.is_floating_point() for tensor in state.values())):
        raise StoreError(
            f"the adapter in {str(saved.source)!r} has, at {share.built.path!r}, {sorted(dtypes)}: not one float dtype"
        )


def _put(model: nn.Module, built: BuiltModule, state: Mapping[str, Tensor]) -> None:
    """Give a module its tensors, and move it to where its host computes."""
    module, spec = built.module, built.spec
    if isinstance(spec, SiteSpec) or any(parameter.is_meta for parameter in module.parameters()):
        # `assign`: the module is on the meta device, so there is no memory to copy into; the file's dtype stays.
        module.load_state_dict(state, assign=True)
        module.to(device_near(model, built.path))
        return
    # A head with values of its own, whose parameters may be tied to one another: they are kept, and written over.
    module.load_state_dict(state)
    if isinstance(spec.config, CustomHead):  # a copy of the model's own lies where that does
        module.to(device_near(model, built.path))
