"""What the types of modules tell about themselves: feature width, feature axis, weight, whether a hook on them fires.

There is one table of `HostType`s. It holds torch's own layers; other packages add theirs, and nothing here changes:

    [project.entry-points."adapterkit.hosts"]          # in the pyproject.toml of a package
    int8 = "adapterkit_int8:INT8_LINEAR"               # a HostType, several, or a function that returns them

    register_host(HostType((Int8Linear,), shape=…))    # or in a notebook

A module is described by the nearest of its classes that stands in the table: a subclass of `nn.Linear` that nobody
describes counts as an `nn.Linear`. Everything else is learned from a trace of example inputs; nothing is read from a
model's config.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from torch import nn

from ..errors import ConfigError, TargetError
from .paths import SITE
from .plugins import describe, load, points_in

__all__ = [
    "HostShape",
    "HostType",
    "all_hosts",
    "channel_axis",
    "described_projection",
    "holds_described_weights",
    "host_type",
    "is_called",
    "is_more_than_a_norm",
    "is_norm",
    "known_shape",
    "note_of_unread_packages",
    "product_names",
    "register_host",
    "resolve_host",
    "table_version",
]

_GROUP = "adapterkit.hosts"

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Modules whose axis 1 is the channel, whatever they hold.
_CHANNELS_FIRST = (
    *_CONV, *_BATCH_NORM, nn.SyncBatchNorm, nn.GroupNorm, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.PixelShuffle, nn.LocalResponseNorm,
)  # fmt: skip


@dataclass(frozen=True)
class HostShape:
    """Widths of a host's output and input, in features, and the axis that they lie on.

    Attributes:
        width: Features of the output.
        input_width: Features of the input; None if the type does not tell.
        axis: The axis of the features: -1 for tokens, -3 for images (batch, channels, height, width).
    """

    width: int
    input_width: int | None = None
    axis: int = -1


@dataclass(frozen=True)
class HostType:
    """What a class of modules tells about itself, before it has run.

    What is left out is what the next class in the module's `__mro__` tells, `nn.Linear` for a subclass of it.

    Attributes:
        classes: The module classes that this describes, with the classes that derive from them.
        shape: Takes a module; returns the widths of its output and input, or None if this one cannot tell.
        projection: Takes a module that multiplies its input by a weight; returns the geometry of that weight, an
            `adapterkit.hosts.Projection`. LoRA and its like then add beside the module, however the weight is stored.
        is_called: Whether a model calls such a module. False for a container whose children are called, as `nn.ModuleList`.
        products: The operators of `torch.ops` that multiply an input by a weight in its forward, such as
            "mylib::int8_linear". Roles (`@attention.q`) are found by looking for products; those of torch are known.

    Raises:
        ConfigError: a class is no module class, or a product has no namespace.
    """

    classes: tuple[type[nn.Module], ...]
    shape: Callable[[Any], HostShape | None] | None = None
    # `Projection` belongs to the room beside this one, so it passes through unseen; `placement.projections` checks it.
    projection: Callable[[Any], object | None] | None = None
    is_called: bool = True
    products: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple) or not self.classes or not all(map(_is_module_class, self.classes)):
            raise ConfigError(f"a HostType's classes must be a tuple of nn.Module classes; found {self.classes!r}")
        bare = [name for name in self.products if "::" not in name]
        if isinstance(self.products, str) or bare:
            raise ConfigError(
                f"a HostType's products must be a tuple of operators with their namespaces, such as "
                f"('mylib::int8_linear',); found {self.products!r}"
            )


def known_shape(module: nn.Module) -> HostShape | None:
    """Return what the type of a module tells of its widths; None if it tells nothing.

    Raises:
        ConfigError: the function that a package gave returned something else.
    """
    tell = next((found.shape for found in _described(module) if found.shape is not None), None)
    shape = None if tell is None else tell(module)
    if shape is not None and not isinstance(shape, HostShape):
        raise ConfigError(f"the HostType of {type(module).__name__} must give a HostShape as its shape; found {shape!r}")
    return shape


def described_projection(module: nn.Module) -> object | None:
    """Return the geometry of the weight that a module applies, as a package describes it; None if none does.

    That of torch's own layers is known to `nn.functional.projections`; `placement.projections` joins the two.
    """
    tell = next((found.projection for found in _described(module) if found.projection is not None), None)
    return None if tell is None else tell(module)


def holds_described_weights(module: nn.Module) -> bool:
    """Tell whether a module is, or holds, a layer with a weight that a package describes.

    Such a weight need not be a Parameter (quantised ones are buffers), so counting Parameters would miss it.
    """
    return any(found.projection is not None for inner in module.modules() for found in _described(inner))


def is_called(module: nn.Module) -> bool:
    """Tell whether a model calls a module of this type, so that hooks on it fire: it calls no `nn.ModuleList`."""
    return next((found.is_called for found in _described(module)), True)


def product_names() -> frozenset[str]:
    """Return the operators that multiply an input by a weight, as packages name them: {"mylib::int8_linear"}.

    Raises:
        ConfigError: a package cannot be asked. An operator that it would name may then hide a whole branch of the model.
    """
    return frozenset(name for found in all_hosts() for name in found.products)


def all_hosts() -> list[HostType]:
    """Return every HostType: torch's, those of installed packages, those of `register_host`.

    Raises:
        ConfigError: a package's cannot be loaded, or describe a class that is described already.
    """
    brought, problems = _from_packages()
    if problems:
        raise ConfigError("; ".join(problems))
    return list(dict.fromkeys((*_TORCHS.values(), *brought.values(), *_REGISTERED.values())))


def register_host(host: HostType) -> None:
    """Describe layers of your own to this process: what an entry point does for a package.

    Describing a class again, as a notebook's cell does when it is run a second time, replaces the first description.

    Raises:
        ConfigError: one of the classes is torch's, or a package describes it.
    """
    taken = {**_from_packages()[0], **_TORCHS}
    _check_free(host, taken, "register_host")
    _REGISTERED.update(dict.fromkeys(host.classes, host))
    _VERSIONS.append(host)


def table_version() -> int:
    """Count the calls of `register_host`: what was found by an older table is to be found anew."""
    return len(_VERSIONS)


def note_of_unread_packages() -> str:
    """Return a sentence about packages whose host types could not be loaded, to end a message with; empty if all could.

    Types are looked up at every layer of every model, so one bad package is no error there: it would be in everyone's way.
    But where a layer turns out to be unknown, that package may be the reason.
    """
    problems = _from_packages()[1]
    return f". Layers of other packages may be unknown: {'; '.join(problems)}" if problems else ""


def _described(module: nn.Module) -> Iterator[HostType]:
    """Yield what describes a module, the nearest of its classes first."""
    # Torch's own classes are described here alone, so for a model made of them no package is imported.
    tables: Sequence[Mapping[type, HostType]] = (_TORCHS,)
    if not type(module).__module__.startswith("torch.nn."):
        tables = (_REGISTERED, _from_packages()[0], _TORCHS)
    for kind in type(module).__mro__:
        yield from (table[kind] for table in tables if kind in table)


@cache
def _from_packages() -> tuple[Mapping[type[nn.Module], HostType], tuple[str, ...]]:
    """Load the host types of installed packages, once: map class → HostType; and a sentence for each that brings none."""
    brought: dict[type[nn.Module], HostType] = {}
    problems: list[str] = []
    for point in points_in(_GROUP):
        try:
            found = _types_at(point)
            for host in found:
                _check_free(host, {**brought, **_TORCHS}, describe(point))
        except ConfigError as error:
            problems.append(str(error))  # and go on: the other packages are as good as before
        else:
            brought |= {kind: host for host in found for kind in host.classes}
    return brought, tuple(problems)


def _types_at(point: EntryPoint) -> list[HostType]:
    """Return the host types that an entry point leads to.

    Raises:
        ConfigError: it cannot be loaded, or leads to something else.
    """
    found = load(point)
    try:
        found = found() if callable(found) else found
        types = [found] if isinstance(found, HostType) else list(found)
    except Exception as error:  # the package's own function may raise anything
        raise ConfigError(f"{describe(point)} gives no HostType: {error!r}") from error
    if not all(isinstance(host, HostType) for host in types):
        raise ConfigError(f"{describe(point)} must lead to a HostType, or to several; found {types!r}")
    return types


def _check_free(host: HostType, taken: Mapping[type[nn.Module], HostType], who: str) -> None:
    """Raise ConfigError if a class of this HostType is described already: one description would hide the other."""
    for kind in host.classes:
        if kind in taken:
            raise ConfigError(
                f"{who} describes {kind.__module__}.{kind.__qualname__}, which is described already; derive a class from "
                "it, and describe that"
            )


def _is_module_class(kind: object) -> bool:
    """Tell whether a value is a class of modules."""
    return isinstance(kind, type) and issubclass(kind, nn.Module)


# --- torch's own ------------------------------------------------------------------------------------------------------


def _of_vectors(norm: Any) -> HostShape | None:
    """Return the width of a norm over the last axis; None if it is over several, or over others."""
    if len(norm.normalized_shape) != 1 or not _is_torchs_own(norm):
        return None
    return HostShape(norm.normalized_shape[0], norm.normalized_shape[0])


def _recurrent(rnn: Any) -> HostShape:
    """Return the widths of an LSTM, GRU or RNN."""
    width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)  # both directions lie side by side
    return HostShape(width, rnn.input_size)


def _by_class(*hosts: HostType) -> dict[type[nn.Module], HostType]:
    """Map each class to the HostType that describes it."""
    return {kind: host for host in hosts for kind in host.classes}


_TORCHS: Mapping[type[nn.Module], HostType] = _by_class(
    HostType((nn.Linear,), lambda m: HostShape(m.out_features, m.in_features)),
    HostType((nn.Bilinear,), lambda m: HostShape(m.out_features)),  # it takes two inputs
    HostType((nn.Embedding, nn.EmbeddingBag), lambda m: HostShape(m.embedding_dim)),  # ids have no features
    HostType((nn.LayerNorm, nn.RMSNorm), _of_vectors),
    HostType((nn.GroupNorm,), lambda m: HostShape(m.num_channels, m.num_channels, axis=1)),
    HostType((*_BATCH_NORM, nn.SyncBatchNorm), lambda m: HostShape(m.num_features, m.num_features, axis=1)),
    HostType(_CONV, lambda m: HostShape(m.out_channels, m.in_channels, axis=-len(m.kernel_size) - 1)),
    HostType((nn.LSTM, nn.GRU, nn.RNN), _recurrent),
    HostType((nn.LSTMCell, nn.GRUCell, nn.RNNCell), lambda m: HostShape(m.hidden_size, m.input_size)),
    HostType((nn.MultiheadAttention,), lambda m: HostShape(m.embed_dim, m.embed_dim)),
    HostType(
        (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
        lambda m: HostShape(m.self_attn.embed_dim, m.self_attn.embed_dim),
    ),
    HostType((nn.TransformerEncoder, nn.TransformerDecoder), lambda m: known_shape(m.layers[-1])),
    HostType((nn.Transformer,), lambda m: HostShape(m.d_model, m.d_model)),
    HostType((nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict), is_called=False),
    # The output projection of an nn.MultiheadAttention, which reads its weight and never calls it.
    HostType((nn.modules.linear.NonDynamicallyQuantizableLinear,), is_called=False),
)
_REGISTERED: dict[type[nn.Module], HostType] = {}
_VERSIONS: list[HostType] = []


# --- what follows from the table --------------------------------------------------------------------------------------


def host_type(module: nn.Module) -> str:
    """Return the name of the module's class in torch.nn where it is one or derives from one, else of its own class."""
    for base in type(module).__mro__:
        if base.__module__.startswith("torch.nn.modules.") and base is not nn.Module:
            return base.__name__
    return type(module).__name__


def channel_axis(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Tell the axis of the features in an output of this shape from what the module holds; None if that does not tell.

    Evidence for axis 1: the module is, or holds, a layer of images or signals with as many channels. Evidence for the
    last axis: it holds a Linear, an Embedding or a norm of that width. Up to three axes, no evidence means the last.

    Example: an output (2, 6, 5, 5) of `Sequential(Conv2d(3, 6, 3), ReLU())` has its features on axis 1, for the
    convolution has 6 channels, and nothing inside is 5 wide.
    """
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    evidence = [_evidence(inner, shape) for inner in module.modules()]
    first, last = any(is_first for is_first, _ in evidence), any(is_last for _, is_last in evidence)
    if first != last:
        return 1 if first else -1
    # Both, or neither. Tensors of tokens have three axes, and those of vectors two; an image of four could be either.
    return -1 if len(shape) <= 3 and not first else None


def _evidence(module: nn.Module, shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Tell whether one module speaks for features on axis 1, and whether for features on the last, of this shape."""
    known = known_shape(module)
    if known is None:  # a norm written by hand tells its width by its vectors, but not the axis that they lie along
        vectors = () if is_more_than_a_norm(module) else module.parameters(recurse=False)
        widths = {p.shape[0] for p in vectors if p.dim() == 1}
        return len(shape) > 2 and shape[1] in widths, shape[-1] in widths
    if known.axis == -1:
        return False, known.width == shape[-1]
    # A convolution says how many axes come after the channels (-3: two); a BatchNorm (1) takes any number of them.
    spatial = -known.axis - 1 if known.axis < 0 else None
    return len(shape) > 2 and known.width == shape[1] and spatial in (None, len(shape) - 2), False


def _is_torchs_own(module: nn.Module) -> bool:
    """Tell whether the module's forward is that of torch.nn, not of a class that derives from it and may use other axes."""
    return type(module).forward.__module__.startswith("torch.nn.")


def is_more_than_a_norm(module: nn.Module) -> bool:
    """Tell whether a module has children or matrices of its own."""
    return any(name != SITE for name in module._modules) or any(p.dim() > 1 for p in module.parameters(recurse=False))


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises: one of torch.nn's, or one named "norm" whose only weights are vectors."""
    own = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase))
    return own or ("norm" in type(module).__name__.lower() and not is_more_than_a_norm(module))


def resolve_host(path: str, modules: dict[str, nn.Module], *, at_input: bool) -> str:
    """Return the path of the module whose hook sees what the module at `path` returns (`at_input`: takes).

    It is that module itself, but for `nn.Sequential`, in which nothing can be registered without being run: its output
    is its last child's output, its input its first child's input.

    Raises:
        TargetError: the module is never called, or is read around, so that a hook on it would not fire.
    """
    module = modules[path]
    if isinstance(module, nn.Sequential):
        return resolve_host(_end_of_sequential(path, module, modules, at_input=at_input), modules, at_input=at_input)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        parent = path.rpartition(".")[0]
        raise TargetError(
            f"{path!r} is the output projection of an nn.MultiheadAttention, whose weight is read around its module: a "
            f"hook on it never fires. Target {parent!r} (its output is adapted), and exclude {path!r} if a wide pattern "
            "matched it."
        )
    if not is_called(module):
        kind = type(module)
        name = f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
        raise TargetError(f"{path!r} is an {name}, which is never called as it is; target its children: '{path}.*'")
    if "ScriptModule" in {base.__name__ for base in type(module).__mro__}:
        raise TargetError(f"{path!r} is a TorchScript module, whose hooks cannot run Python; adapt the model before it")
    return path


def _end_of_sequential(path: str, module: nn.Sequential, modules: dict[str, nn.Module], *, at_input: bool) -> str:
    """Return the path of the child that returns what an `nn.Sequential` returns, or takes what it takes.

    Raises:
        TargetError: there is none, it computes something else, or a hook on it would fire elsewhere, too.
    """
    if type(module).forward is not nn.Sequential.forward:
        raise TargetError(f"{path!r} is an nn.Sequential with a forward of its own; target one of its layers")
    names = list(module._modules)
    if not names:
        raise TargetError(f"{path!r} is an empty nn.Sequential: it holds no layer to adapt")
    child = f"{path}.{names[0 if at_input else -1]}".removeprefix(".")
    holders = {id(other): other for other in modules.values()}.values()  # each module once, whatever names it has
    if sum(held is modules[child] for other in holders for held in other._modules.values()) > 1:
        raise TargetError(
            f"{path!r} is an nn.Sequential whose {'first' if at_input else 'last'} layer {child!r} is used elsewhere "
            f"too; target {child!r} itself to adapt it everywhere"
        )
    return child
