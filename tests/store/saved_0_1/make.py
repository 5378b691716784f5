"""Write the files beside it, at commit aeb8dc3: adapters as the first release of their format wrote them.

Run it at that commit, from the root of the repository: `python tests/store/saved_0_1/make.py`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import adapterkit as ak

HERE = Path(__file__).parent
CONFIG = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "vocab_size": 32,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ADAPTERS: dict[str, tuple[str | ak.Union, dict[str, object]]] = {
    "pfeiffer": ("pfeiffer", {}),
    "houlsby": ("houlsby", {"bottleneck_size": 4}),
    "parallel": ("parallel", {"bottleneck_size": 4}),
    "adapter_plus": ("adapter_plus", {"bottleneck_size": 4}),
    "compacter": ("compacter", {"bottleneck_size": 4, "phm_dim": 2}),
    "lora": ("lora", {"rank": 2, "targets": ["@attention.q", "@attention.v"]}),
    "parameter": ("lora", {"rank": 2, "targets": ["c_proj.weight"]}),
    "dora": ("dora", {"rank": 2, "targets": ["c_attn"]}),
    "vera": ("vera", {"rank": 2, "targets": ["c_fc"]}),
    "ia3": ("ia3", {}),
    "bitfit": ("bitfit", {}),
    "norm_tuning": ("norm_tuning", {}),
    "madx": ("madx", {"bottleneck_size": 4}),
    "union": (
        ak.Union(ak.BottleneckConfig(targets=["mlp"], bottleneck_size=2), ak.LoRAConfig(rank=2, targets=["c_fc"])),
        {},
    ),
}


def main() -> None:
    """Write the base, each adapter, and what the model returns with it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG)).eval()
    ids = torch.arange(8).reshape(2, 4)
    save_file(
        {name: t.detach().clone() for name, t in model.state_dict().items() if name != "lm_head.weight"},
        HERE / "base.safetensors",
    )
    kit = ak.wrap(model, example_inputs={"input_ids": ids})
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> None:
        for parameter in kit.parameters(name, heads=False):
            torch.nn.init.normal_(parameter, std=0.1)
        kit.activate(fuse if name == "fusion" else name)
        with torch.no_grad():
            seen = model(input_ids=ids)
        outputs[name] = (seen.logits if hasattr(seen, "logits") else seen[0]).clone()
        kit.deactivate()
        kit.save(name, HERE / name)

    for name, (config, settings) in ADAPTERS.items():
        kit.add(name, config, **settings)
        keep(name)
    kit.add("head", "pfeiffer", heads=[ak.ClassificationHead(labels=("no", "yes"), output="logits")])
    keep("head")
    fuse = ak.Fuse("pfeiffer", "head", name="fusion")
    kit.add_fusion(fuse)
    keep("fusion")
    save_file(outputs, HERE / "outputs.safetensors")
    (HERE / "model.json").write_text(json.dumps({"config": CONFIG, "adapters": list(outputs)}, indent=1))


main()
