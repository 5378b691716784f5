"""The façade: `ak.wrap(model)` gives an `AdapterKit`, whose methods delegate to the layers below."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from . import store
from .composition.nodes import Composition, Fuse
from .config.fusion import FusionConfig
from .config.union import Config
from .errors import ConfigError
from .heads.config import HeadConfig
from .heads.find import Heads
from .inspection import fusion_attention
from .inspection.fusion_attention import FusionAttention
from .inspection.summary import Summary, summarise
from .inspection.tree import Tree, tree_of
from .inspection.verify import Verification, verify
from .lifecycle import activate, add, attach, combining, freeze, fusion
from .lifecycle.merging import merge
from .methods.spellings import as_config
from .placement.spec import SiteSpec
from .runtime.lookup import adapter_names, fusions_of, heads_of, named_parameters, sites_of
from .runtime.state import STATE, ModelState
from .structure.tracing.forward import ExampleInputs

__all__ = ["AdapterKit", "wrap"]

ConfigLike = Config | Mapping[str, Any] | str | Path

_kits: WeakValueDictionary[int, "AdapterKit"] = WeakValueDictionary()


def wrap(model: nn.Module, example_inputs: ExampleInputs | None = None) -> "AdapterKit":
    """Get the kit of a model. The model is not touched, and stays the object that you use.

    Args:
        model: Any module. Of one that `torch.compile` wrapped, the module inside.
        example_inputs: Inputs that the model runs on: a tensor, a tuple (by position) or a mapping (by keyword). Needed
            where the widths of target modules cannot be told from their types.

    Raises:
        ConfigError: not a module.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ConfigError(f"wrap takes an nn.Module; found {type(model).__name__}")
    kit = _kits.get(id(inner))
    if kit is None:
        kit = _kits[id(inner)] = AdapterKit(inner)
    if example_inputs is not None:
        kit.example_inputs = example_inputs
    return kit


class AdapterKit:
    """A handle on the adapters of one model. It holds no state of theirs: that lies in the model's sites.

    Get one from `ak.wrap`. Every method that fails leaves the model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.example_inputs: ExampleInputs | None = None

    # --- adapters -----------------------------------------------------------------------------------------------------

    def add(self, name: str, config: ConfigLike, heads: Heads = (), **overrides: Any) -> None:
        """Add a new adapter. It is not active yet, and the identity for every init whose paper allows it.

        Args:
            name: Any printable name of at most 128 characters.
            config: A preset's name, a config, a mapping with its method, or a path to such JSON.
            heads: What the adapter owns beside its modules, trained and saved with it: names (patterns) of the model's own
                modules, of which it gets copies; heads such as `ak.ClassificationHead(labels=("neg", "pos"))` on the
                model's output; or a mapping of names to modules of yours that run in the places of the model's.
            **overrides: Settings to change in the config.

        Raises:
            AdapterNameError: the name is taken.
            ConfigError: bad settings.
            TargetError: a target or head that names nothing, or something that cannot be adapted.
        """
        add.add(self.model, name, as_config(config, overrides), heads, self.example_inputs)

    def add_head(self, name: str, head: Heads) -> None:
        """Give an adapter another head, or several, as `heads=` of `add` does. It trains if the adapter does.

        Raises:
            AdapterNameError: no such adapter.
            ConfigError: the adapter has a head of this name, or in this place.
            TargetError: a head that names nothing, or something that cannot be one.
            CompatibilityError: the composition that is active cannot choose between this head and another adapter's.
            ActivationError: the adapter is merged.
        """
        activate.check_known(self.model, name)
        add.add_heads(self.model, name, head, self.example_inputs)

    def remove_head(self, name: str, head: str) -> None:
        """Take a head from an adapter, by the head's name (see `labels`). The adapter stays.

        Raises:
            AdapterNameError: no such adapter, or it has no such head.
            ActivationError: it is merged.
        """
        activate.check_known(self.model, name)
        add.remove_head(self.model, name, head)

    def heads(self, name: str) -> dict[str, HeadConfig]:
        """An adapter's heads by their names. Raises AdapterNameError."""
        activate.check_known(self.model, name)
        return heads_of(self.model, name)

    def labels(self, name: str) -> dict[str, dict[int, str]]:
        """What an adapter's heads call their outputs: by the head's name, the label of each index; no heads without labels.

        Raises AdapterNameError.
        """
        maps = {head: config.label_map for head, config in self.heads(name).items()}
        return {head: labels for head, labels in maps.items() if labels is not None}

    def remove(self, name: str) -> None:
        """Remove an adapter; a host without any left is as it was before. A merged one is unmerged first.

        Raises:
            AdapterNameError: no such adapter.
            ActivationError: another thread is running the model with it.
            CompatibilityError: it is merged, and the weights have changed since; see `unmerge`.
        """
        activate.check_known(self.model, name)
        add.remove(self.model, name)

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        how: combining.How = "concatenate",
        rank: int | None = None,
        heads: bool = True,
    ) -> dict[str, float]:
        """Make a new adapter of others of the same method, which stay: a weighted sum. It is not active yet.

        Args:
            name: Of the new adapter.
            weights: A number, of any sign, for each adapter that goes into it. One adapter at weight 1 is copied.
            how: How low-rank changes of weights are summed: "concatenate" is exact, its rank the sum of the ranks; "svd"
                is the nearest sum of the given rank; "linear" adds factor by factor, with cross terms between different
                adapters that may be as large as the sum: prefer "concatenate". Methods that are linear in their
                parameters (IA3, BitFit, norm tuning) are summed exactly by each of them; of all others "linear" takes the
                weighted mean, for weights that sum to 1.
            rank: Of the result of "svd"; the largest of the ranks if not given.
            heads: Combine heads, too: of copies of the model's own, that plus the weighted differences to it; of others,
                the only one that there is, or the weighted mean, for weights that sum to 1.

        Returns:
            For "svd" and "linear", by site, how far the change of the weight is from the weighted sum, in parts of it.

        Raises:
            AdapterNameError: the name is taken, or one of the others is no adapter.
            ConfigError: the adapters cannot be combined, or not so; says why.
            TargetError: they sit at places that no one config names, or, for a mean, at different ones.
            CompatibilityError: a value is not finite.
        """
        return combining.combine(self.model, name, weights, how=how, rank=rank, heads=heads)

    @property
    def adapters(self) -> Mapping[str, Config]:
        """The adapters' configs by name."""
        held = {name: entries[0].config for _, _, site in sites_of(self.model) for name, entries in site.entries.items()}
        return {name: config for name, config in held.items() if not isinstance(config, FusionConfig)}

    def sites(self, config: ConfigLike, **overrides: Any) -> list[SiteSpec]:
        """What a config would adapt. Changes nothing. Raises as `add` does."""
        return add.find_sites(self.model, as_config(config, overrides), self.example_inputs)

    def unwrap(self) -> nn.Module:
        """Remove everything that adapterkit added or changed, and return the model. Raises as `remove` does."""
        for name in adapter_names(self.model):
            self._state().activation.check_forgettable(name)  # first: what raises here leaves all as it was
        merge.unmerge_all(self.model, self._state())
        self.deactivate()
        freeze.unfreeze(self.model, self._state())
        for name in (*self.fusions, *adapter_names(self.model)):
            add.remove(self.model, name)
        self.model.__dict__.pop(STATE, None)
        return self.model

    # --- fusions ------------------------------------------------------------------------------------------------------

    def add_fusion(
        self,
        fuse: Fuse,
        config: FusionConfig | Mapping[str, Any] | str | Path = "dynamic",
        heads: Heads = (),
        **overrides: Any,
    ) -> None:
        """Add a fusion: an attention that weighs what the children of a Fuse add. It is not active yet.

        Its name is that of the Fuse, else its children's with commas between; `parameters`, `freeze`, `remove`, `save` and
        `load` take it as they take an adapter's.

        Args:
            fuse: `ak.Fuse("a", "b")`; the adapters are there already.
            config: "dynamic", "static", a config, a mapping, or a path to such JSON.
            heads: Heads that the fusion owns, as those of an adapter.
            **overrides: Settings to change in the config.

        Raises:
            AdapterNameError: the name is taken, or an adapter is not there.
            ConfigError: bad settings, or no Fuse.
            TargetError: a head that names nothing.
            CompatibilityError: the adapters cannot be weighed; says where and why.
        """
        settings = fusion.as_fusion_config(config, overrides)
        fusion.add_fusion(self.model, fuse, settings, heads, self.example_inputs)

    def train_fusion(self, fuse: Fuse | str, *, reentrant: bool = True) -> None:
        """Freeze the base and all adapters, open this fusion and its heads, and activate it.

        Add `kit.fusion_loss()` to the loss.

        Args:
            reentrant: Whether the model may be checkpointed in the reentrant way; see `freeze`.

        Raises:
            AdapterNameError: no such fusion.
        """
        self.train_adapter(fusion.fusion_of(self.model, fuse)[0], reentrant=reentrant)

    def fusion_loss(self) -> Tensor:
        """What to add to the loss while fusions train: how far each Wv is from the identity, times `regularization`."""
        return fusion.loss(self.model, list(self.fusions))

    def anneal_fusion(self, fuse: Fuse | str) -> None:
        """Lower a fusion's temperature by its `temperature_step`, down to 1: after a step of training."""
        fusion.anneal(self.model, fusion.fusion_of(self.model, fuse)[0])

    def prune_fusion(self, fuse: Fuse | str, keep: Sequence[Composition]) -> Fuse:
        """Let a fusion weigh these of its children alone, such as `seen.most_used(2)`; the adapters stay in the model.

        Raises:
            AdapterNameError: no such fusion.
            ConfigError: fewer than two children, or ones that it does not weigh.
            CompatibilityError: it is active.
        """
        return fusion.prune(self.model, self._state(), fusion.fusion_of(self.model, fuse)[0], keep)

    def fusion_attention(self, fuse: Fuse | str | None = None) -> AbstractContextManager[FusionAttention]:
        """Keep what the active fusion attends to: `with kit.fusion_attention() as seen: model(x)`, then `seen.mean()`.

        Args:
            fuse: Which fusion, where several are active.

        Raises:
            AdapterNameError: no such fusion.
            ActivationError: it is not active.
        """
        name = None if fuse is None else fusion.fusion_of(self.model, fuse)[0]
        return fusion_attention.watched(self.model, self._state(), name)

    @property
    def fusions(self) -> Mapping[str, Fuse]:
        """What each fusion weighs, by its name."""
        return fusions_of(self.model)

    # --- what runs ----------------------------------------------------------------------------------------------------

    def activate(self, composition: Composition) -> None:
        """Run this adapter or composition of adapters from now on. What trains does not change.

        Raises:
            AdapterNameError: no such adapter.
            ConfigError: several adapters in a list, a tuple or a set.
            TargetError: a Drop of a layer that there is not.
            CompatibilityError: adapters that cannot act together as the composition says, with the place and the reason.
            ActivationError: another thread is running the model with another adapter, or another adapter is merged.
        """
        activate.activate(self.model, self._state(), activate.check_active(self.model, composition))

    def deactivate(self) -> None:
        """Run the base alone from now on. Raises ActivationError while an adapter is merged."""
        activate.activate(self.model, self._state(), None)

    def active(self, composition: Composition) -> AbstractContextManager[None]:
        """`with kit.active("a"):` runs adapter a within the block, and what was active before after it.

        Raises as `activate` does: for what is no composition at the call, otherwise as the block is entered.
        """
        return activate.activated(self.model, self._state(), activate.check_active(self.model, composition))

    def base(self) -> AbstractContextManager[None]:
        """`with kit.base():` runs the base alone within the block."""
        return activate.activated(self.model, self._state(), None)

    def merge(self, name: str) -> None:
        """Write the active adapter into the base's weights: the model computes what it did, without the adapter's cost.

        Until `unmerge` what runs must contain it, and it cannot train; θ still means the weights without it.

        Raises:
            AdapterNameError: no such adapter.
            ActivationError: it is not active, or only within a `with` block; or it is merged already.
            CompatibilityError: its method, or a weight at its places, does not allow it; says which and why.
        """
        merge.merge(self.model, self._state(), name, self.example_inputs)

    def unmerge(self, name: str, *, restore: bool = True) -> None:
        """Take an adapter out of the weights again, to the bit; it stays active.

        Args:
            restore: Put the original weights back. If not, forget them, of all merged adapters, and leave the weights as
                they are: for when others were loaded after merging.

        Raises:
            AdapterNameError: no such adapter.
            ActivationError: it is not merged.
            CompatibilityError: the weights have changed since they were merged; says which.
        """
        merge.unmerge(self.model, self._state(), name, restore=restore)

    # --- what trains --------------------------------------------------------------------------------------------------

    def train_adapter(self, name: str, *, reentrant: bool = True) -> None:
        """Freeze the base and all other adapters, open this one and its heads, and activate it.

        Leaves train/eval mode alone. Raises AdapterNameError; ActivationError if it, or another, is merged.

        Args:
            reentrant: Whether the model may be checkpointed in the reentrant way; see `freeze`.
        """
        activate.check_known(self.model, name)
        freeze.check_may_train(self._state(), name)
        self.activate(name)  # first: from here on nothing can fail
        freeze.freeze(self.model, self._state(), reentrant=reentrant)
        for other in adapter_names(self.model):
            freeze.set_training(self.model, self._state(), other, trains=other == name)

    def freeze(self, name: str | None = None, *, reentrant: bool = True) -> None:
        """Freeze the base, or the adapter of this name. Raises AdapterNameError.

        Args:
            reentrant: Whether the model may be checkpointed in the reentrant way (`use_reentrant=True`), which computes
                no gradients in a frozen model unless what goes in requires one. With False nothing below the first
                active adapter is kept for backward. Models of transformers say themselves whether they are checkpointed.
        """
        if name is None:
            freeze.freeze(self.model, self._state(), reentrant=reentrant)
        else:
            activate.check_known(self.model, name)
            freeze.set_training(self.model, self._state(), name, trains=False)

    def unfreeze(self, name: str | None = None) -> None:
        """Undo `freeze`: restore the base's flags as they were found, or open the adapter of this name.

        Raises AdapterNameError; ActivationError if the adapter is merged.
        """
        if name is None:
            freeze.unfreeze(self.model, self._state())
        else:
            activate.check_known(self.model, name)
            freeze.set_training(self.model, self._state(), name, trains=True)

    def parameters(self, name: str, *, heads: bool = False) -> Iterator[nn.Parameter]:
        """The adapter's own parameters in a fixed order, frozen or not; with `heads`, those of its heads after them."""
        return (parameter for _, parameter in self.named_parameters(name, heads=heads))

    def named_parameters(self, name: str, *, heads: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """`parameters`, each with its name in the model. Raises AdapterNameError."""
        activate.check_known(self.model, name)
        return named_parameters(self.model, name, heads=heads)

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The adapter's own tensors by name, detached; no heads. Raises AdapterNameError."""
        return {key: parameter.detach() for key, parameter in self.named_parameters(name)}

    # --- looking and proving ------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Adapters, parameters, bytes, share of θ, what is active and what trains; `print` it."""
        return summarise(self.model, self._state())

    def tree(self, *, depth: int | None = None) -> Tree:
        """What the model is made of and where adapters sit; `print` it, or let rich print it in colour.

        Args:
            depth: Levels to show below the model; all if None.
        """
        return tree_of(self.model, self.example_inputs, depth=depth)

    def verify(
        self, example_inputs: ExampleInputs | None = None, *, optimizer: torch.optim.Optimizer | None = None
    ) -> Verification:
        """Prove that the active adapter is where it should be, and print the proof: `print(kit.verify())`.

        Checked: hooks are there; hosts were not replaced, and run in eval and training mode; one residual addition takes
        what each branch yields (the ε-test); gradients reach every trained parameter; devices agree; the base is frozen
        and has not moved; the optimizer has what trains.

        Args:
            example_inputs: Inputs to run the model on; else those given to `wrap`, else tiny ones made for it.
            optimizer: Of the training to come.
        """
        inputs = self.example_inputs if example_inputs is None else example_inputs
        return verify(self.model, self._state(), inputs, optimizer)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(
        self,
        name: str,
        directory: str | Path,
        *,
        heads: bool = True,
        metadata: store.Metadata | Mapping[str, Any] | None = None,
    ) -> Path:
        """Save an adapter in a directory, atomically, and return the directory.

        Args:
            heads: Save its heads too.
            metadata: What people want to know: see `ak.Metadata`.

        Raises:
            AdapterNameError: no such adapter.
            StoreError: the directory cannot be written, or the metadata are wrong.
        """
        activate.check_known(self.model, name)
        return store.save_adapter(self.model, name, directory, heads=heads, metadata=metadata)

    def load(
        self,
        directory: str | Path,
        name: str | None = None,
        *,
        heads: bool | Mapping[str, nn.Module] = True,
        any_base: bool = False,
    ) -> str:
        """Load an adapter and return its name; it is not active yet.

        Args:
            name: Another name than it was saved under.
            heads: Bring its heads as well. A mapping gives the modules of its custom heads, by their names.
            any_base: Say nothing if the model's weights are not those it was trained on.

        Raises: see `store.load_adapter`.
        """
        inputs = self.example_inputs
        return store.load_adapter(self.model, directory, name=name, heads=heads, any_base=any_base, example_inputs=inputs)

    @contextmanager
    def base_checkpoint(self) -> Iterator[None]:
        """Within the block, `model.state_dict()` (so `save_pretrained`, too) holds the base alone."""
        state = self._state()
        before, state.omit_adapters = state.omit_adapters, True
        try:
            yield
        finally:
            state.omit_adapters = before

    def __repr__(self) -> str:
        active = self._state().activation.active
        held = f"adapters={[*self.adapters]}" + (f", fusions={[*self.fusions]}" if self.fusions else "")
        return f"AdapterKit({type(self.model).__name__}, {held}, active={active!r})"

    def _state(self) -> ModelState:
        return attach.state_of(self.model)
