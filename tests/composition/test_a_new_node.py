"""A new composition node costs two files: its class, and its plan node with the function that makes it.

The test is the drill of docs/decisions/0014: it edits a copy of the package as a developer would, and runs it.
"""

from pathlib import Path

import pytest

from adapterkit.composition.nodes import CompositionNode
from adapterkit.runtime.compose.plan_nodes import plan_of

from ..drill import copy_of_package, insert, run_with

NODE = '''

@dataclass(frozen=True, init=False, repr=False)
class Scaled(CompositionNode):
    """What the child adds, times a number."""

    factor: float

    child_gets = "everything"
    is_in_order = False
    head_from = "only"
    most = 1
    example = 'Scaled("a", 0.5)'

    def __init__(self, child: Composition, factor: float) -> None:
        if not math.isfinite(factor):
            raise ConfigError(f"factor is a finite number; found {factor!r}")
        self._set_fields((child,), factor=float(factor))
'''

PLAN = '''

@dataclass(frozen=True)
class Times(PlanGroup):
    """What one node adds, times a number."""

    factor: float

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return the product. Shape: as `view.x`."""
        return self.factor * self.nodes[0].delta(site, host, view)


@plan_of.register(Scaled)
def _plan_of_scaled(composition: Scaled, nodes: Sequence[PlanNode], _at: SiteContext, _whole: Composition) -> PlanNode:
    return Times(tuple(nodes), composition.factor)
'''

IMPORT = "from ...composition.nodes import Average, Composition, CompositionNode, Drop, Fuse, Split, Stack, to_json"

USE = """
import json, pickle
import torch
from torch import nn
import adapterkit as ak
from adapterkit.composition.nodes import Parallel, Rows, Scaled, Split, Stack, from_json, names_always, names_in, to_json
from adapterkit.composition.rows import rows_of

assert ak.__file__.startswith(ROOT), ak.__file__

# The value: what every composition promises.
half = Scaled("a", 0.5)
for value in (half, Stack("b", half), Rows([half, None]), Scaled(Stack("a", "b"), -2)):
    for again in (eval(repr(value)), from_json(json.loads(json.dumps(to_json(value)))), pickle.loads(pickle.dumps(value))):
        assert again == value and hash(again) == hash(value), value
assert repr(half) == "Scaled('a', factor=0.5)" and half != Scaled("a", 0.25)
assert list(names_in(Stack("b", half))) == ["b", "a"] and names_always(Stack("b", half)) == {"b"}
assert rows_of(Scaled(Rows(["a", None]), 0.5), 2) == (half, Scaled("a", 0.5).with_children([None]))
for wrong, message in (
    (lambda: Scaled("a", float("inf")), "found inf"),
    (lambda: Scaled(Parallel("a", "b"), 1), "Scaled cannot hold Parallel"),
    (lambda: from_json({"type": "Scaled", "children": ["a", "b"], "factor": 1.0}), "no Scaled can be made of"),
    (lambda: from_json({"type": "Scaled", "children": ["a"]}), "a list of 'children' and the settings of that type"),
):
    try:
        wrong()
    except ak.ConfigError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

# What runs.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
kit = ak.wrap(model)
for name in ("a", "b"):
    kit.add(name, ak.BottleneckConfig(targets=["2"], bottleneck_size=2))
    for parameter in kit.parameters(name):
        nn.init.normal_(parameter)
x = torch.randn(4, 4)


def out(composition):
    with torch.no_grad(), kit.active(composition):
        return model(x)


with torch.no_grad(), kit.base():
    base = model(x)
a, b = out("a") - base, out("b") - base
assert not torch.allclose(a, b)


def equal(composition, expected):
    found = out(composition)
    assert torch.allclose(found, expected, atol=1e-6), (composition, found - expected)


equal(half, base + 0.5 * a)
equal(Scaled("a", 1), out("a"))
equal(Scaled(half, 0.5), base + 0.25 * a)
equal(Stack(half), base + 0.5 * a)
equal(ak.Average(half, "b"), base + 0.25 * a + 0.5 * b)
equal(Rows([half, "a", None, "b"]), torch.stack([base[0] + 0.5 * a[0], base[1] + a[1], base[2], base[3] + b[3]]))
equal(Scaled(ak.BatchSplit("a", "b"), 0.5), torch.cat([base[:2] + 0.5 * a[:2], base[2:] + 0.5 * b[2:]]))
equal(Parallel(half, "b"), torch.cat([base + 0.5 * a, base + b]))
equal(Scaled(ak.Drop("a", layers=[]), 0.5), base + 0.5 * a)

# "b" reads what the scaled "a" left.
site = next(module for module in model.modules() if type(module).__name__ == "AdapterSite")
with torch.no_grad():
    left = base + 0.5 * a
    equal(Stack(half, "b"), left + site.get_submodule("b")(left, left))

# Where the host's Parameter itself is changed there is nothing that could be scaled.
kit.add("w", ak.BitFitConfig(targets=["0"]))
before = out("a")
try:
    kit.activate(Scaled("w", 0.5))
except ak.CompatibilityError as error:
    assert "Scaled('w', factor=0.5) cannot act on '0'" in str(error) and "all rows and tokens share" in str(error), error
else:
    raise AssertionError("a shared Parameter was scaled")
equal("a", before)

# Heads: the one owner below it.
kit.add("h", ak.BottleneckConfig(targets=["2"], bottleneck_size=2), heads=ak.ClassificationHead(num_labels=2))
with kit.active(Scaled("h", 0.5)):
    assert model(x).logits.shape == (4, 2)
print("drill passed")
"""


def test_a_new_node_takes_two_files(tmp_path: Path) -> None:
    root = copy_of_package(tmp_path)
    # The class goes before what walks over compositions, the plan node to the end; one name more is imported.
    nodes, plans = root / "composition" / "nodes.py", root / "runtime" / "compose" / "plan_nodes.py"
    insert(nodes, NODE.lstrip("\n") + "\n\n", before="def _nodes_in(")
    assert plans.read_text().count(IMPORT) == 1
    plans.write_text(plans.read_text().replace(IMPORT, IMPORT.replace("Fuse, ", "Fuse, Scaled, ")) + PLAN)
    assert run_with(root, f"ROOT = {str(root)!r}\n{USE}") == "drill passed"


def test_a_node_that_does_not_state_its_facts_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match="the composition Half does not state child_gets, head_from"):
        type("Half", (CompositionNode,), {"is_in_order": True})


def test_a_node_without_a_plan_is_an_error() -> None:
    node = object.__new__(CompositionNode)
    with pytest.raises(TypeError, match=r"no plan is known of a CompositionNode: register a function"):
        plan_of(node, [], None, "a")
