"""The drill of decision 12: a method of adapterkit itself is two new files and one line in an existing one."""

from pathlib import Path

import adapterkit as ak
from adapterkit.methods import METHODS, in_tree

from ..drill import copy_of_package, run_with
from ..helpers import typed_names

SOURCE = Path(ak.__file__).parent

MODULE = '''
"""LoHa: a change of a weight that is the elementwise product of two low-rank ones."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .functional.projections import Projection, project

__all__ = ["LoHa"]


class LoHa(nn.Module):
    """Compute what the change scaling * (B1 A1) * (B2 A2) of its weight adds to a projection's output.

    B1 starts at zero: a new adapter is the identity.

    Shape:
        z: (..., in), x and the result: (..., out)

    Reference: Hyeon-Woo et al. 2022, arXiv:2108.06098.
    """

    def __init__(self, projection: Projection, rank: int, *, scaling: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.projection, self.scaling = projection, scaling
        for name in ("hada_A1", "hada_A2"):
            self.register_parameter(name, nn.Parameter(torch.empty(rank, projection.in_features, dtype=dtype)))
        for name in ("hada_B1", "hada_B2"):
            self.register_parameter(name, nn.Parameter(torch.empty(projection.out_features, rank, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """B1 zero, the others normal, from torch's current random generator."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name == "hada_B1" else nn.init.normal_(parameter, std=1 / math.sqrt(len(parameter)))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the adapter computes in."""
        return self.hada_B1.dtype

    def forward(self, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """Return the delta for the host's output. Shape: as x."""
        return project(self.projection, z, self.weight_delta())

    def weight_delta(self) -> Tensor:
        """Return what is added to the host's weight. Shape: as the weight."""
        delta = self.scaling * (self.hada_B1 @ self.hada_A1) * (self.hada_B2 @ self.hada_A2)
        return delta.t() if self.projection.out_axis == 1 else delta

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the changed weight. Shape: as the weight."""
        return (weight + self.weight_delta()).to(weight.dtype)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host's tensors that change if the adapter is merged into them: the weight."""
        return {"weight": self.adapted(tensors["weight"])}
'''

METHOD = '''
"""LoHa as a method."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..config.settings import AdapterConfig, Size, Targets
from ..nn.loha import LoHa as LoHaModule
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from ..placement.weights import projection_at

__all__ = ["LoHa", "LoHaConfig"]


class LoHaConfig(AdapterConfig):
    """A change of a weight that is the elementwise product of two low-rank ones.

    Args:
        rank: Inner width of each.
        alpha: Numerator of the scaling alpha / rank.

    Every other setting: see `AdapterConfig`.

    Reference: Hyeon-Woo et al. 2022, arXiv:2108.06098.
    """

    method: Literal["loha"] = "loha"
    targets: Targets = Field(default=("@attention.q", "@attention.v"), min_length=1)
    rank: Size = 8
    alpha: float = 8.0


class LoHa:
    """Elementwise products of two low-rank changes."""

    name = "loha"
    config_type = LoHaConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"loha": {}}

    def placements(self, config: LoHaConfig) -> tuple[Placement, ...]:
        """At the targets' weights."""
        return (Placement(level="projection", reads="own_input"),)

    def build(self, config: LoHaConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> LoHaModule:
        """The factors of one site."""
        return LoHaModule(projection_at(site, host), config.rank, scaling=config.alpha / config.rank, dtype=dtype)
'''

LINE = "from .loha import LoHaConfig as LoHaConfig\n"

USE = """
import sys, torch
import adapterkit as ak
assert "adapterkit.methods" not in sys.modules
from tests.hosts.tiny import PreNormBlock, Tiny, randomise

assert ak.LoHaConfig(rank=2).method == "loha"
assert "LoHaConfig" in ak.__all__ and ak.__all__ == sorted(ak.__all__) == dir(ak)

ids = torch.randint(0, 11, (3, 5))
model, fresh = Tiny(PreNormBlock).eval(), Tiny(PreNormBlock).eval()
fresh.load_state_dict(model.state_dict())
base = model(ids)
kit = ak.wrap(model, ids)
kit.add("x", "loha", rank=2)
kit.train_adapter("x")
assert torch.equal(model(ids), base)
randomise(kit, "x")
adapted = model(ids)
assert not torch.allclose(adapted, base, atol=1e-4)
kit.verify(ids).require()
kit.merge("x")
torch.testing.assert_close(model(ids), adapted, atol=1e-5, rtol=1e-5)
kit.unmerge("x")
kit.save("x", sys.argv[1])
other = ak.wrap(fresh)
other.load(sys.argv[1])
other.activate("x")
assert torch.equal(fresh(ids), adapted)
print(ak.__file__)
"""


def test_a_method_is_two_new_files_and_one_line(tmp_path: Path) -> None:
    package = copy_of_package(tmp_path / "src")
    (package / "nn" / "loha.py").write_text(MODULE)
    (package / "methods" / "loha.py").write_text(METHOD)
    with (package / "methods" / "in_tree.py").open("a") as file:
        file.write(LINE)
    assert typed_names(package / "__init__.py") == typed_names(SOURCE / "__init__.py") | {"LoHaConfig"}
    assert run_with(package, USE, tmp_path / "saved") == str(package / "__init__.py")


def test_each_line_of_the_list_brings_one_method() -> None:
    configs = {name: config for name, config in vars(in_tree).items() if name.endswith("Config")}
    assert [method.config_type for method in METHODS] == list(configs.values())
    assert all(type(method).__module__ == method.config_type.__module__ for method in METHODS)
    assert all(getattr(ak, name) is config for name, config in configs.items())
