"""Proof that the sites of an adapter are what they should be: they run, feed the residual stream, get gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError
from ..placement.spec import SiteSpec
from ..runtime.lookup import adapters_in, named_parameters
from ..runtime.state import without_adapters
from ..structure import pytree
from ..structure.anatomy.description import Anatomy, Sublayer
from ..structure.anatomy.discover import discover
from ..structure.anatomy.epsilon import Moved, epsilon_test
from ..structure.hosts import resolve_host
from ..structure.paths import modules_by_path
from ..structure.tracing.forward import ExampleInputs, call_with, fresh, observe, untouched

__all__ = ["SiteProof", "dead_parameters", "prove_sites"]

_TRIES = 3  # of a forward in training mode: layer drop skips blocks at random


@dataclass(frozen=True)
class SiteProof:
    """What was seen at one site of the active adapter.

    Attributes:
        path: The host.
        place: What it is in the model: "attention branch", "norm after feedforward", "sum after mixer", or "module".
        fired_in_eval: How often it ran in a forward in eval mode.
        fired_in_training: The same in training mode.
        shape: Of the tensor at the site.
        dtype: Of the tensor at the site.
        moved: The ε-test of the branch that it yields, or that ends in its norm or sum; None where there is none.
        agrees: Whether the ε-test of a branch that it yields came out as the structure says, with a factor that is not 0.
        training_error: Why the model did not run in training mode, if it did not.
    """

    path: str
    place: str
    fired_in_eval: int
    fired_in_training: int
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    moved: Moved | None
    agrees: bool
    training_error: str | None = None


def prove_sites(model: nn.Module, name: str, inputs: ExampleInputs) -> list[SiteProof]:
    """Run the adapted model and look at every site of an adapter.

    Raises:
        CompatibilityError: the model does not run on the inputs.
    """
    specs = [(held.path, entry.spec) for held, entry in adapters_in(model).sites(name)]
    # One spec for each host: of several sites there, the first (a later pair wins in a dict, so they are turned round).
    first = dict(reversed(specs))

    def look(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[tuple[int, ...], torch.dtype]:
        tensor = _tensor_at(first[path], (args, kwargs), output)
        return tuple(tensor.shape), tensor.dtype

    # The adapted model runs here: what fires is what would fire for the user. The structure below is that of the base.
    in_eval = observe(model, inputs, first, look)
    in_training, error = _fired_in_training(model, inputs, first)
    anatomy, moved = _structure(model, inputs)
    modules = modules_by_path(model)
    proofs = []
    for path, spec in specs:
        place, sublayer, yields = _role_of_site(spec, path, anatomy, modules)
        branch = moved.get(sublayer.out.path) if sublayer and sublayer.out else None
        shape, dtype = in_eval[path][0] if in_eval[path] else (None, None)
        # A factor of 0 (a gate or LayerScale at zero) proves nothing: the sum takes no number of the branch.
        proven = sublayer is not None and branch is not None and branch.agrees(sublayer) and branch.factor != (0.0, 0.0)
        # For a norm or a sum the ε-test is shown, but not judged: it is that of the branch, which is another module's.
        agrees = proven or not yields
        proofs.append(SiteProof(path, place, len(in_eval[path]), in_training[path], shape, dtype, branch, agrees, error))
    return proofs


def _fired_in_training(model: nn.Module, inputs: ExampleInputs, paths: Iterable[str]) -> tuple[dict[str, int], str | None]:
    """Map each host to how often it runs in training mode; with the reason if the model does not run in it."""
    fired = dict.fromkeys(paths, 0)
    for _ in range(_TRIES):
        if not all(fired.values()):
            try:
                calls = observe(model, inputs, fired, lambda *_: None, training=True)
            except CompatibilityError as error:  # it may ask for labels then
                return fired, str(error)
            # Over all tries: a block that layer drop skipped in one of them may run in another.
            fired = {path: max(count, len(calls[path])) for path, count in fired.items()}
    return fired, None


def dead_parameters(model: nn.Module, name: str, inputs: ExampleInputs) -> list[str]:
    """Return the names of an adapter's trainable parameters that no gradient of the model's output reaches.

    No `grad` is changed.

    Raises:
        RuntimeError: No gradients can be computed.
    """
    trained = [(key, p) for key, p in named_parameters(model, name, heads=False) if p.requires_grad]
    wanted = [p for _, p in trained]
    # Hooks on gradients may train (an optimizer in the backward): then a look must not run them.
    may_run_backward = not any(p._post_accumulate_grad_hooks for p in model.parameters())
    # `untouched` switches gradients off, and here they are what is looked for.
    with untouched(model), torch.enable_grad():
        gradients = _gradients(model, inputs, wanted, refusal_is_said=not may_run_backward)
        # `autograd.grad` went first, since it writes no `grad`. A backward is for what it does not reach, or is refused.
        if may_run_backward and any(g is None for g in gradients):
            gradients = _by_backward(model, inputs, wanted)
    return [key for (key, _), gradient in zip(trained, gradients, strict=True) if gradient is None]


def _gradients(
    model: nn.Module, inputs: ExampleInputs, wanted: list[nn.Parameter], *, refusal_is_said: bool
) -> Sequence[Tensor | None]:
    """Return the gradients of a projection of the output; None for each parameter that none reaches.

    Args:
        refusal_is_said: Raise the error of a model that refuses to give gradients in this way, as reentrant checkpointing
            does. If not, all are None then, and a backward is to follow.
    """
    loss = _loss(model, inputs)
    if not loss.requires_grad or not wanted:
        return [None for _ in wanted]
    try:
        # `allow_unused` gives None for a parameter that nothing reaches. A gradient of zeros counts as reached.
        return torch.autograd.grad(loss, wanted, allow_unused=True)
    except RuntimeError:
        if refusal_is_said:
            raise
        return [None for _ in wanted]


def _by_backward(model: nn.Module, inputs: ExampleInputs, wanted: list[nn.Parameter]) -> Sequence[Tensor | None]:
    """Return the gradients as training computes them: checkpointing and reversible layers may know no other way."""
    held = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    try:
        # The user's gradients are put aside: what is None after the backward was not reached by it.
        for parameter, _ in held:
            parameter.grad = None
        loss = _loss(model, inputs)
        if loss.requires_grad:
            torch.autograd.backward(loss)
        return [parameter.grad for parameter in wanted]
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def _loss(model: nn.Module, inputs: ExampleInputs) -> Tensor:
    """Return a random projection of all that the model returns; a constant if nothing of it has a gradient."""
    out = [t for _, t in pytree.tensors(call_with(model, fresh(inputs))) if t.requires_grad]
    sums = [(t.float() * torch.rand_like(t, dtype=torch.float32)).sum() for t in out]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def _structure(model: nn.Module, inputs: ExampleInputs) -> tuple[Anatomy, dict[str, Moved]]:
    """Return the anatomy of the base, and map the path of each branch to the ε-test of its sub-layer."""
    # In a trace of the adapted model, the additions of the adapters would look like residual ones.
    with without_adapters():
        anatomy, _ = discover(model, inputs)
        return anatomy, epsilon_test(model, inputs, anatomy)


def _tensor_at(spec: SiteSpec, call: tuple[Any, Any], output: Any) -> Tensor:
    """Return the tensor at a site, from a call of the host or from what it returned."""
    holder = call if spec.at == "input" else output
    if spec.at == "input":
        path = pytree.argument_path(call, spec.input) if spec.input else pytree.find(call)
    else:
        path = spec.output or pytree.find(output)
    tensor = None if path is None else pytree.get(holder, path)
    if not isinstance(tensor, Tensor):
        raise CompatibilityError(f"{spec.path!r} has no tensor at its {spec.at}")
    return tensor


def _role_of_site(
    spec: SiteSpec, path: str, anatomy: Anatomy, modules: dict[str, nn.Module]
) -> tuple[str, Sublayer | None, bool]:
    """Return what a site is in the model, the sub-layer that it belongs to, and whether it yields that one's branch."""
    for sublayer in (*anatomy.sublayers, *anatomy.others):
        for what, host in _hosts(sublayer, modules):
            # A post-norm is adapted at its input or at its output. A branch or a sum is what a module returns.
            if host == path and (what == "norm after" or spec.at == "output"):
                yields = what == ""
                return (f"{sublayer.kind} branch" if yields else f"{what} {sublayer.kind}"), sublayer, yields
    return "module", None, False


def _hosts(sublayer: Sublayer, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield what a host stands for (its branch is ""), and the host, for a sub-layer's branch, norm and sum."""
    if sublayer.out is not None:
        yield "", resolve_host(sublayer.out.path, modules, at_input=False)
    if sublayer.post_norm is not None:
        yield "norm after", sublayer.post_norm.path
    if sublayer.sum is not None:
        yield "sum after", resolve_host(sublayer.sum.path, modules, at_input=False)
