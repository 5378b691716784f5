"""The freezing manager: θ stays as it is, φ trains.

It owns `requires_grad`, keeps the running statistics of frozen norms from moving, and makes the first tensor of the
stream require grad, without which reentrant gradient checkpointing trains nothing on a frozen base (but where the model
says that it is not checkpointed: see docs/decisions/0005).
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ActivationError
from ..runtime.hooks import KitHook, has_hook, keep_hook, remove_hooks, require_input_grad, update_hook
from ..runtime.lookup import open_parameters, sites_of
from ..runtime.originals import base_digests
from ..runtime.state import STATE, Frozen, ModelState
from ..runtime.sync import forget_compiled
from ..structure import pytree
from ..structure.base_tensors import base_parameters
from ..structure.paths import ancestors, modules_by_path

__all__ = ["check_may_train", "freeze", "set_training", "unfreeze"]


class FrozenNormHook(KitHook):
    """Let a norm with running statistics normalise with them, and leave them alone, in `model.train()` too."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Switch this norm, and no other module, to eval mode, if `model.train()` switched it on. Shape: any."""
        if module.training:
            module.training = False  # not `eval()`, which would reach its children as well


class ScriptedNormsHook(KitHook):
    """Do for the scripted norms in a model what `FrozenNormHook` does for others: they call no Python hooks."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Switch every scripted norm in the model, and nothing else, to eval mode. Shape: any."""
        for norm in scripted_norms(module):
            norm.training = False


class CheckpointAware(KitHook):
    """Base of the hooks that gradient checkpointing needs.

    Args:
        flagged: The modules that say whether they are checkpointed, by the attribute that transformers gives them. Where
            there are any, and none is, gradients need not go below the first adapter, which saves a block's share of
            the backward pass.
    """

    def __init__(self, flagged: tuple[nn.Module, ...]) -> None:
        self.flagged = flagged

    def is_idle(self) -> bool:
        """Tell whether nothing needs this hook now."""
        # A compiler cannot trace `requires_grad_`.
        if torch.compiler.is_compiling():
            return True
        return bool(self.flagged) and not any(module.gradient_checkpointing for module in self.flagged)


class StreamStartHook(CheckpointAware):
    """Make what an embedding returns require grad, in grad mode."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the output, requiring grad. Shape: (..., hidden)."""
        return None if self.is_idle() else require_input_grad(output)


class RootInputHook(CheckpointAware):
    """Make the model's floating-point input require grad, in grad mode.

    That is its first tensor, or one given by keyword that is not called a mask; masks come after token ids, and a mask
    that requires grad would keep attention off its fast kernels.
    """

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments, the first floating one requiring grad. Shape: as given."""
        if self.is_idle():
            return None
        positions = [i for i, value in enumerate(args) if isinstance(value, Tensor)][:1]
        keywords = [key for key, value in kwargs.items() if isinstance(value, Tensor) and "mask" not in key]
        for path in [*((0, i) for i in positions), *((1, key) for key in keywords)]:
            if pytree.get((args, kwargs), path).is_floating_point():
                return require_input_grad((args, kwargs), path)
        return None


def freeze(model: nn.Module, state: ModelState, *, reentrant: bool = True) -> None:
    """Freeze the base: no gradients, no moving statistics. Remembers what it finds; freezing twice changes nothing.

    Args:
        reentrant: Whether the model may be checkpointed in the reentrant way, which gives gradients only where what goes
            in requires one. It is asked of models alone that do not say so themselves.
    """
    modules = modules_by_path(model)
    # A model may be frozen before it has an adapter: then its state is not on it yet.
    model.__dict__[STATE] = state
    if state.frozen is None:
        # Once: a second call would find the flags that the first one set, and `unfreeze` would restore those.
        state.frozen = Frozen(
            requires_grad={name: p.requires_grad for name, p in base_parameters(model)},
            digests=base_digests(model),  # by these `kit.verify` proves that θ did not move
            own_mode={
                path: module.training
                for path, module in modules.items()
                if has_running_statistics(module) and module.training != _mode_around(path, modules)
            },
        )
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    scripted = scripted_norms(model)
    for norm in scripted:
        norm.training = False  # at once, for what does not run through the model's own forward
    # Models that say so themselves are asked in each forward (`is_idle`), whatever the user says: decision 0005.
    starts = reentrant or any(map(_says_whether_checkpointed, modules.values()))
    for module in modules.values():
        keep_hook(module, FrozenNormHook, state, is_wanted=has_running_statistics(module) and not is_scripted(module))
    keep_hook(model, ScriptedNormsHook, state, is_wanted=bool(scripted))
    _start_gradients(model, modules, state, is_wanted=starts)
    forget_compiled()


def _start_gradients(model: nn.Module, modules: Mapping[str, nn.Module], state: ModelState, *, is_wanted: bool) -> None:
    """Register the hooks that make the start of the stream require grad, or remove them.

    Those that are there keep their place in the order: hooks of others, registered since, see what requires grad.
    """
    embeddings = {path: m for path, m in modules.items() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    flagged = _saying_whether_checkpointed(modules, embeddings)
    starts = [(model, RootInputHook(flagged)), *((module, StreamStartHook(flagged)) for module in embeddings.values())]
    for module, hook in starts:
        if is_wanted:
            update_hook(module, hook, state)
        else:
            remove_hooks(module, type(hook))


def unfreeze(model: nn.Module, state: ModelState) -> None:
    """Undo `freeze`: every base parameter trains, or not, as it did before; norms follow the mode around them again."""
    if state.frozen is None:
        return
    for name, parameter in base_parameters(model):
        # One that came after `freeze` has no flag to go back to, and stays as it is.
        parameter.requires_grad_(state.frozen.requires_grad.get(name, parameter.requires_grad))
    modules = modules_by_path(model)
    for path, module in modules.items():
        if has_hook(module, FrozenNormHook) or (is_scripted(module) and has_running_statistics(module)):
            # The hook has put it in eval mode. `own_mode` has it only if it differed from the module around it before.
            around = _mode_around(path, modules)
            module.training = state.frozen.own_mode.get(path, module.training if around is None else around)
        for kind in (FrozenNormHook, ScriptedNormsHook, StreamStartHook, RootInputHook):
            remove_hooks(module, kind)
    state.frozen = None
    forget_compiled()


def _saying_whether_checkpointed(modules: Mapping[str, nn.Module], embeddings: Collection[str]) -> tuple[nn.Module, ...]:
    """Return the modules that say whether they are checkpointed, as it is now or will be switched later.

    Those around an embedding are left out: a hook that led back to its own module would keep the model from being freed.
    Layers remain, which are switched with them.
    """
    around = {above for path in embeddings for above in ancestors(path)}
    return tuple(m for path, m in modules.items() if _says_whether_checkpointed(m) and path not in around)


def _says_whether_checkpointed(module: nn.Module) -> bool:
    """Tell whether a module has the attribute by which transformers switches gradient checkpointing."""
    return isinstance(getattr(module, "gradient_checkpointing", None), bool)


def _mode_around(path: str, modules: dict[str, nn.Module]) -> bool | None:
    """Tell whether the module around this one is in training mode; None for the root."""
    return modules[path.rpartition(".")[0]].training if path else None


def check_may_train(state: ModelState, name: str) -> None:
    """Raise ActivationError if the adapter is merged: its parameters do not run then."""
    if name in state.merged:
        raise ActivationError(
            f"adapter {name!r} is merged into the weights, so that its parameters do not run and cannot train. Call "
            f"kit.unmerge({name!r}) first"
        )


def set_training(model: nn.Module, state: ModelState, name: str, *, trains: bool) -> None:
    """Let an adapter's parameters train, its heads' too, or not. Raises ActivationError if it is to train, yet merged."""
    if trains:
        check_may_train(state, name)
    elif name in state.merged:
        state.merged[name] = ()  # so that unmerging opens none of them
    for _, _, site in sites_of(model):
        for _, module in site.modules_of(name):
            open_parameters(module, trains=trains)


def has_running_statistics(module: nn.Module) -> bool:
    """Tell whether the module normalises with running statistics (BatchNorm, InstanceNorm and their like)."""
    # With track_running_stats=False the two are registered, as None.
    held = {name for name, buffer in module._buffers.items() if buffer is not None}
    return {"running_mean", "running_var"} <= held


def scripted_norms(model: nn.Module) -> list[nn.Module]:
    """Return the norms with running statistics among the model's TorchScript modules."""
    return [module for module in model.modules() if is_scripted(module) and has_running_statistics(module)]


def is_scripted(module: nn.Module) -> bool:
    """Tell whether the module runs as TorchScript, which calls none of its hooks."""
    return isinstance(module, torch.jit.ScriptModule)
