"""The change drill of a fused kernel: it computes a module, the norm behind it and the addition, in one function.

A copy of the package gets it as a developer would write it: one new file, and one existing one, the module's.
"""

from pathlib import Path

from ..drill import copy_of_package, insert, run_with

KERNEL = '''
"""A bottleneck, the norm behind it and the addition as one operator, which eager and compiled code both take."""

import torch
from torch import Tensor
from torch.nn import functional as F

CALLS = []


@torch.library.custom_op("adapterkit_drill::bottleneck_added", mutates_args=())
def added(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, norm: Tensor, shift: Tensor) -> Tensor:
    CALLS.append(tuple(x.shape))
    branch = F.linear(F.relu(F.linear(x.to(down.dtype), down, down_bias)), up, up_bias)
    return x + F.layer_norm(branch, branch.shape[-1:], norm, shift).to(x.dtype)


@added.register_fake
def _(x, *_):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    with torch.enable_grad():
        x, *own = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        branch = F.linear(F.relu(F.linear(x, *own[:2])), *own[2:4])
        out = x + F.layer_norm(branch, branch.shape[-1:], *own[4:])
    return torch.autograd.grad(out, (x, *own), grad)


added.register_autograd(_backward, setup_context=_save)
'''

# In nn/bottleneck.py: two imports, and at the end of the class the kernel.
IMPORTS = "from torch.nn import functional as F\nfrom .functional.fused_bottleneck import added\n"
METHOD = '''
    @property
    def is_fused(self) -> bool:
        """Whether `added` knows these settings."""
        return self.norm_after and self._activation is F.relu and not (self.norm_before or self.gating or self.dropout)

    def added(self, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """Return x with what the bottleneck adds. Shape: (..., output)."""
        own = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return added(x, *own, self.norm_after_weight, self.norm_after_bias)
'''

SCRIPT = """
import torch
from torch import nn

import adapterkit as ak
from adapterkit.nn.functional.fused_bottleneck import CALLS

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
x = torch.randn(2, 5, 6)
kit = ak.wrap(model)
for name, norm in (("fused", True), ("plain", False)):
    kit.add(name, ak.BottleneckConfig(targets=["0"], bottleneck_size=3, layer_norm_after=norm))
    for parameter in kit.parameters(name):
        nn.init.normal_(parameter, std=0.5)
host = model[0]
module = host._adapterkit.get_submodule("fused")
y = host(x)
expected = model[2](torch.tanh(y + module(y, y)))
kit.train_adapter("fused")
assert not CALLS
found = model(x)
assert CALLS == [(2, 5, 6)], CALLS
torch.testing.assert_close(found, expected)
found.square().mean().backward()
got = [p.grad.clone() for p in kit.parameters("fused")]
for p in kit.parameters("fused"):
    p.grad = None
model[2](torch.tanh(y.detach() + module(y.detach(), y.detach()))).square().mean().backward()
torch.testing.assert_close(got, [p.grad for p in kit.parameters("fused")])
torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
CALLS.clear()
kit.activate("plain")
model(x)
assert not CALLS, "its settings are not the kernel's"
kit.activate(ak.Average("fused", "plain"))
model(x)
assert not CALLS, "a mean needs the deltas"
kit.activate(ak.Stack("plain", "fused"))
model(x)
assert len(CALLS) == 1
module.register_forward_hook(lambda *_: None)
model(x)
assert len(CALLS) == 1, "a kernel would pass by hooks on the module"
print("ran")
"""


def test_a_fused_kernel_is_one_new_file_and_one_that_exists(tmp_path: Path) -> None:
    package = copy_of_package(tmp_path)
    (package / "nn" / "functional" / "fused_bottleneck.py").write_text(KERNEL)
    file = package / "nn" / "bottleneck.py"
    insert(file, IMPORTS, before="from .functional.bottleneck import")
    file.write_text(f"{file.read_text().rstrip()}\n{METHOD}")
    assert run_with(package, SCRIPT) == "ran"
