"""Train an adapter on each of four sentiment domains, fuse them for the one with few labels, and compare.

    python examples/fusion.py --data vaderSentiment-3.3.2.tar.gz          # offline; one seed
    python examples/fusion.py --data vaderSentiment-3.3.2.tar.gz --model FacebookAI/roberta-base

The archive comes from `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`. All arms are tested on the same
sentences about products, and see the same 250 labelled ones of them; see docs/fusion-on-text.md.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import domains
import sentiment
import torch
from domains import TARGET, Domain, Example
from torch import nn

import adapterkit as ak

# Chosen on validation sentences alone, by benchmarks/bench_fusion.py --select; those of "source" and "multi-task" are what
# examples/sentiment.py has for an adapter. See docs/fusion-on-text.md.
SETTINGS = {
    "source": {"learning_rate": 3e-3, "epochs": 3},
    "single task": {"learning_rate": 3e-3, "epochs": 10},
    "full": {"learning_rate": 5e-5, "epochs": 10},
    "multi-task": {"learning_rate": 3e-3, "epochs": 3},
    "stack": {"learning_rate": 3e-3, "epochs": 10},
    "average": {"learning_rate": 1.5e-3, "epochs": 10},
    "fusion": {"learning_rate": 5e-5, "epochs": 10},
}
SOURCES = tuple(name for name in domains.FILES if name != TARGET)
TRAIN_SIZE, TARGET_SIZE = 1500, 250  # sentences of each source domain at most, and of the target

Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One seed.

    Attributes:
        sources: Where the source domains' adapters are saved.
        out: Where everything else is.
        split: What is measured on.
        nearest: The source domain that is nearest to the target.
    """

    data: Path
    model: str
    seed: int
    train_size: int
    target_size: int
    sources: Path
    out: Path
    split: str = "test"
    nearest: str = ""

    def domains(self) -> dict[str, Domain]:
        """The sentences that this seed draws."""
        return domains.make_domains(domains.read_rated(self.data), self.seed, self.train_size, self.target_size)

    def folder(self, domain: str) -> Path:
        """Where a domain's adapter lies."""
        return (self.out if domain == TARGET else self.sources) / domain


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    arm: str
    accuracy: float
    parameters: int
    seconds_per_step: float


# --- what each arm runs and trains ------------------------------------------------------------------------------------


def one_adapter(kit: ak.AdapterKit, run: Run) -> None:
    """A new adapter with its own copy of the head."""
    kit.add("own", "pfeiffer", bottleneck_size=48, seed=run.seed, heads=["classifier"])
    kit.train_adapter("own")


def nearest_source(kit: ak.AdapterKit, run: Run) -> None:
    """The adapter and the head of the nearest source domain, as they are."""
    kit.activate(kit.load(run.folder(run.nearest), run.nearest))


def all_weights(kit: ak.AdapterKit, run: Run) -> None:
    """No adapter."""


def stack(kit: ak.AdapterKit, run: Run) -> None:
    """A new adapter on top of that of the nearest source domain, which is frozen."""
    kit.load(run.folder(run.nearest), run.nearest, heads=False)
    one_adapter(kit, run)
    kit.activate(ak.Stack(run.nearest, "own"))


def average(kit: ak.AdapterKit, run: Run) -> None:
    """The mean of all four adapters, frozen; the model's head trains."""
    load_all(kit, run, heads=False)
    for name in (None, *domains.FILES):  # None is the base
        kit.freeze(name)
    kit.activate(ak.Average(*domains.FILES))
    kit.model.classifier.requires_grad_(True)


def fusion(kit: ak.AdapterKit, run: Run) -> None:
    """AdapterFusion over all four adapters, frozen, with its own copy of the head."""
    load_all(kit, run, heads=False)
    fuse = ak.Fuse(*domains.FILES, name="fused")
    kit.add_fusion(fuse, "dynamic", heads=["classifier"], seed=run.seed)
    kit.train_fusion(fuse)


def load_all(kit: ak.AdapterKit, run: Run, *, heads: bool) -> None:
    """The adapters of all four domains."""
    for domain in domains.FILES:
        kit.load(run.folder(domain), domain, heads=heads)


ARMS = {
    "nearest source": nearest_source,
    "single task": one_adapter,
    "full": all_weights,
    "multi-task": one_adapter,
    "stack": stack,
    "average": average,
    "fusion": fusion,
}

# --- training and measuring -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A model in which exactly that requires grad which an arm trains. Every arm begins with the same new head."""

    model: nn.Module
    tokenizer: Any
    kit: ak.AdapterKit

    @classmethod
    def of(cls, arm: Callable[[ak.AdapterKit, Run], None], run: Run) -> "Prepared":
        """The model of an arm, before training."""
        model, tokenizer = sentiment.build(run.model, run.seed)
        kit = ak.wrap(model)
        arm(kit, run)
        return cls(model, tokenizer, kit)

    def train(self, examples: list[Example], title: str, seed: int, settings: Settings) -> float:
        """Train on the examples; return the median seconds of a step."""
        penalty = {"penalty": self.kit.fusion_loss} if title == "fusion" else {}
        return sentiment.train(self.model, self.tokenizer, examples, title=title, seed=seed, **settings, **penalty)

    def accuracy(self, examples: list[Example]) -> float:
        """Share of right labels, in percent."""
        return sentiment.accuracy(sentiment.predict(self.model, self.tokenizer, examples), examples)


def train_source(run: Run, domain: str, settings: Settings) -> float:
    """Train and save the adapter of a source domain; return its accuracy on that domain's own split."""
    data = run.domains()[domain]
    ready = Prepared.of(one_adapter, run)
    ready.train(data.train, domain, run.seed, settings)
    ready.kit.save("own", run.folder(domain))
    return ready.accuracy(getattr(data, run.split))


def find_nearest(run: Run) -> str:
    """The source domain whose adapter, as it is, is right most often on the target's sentences to train on."""
    examples = run.domains()[TARGET].train
    found = {source: Prepared.of(nearest_source, replace(run, nearest=source)).accuracy(examples) for source in SOURCES}
    return max(found, key=lambda source: found[source])


def run_arm(run: Run, arm: str, settings: Settings | None) -> tuple[Result, Prepared]:
    """Train one arm, unless it has no settings, and measure it on the target domain."""
    ready, data, trained, seconds = Prepared.of(ARMS[arm], run), run.domains(), 0, 0.0
    if settings is not None:
        everything = [example for domain in data.values() for example in domain.train]
        trained = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
        seconds = ready.train(everything if arm == "multi-task" else data[TARGET].train, arm, run.seed, settings)
    if arm == "single task":
        ready.kit.save("own", run.folder(TARGET))
    return Result(arm, ready.accuracy(getattr(data[TARGET], run.split)), trained, seconds), ready


def run_seed(run: Run) -> dict[str, Any]:
    """Everything for one seed: an adapter for each source domain, then each arm on the target domain."""
    own = {source: train_source(run, source, SETTINGS["source"]) for source in SOURCES}
    run = replace(run, nearest=find_nearest(run))
    results = []
    for arm in ARMS:
        result, ready = run_arm(run, arm, SETTINGS.get(arm))
        results.append(asdict(result))
    ready.kit.verify().require()  # of the fusion, the last arm
    return {
        "seed": run.seed,
        "nearest": run.nearest,
        "own": own,
        "attention": draw_attention(run, ready),
        "arms": results,
    }


# --- looking into the fusion, and routing rows ------------------------------------------------------------------------


@torch.no_grad()
def draw_attention(run: Run, ready: Prepared) -> dict[str, list[float]]:
    """Draw how much each adapter counts in each layer, over the target's sentences; return that."""
    masks = []
    with ready.kit.fusion_attention() as seen:
        for inputs, _ in sentiment.batches(getattr(run.domains()[TARGET], run.split), ready.tokenizer):
            ready.model(**inputs)
            masks.append(inputs["attention_mask"])
    seen.draw(run.out / "attention.png", masks)
    return {domain: column.tolist() for domain, column in zip(domains.FILES, seen.mean(masks).T, strict=True)}


@torch.no_grad()
def route(run: Run, each: int = 8) -> str:
    """Run sentences of all domains in one batch, each row with its domain's adapter and head, and check every row."""
    model, tokenizer = sentiment.build(run.model, run.seed)
    kit = ak.wrap(model)
    pairs = [(name, example) for name, domain in run.domains().items() for example in domain.test[-each:]]
    load_all(kit, run, heads=True)
    names, examples = zip(*random.Random(run.seed).sample(pairs, len(pairs)), strict=True)
    inputs, _ = next(sentiment.batches(list(examples), tokenizer))
    model.eval()
    with kit.active(ak.Rows(names)):
        together = model(**inputs)
    alone = []
    for row, name in enumerate(names):
        with kit.active(name):
            alone.append(model(**{key: value[row : row + 1] for key, value in inputs.items()}))
    torch.testing.assert_close(together, torch.cat(alone))
    return (
        f"one batch, {len(names)} rows of {len(domains.FILES)} domains: each as its adapter alone gives it, largest "
        f"difference of a logit {(together - torch.cat(alone)).abs().max():.1e}"
    )


# --- the report -------------------------------------------------------------------------------------------------------


def table(outcome: dict[str, Any]) -> str:
    """One seed as text."""
    rows = [
        f"{arm['arm']:<15} {arm['accuracy']:>7.1f}% {arm['parameters']:>12,} {arm['seconds_per_step']:>8.3f}"
        for arm in outcome["arms"]
    ]
    own = ", ".join(f"{domain} {value:.1f}%" for domain, value in outcome["own"].items())
    head = f"{'arm, on ' + TARGET:<15} {'accuracy':>8} {'trained':>12} {'s/step':>8}"
    return "\n".join([head, *rows, "", f"sources on their own sentences: {own}; nearest to {TARGET}: {outcome['nearest']}"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--model", default=sentiment.OFFLINE_MODEL, help="a Hugging Face id or folder")
    parser.add_argument("--train-size", type=int, default=TRAIN_SIZE, help="of each source domain, at most")
    parser.add_argument("--target-size", type=int, default=TARGET_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fusion"))
    return parser.parse_args()


def main() -> None:
    """Run one seed, print the table, draw the attention, route a mixed batch."""
    args = arguments()
    run = Run(args.data, args.model, args.seed, args.train_size, args.target_size, args.out, args.out)
    outcome = run_seed(run)
    print(f"\n{table(outcome)}\n\n{route(run)}")
    (args.out / "results.json").write_text(json.dumps(outcome, indent=2))
    print(f"adapters: {args.out}   attention: {args.out / 'attention.png'}")


if __name__ == "__main__":
    main()
