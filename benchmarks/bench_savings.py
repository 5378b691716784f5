"""What do adapters save, in parameters and in bytes on disk, against a full copy for each task?

    python benchmarks/bench_savings.py            # all sizes, with real files (needs 4 GB of disk for a minute)
    python benchmarks/bench_savings.py --quick    # the smallest base, in seconds

Bases have the shapes of published models and random weights: neither counts nor bytes depend on values. Published counts
(AdapterHub, arXiv:2007.07779, table 2, and its v3.1 release notes) must come out exactly.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from report import RESULTS, write_json
from torch import nn
from tqdm import tqdm
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import adapterkit as ak

METHODS = ("pfeiffer", "houlsby", "parallel")
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
MINI = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BASES = {
    "MiniLM-L6": lambda: BertModel(BertConfig(**MINI)),
    "RoBERTa-base": lambda: RobertaModel(RobertaConfig(**ROBERTA)),
    "RoBERTa-large": lambda: RobertaModel(RobertaConfig(**ROBERTA, **LARGE)),
}
PUBLISHED = {
    ("RoBERTa-base", "pfeiffer", 16): 894_528,
    ("RoBERTa-base", "houlsby", 16): 1_789_056,
    ("RoBERTa-base", "parallel", 2): 7_091_712,
}
REDUCTION_FACTORS = (64, 16, 2)


def formula(method: str, hidden: int, layers: int, factor: int) -> int:
    """Parameters by the published formula: L (2 d b + b + d), twice that for Houlsby."""
    width = hidden // factor
    return layers * (2 * hidden * width + width + hidden) * (2 if method == "houlsby" else 1)


def measure(name: str, model: nn.Module, folder: Path) -> list[dict[str, Any]]:
    """Parameters and bytes of every method and size on one base."""
    full = folder / "full.safetensors"
    safetensors.torch.save_file(model.state_dict(), full)
    full_bytes = full.stat().st_size
    full.unlink()
    theta = sum(p.numel() for p in model.parameters())
    kit, rows = ak.wrap(model), []
    for method in METHODS:
        for factor in REDUCTION_FACTORS:
            kit.add("a", method, reduction_factor=factor)
            saved = kit.save("a", folder / "adapter")
            parameters = sum(p.numel() for p in kit.parameters("a"))
            kit.remove("a")
            config = model.config
            assert parameters == formula(method, config.hidden_size, config.num_hidden_layers, factor)
            assert parameters == PUBLISHED.get((name, method, factor), parameters)
            rows.append(
                {
                    "base": name,
                    "base_parameters": theta,
                    "base_bytes": full_bytes,
                    "method": method,
                    "reduction_factor": factor,
                    "bottleneck_size": config.hidden_size // factor,
                    "parameters": parameters,
                    "percent": 100 * parameters / theta,
                    "bytes": sum(file.stat().st_size for file in saved.iterdir()),
                    "published": PUBLISHED.get((name, method, factor)),
                }
            )
    return rows


def many(model: nn.Module, count: int, width: int, folder: Path) -> dict[str, Any]:
    """Real files: the base once and `count` Pfeiffer adapters, against full copies."""
    base = folder / "base.safetensors"
    safetensors.torch.save_file(model.state_dict(), base)
    kit = ak.wrap(model)
    for n in tqdm(range(count), desc="saving adapters", unit="adapter"):
        kit.add("a", "pfeiffer", bottleneck_size=width, seed=n)
        kit.save("a", folder / f"adapter-{n}")
        kit.remove("a")
    adapters = sum(file.stat().st_size for file in folder.glob("adapter-*/*"))
    one = base.stat().st_size
    return {
        "adapters": count,
        "bottleneck_size": width,
        "base_bytes": one,
        "adapter_bytes": adapters,
        "in_full_models": (one + adapters) / one,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes for a growing number of tasks: full copies, and one base with adapters."""
    import matplotlib.pyplot as plt

    row = next(r for r in rows if (r["base"], r["method"], r["reduction_factor"]) == ("RoBERTa-base", "pfeiffer", 16))
    tasks = torch.arange(1, 126)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(tasks, tasks * row["base_bytes"] / 2**30, label="a full copy for each task")
    axes.plot(tasks, (row["base_bytes"] + tasks * row["bytes"]) / 2**30, label="one base, a Pfeiffer adapter (48) for each")
    axes.set(xlabel="tasks", ylabel="GiB on disk", yscale="log", title="RoBERTa-base shapes")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print the table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest base only")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in tqdm(list(BASES)[: 1 if args.quick else None], desc="bases", unit="base"):
            rows += measure(name, BASES[name](), Path(temporary))
        model = BASES["MiniLM-L6"]() if args.quick else BertModel(BertConfig())
        total = many(model, 5 if args.quick else 125, 48, Path(temporary))
    print(f"{'base':<14} {'method':<9} {'rf':>3} {'width':>5} {'parameters':>11} {'of θ':>7} {'bytes':>12} {'of full':>8}")
    for r in rows:
        print(
            f"{r['base']:<14} {r['method']:<9} {r['reduction_factor']:>3} {r['bottleneck_size']:>5} {r['parameters']:>11,} "
            f"{r['percent']:>6.2f}% {r['bytes']:>12,} {100 * r['bytes'] / r['base_bytes']:>7.2f}%"
            + ("  = published" if r["published"] else "")
        )
    print(
        f"{total['adapters']} adapters of width {total['bottleneck_size']} and their base: "
        f"{(total['base_bytes'] + total['adapter_bytes']) / 1e6:,.1f} MB = {total['in_full_models']:.2f} full models"
    )
    write_json("savings", {"rows": rows, "many": total}, quick=args.quick)
    if not args.quick:
        plot(rows, RESULTS / "savings.png")


if __name__ == "__main__":
    main()
