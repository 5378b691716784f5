"""What every architecture of the zoo must show: sub-layers found and proven, adapters inserted and removed exactly."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure import pytree as values
from adapterkit.structure.anatomy.blocks import template_of
from adapterkit.structure.anatomy.description import Anatomy, Sublayer
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.epsilon import epsilon_test

PRESETS = ("pfeiffer", "houlsby")
SMALL = {"bottleneck_size": 8, "non_linearity": "gelu", "seed": 1}
Inputs = dict[str, Any]


class GateError(Exception):
    """A gate that a model did not pass."""


def examine(
    model: nn.Module, inputs: Inputs, irregular: str | None = None, kinds: dict[str, int] | None = None
) -> dict[str, Any]:
    """What was found in a model, after all gates.

    Args:
        irregular: Why blocks of one build need not have as many sub-layers, if they need not.
        kinds: How many sub-layers of each kind there are, where that is known.

    Raises:
        GateError: one did not open.
    """
    anatomy, _ = discover(model, inputs)
    report = {"sublayers": len(anatomy.sublayers), "kinds": dict(Counter(s.kind for s in anatomy.sublayers))}
    report["templates"] = templates(anatomy)
    if kinds is not None and report["kinds"] != kinds:
        raise GateError(f"kinds: {report['kinds']} were found, {kinds} are there")
    if not anatomy.transformer_blocks:
        check_refused(model, inputs)
        return report
    if irregular is None:
        check_regular(model, anatomy)
    report["regular"] = irregular or "yes"
    report["epsilon"] = check_epsilon(model, inputs, anatomy)
    for preset in PRESETS:
        report[preset] = check_preset(model, inputs, preset)
    return report


def check_refused(model: nn.Module, inputs: Inputs) -> None:
    """Presets say that a model without transformer blocks has none, and leave it alone."""
    hooks = count_hooks(model)
    for preset in PRESETS:
        try:
            ak.wrap(model, example_inputs=inputs).add("zoo", preset)
        except ak.TargetError:
            continue
        raise GateError(f"{preset}: it was added to a model that has no transformer blocks")
    if count_hooks(model) != hooks:
        raise GateError("hooks are left after a refusal")


def templates(anatomy: Anatomy) -> list[str]:
    """One line for each way that sub-layers occur: what a new release of a library must not move in silence."""
    lines = [
        f"{_place(s)} {s.kind}{' moe' if s.is_moe else ''} {s.norm}{' parallel' if s.is_parallel else ''}"
        f"{' scaled' if s.scales else ''}"
        for s in anatomy.sublayers
    ]
    return [f"{line} x{count}" for line, count in Counter(lines).items()]


def _place(sublayer: Sublayer) -> str:
    """Its module within any of its blocks, and where in the module's output."""
    block = sublayer.block or ""
    if sublayer.out is None:
        return f"{template_of(block)} (functions)"
    output = "".join(f"[{key}]" for key in sublayer.out.output)
    return f"{template_of(block)}{sublayer.out.path[len(block) :]}{output}"


def check_regular(model: nn.Module, anatomy: Anatomy) -> None:
    """Blocks of the same build have as many sub-layers."""
    blocks: dict[object, Counter[str]] = {}
    for sublayer in anatomy.sublayers:
        block = sublayer.block or ""
        blocks.setdefault((template_of(block), _build(model.get_submodule(block))), Counter())[block] += 1
    uneven = [dict(counts) for counts in blocks.values() if len(set(counts.values())) > 1]
    if uneven:
        raise GateError(f"regular: blocks differ: {uneven}")


def _build(block: nn.Module) -> tuple[tuple[str, str], ...]:
    """The modules that a block is made of, whatever their sizes."""
    return tuple((path, type(module).__qualname__) for path, module in block.named_modules())


def check_epsilon(model: nn.Module, inputs: Inputs, anatomy: Anatomy) -> str:
    """Each sub-layer's module yields what is added, exactly or times a declared factor."""
    moved = epsilon_test(model, inputs, anatomy)
    wrong = [s.out.path for s in anatomy.sublayers if s.out and not (moved.get(s.out.path) and moved[s.out.path].agrees(s))]
    if wrong:
        raise GateError(f"epsilon: {wrong[:3]}")
    lost = [s.addition for s in anatomy.sublayers if s.out is None]
    if lost:
        raise GateError(f"epsilon: no module yields the branch in {lost[:3]}")
    return "exact" if all(moved[s.out.path].is_exact for s in anatomy.sublayers if s.out) else "declared factor"


def check_preset(model: nn.Module, inputs: Inputs, preset: str) -> int:
    """Insert, train one step's gradients, copy, save, load, remove. Returns the number of sites."""
    before, keys, hooks = outputs(model, inputs), list(model.state_dict()), count_hooks(model)
    kit = ak.wrap(model, example_inputs=inputs)
    try:
        kit.add("zoo", preset, **SMALL)
        kit.activate("zoo")
        _same(f"{preset}: the output at init", before, outputs(model, inputs))
        kit.train_adapter("zoo")
        randomise(kit)
        adapted = outputs(model, inputs)
        # A detector returns as many objects as it finds, so their number may be what an adapter changes.
        is_same = len(before) == len(adapted) and all(map(torch.equal, before, adapted))
        check_effect(kit, model, inputs, preset, is_same=is_same)
        check_gradients(kit, model, inputs, preset)
        check_copy(model, inputs, preset, adapted)
        check_files(kit, model, inputs, preset, adapted)
        sites = len(kit.sites(preset, **SMALL))
    finally:
        kit.unwrap()
    _same(f"{preset}: the output after removal", before, outputs(model, inputs))
    if list(model.state_dict()) != keys or count_hooks(model) != hooks:
        raise GateError(f"{preset}: keys or hooks are left after removal")
    return sites


def check_effect(kit: ak.AdapterKit, model: nn.Module, inputs: Inputs, preset: str, *, is_same: bool) -> None:
    """A randomised adapter changes the output, unless the base itself rounds away what its hosts return."""
    if is_same:
        hosts = sorted({name.partition("._adapterkit.")[0] for name, _ in kit.named_parameters("zoo")})
        if _unused_by_the_base(kit, model, inputs, hosts) != {*hosts}:
            raise GateError(f"{preset}: a randomised adapter changes nothing")


def check_gradients(kit: ak.AdapterKit, model: nn.Module, inputs: Inputs, preset: str) -> int:
    """Every adapter tensor gets a gradient of the output, where the base's own tensor there does. Returns where not."""
    names, parameters = zip(*kit.named_parameters("zoo"), strict=True)
    gradients = _gradients(model, inputs, lambda: parameters)
    dead = [name for name, g in zip(names, gradients, strict=True) if g is None or not g.abs().sum() > 0]
    if not dead:
        return 0
    hosts = sorted({name.partition("._adapterkit.")[0] for name in dead})
    unused = _unused_by_the_base(kit, model, inputs, hosts)
    lost = [name for name in dead if name.partition("._adapterkit.")[0] not in unused]
    if lost:
        raise GateError(f"{preset}: no gradient reaches {len(lost)} of {len(names)}: {lost[:3]}")
    return len(unused)


def _unused_by_the_base(kit: ak.AdapterKit, model: nn.Module, inputs: Inputs, hosts: list[str]) -> set[str]:
    """The hosts on whose output no gradient of the base's own output falls: the model does not use it, or rounds it."""
    returned: dict[str, list[Tensor]] = {path: [] for path in hosts}
    with ExitStack() as stack:
        for path, kept in returned.items():

            def keep(_module: nn.Module, _args: Any, output: Any, kept: list[Tensor] = kept) -> None:
                kept.extend(tensor for tensor in floats(output) if tensor.requires_grad)

            stack.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        stack.enter_context(kit.base())
        gradients = iter(_gradients(model, inputs, lambda: [t for kept in returned.values() for t in kept]))
    taken = {path: [next(gradients) for _ in kept] for path, kept in returned.items()}
    return {path for path, found in taken.items() if not any(g is not None and g.abs().sum() > 0 for g in found)}


def _gradients(model: nn.Module, inputs: Inputs, wanted: Callable[[], Sequence[Tensor]]) -> list[Tensor | None]:
    """Of a random projection of everything that the model returns, with respect to what is wanted after its forward.

    By backward, as in training: there are functions that know no other way, and models that know it in training mode only.
    """
    try:
        return _backward(model, inputs, wanted)
    except (AssertionError, RuntimeError):
        torch.manual_seed(0)
        try:
            return _backward(model.train(), inputs, wanted)
        finally:
            model.eval()


def _backward(model: nn.Module, inputs: Inputs, wanted: Callable[[], Sequence[Tensor]]) -> list[Tensor | None]:
    with torch.enable_grad():
        torch.manual_seed(0)
        out = [o for o in floats(model(**copy.deepcopy(inputs))) if o.requires_grad]
        draw = torch.Generator().manual_seed(0)
        tensors = wanted()
        for tensor in tensors:
            tensor.grad = None
            tensor.retain_grad()
        if out:
            torch.stack([(o.float() * torch.randn(o.shape, generator=draw)).sum() for o in out]).sum().backward()
    return [tensor.grad for tensor in tensors]


def check_copy(model: nn.Module, inputs: Inputs, preset: str, adapted: list[Tensor]) -> None:
    """A deep copy computes the same, if the base can be copied: some models keep tensors of their last forward."""
    try:
        other = copy.deepcopy(model)
    except RuntimeError as error:
        if "graph leaves" not in str(error):
            raise
        return
    _same(f"{preset}: a deep copy", adapted, outputs(other, inputs))


def check_files(kit: ak.AdapterKit, model: nn.Module, inputs: Inputs, preset: str, adapted: list[Tensor]) -> None:
    """State dict and files give the same adapter again."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        kit.save("zoo", folder)
        randomise(kit, seed=9)
        model.load_state_dict(state)
        _same(f"{preset}: after load_state_dict", adapted, outputs(model, inputs))
        kit.remove("zoo")
        kit.train_adapter(kit.load(folder))  # as before: torch's kernels round differently for weights that need gradients
        _same(f"{preset}: after save and load", adapted, outputs(model, inputs))


def randomise(kit: ak.AdapterKit, name: str = "zoo", seed: int = 7) -> None:
    """Draw every tensor of an adapter anew."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in kit.parameters(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every floating tensor that the model returns, from the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor.clone() for tensor in floats(model(**copy.deepcopy(inputs)))]


def floats(output: Any) -> Iterator[Tensor]:
    """The floating tensors in an output."""
    return (tensor for _, tensor in values.tensors(output) if tensor.is_floating_point() and tensor.numel())


def count_hooks(model: nn.Module) -> int:
    """How many hooks hang on the model's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _same(what: str, a: list[Tensor], b: list[Tensor], equal: Callable[[Tensor, Tensor], bool] | None = None) -> None:
    equal = equal or (lambda x, y: torch.equal(x.nan_to_num(), y.nan_to_num()))
    if len(a) != len(b) or not all(x.shape == y.shape and equal(x, y) for x, y in zip(a, b, strict=True)):
        raise GateError(f"{what} differs")
