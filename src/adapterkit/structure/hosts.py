"""What the types of torch.nn tell about themselves: feature width, feature axis, whether a hook on them fires.

Everything else is learned from a trace of example inputs; nothing is read from a model's config.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TargetError
from .paths import SITE

__all__ = ["HostShape", "channel_axis", "host_type", "is_more_than_a_norm", "is_norm", "known_shape", "resolve_host"]

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
    """Widths of a host's output and input, in features, and the axis that they lie on. None: the type does not tell."""

    width: int
    input_width: int | None = None
    axis: int = -1


def known_shape(module: Any) -> HostShape | None:
    """What the type of a standard torch.nn layer tells; None for every other module."""
    match module:
        case nn.Linear() | nn.Bilinear():
            inputs = module.in_features if isinstance(module, nn.Linear) else None
            return HostShape(module.out_features, inputs)
        case nn.Embedding() | nn.EmbeddingBag():
            return HostShape(module.embedding_dim)
        case nn.LayerNorm() | nn.RMSNorm() if len(module.normalized_shape) == 1 and _is_torchs_own(module):
            return HostShape(module.normalized_shape[0], module.normalized_shape[0])
        case nn.LSTM() | nn.GRU() | nn.RNN():
            width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
            return HostShape(width, module.input_size)
        case nn.LSTMCell() | nn.GRUCell() | nn.RNNCell():
            return HostShape(module.hidden_size, module.input_size)
        case nn.MultiheadAttention():
            return HostShape(module.embed_dim, module.embed_dim)
        case nn.TransformerEncoderLayer() | nn.TransformerDecoderLayer():
            return HostShape(module.self_attn.embed_dim, module.self_attn.embed_dim)
        case nn.TransformerEncoder() | nn.TransformerDecoder():
            return known_shape(module.layers[-1])
        case nn.Transformer():
            return HostShape(module.d_model, module.d_model)
        case nn.GroupNorm():
            return HostShape(module.num_channels, module.num_channels, axis=1)
        case _ if isinstance(module, _CONV):
            return HostShape(module.out_channels, module.in_channels, axis=-len(module.kernel_size) - 1)
        case _ if isinstance(module, (*_BATCH_NORM, nn.SyncBatchNorm)):
            return HostShape(module.num_features, module.num_features, axis=1)
    return None


def host_type(module: nn.Module) -> str:
    """The name of the module's class in torch.nn where it is one or derives from one, else of its own class."""
    for base in type(module).__mro__:
        if base.__module__.startswith("torch.nn.modules.") and base is not nn.Module:
            return base.__name__
    return type(module).__name__


def channel_axis(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """The axis of the features in an output of this shape, by what the module is made of; None if it does not tell.

    Evidence for axis 1: the module is, or holds, a layer of images or signals with as many channels. Evidence for the
    last axis: it holds a Linear, an Embedding or a norm of that width. Up to three axes, no evidence means the last.
    """
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    first = last = False
    for part in module.modules():
        known = known_shape(part)
        if known is None:
            widths = (
                {p.shape[0] for p in part.parameters(recurse=False) if p.dim() == 1}
                if not is_more_than_a_norm(part)
                else set()
            )
            first |= len(shape) > 2 and shape[1] in widths
            last |= shape[-1] in widths
            continue
        if isinstance(part, _CHANNELS_FIRST):
            spatial = len(part.kernel_size) if isinstance(part, _CONV) else None
            first |= len(shape) > 2 and known.width == shape[1] and spatial in (None, len(shape) - 2)
        else:
            last |= known.width == shape[-1]
    if first != last:
        return 1 if first else -1
    return -1 if len(shape) <= 3 and not first else None


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether the module's forward is that of torch.nn, not of a class that derives from it and may use other axes."""
    return type(module).forward.__module__.startswith("torch.nn.")


def is_more_than_a_norm(module: nn.Module) -> bool:
    """Whether a module has children or matrices of its own."""
    return any(name != SITE for name in module._modules) or any(p.dim() > 1 for p in module.parameters(recurse=False))


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: one of torch.nn's, or one with "norm" in its name and vectors for its only weights."""
    own = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase))
    return own or ("norm" in type(module).__name__.lower() and not is_more_than_a_norm(module))


def resolve_host(path: str, modules: dict[str, nn.Module], *, at_input: bool) -> str:
    """The path of the module whose hook sees what the module at `path` takes or returns.

    It is that module itself, but for `nn.Sequential`, in which nothing can be registered without being run: its output
    is its last child's output, its input its first child's input.

    Raises:
        TargetError: the module is never called, or is read around, so that a hook on it would not fire.
    """
    module = modules[path]
    if isinstance(module, nn.Sequential):
        if type(module).forward is not nn.Sequential.forward:
            raise TargetError(f"{path!r} is an nn.Sequential with a forward of its own; target one of its layers")
        names = list(module._modules)
        if not names:
            raise TargetError(f"{path!r} is an empty nn.Sequential: it holds no layer to adapt")
        child = f"{path}.{names[0 if at_input else -1]}".removeprefix(".")
        holders = {id(other): other for other in modules.values()}.values()
        if sum(held is modules[child] for other in holders for held in other._modules.values()) > 1:
            raise TargetError(
                f"{path!r} is an nn.Sequential whose {'first' if at_input else 'last'} layer {child!r} is used elsewhere "
                f"too; target {child!r} itself to adapt it everywhere"
            )
        return resolve_host(child, modules, at_input=at_input)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        name = type(module).__name__
        raise TargetError(f"{path!r} is an nn.{name}, which is never called as it is; target its children: '{path}.*'")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        parent = path.rpartition(".")[0]
        raise TargetError(
            f"{path!r} is the output projection of an nn.MultiheadAttention, whose weight is read around its module: a "
            f"hook on it never fires. Target {parent!r} (its output is adapted), and exclude {path!r} if a wide pattern "
            "matched it."
        )
    if "ScriptModule" in {base.__name__ for base in type(module).__mro__}:
        raise TargetError(f"{path!r} is a TorchScript module, whose hooks cannot run Python; adapt the model before it")
    return path
