"""What tests of compositions share: adapters of every method in one model, and trees over them."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import adapterkit as ak
from adapterkit.composition.nodes import Average, Drop, Fuse, Stack

from ...hosts.tiny import PreNormBlock, Tiny, randomise

CONFIGS: dict[str, Any] = {
    "p": ak.BottleneckConfig(targets=["blocks.*"], bottleneck_size=3),
    "q": ak.BottleneckConfig(targets=["blocks.*"], bottleneck_size=3),
    "wide": ak.BottleneckConfig(targets=["blocks.*"], bottleneck_size=5, non_linearity="tanh", layers=[1]),
    "parallel": ak.BottleneckConfig(targets=["mlp"], placement="parallel", residual="norm_2", bottleneck_size=2),
    "l": ak.LoRAConfig(targets=["query", "value", "mlp.0"], rank=2),
    "m": ak.LoRAConfig(targets=["query", "value", "mlp.0"], rank=2),
    "dora": ak.LoRAConfig(targets=["value", "mlp.2"], rank=2, use_dora=True, layers=[0]),
    "vera": ak.VeRAConfig(targets=["query", "mlp.0"], rank=3),
    "vera 2": ak.VeRAConfig(targets=["query", "mlp.0"], rank=3),
    "i": ak.IA3Config(targets=["key", "value"], feedforward_targets=["mlp.2"]),
    "compacter": ak.CompacterConfig(targets=["mlp"], phm_dim=2, bottleneck_size=4),
    "compacter 2": ak.CompacterConfig(targets=["mlp"], phm_dim=2, bottleneck_size=4),
}
FUSIONS = [Fuse("p", "q"), Fuse("l", Stack("m", "wide"), "p", name="mixed")]
ROWS, TOKENS = 4, 6


def with_every_method() -> tuple[ak.AdapterKit, Tensor]:
    torch.manual_seed(0)
    kit = ak.wrap(Tiny(PreNormBlock).eval(), torch.zeros(1, 5, dtype=torch.long))
    for name, config in CONFIGS.items():
        kit.add(name, config)
        randomise(kit, name)
    for fuse in FUSIONS:
        kit.add_fusion(fuse)
        randomise(kit, fuse.fusion)
    return kit, torch.randint(0, 11, (ROWS, TOKENS))


def hidden(kit: ak.AdapterKit, ids: Tensor) -> Tensor:
    """What the last block returns, token by token."""
    seen: list[Tensor] = []
    with kit.model.blocks[-1].register_forward_hook(lambda _m, _a, output: seen.append(output)):
        kit.model(ids)
    return seen[0]


names = st.sampled_from(list(CONFIGS))
same = st.recursive(
    names | st.sampled_from(FUSIONS),
    lambda c: (
        st.lists(c, min_size=1, max_size=3).map(lambda held: Stack(*held))
        | st.lists(c, min_size=1, max_size=3).map(lambda held: Average(*held, weights=[i + 1 for i in range(len(held))]))
        | st.builds(lambda held, layers: Drop(held, layers=layers), c, st.sampled_from([(0,), (-1,), range(2)]))
    ),
    max_leaves=4,
)
