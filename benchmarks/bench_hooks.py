"""What does a hook cost over the arithmetic that it does?

    python benchmarks/bench_hooks.py            # microseconds a site, then a BERT-base shape, some minutes
    python benchmarks/bench_hooks.py --quick    # in seconds

All variants are timed in turn within one run, round after round, so that a machine whose speed drifts gives the same
answer. Of a site, the fastest round of each is compared (what else runs on the machine only ever adds microseconds); of a
whole model, the median.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from report import write_json
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

import adapterkit as ak

WIDTH, BOTTLENECK, TOKENS = 64, 8, 4
SMALL_OVERHEAD_US = 6.0
PFEIFFER = {"targets": ["layer.*.output.LayerNorm"], "at": "renormalised", "bottleneck_size": 48}


class Inlined(nn.Linear):
    """The arithmetic of a bottleneck written into a linear layer by hand."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__(WIDTH, WIDTH)
        self.requires_grad_(False)
        self.down_weight, self.down_bias = adapter.down_weight, adapter.down_bias
        self.up_weight, self.up_bias = adapter.up_weight, adapter.up_bias

    def forward(self, x: Tensor) -> Tensor:
        """Host and bottleneck. Shape: (tokens, width)."""
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.relu(F.linear(y, self.down_weight, self.down_bias)), self.up_weight, self.up_bias)


class InlinedNorm(nn.LayerNorm):
    """The same for the norm of a post-norm block, as `at="renormalised"` adapts it: norm(s + f(norm(s)))."""

    def __init__(self, norm: nn.LayerNorm, adapter: nn.Module) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.load_state_dict(norm.state_dict(), strict=False)
        self.requires_grad_(False)
        self.down_weight, self.down_bias = adapter.down_weight, adapter.down_bias
        self.up_weight, self.up_bias = adapter.up_weight, adapter.up_bias

    def forward(self, s: Tensor) -> Tensor:
        """Bottleneck and host. Shape: (batch, seq, hidden)."""
        h = F.relu(F.linear(super().forward(s), self.down_weight, self.down_bias))
        return super().forward(s + F.linear(h, self.up_weight, self.up_bias))


def empty_hook(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> None:
    """The least that a hook can do."""


def time_in_turn(
    work: dict[str, Callable[[], Any]], rounds: int, repeats: int, choose: Callable[[list[float]], float]
) -> dict[str, float]:
    """Mean seconds of each piece of work, all in turn, of the round that `choose` takes."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for task in work.values():
        task()
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name, task in work.items():
            started = time.perf_counter()
            for _ in range(repeats):
                task()
            seconds[name].append((time.perf_counter() - started) / repeats)
    return {name: choose(values) for name, values in seconds.items()}


def site_cost(rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of one call of a small layer: forward, and forward with backward."""

    def linear() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    bare, hooked, inactive, active, removed = (linear() for _ in range(5))
    hooked.register_forward_hook(empty_hook, with_kwargs=True)
    config = ak.BottleneckConfig(targets=[""], bottleneck_size=BOTTLENECK)
    for model in (inactive, active, removed):
        ak.wrap(model).add("a", config)
    ak.wrap(active).activate("a")
    ak.wrap(removed).remove("a")
    inlined = Inlined(active._adapterkit.first_module("a"))
    models = {
        "bare": bare,
        "empty hook": hooked,
        "inlined": inlined,
        "ours, active": active,
        "ours, inactive": inactive,
        "ours, removed": removed,
    }
    x = torch.randn(TOKENS, WIDTH)
    x_grad = x.clone().requires_grad_()
    with torch.no_grad():
        forward = time_in_turn({name: lambda m=m: m(x) for name, m in models.items()}, rounds, repeats, min)
    both = time_in_turn({n: lambda m=m: m(x_grad).sum().backward() for n, m in models.items()}, rounds, repeats // 3, min)
    return {"forward": _micro(forward), "forward and backward": _micro(both)}


def _micro(seconds: dict[str, float]) -> dict[str, float]:
    return {name: value * 1e6 for name, value in seconds.items()}


def model_cost(rounds: int, config: BertConfig, batch: int, length: int) -> dict[str, float]:
    """Seconds of a forward and of a training step on a whole model.

    Without adapters, with them, fine-tuning it all, and training adapters that are written into the model by hand on a
    base frozen by hand: what the arithmetic of the step costs.
    """
    ids, labels = torch.randint(0, config.vocab_size, (batch, length)), torch.zeros(batch, dtype=torch.long)
    plain, adapted, by_hand = (BertForSequenceClassification(config).eval() for _ in range(3))
    kit = ak.wrap(adapted)
    kit.add("a", {"method": "bottleneck", **PFEIFFER}, heads=["classifier"])
    kit.train_adapter("a")
    by_hand.bert.requires_grad_(False)
    for layer, host in zip(by_hand.bert.encoder.layer, adapted.bert.encoder.layer, strict=True):
        adapter = copy.deepcopy(host.output.LayerNorm._adapterkit.first_module("a"))
        layer.output.LayerNorm = InlinedNorm(layer.output.LayerNorm, adapter)
    models = (plain, adapted, by_hand)
    optimizers = {m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in models}

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model.eval()(input_ids=ids)

    def step(model: nn.Module) -> None:
        model.train()(input_ids=ids, labels=labels).loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    work = {
        "forward, base": lambda: forward(plain),
        "forward, adapter": lambda: forward(adapted),
        "step, full": lambda: step(plain),
        "step, by hand": lambda: step(by_hand),
        "step, adapter": lambda: step(adapted),
    }
    return time_in_turn(work, rounds, 1, statistics.median)


def main() -> None:
    """Measure both, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds and a small model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sites = site_cost(rounds=10 if args.quick else 60, repeats=150 if args.quick else 600)
    overheads = {}
    for kind, us in sites.items():
        print(f"\n{kind}, microseconds")
        for name, value in us.items():
            print(f"  {name:<16} {value:8.2f}")
        overheads[kind] = us["ours, active"] - us["inlined"] - (us["empty hook"] - us["bare"])
        inactive = us["ours, inactive"] - us["empty hook"]
        print(f"  over an empty hook and the arithmetic: {overheads[kind]:+.2f} (at most {SMALL_OVERHEAD_US})")
        print(f"  inactive, over an empty hook: {inactive:+.2f}")
    torch.set_num_threads(2)
    small = BertConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=512)
    seconds = model_cost(3, small, 2, 32) if args.quick else model_cost(5, BertConfig(), 8, 128)
    ratios = {
        "forward": seconds["forward, adapter"] / seconds["forward, base"],
        "step": seconds["step, adapter"] / seconds["step, full"],
        "step, by hand": seconds["step, by hand"] / seconds["step, full"],
    }
    print(f"\n{'a small BERT' if args.quick else 'BERT-base shape, batch 8 x 128'}, seconds")
    for name, value in seconds.items():
        print(f"  {name:<18} {value:8.3f}")
    print(f"  forward {ratios['forward']:.3f} x base (at most 1.05), step {ratios['step']:.3f} x full (at most 0.65)")
    print(f"  step with the arithmetic written by hand: {ratios['step, by hand']:.3f} x full")
    result = {"sites_us": sites, "overhead_us": overheads, "model_seconds": seconds, "ratios": ratios}
    write_json("hooks", result, quick=args.quick)


if __name__ == "__main__":
    main()
