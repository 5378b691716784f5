"""MAD-X on real text: language adapters under a task adapter, and the language swapped at inference.

    python examples/madx.py

What part of the Bible a verse is from, learned from English labels and tested on Chichewa verses, of chapters that nothing
was trained on. The base is a multilingual transformer, made a masked language model of both languages first. Then:

1. a language adapter for each of the two, with an invertible part, by masked language modelling on unlabelled verses;
2. a task adapter on labelled English verses, on top of the English language adapter, which stays as it is;
3. the same task adapter on top of the Chichewa language adapter, on Chichewa verses.

Reference: Pfeiffer et al. 2020, arXiv:2005.00052.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import madx_base
import madx_text
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import adapterkit as ak
from adapterkit.composition.nodes import Composition

LANGUAGES = ("english", "chichewa")  # source, target
Row = tuple[list[int], int]  # token ids, label
Rows = dict[str, dict[str, list[Row]]]  # by language and split


@dataclass(frozen=True)
class Settings:
    """How long and how fast each part trains; chosen on validation verses. See docs/madx.md."""

    layers: int = 6  # of 12: half the time
    max_tokens: int = 32
    batch_size: int = 16
    head_steps: int = 100
    head_rate: float = 3e-3
    base_steps: int = 250
    base_rate: float = 3e-4
    language_steps: int = 200
    language_rate: float = 1e-3
    task_steps: int = 150
    task_rate: float = 2e-3
    task_verses: int = 1000  # to measure accuracy on
    language_verses: int = 300  # to measure the masked-LM loss on


class Reader(nn.Module):
    """A transformer encoder with two outputs: words for masked tokens, and a class for the whole text.

    The output embedding is the input embedding, as in BERT. The encoder came without what maps its hidden states there
    (`transform`); `train_base` trains it.

    Args:
        encoder: Takes input_ids and attention_mask, returns an object with last_hidden_state.
        width: Features of its hidden states.
        embedding: Its word embedding.
        classes: How many classes there are.

    Shape:
        ids, mask: (batch, seq). masked: (batch, seq), true where a word is asked for; none by default.
        result: (masked tokens, vocabulary) and (batch, classes)
    """

    def __init__(self, encoder: nn.Module, width: int, embedding: nn.Embedding, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.output = nn.Linear(width, embedding.num_embeddings)
        self.output.weight = embedding.weight
        nn.init.zeros_(self.output.bias)
        self.classifier = nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits over the vocabulary at the masked tokens, and logits over the classes."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        if masked is None:
            masked = torch.zeros_like(mask, dtype=torch.bool)
        words = self.output(self.transform(hidden[masked]))
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return words, self.classifier((hidden * weights).sum(1) / weights.sum(1))


# --- model and text ---------------------------------------------------------------------------------------------------


def prepare(settings: Settings) -> tuple[Reader, Rows]:
    """The base, its masked-LM head not yet trained, and both languages as token ids with labels."""
    torch.manual_seed(0)
    text = madx_text.load()
    file = madx_base.weight_file()
    tokens = madx_base.Tokens(file.pieces, (verse.text for splits in text.values() for verse in splits.train))
    encoder = madx_base.encoder(file, tokens.kept, settings.layers)
    rows: Rows = {}
    for language, splits in text.items():
        rows[language] = {}
        for name, verses in vars(splits).items():
            ids = tokens([verse.text for verse in verses], settings.max_tokens)
            rows[language][name] = list(zip(ids, map(madx_text.part_of, verses), strict=True))
    return Reader(encoder, file.hidden, encoder.embeddings.word_embeddings, len(madx_text.PARTS)), rows


def collate(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels. Shape: (batch, seq), (batch, seq), (batch,)."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [madx_base.Tokens.pad] * (length - len(ids)) for ids, _ in rows])
    return ids, (ids != madx_base.Tokens.pad).long(), torch.tensor([label for _, label in rows])


def hide(ids: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide 15 % of the tokens as BERT does: 80 % of these as <mask>, 10 % as any token, 10 % left; and which they are."""
    special = len(madx_base.SPECIAL)
    masked = (ids >= special) & (torch.rand(ids.shape, generator=generator) < 0.15)
    how = torch.rand(ids.shape, generator=generator)
    others = torch.randint(special, vocabulary, ids.shape, generator=generator)
    hidden = torch.where(masked & (how < 0.8), madx_base.Tokens.mask, ids)
    return torch.where(masked & (how >= 0.9), others, hidden), masked


# --- training and measuring: ordinary PyTorch -------------------------------------------------------------------------


def word_loss(model: Reader, rows: list[Row], generator: torch.Generator) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of hidden words, and how many were hidden."""
    ids, mask, _ = collate(rows)
    shown, masked = hide(ids, model.output.out_features, generator)
    words, _ = model(shown, mask, masked)
    return F.cross_entropy(words, ids[masked], reduction="sum"), int(masked.sum())


def train_words(model: Reader, rows: list[Row], steps: int, rate: float, settings: Settings, seed: int, title: str) -> None:
    """Train whatever requires grad to find hidden words."""
    generator = torch.Generator().manual_seed(seed)
    for batch in _training(model, rows, steps, rate, settings, seed, title):
        loss, count = word_loss(model, batch, generator)
        (loss / max(1, count)).backward()


def train_classes(model: Reader, rows: list[Row], settings: Settings, seed: int, title: str) -> None:
    """Train whatever requires grad to tell the classes."""
    for batch in _training(model, rows, settings.task_steps, settings.task_rate, settings, seed, title):
        ids, mask, labels = collate(batch)
        F.cross_entropy(model(ids, mask)[1], labels).backward()


def _training(
    model: Reader, rows: list[Row], steps: int, rate: float, settings: Settings, seed: int, title: str
) -> Iterator[list[Row]]:
    """Batches drawn at random; between them, one step of AdamW along the gradients that the caller computed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm)))
    order = random.Random(seed)
    model.train()
    for _ in tqdm(range(steps), desc=title, unit="step", mininterval=2):
        yield order.sample(rows, settings.batch_size)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def mean_word_loss(model: Reader, rows: list[Row], count: int) -> float:
    """Cross-entropy of a hidden word in nats, over some of the rows: always the same ones, with the same words hidden."""
    generator, total, words = torch.Generator().manual_seed(0), 0.0, 0
    model.eval()
    for batch in _some(rows, count):
        loss, hidden = word_loss(model, batch, generator)
        total, words = total + loss.item(), words + hidden
    return total / words


@torch.no_grad()
def accuracy(model: Reader, rows: list[Row], count: int) -> float:
    """Share of right classes in percent, over some of the rows: always the same ones."""
    right, seen = 0, 0
    model.eval()
    for batch in _some(rows, count):
        ids, mask, labels = collate(batch)
        right += int((model(ids, mask)[1].argmax(-1) == labels).sum())
        seen += len(batch)
    return 100 * right / seen


def _some(rows: list[Row], count: int) -> Iterator[list[Row]]:
    chosen = sorted(random.Random(0).sample(rows, min(count, len(rows))), key=lambda row: len(row[0]))  # less padding
    return (chosen[start : start + 32] for start in range(0, len(chosen), 32))


# --- MAD-X ------------------------------------------------------------------------------------------------------------


def build(settings: Settings, out: Path) -> tuple[Reader, Rows]:
    """The base as a masked language model, and the rows. A base that an earlier run trained under `out` is taken."""
    model, rows = prepare(settings)
    path = (
        out / f"base-{settings.layers}-layers-{settings.head_steps}-{settings.base_steps}-steps-{settings.base_rate:g}.pt"
    )
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train_base(model, rows, settings)
        out.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model, rows


def train_base(model: Reader, rows: Rows, settings: Settings) -> None:
    """Make a masked language model of the encoder, on both languages: as it comes, it embeds sentences and knows no words.

    First only what is new trains, then all but the word embeddings, which are the output embedding, too.
    """
    both = [row for language in LANGUAGES for row in rows[language]["train"]]
    model.requires_grad_(False)
    model.transform.requires_grad_(True)
    model.output.bias.requires_grad_(True)
    train_words(model, both, settings.head_steps, settings.head_rate, settings, 0, "base: head")
    model.encoder.requires_grad_(True)
    model.output.weight.requires_grad_(False)
    train_words(model, both, settings.base_steps, settings.base_rate, settings, 1, "base: all of it")


def wrap(model: Reader, rows: Rows) -> ak.AdapterKit:
    """The kit; the example inputs ask for words and for classes."""
    ids, mask, _ = collate(rows[LANGUAGES[0]]["train"][:4])
    return ak.wrap(model, (ids, mask, ids == ids[0, 1]))


def train_languages(kit: ak.AdapterKit, model: Reader, rows: Rows, settings: Settings, seed: int) -> None:
    """A language adapter for each language, from text without labels."""
    for language in LANGUAGES:
        kit.add(language, "madx", seed=seed)
        kit.train_adapter(language)
        train, title = rows[language]["train"], f"language adapter, {language}"
        train_words(model, train, settings.language_steps, settings.language_rate, settings, seed, title)


def measure_words(kit: ak.AdapterKit, model: Reader, rows: Rows, split: str, count: int) -> dict[str, dict[str, float]]:
    """Masked-LM loss of each language's text: without an adapter, with each language's one."""
    losses: dict[str, dict[str, float]] = {"no adapter": {}, **{f"{adapter} adapter": {} for adapter in LANGUAGES}}
    for language in LANGUAGES:
        text = rows[language][split]
        with kit.base():
            losses["no adapter"][language] = mean_word_loss(model, text, count)
        for adapter in LANGUAGES:
            with kit.active(adapter):
                losses[f"{adapter} adapter"][language] = mean_word_loss(model, text, count)
    return losses


def train_task(
    kit: ak.AdapterKit, model: Reader, rows: list[Row], name: str, below: str | None, settings: Settings, seed: int
) -> None:
    """A task adapter on top of a language adapter, which stays as it is, or of none."""
    kit.add(name, "pfeiffer", seed=seed, heads=["classifier"])
    kit.train_adapter(name)  # all else is frozen: the base, the language adapters
    kit.activate(ak.Stack(below, name) if below else name)
    train_classes(model, rows, settings, seed, f"task adapter on {below or 'nothing'}")


def train_tasks(kit: ak.AdapterKit, model: Reader, rows: Rows, settings: Settings, seed: int) -> dict[str, Composition]:
    """The task adapters, and the ways to use them that are compared."""
    source, target = LANGUAGES
    train_task(kit, model, rows[source]["train"], "task alone", None, settings, seed)
    train_task(kit, model, rows[source]["train"], "task", source, settings, seed)
    train_task(kit, model, rows[target]["train"], "task of target", target, settings, seed)
    return {
        "no language adapters": "task alone",
        "not swapped": ak.Stack(source, "task"),
        "swapped (MAD-X)": ak.Stack(target, "task"),
        f"trained on {target} labels": ak.Stack(target, "task of target"),
    }


def measure_tasks(
    kit: ak.AdapterKit, model: Reader, rows: Rows, ways: dict[str, Composition], split: str, count: int
) -> dict[str, dict[str, float]]:
    """Accuracy in each language, of each way to use the adapters."""
    scores = {"majority": {language: majority(rows[language], split) for language in LANGUAGES}}
    for way, composition in ways.items():
        with kit.active(composition):
            scores[way] = {language: accuracy(model, rows[language][split], count) for language in LANGUAGES}
    return scores


def majority(splits: dict[str, list[Row]], split: str) -> float:
    """Accuracy in percent of always saying the class that is most frequent in training."""
    [(most, _)] = Counter(label for _, label in splits["train"]).most_common(1)
    return 100 * sum(label == most for _, label in splits[split]) / len(splits[split])


def run(settings: Settings, seed: int, split: str, out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """All of it with one seed; the adapters and the numbers go under `out`. The base is the same for all seeds."""
    model, rows = build(settings, out)
    kit = wrap(model, rows)
    for site in kit.sites("madx"):
        print(f"{site.tag or 'bottleneck':<10} at the {site.at} of {site.path}")
    train_languages(kit, model, rows, settings, seed)
    words = measure_words(kit, model, rows, split, settings.language_verses)
    ways = train_tasks(kit, model, rows, settings, seed)
    tasks = measure_tasks(kit, model, rows, ways, split, settings.task_verses)
    kit.verify().require()  # that every adapter is in its place, and that no bit of the base moved
    folder = out / f"seed-{seed}"
    for name in kit.adapters:
        kit.save(name, folder / name.replace(" ", "-"))
    results = {"words": words, "tasks": tasks}
    (folder / "results.json").write_text(json.dumps({"settings": asdict(settings), "split": split, **results}, indent=2))
    return results


# --- the report -------------------------------------------------------------------------------------------------------


def table(title: str, cells: dict[str, dict[str, float]], form: str) -> str:
    """Numbers by row and language, as text."""
    head = f"{title:<28}" + "".join(f"{language:>12}" for language in LANGUAGES)
    rows = [f"{row:<28}" + "".join(f"{form.format(values[la]):>12}" for la in LANGUAGES) for row, values in cells.items()]
    return "\n".join([head, *rows])


def main() -> None:
    """One seed, tested on verses of chapters that nothing was trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/madx"))
    args = parser.parse_args()
    started = time.perf_counter()
    results = run(Settings(), args.seed, "test", args.out)
    print("\n" + table("masked-LM loss (nats)", results["words"], "{:.3f}"))
    print("\n" + table("accuracy of the task", results["tasks"], "{:.1f} %"))
    print(f"\nadapters and numbers: {args.out / f'seed-{args.seed}'}   {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
