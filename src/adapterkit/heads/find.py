"""Heads: which modules an adapter is to own, on the model's output or in the place of the model's own modules."""

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError, ConfigError, TargetError
from ..nn.seeded import seeded
from ..placement.match import match
from ..runtime.hooks import remove_hooks
from ..runtime.state import ACTIVATION_LOCK, without_adapters
from ..structure.attributes import attribute
from ..structure.hosts import known_shape, resolve_host
from ..structure.paths import SITE, ancestors, modules_by_path
from ..structure.tracing.forward import ExampleInputs, forward, observe
from ..structure.tracing.inputs import first_that_runs
from .build import VocabularySize, build_head
from .config import CustomHead, HeadConfig, MultipleChoiceHead, OutputHead, OwnHead
from .spec import HeadSpec
from .steps import described_fields, hidden_in

__all__ = ["FoundHead", "Heads", "build_heads", "check_apart", "check_names", "copy_heads", "find_heads", "output_host"]

Heads = str | HeadConfig | Sequence[str | HeadConfig] | Mapping[str, nn.Module]


@dataclass(frozen=True)
class FoundHead:
    """A head that an adapter is to own.

    Attributes:
        path: Its host: the module whose place it takes, or which yields the model's output.
        module: The module that is to run, of the user's own or made already; None for what is copied, or built.
        vocabulary: Tokens that its logits are of, for a head with a vocabulary.
    """

    path: str
    spec: HeadSpec
    module: nn.Module | None = None
    vocabulary: int = 0

    @property
    def is_in_place(self) -> bool:
        """Tell whether it takes the place of its host."""
        return self.spec.above is None


def find_heads(model: nn.Module, heads: Heads, example_inputs: ExampleInputs | None) -> list[FoundHead]:
    """Find the heads that `heads` means, each with its host. Changes nothing.

    Raises:
        ConfigError: what is no head, two of one name, a module that is in the model already.
        TargetError: a pattern matches nothing, what it matches has no parameters, a head lies in another, a module never
            runs on the example inputs, or the width of the model's output is not known.
    """
    found: list[FoundHead] = []
    width = _HiddenWidth(model, example_inputs)  # runs the model when first asked, and once for all heads
    for head in _as_configs(heads):
        if isinstance(head, OwnHead):
            found += _find_own(model, head)
        elif isinstance(head, CustomHead):
            found.append(_find_custom(model, head, width))
        elif isinstance(head, OutputHead):
            found.append(_find_on_output(model, head, width))
    in_place = [head.path for head in found if head.is_in_place]
    check_names([head.spec for head in found], in_place)
    check_apart([], in_place)
    if in_place and example_inputs is not None:
        _check_that_they_run(model, in_place, example_inputs)
    return found


def _check_that_they_run(model: nn.Module, paths: Sequence[str], example_inputs: ExampleInputs) -> None:
    """Raise TargetError if a module that a head replaces is not called: a hook on it would never run the copy."""
    # Nothing is kept of the calls: whether there were any is asked.
    calls = observe(model, example_inputs, paths, lambda *_: None)
    silent = [path for path, seen in calls.items() if not seen]
    if silent:
        raise TargetError(f"the heads {silent} never ran on the example inputs, so copies of them would not either")


def check_apart(sites: Sequence[str], heads: Sequence[str]) -> None:
    """Raise TargetError if a site or head lies in a head: a copy runs in its place, so it would not."""
    for head in heads:
        inside = [path for path in (*sites, *(other for other in heads if other != head)) if head in ancestors(path)]
        if inside:
            raise TargetError(f"{inside} lie inside the head {head!r}, which the adapter replaces by a copy; exclude them")


def check_names(heads: Sequence[HeadSpec], in_place: Sequence[str]) -> None:
    """Raise ConfigError unless the heads of one adapter can be told apart, and run side by side.

    Args:
        heads: All heads of the adapter.
        in_place: The paths of the modules that they replace.
    """
    # Names tell heads apart in `HeadOutput.heads`, in labels by head, and in files.
    names = [head.config.name for head in heads]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"an adapter's heads have different names, and {twice} is that of several; give each a name=")
    places = sorted({path for path in in_place if in_place.count(path) > 1})
    if places:
        raise ConfigError(f"one head takes the place of a module, and {places} would have several")
    on_output = [head for head in heads if head.above is not None]
    if len(on_output) > 1 and any(isinstance(head.config, MultipleChoiceHead) for head in on_output):
        raise ConfigError(
            "a MultipleChoiceHead takes several rows for one example, and other heads on the output do not: give it to an "
            f"adapter that has no others; found {names}"
        )


def build_heads(model: nn.Module, heads: Sequence[FoundHead], dtype: torch.dtype, *, meta: bool = False) -> list[nn.Module]:
    """Return the modules of these heads: copies of the model's own, the user's, or new ones.

    Args:
        dtype: Of new ones.
        meta: Make new ones without memory or values, for a file to fill.
    """
    # All copies in one call, so that weights that two heads share stay shared.
    own = [head.path for head in heads if isinstance(head.spec.config, OwnHead) and head.module is None]
    copies = dict(zip(own, copy_heads([model.get_submodule(path) for path in own]), strict=True))
    modules: list[nn.Module] = []
    for head in heads:
        config = head.spec.config
        if head.module is not None:
            modules.append(head.module)
        elif isinstance(config, OwnHead):
            modules.append(copies[head.path])
        else:
            with seeded(getattr(config, "seed", None), meta=meta):
                modules.append(build_head(config, head.spec, head.vocabulary, dtype))
    return modules


def copy_heads(heads: list[nn.Module]) -> list[nn.Module]:
    """Return copies of heads without what adapterkit put there; weights that they share, their copies share."""
    copies = copy.deepcopy(heads)
    # A set: a module that two heads share is visited once.
    for module in {module for head in copies for module in head.modules()}:
        if SITE in module._modules:  # TorchScript's have no pop
            del module._modules[SITE]
        remove_hooks(module)
    return copies


def output_host(model: nn.Module) -> tuple[str, int]:
    """Return the path of the module whose output is the model's, and how many modules of the model lie around it.

    That module is the model itself, with none around it. Of an `nn.Sequential` it is the last layer: it would run a site as
    one of its layers. Raises TargetError: see `resolve_host`.
    """
    # "" is the model itself.
    path = resolve_host("", modules_by_path(model), at_input=False)
    return path, len(ancestors(path)) - 1


def _as_configs(heads: Heads) -> Iterator[HeadConfig]:
    """Yield the heads as values. Raises ConfigError: what is no head."""
    if isinstance(heads, Mapping):
        for path, module in heads.items():
            if not isinstance(path, str) or not path or not isinstance(module, nn.Module):
                raise ConfigError(
                    f"a mapping of heads has the paths of modules and what is to run in their places; found {path!r}: "
                    f"{type(module).__name__}. A module of yours on the model's output is ak.CustomHead(module)"
                )
            yield CustomHead(module, target=path)
        return
    for head in [heads] if isinstance(heads, (str, HeadConfig)) or not isinstance(heads, Sequence) else heads:
        if isinstance(head, str):
            yield OwnHead(head)
        elif isinstance(head, HeadConfig):
            yield head
        else:
            raise ConfigError(
                "heads= takes names of the model's modules, heads such as ak.ClassificationHead(labels=('neg', 'pos')), or "
                f"a mapping of names to modules; found {type(head).__name__}"
            )


def _find_own(model: nn.Module, head: OwnHead) -> list[FoundHead]:
    """Find what a pattern matches, to be copied. Of several, the last one has the name and the labels that were given.

    The last, since heads of several layers (dense, dropout, out_proj) end with the one whose outputs the labels name.

    Raises:
        TargetError: it matches nothing, or nothing with parameters.
        ConfigError: there are not as many labels as outputs.
    """
    modules = modules_by_path(model)
    paths = [inner for path in match(model, [head.target]) for inner in _parametrised(path, modules)]
    # A pattern may match an nn.Sequential and a layer of it: each host once, in the model's order.
    paths = list(dict.fromkeys(resolve_host(path, modules, at_input=False) for path in paths))
    _check_own(head, paths)
    found = []
    for path in paths:
        # All widths in it: which layer comes last is not known of a module with a `forward` of its own.
        widths = {shape.width for module in modules[path].modules() if (shape := known_shape(module)) is not None}
        is_last = path == paths[-1]
        given = head.labels if is_last else None
        # `widths` is empty for layers of unknown types: then the labels are believed.
        if given is not None and widths and len(given) not in widths:
            raise ConfigError(
                f"labels names {len(given)}, and the head {path!r} has {sorted(widths)} outputs; for another number, use "
                f"a module of yours, heads={{{path!r}: nn.Linear(…, {len(given)})}}"
            )
        name = head.name if head.name is not None and is_last else path
        config = OwnHead(path, name=name, labels=given or _labels_of_model(model, widths))
        found.append(FoundHead(path, HeadSpec(config)))
    return found


def _check_own(head: OwnHead, paths: Sequence[str]) -> None:
    """Raise TargetError unless a pattern led to modules that can each be copied: some, and none inside another."""
    if not paths:
        raise TargetError(f"heads={[head.target]} have no parameters of their own to train")
    # `ancestors` begins with the path itself, which is no place inside it.
    inside = [path for path in paths if {*ancestors(path)[1:]} & {*paths}]
    if inside:
        outside = next(path for path in ancestors(inside[0])[1:] if path in paths)
        raise TargetError(
            f"heads={[head.target]} matches {len(paths)} modules, {list(paths[:4])}, of which {inside[0]!r} lies inside "
            f"{outside!r}; name the one that you mean, such as heads=['re:{re.escape(outside)}']"
        )


def _labels_of_model(model: nn.Module, widths: set[int]) -> tuple[str, ...] | None:
    """Return what a model of transformers calls the outputs of a head of such widths; None if nobody named them."""
    labels = getattr(attribute(model, "config"), "id2label", None)
    if not isinstance(labels, Mapping) or len(labels) not in widths:
        return None
    named = [labels.get(index, labels.get(str(index))) for index in range(len(labels))]  # JSON has no other keys
    # transformers makes up LABEL_0, LABEL_1, … where nobody gave names.
    is_default = named == [f"LABEL_{index}" for index in range(len(named))]
    wrong = is_default or len({*named}) < len(named) or not all(isinstance(name, str) and name for name in named)
    return None if wrong else tuple(map(str, named))


def _find_custom(model: nn.Module, head: CustomHead, width: Callable[[OutputHead | CustomHead], int]) -> FoundHead:
    """Find where the user's module is to run: in the place of another, or on the output.

    Raises:
        ConfigError: it is missing, or a part of the model.
        TargetError: no one module has this path, or hooks on it cannot replace its output.
    """
    module = head.module
    if module is None:
        raise ConfigError("CustomHead needs its module: ak.CustomHead(module)")
    # The adapter would train, move and save a Parameter of the base.
    theirs = {id(p) for p in module.parameters()} & {id(p) for p in model.parameters()}
    if theirs or any(module is other for other in model.modules()):
        raise ConfigError(
            f"the {type(module).__name__} that is to be a head is in the model already, or shares a Parameter with it; "
            "give a copy of its own: copy.deepcopy(module)"
        )
    if head.target is not None:
        path = _one_host(model, head.target)
        # Without the module: the config is saved, and compared, as one of a file is.
        config = CustomHead(target=path, name=head.name or path, labels=head.labels)
        return FoundHead(path, HeadSpec(config), module)
    path, above = output_host(model)
    config = CustomHead(name=head.name or "custom", output=head.output, labels=head.labels)
    takes_mask = "mask" in inspect.signature(module.forward).parameters
    return FoundHead(path, HeadSpec(config, above, width(head), takes_mask), module)


def _one_host(model: nn.Module, target: str) -> str:
    """Return the path of the one module that a pattern matches. Raises TargetError: several, or an nn.Sequential."""
    modules = modules_by_path(model)
    paths = match(model, [target])
    if len(paths) > 1:
        raise TargetError(f"a module takes the place of one other, and {target!r} matches {paths}: give a path")
    if isinstance(modules[paths[0]], nn.Sequential):
        raise TargetError(
            f"{paths[0]!r} is an nn.Sequential, of which hooks see the layers; name one, and what is to take its place"
        )
    return resolve_host(paths[0], modules, at_input=False)


def _find_on_output(model: nn.Module, head: OutputHead, width: Callable[[OutputHead | CustomHead], int]) -> FoundHead:
    """Return a new head on the model's output, with the width and the vocabulary that it needs."""
    path, above = output_host(model)
    config = head.override({"name": head.name or head.kind})
    spec = HeadSpec(config, above, width(head))
    embedding, vocabulary = VocabularySize(model).of(config, spec.width)
    return FoundHead(path, HeadSpec(config, above, spec.width, embedding=embedding), vocabulary=vocabulary)


class _HiddenWidth:
    """How wide the tensor is that a head reads: seen in one run of the model, or told by the type of its last layer.

    Called with the settings of a head, it returns the number of features.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.output: Any = None

    def __call__(self, head: OutputHead | CustomHead) -> int:
        """Return the features that a head reads. Raises TargetError: they are not known, or no such tensor is there."""
        known = known_shape(self.model.get_submodule(output_host(self.model)[0]))
        # The type of the last layer tells enough, and no inputs have to be made up. A run tells more where there are some.
        if self.example_inputs is None and known is not None and known.axis == -1 and head.output is None:
            return known.width
        if self.output is None:
            self.output = self._output_of_a_run()
        hidden = hidden_in(self.output, head.output)
        if hidden is None:
            what = "first tensor of (batch, seq, hidden) or (batch, hidden)" if head.output is None else list(head.output)
            raise TargetError(
                f"a head reads {what} of the model's output, and there is none in what {type(self.model).__name__} "
                f"returned: {type(self.output).__name__}{described_fields(self.output)}. {_way_to(head.output)}"
            )
        if head.output is None:  # who names output="logits" means them
            _warn_of_logits(self.model, self.output, hidden)
        return hidden.shape[-1]

    def _output_of_a_run(self) -> Any:
        """Return what the base returns for the example inputs, or for tiny ones. Raises TargetError: none are known."""
        # The width of the base's output is asked: an active adapter's head would return a HeadOutput.
        with ACTIVATION_LOCK, without_adapters():
            if self.example_inputs is not None:
                return forward(self.model, self.example_inputs)
            try:
                return first_that_runs(self.model, partial(forward, self.model))[1]
            except CompatibilityError as error:
                raise TargetError(f"the width of the model's output is not known. {error}") from error


def _way_to(output: Sequence[int | str] | None) -> str:
    """Tell how the output gets the tensor that a head is to read."""
    # Models of transformers return these on demand, and the config is the one place where a kit can ask for them.
    for name in ("hidden_states", "attentions"):
        if output is not None and str(output[0]).endswith(name):
            return f"Set output_{name}=True in the model's config, or name another tensor with output="
    return "Name the tensor with output="


def _warn_of_logits(model: nn.Module, output: Any, hidden: Tensor) -> None:
    """Warn where a head reads the scores of another: the logits that a model of transformers makes by a head of its own."""
    # In transformers `base_model` is the model without its head, e.g. `.bert` of BertForSequenceClassification.
    inner = getattr(model, "base_model", None)
    if not isinstance(inner, nn.Module) or inner is model or not isinstance(output, Mapping):
        return
    # Only where what the new head reads is what the model's own head made.
    if output.get("logits") is not hidden:
        return
    children = {name: child for name, child in model.named_children() if name != SITE}
    own = [name for name, child in children.items() if child is not inner and any(True for _ in child.parameters())]
    prefix = next((name for name, child in children.items() if child is inner), "base_model")
    warnings.warn(
        f"{type(model).__name__} has a head of its own, {own}: a new head on its output reads the logits of that one, of "
        f"width {hidden.shape[-1]}, not hidden states. To train a copy of the model's own, give heads={own}. For a new "
        f"head on hidden states, load the model without its head (AutoModel), wrap model.{prefix}, or name output=.",
        stacklevel=7,  # the caller of kit.add or kit.add_head
    )


def _parametrised(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the path itself if the module has parameters; of a Sequential, the paths of its layers that have some."""
    module = modules[path]
    if type(module) is nn.Sequential:
        return [inner for name in module._modules for inner in _parametrised(f"{path}.{name}".lstrip("."), modules)]
    return [path] if any(True for _ in module.parameters()) else []
