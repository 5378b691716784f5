"""What an adapter adds to each weight, and what every combination is checked for."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.placement.layers import setting_at
from adapterkit.runtime.site import SiteEntry

HOWS = ["linear", "concatenate", "svd"]
EXACT = ["concatenate", "svd"]


def exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def modules(kit: ak.AdapterKit, name: str) -> dict[tuple[str, tuple[str, ...]], Any]:
    """An adapter's modules by host and Parameter."""
    return {
        (path, entry.spec.parameters): module
        for path, host in kit.model.named_modules()
        if "_adapterkit" in host._modules
        for entry, module in host._adapterkit.modules_of(name)
        if isinstance(entry, SiteEntry)
    }


def deltas(kit: ak.AdapterKit, name: str) -> dict[tuple[str, tuple[str, ...]], Tensor]:
    """What an adapter adds to each weight."""
    return {key: module.weight_delta().detach() for key, module in modules(kit, name).items()}


def outputs(kit: ak.AdapterKit, name: str, x: Any) -> Tensor:
    with kit.active(name), torch.no_grad():
        found = kit.model(x)
    return found if isinstance(found, Tensor) else found[0]


def check_sum(kit: ak.AdapterKit, name: str, weights: dict[str, float]) -> None:
    """The result's change of each weight is the weighted sum of the sources' changes."""
    expected: dict[Any, Tensor] = {}
    for source, weight in weights.items():
        for key, delta in deltas(kit, source).items():
            expected[key] = expected.get(key, 0) + weight * delta
    found = deltas(kit, name)
    assert found.keys() == expected.keys()
    for key, delta in found.items():
        exact(delta, expected[key])


def check_config(kit: ak.AdapterKit, name: str) -> None:
    """The result's config leads to its sites, and to the rank and the scaling that its modules have."""
    config: Any = kit.adapters[name]
    held = modules(kit, name)
    sites = kit.sites(config)
    assert {(site.path, site.parameters) for site in sites} == held.keys()
    for site in sites:
        module = held[site.path, site.parameters]
        rank = setting_at(config.rank, site)
        assert module.low_rank.layout.slices == site.slices
        assert all(parameter.is_contiguous() for parameter in module.parameters())
        assert (module.low_rank.rank, module.lora_A.shape) == (rank, module.low_rank.a_shape)
        assert module.scaling == setting_at(config.alpha, site) / (rank**0.5 if config.use_rslora else rank)


def check_loads(kit: ak.AdapterKit, name: str, x: Any, directory: Path) -> None:
    """Saved and loaded into the bare model under another name, the result computes the same."""
    expected = outputs(kit, name, x)
    kit.save(name, directory)
    fresh = copy.deepcopy(kit.model)
    other = ak.wrap(fresh, kit.example_inputs)
    other.unwrap()
    other.load(directory, "loaded")
    assert torch.equal(outputs(other, "loaded", x), expected)
    assert other.adapters["loaded"] == kit.adapters[name]
