"""The façade: `ak.wrap(model)` gives an `AdapterKit`, whose methods delegate to the layers below."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
from .lifecycle import activate, add, attach, combining, freeze, fusion, train, unwrap
from .lifecycle.merging import merge
from .methods.spellings import as_config
from .placement.spec import SiteSpec
from .runtime.lookup import adapters_in, fusions_of, heads_of, named_parameters
from .runtime.state import ModelState
from .structure.tracing.forward import ExampleInputs

__all__ = ["AdapterKit", "wrap"]

ConfigLike = Config | Mapping[str, Any] | str | Path

# By `id`: a kit holds its model, so that while the kit lives no other model can have the number. Weak, so that the
# model goes when nobody uses it; a kit made anew finds everything in the model, but for `example_inputs`.
_kits: WeakValueDictionary[int, "AdapterKit"] = WeakValueDictionary()


def wrap(model: nn.Module, example_inputs: ExampleInputs | None = None) -> "AdapterKit":
    """Return the kit of a model: the handle with which you add, train, run and save adapters.

        kit = ak.wrap(model)
        kit.add("reviews", "pfeiffer")
        kit.train_adapter("reviews")

    The model is not touched, and stays the object that you use. Wrapping it again returns the same kit.

    Args:
        model: Any module. If `torch.compile` wrapped it, the module inside is adapted.
        example_inputs: Inputs that the model runs on: a tensor, a tuple (by position) or a mapping (by keyword). Give some
            if the model takes others than token ids or images, or if the widths of target modules cannot be told from
            their types.

    Raises:
        ConfigError: `model` is not a module.
    """
    # What torch.compile returns holds the module as `_orig_mod`, and runs the hooks that are put there.
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ConfigError(f"wrap takes an nn.Module; found {type(model).__name__}")
    kit = _kits.get(id(inner))
    if kit is None:
        kit = _kits[id(inner)] = AdapterKit(inner)
    if example_inputs is not None:
        # Not forgotten by a later `ak.wrap(model)` without any, which only asks for the kit.
        kit.example_inputs = example_inputs
    return kit


class AdapterKit:
    """The adapters of one model, to add, train, run and save. Get it from `ak.wrap`.

    The kit holds no state of theirs: that lies in the model, so that copies and pickles of the model have it. A method
    that raises an error leaves the model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.example_inputs: ExampleInputs | None = None

    # --- adapters -----------------------------------------------------------------------------------------------------

    def add(self, name: str, config: ConfigLike, heads: Heads = (), **overrides: Any) -> None:
        """Add a new adapter. It does not run yet: call `train_adapter` or `activate`.

            kit.add("reviews", "pfeiffer", heads=ak.ClassificationHead(num_labels=2))
            kit.add("topics", "lora", rank=16)

        Args:
            name: Any printable name of at most 128 characters.
            config: A preset's name, a config, a mapping with its method, or a path to a JSON file with such a mapping.
            heads: What the adapter owns beside its modules, trained and saved with it. One of these, or a list of them:
                a name (or pattern) of the model's own modules, of which the adapter gets copies; a head such as
                `ak.ClassificationHead(labels=("neg", "pos"))` on the model's output. Or a mapping from names of the
                model's modules to modules of yours, which run in their places.
            **overrides: Settings to change in the config.

        Raises:
            AdapterNameError: The name is taken.
            ConfigError: A setting is wrong.
            TargetError: A target or head names nothing, or something that cannot be adapted.
        """
        add.add(self.model, name, as_config(config, overrides), heads, self.example_inputs)

    def add_head(self, name: str, head: Heads) -> None:
        """Give an adapter another head, or several. It trains if the adapter does.

        Args:
            name: The adapter.
            head: The head, as `heads` of `add`.

        Raises:
            AdapterNameError: There is no such adapter.
            ConfigError: The adapter has a head of this name, or in this place.
            TargetError: A head names nothing, or something that cannot be one.
            CompatibilityError: The active composition cannot choose between this head and another adapter's.
            ActivationError: The adapter is merged.
        """
        activate.check_known(self.model, name)
        add.add_heads(self.model, name, head, self.example_inputs)

    def remove_head(self, name: str, head: str) -> None:
        """Take a head from an adapter. The adapter stays.

        Args:
            name: The adapter.
            head: The head's name; `heads` lists them.

        Raises:
            AdapterNameError: There is no such adapter, or it has no such head.
            ActivationError: The adapter is merged.
        """
        activate.check_known(self.model, name)
        add.remove_head(self.model, name, head)

    def heads(self, name: str) -> dict[str, HeadConfig]:
        """Map the name of each head of an adapter to its settings.

        Args:
            name: The adapter.

        Raises:
            AdapterNameError: There is no such adapter.
        """
        activate.check_known(self.model, name)
        return heads_of(self.model, name)

    def labels(self, name: str) -> dict[str, dict[int, str]]:
        """Map the name of each head that has labels to its labels by their indices.

            kit.labels("reviews")  # {"classification": {0: "neg", 1: "pos"}}

        Args:
            name: The adapter.

        Raises:
            AdapterNameError: There is no such adapter.
        """
        maps = {head: config.label_map for head, config in self.heads(name).items()}
        return {head: labels for head, labels in maps.items() if labels is not None}

    def remove(self, name: str) -> None:
        """Remove an adapter or a fusion. If it is merged, it is unmerged first.

        A module that holds no adapter any more is as it was before the first one was added.

        Args:
            name: The adapter or fusion.

        Raises:
            AdapterNameError: There is no such adapter.
            ActivationError: Another thread is running the model with it.
            CompatibilityError: A fusion weighs it; or it is merged, and the weights have changed since (see `unmerge`).
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
        """Make a new adapter: a weighted sum of others of the same method, which stay. It is not active yet.

            kit.combine("both", {"reviews": 0.5, "topics": 0.5})

        Args:
            name: The name of the new adapter.
            weights: Map each adapter that goes into the sum to its weight, of any sign. One adapter at weight 1 is copied.
            how: How low-rank changes of weights are summed. "concatenate" is exact; its rank is the sum of the ranks.
                "svd" is the nearest sum of the given rank. "linear" adds factor by factor; that brings cross terms between
                different adapters, which may be as large as the sum: prefer "concatenate". Methods that are linear in
                their parameters (IA3, BitFit, norm tuning) are summed exactly, whatever is given. For all others "linear"
                takes the weighted mean, and the weights must sum to 1.
            rank: The rank of the result of "svd"; the largest of the ranks if not given.
            heads: Combine heads, too. Copies of the model's own heads become that head plus the weighted differences to it.
                Of other heads the only one that there is is taken, or the weighted mean of them if the weights sum to 1.

        Returns:
            For "svd" and "linear": map each site to how far the change of its weight is from the weighted sum, relative to
            the sum.

        Raises:
            AdapterNameError: The name is taken, or one of the others is no adapter.
            ConfigError: The adapters cannot be combined, or not so; says why.
            TargetError: The adapters sit at places that no one config names; for a mean, at different ones.
            CompatibilityError: A value is not finite.
        """
        return combining.combine(self.model, name, weights, how=how, rank=rank, heads=heads)

    @property
    def adapters(self) -> Mapping[str, Config]:
        """Map the name of each adapter to its config. Fusions are in `fusions`."""
        # A fusion lies in sites as an adapter does, with a config of its own.
        return {n: c for n, c in adapters_in(self.model).configs.items() if not isinstance(c, FusionConfig)}

    def sites(self, config: ConfigLike, **overrides: Any) -> list[SiteSpec]:
        """Return what a config would adapt, without changing anything. Raises as `add` does.

            for site in kit.sites("pfeiffer"):
                print(site.path, site.at)

        Args:
            config: As for `add`.
            **overrides: Settings to change in the config.
        """
        return add.find_sites(self.model, as_config(config, overrides), self.example_inputs)

    def unwrap(self) -> nn.Module:
        """Remove everything that adapterkit added or changed, and return the model. Raises as `remove` does."""
        unwrap.unwrap(self.model, self._state())
        return self.model

    # --- fusions ------------------------------------------------------------------------------------------------------

    def add_fusion(
        self,
        fuse: Fuse,
        config: FusionConfig | Mapping[str, Any] | str | Path = "dynamic",
        heads: Heads = (),
        **overrides: Any,
    ) -> None:
        """Add a fusion: an attention that weighs what the adapters in a Fuse add. It is not active yet.

            kit.add_fusion(ak.Fuse("books", "films"))
            kit.train_fusion("books,films")

        The fusion is called as the Fuse is, else as its adapters with commas between. `parameters`, `freeze`, `remove`,
        `save` and `load` take that name as they take an adapter's.

        Args:
            fuse: What to weigh: adapters that are there already.
            config: "dynamic", "static", a config, a mapping, or a path to a JSON file with such a mapping.
            heads: Heads that the fusion owns, as those of an adapter.
            **overrides: Settings to change in the config.

        Raises:
            AdapterNameError: The name is taken, or an adapter is not there.
            ConfigError: A setting is wrong, or `fuse` is no Fuse.
            TargetError: A head names nothing.
            CompatibilityError: The adapters cannot be weighed; says where and why.
        """
        settings = fusion.as_fusion_config(config, overrides)
        fusion.add_fusion(self.model, fuse, settings, heads, self.example_inputs)

    def train_fusion(self, fuse: Fuse | str, *, reentrant: bool = True) -> None:
        """Freeze the base and all adapters, open this fusion and its heads, and activate it.

        Add `kit.fusion_loss()` to the loss.

        Args:
            fuse: The fusion, or its name.
            reentrant: Whether the model may be checkpointed in the reentrant way; see `freeze`.

        Raises:
            AdapterNameError: There is no such fusion.
        """
        self.train_adapter(fusion.fusion_of(self.model, fuse)[0], reentrant=reentrant)

    def fusion_loss(self) -> Tensor:
        """Return what to add to the loss while fusions train.

        For each fusion: how far each of its value matrices is from the identity, times the config's `regularization`.
        """
        return fusion.loss(self.model, list(self.fusions))

    def anneal_fusion(self, fuse: Fuse | str) -> None:
        """Lower a fusion's temperature by its `temperature_step`, down to 1. Call it after a step of training.

        Args:
            fuse: The fusion, or its name.

        Raises:
            AdapterNameError: There is no such fusion.
        """
        fusion.anneal(self.model, fusion.fusion_of(self.model, fuse)[0])

    def prune_fusion(self, fuse: Fuse | str, keep: Sequence[Composition]) -> Fuse:
        """Let a fusion weigh only some of its children from now on. The adapters stay in the model.

            kit.prune_fusion("books,films,music", seen.most_used(2))  # `seen` from `fusion_attention`

        Args:
            fuse: The fusion, or its name.
            keep: The children that it keeps; at least two.

        Returns:
            What it weighs now.

        Raises:
            AdapterNameError: There is no such fusion.
            ConfigError: `keep` has fewer than two children, or some that the fusion does not weigh.
            CompatibilityError: The fusion is active.
        """
        return fusion.prune(self.model, self._state(), fusion.fusion_of(self.model, fuse)[0], keep)

    def fusion_attention(self, fuse: Fuse | str | None = None) -> AbstractContextManager[FusionAttention]:
        """Keep, within a `with` block, what the active fusion attends to.

            with kit.fusion_attention() as seen:
                model(x)
            print(seen)

        Args:
            fuse: Which fusion, where several are active.

        Raises:
            AdapterNameError: There is no such fusion.
            ActivationError: It is not active.
        """
        name = None if fuse is None else fusion.fusion_of(self.model, fuse)[0]
        return fusion_attention.watched(self.model, self._state(), name)

    @property
    def fusions(self) -> Mapping[str, Fuse]:
        """Map the name of each fusion to what it weighs."""
        return fusions_of(self.model)

    # --- what runs ----------------------------------------------------------------------------------------------------

    def activate(self, composition: Composition) -> None:
        """Run an adapter, or a composition of adapters, from now on. What trains does not change.

            kit.activate("reviews")
            kit.activate(ak.Stack("english", "reviews"))

        Args:
            composition: An adapter's or a fusion's name, or a composition such as `ak.Stack("a", "b")`.

        Raises:
            AdapterNameError: There is no such adapter.
            ConfigError: Several adapters are given in a list, a tuple or a set.
            TargetError: A Drop names a layer that there is not.
            CompatibilityError: The adapters cannot act together as the composition says; says where and why.
            ActivationError: Another thread is running the model with another adapter, or another adapter is merged.
        """
        activate.activate(self.model, self._state(), activate.check_active(self.model, composition))

    def deactivate(self) -> None:
        """Run the base alone from now on. Raises ActivationError while an adapter is merged."""
        activate.activate(self.model, self._state(), None)

    def active(self, composition: Composition) -> AbstractContextManager[None]:
        """Run an adapter or a composition within a `with` block, and after it what was active before.

            with kit.active("reviews"):
                model(x)

        Args:
            composition: As for `activate`, which names the errors: for what is no composition they are raised at the call,
                all others as the block is entered.
        """
        # Checked at the call, so that the error points at the composition and not at the `with`.
        return activate.activated(self.model, self._state(), activate.check_active(self.model, composition))

    def base(self) -> AbstractContextManager[None]:
        """Run the base alone within a `with` block, and after it what was active before.

        Entering the block raises ActivationError while an adapter is merged.
        """
        return activate.activated(self.model, self._state(), None)

    def merge(self, name: str) -> None:
        """Write the active adapter into the base's weights: the model computes the same, without the adapter's cost.

        Until `unmerge`, what runs must contain the adapter, and the adapter cannot train. "The base" still means the
        weights without it.

        Args:
            name: The adapter.

        Raises:
            AdapterNameError: There is no such adapter.
            ActivationError: It is not active, or only within a `with` block; or it is merged already.
            CompatibilityError: Its method, or a weight at its places, does not allow it; says which and why.
        """
        merge.merge(self.model, self._state(), name, self.example_inputs)

    def unmerge(self, name: str, *, restore: bool = True) -> None:
        """Take an adapter out of the weights again, bit for bit. It stays active.

        Args:
            name: The adapter.
            restore: Put the original weights back. False forgets the originals of all merged adapters, and leaves the
                weights as they are: use it if other weights were loaded after merging.

        Raises:
            AdapterNameError: There is no such adapter.
            ActivationError: It is not merged.
            CompatibilityError: The weights have changed since they were merged; says which.
        """
        merge.unmerge(self.model, self._state(), name, restore=restore)

    # --- what trains --------------------------------------------------------------------------------------------------

    def train_adapter(self, name: str, *, reentrant: bool = True) -> None:
        """Freeze the base and all other adapters, open this one and its heads, and activate it.

            kit.train_adapter("reviews")
            optimizer = torch.optim.AdamW(kit.parameters("reviews"), lr=1e-3)

        It does not call `model.train()` or `model.eval()`.

        Args:
            name: The adapter.
            reentrant: Whether the model may be checkpointed in the reentrant way; see `freeze`.

        Raises:
            AdapterNameError: There is no such adapter.
            ActivationError: It, or another adapter, is merged.
        """
        train.train_adapter(self.model, self._state(), name, reentrant=reentrant)

    def freeze(self, name: str | None = None, *, reentrant: bool = True) -> None:
        """Freeze the base, or an adapter and its heads: they do not train until `unfreeze`.

        Args:
            name: The adapter; the base if not given.
            reentrant: Whether the model may be checkpointed in the reentrant way (`use_reentrant=True`), which computes
                no gradients in a frozen model unless what goes in requires one. With False nothing below the first
                active adapter is kept for backward. Models of transformers say themselves whether they are checkpointed.

        Raises:
            AdapterNameError: There is no such adapter.
        """
        if name is None:
            freeze.freeze(self.model, self._state(), reentrant=reentrant)
        else:
            train.freeze_adapter(self.model, self._state(), name)

    def unfreeze(self, name: str | None = None) -> None:
        """Undo `freeze`: give the base's parameters the flags that they had, or open an adapter and its heads.

        Args:
            name: The adapter; the base if not given.

        Raises:
            AdapterNameError: There is no such adapter.
            ActivationError: The adapter is merged.
        """
        if name is None:
            freeze.unfreeze(self.model, self._state())
        else:
            train.unfreeze_adapter(self.model, self._state(), name)

    def parameters(self, name: str, *, heads: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameters of an adapter and of its heads, in a fixed order, frozen or not: what an optimizer wants.

        Args:
            name: The adapter or fusion.
            heads: False leaves the parameters of its heads out.

        Raises:
            AdapterNameError: There is no such adapter.
        """
        # A generator expression evaluates its first iterable at once: an unknown name raises here, not in the optimizer.
        return (parameter for _, parameter in self.named_parameters(name, heads=heads))

    def named_parameters(self, name: str, *, heads: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what `parameters` yields, each with its name in the model.

        Args:
            name: The adapter or fusion.
            heads: False leaves the parameters of its heads out.

        Raises:
            AdapterNameError: There is no such adapter.
        """
        activate.check_known(self.model, name)
        # No `yield from`: it would make this a generator, whose check above waits for the first `next`.
        return named_parameters(self.model, name, heads=heads)

    def state_dict(self, name: str, *, heads: bool = False) -> dict[str, Tensor]:
        """Map the names of an adapter's parameters to their values, detached; without its heads unless asked.

        Args:
            name: The adapter or fusion.
            heads: True adds the parameters of its heads.

        Raises:
            AdapterNameError: There is no such adapter.
        """
        return {key: parameter.detach() for key, parameter in self.named_parameters(name, heads=heads)}

    # --- looking and proving ------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Count what is in the model: adapters, parameters, bytes, share of the base. Say what is active, what is open.

        `print` it for a table.
        """
        return summarise(self.model, self._state())

    def tree(self, *, depth: int | None = None) -> Tree:
        """Show what the model is made of, and where adapters sit. `print` it, or let rich print it in colour.

        Args:
            depth: How many levels to show below the model; all if not given.
        """
        return tree_of(self.model, self.example_inputs, depth=depth)

    def verify(
        self, example_inputs: ExampleInputs | None = None, *, optimizer: torch.optim.Optimizer | None = None
    ) -> Verification:
        """Prove that the active adapter is where it should be, and say what is wrong.

            print(kit.verify(batch, optimizer=optimizer))
            kit.verify(batch).require()  # raises if anything is wrong

        Checked are: hooks are there; hosts were not replaced, and run in eval and training mode; one residual addition
        takes what each branch yields (the ε-test); gradients reach every parameter that trains; devices agree; the base is
        frozen and has not moved; the optimizer has what trains.

        Args:
            example_inputs: Inputs to run the model on. If not given, those of `wrap`, or tiny ones made for the model.
            optimizer: The optimizer of the training to come.
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
        """Save an adapter in a folder, and return the folder. A kill at any moment leaves the old files or the new ones.

            kit.save("reviews", "adapters/reviews", metadata={"task": "sentiment"})

        Args:
            name: The adapter or fusion.
            directory: The folder; made if it is not there.
            heads: Save its heads, too.
            metadata: What people want to know of it: see `ak.Metadata`.

        Raises:
            AdapterNameError: There is no such adapter.
            StoreError: The folder cannot be written, or the metadata are wrong.
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
        """Load an adapter and return its name. It is not active yet.

            kit.activate(kit.load("adapters/reviews"))

        Args:
            directory: The folder that it was saved in.
            name: The name that it is to have; the one it was saved under if not given.
            heads: Load its heads, too. A mapping gives the modules of its custom heads, by the heads' names.
            any_base: Do not warn if the model's weights are not those that it was trained on. For a fusion: weigh adapters
                of the right names, whatever they hold.

        Raises:
            StoreError: The files are missing, damaged, hostile or too new, or a custom head's module was not given.
            CompatibilityError: The model is of another structure than the one the adapter was trained on; says where.
            TargetError: A row-wise setting of the adapter would take another axis for that of the rows.
            AdapterNameError: The name is taken.
        """
        inputs = self.example_inputs
        return store.load_adapter(self.model, directory, name=name, heads=heads, any_base=any_base, example_inputs=inputs)

    def base_checkpoint(self) -> AbstractContextManager[None]:
        """Leave adapters out of `model.state_dict()`, and so out of `save_pretrained`, within a `with` block.

            with kit.base_checkpoint():
                model.save_pretrained("my-base")

        Without it `save_pretrained` would write adapters into the base model's file.
        """
        return unwrap.base_checkpoint(self._state())

    def __repr__(self) -> str:
        active = self._state().activation.active
        held = f"adapters={[*self.adapters]}" + (f", fusions={[*self.fusions]}" if self.fusions else "")
        return f"AdapterKit({type(self.model).__name__}, {held}, active={active!r})"

    def _state(self) -> ModelState:
        # Looked up each time: the kit keeps nothing, so a copy of the model finds its own.
        return attach.state_of(self.model)
