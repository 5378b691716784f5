"""Whether a branch carries something from one token to another is asked of numbers, where no name of an operation tells."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover

from ...hosts.blocks import VOCAB, WIDTH, FeedForward, Model, Pre, randomised
from ...hosts.experts import EXPERTS, block_of

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Four layers, of which a subclass makes what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


class OneContext(Layers):
    """All tokens share one weighted sum of keys, as in MobileViT v2."""

    def forward(self, x: Tensor) -> Tensor:
        context = (self.a(x) * self.b(x)[..., :1].softmax(1)).sum(1, keepdim=True)
        return self.d(F.relu(self.c(x)) * context)


class PooledQuery(Layers):
    """A mean of queries meets every key, as in SwiftFormer."""

    def forward(self, x: Tensor) -> Tensor:
        query = F.normalize(self.a(x), dim=-1)
        weights = F.normalize(query @ torch.ones(WIDTH, 1), dim=1)
        return self.d((weights * query).sum(1, keepdim=True) * self.b(x)) + query


class Decayed(Layers):
    """Keys and values are summed up to each token by a product with a fixed matrix of decays."""

    def forward(self, x: Tensor) -> Tensor:
        ages = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        decay = (0.5 ** ages.clamp(min=0)) * (ages >= 0)
        return self.d(decay @ (self.a(x) * self.b(x).sigmoid()))


class Shifted(Layers):
    """Mixes each token with the one before it in front of its layers, as RWKV does."""

    def before(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, -1))

    def forward(self, x: Tensor) -> Tensor:
        before = self.before(x)
        key, gate = 0.5 * x + 0.5 * before, 0.2 * x + 0.8 * before
        return self.c(gate).sigmoid() * self.b(self.a(key).relu().square())


class Indexed(Shifted):
    """Takes the token before each by its index."""

    def before(self, x: Tensor) -> Tensor:
        return x[:, (torch.arange(x.shape[1]) - 1).clamp(min=0)]


class Squeezed(Layers):
    """One gate for all tokens, made of their mean (squeeze and excitation)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.gelu(self.a(x)))
        return y * self.c(y.mean(1, keepdim=True)).sigmoid()


class Dense(nn.Module):
    """All experts on each token; their outputs are put together by a product with the router's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH))

    def weights(self, flat: Tensor) -> Tensor:
        return self.router(flat).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        each = torch.einsum("eth,ehd->etd", F.gelu(torch.einsum("td,edh->eth", flat, self.up)), self.down)
        return torch.einsum("te,etd->td", self.weights(flat), each).view_as(x)


class Hashed(Dense):
    """A token's place chooses its expert."""

    def weights(self, flat: Tensor) -> Tensor:
        return F.one_hot(torch.arange(len(flat)) % EXPERTS, EXPERTS).to(flat)


class ExpertChoice(Dense):
    """Each expert takes the tokens that want it most."""

    def weights(self, flat: Tensor) -> Tensor:
        weights = self.router(flat).softmax(-1)
        value, index = weights.topk(len(flat) // 2, 0)
        return torch.zeros_like(weights).scatter(0, index, value)


class Gathered(nn.Module):
    """Each expert takes the tokens that want it most, and no other runs through it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(FeedForward() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        value, index = self.router(flat).softmax(-1).topk(len(flat) // 2, 0)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out = out.index_add(0, index[:, i], expert(flat[index[:, i]]) * value[:, i, None])
        return out.view_as(x)


class Slots(nn.Module):
    """Each expert takes one mean of all tokens, and each token a mean of what the experts return (Soft-MoE)."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(FeedForward() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        slots = scores.softmax(1).mT @ x
        return scores.softmax(-1) @ torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], 1)


class NormedSlots(Slots):
    """Its router is learned embeddings of slots, which a norm takes."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.norm = nn.Parameter(torch.randn(EXPERTS, 1, WIDTH)), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("btd,esd->btes", x, self.norm(self.slots)).flatten(2)
        slots = scores.softmax(1).mT @ x
        return scores.softmax(-1) @ torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], 1)


class StackedSlots(Dense):
    """The same, of experts in one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        slots = torch.einsum("bte,btd->bed", scores.softmax(1), x)
        each = torch.einsum("beh,ehd->bed", F.gelu(torch.einsum("bed,edh->beh", slots, self.up)), self.down)
        return torch.einsum("bte,bed->btd", scores.softmax(-1), each)


class FromTheLeft(nn.Module):
    """A weight of tokens by tokens multiplies from the left, and the einsum puts rows and features together (gMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("mn,bnd->bmd", self.weight, self.inner(x))


class SoftmaxKernel(Layers):
    """Efficient attention: softmaxes of queries and of keys stand in for that of their products."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x).softmax(-1) @ (self.b(x).softmax(1).mT @ self.c(x)))


def kinds(mixture: Callable[[], nn.Module]) -> list[tuple[str, bool]]:
    """What the branches of a model are in which this is in the place of the feed-forward, and whether they route."""
    anatomy, _ = discover(randomised(Model(block_of(mixture))), IDS)
    return [(s.kind, s.is_moe) for s in anatomy.sublayers]


@pytest.mark.parametrize("mixture", [OneContext, PooledQuery, Decayed, FromTheLeft, SoftmaxKernel])
def test_what_sums_over_tokens_is_a_mixer(mixture: type[nn.Module]) -> None:
    assert kinds(mixture) == [("attention", False), ("mixer", False)] * 2


@pytest.mark.parametrize("mixture", [Shifted, Indexed, Squeezed])
def test_a_shift_or_a_gate_of_all_tokens_leaves_a_feedforward_one(mixture: type[nn.Module]) -> None:
    assert [kind for kind, _ in kinds(mixture)] == ["attention", "feedforward"] * 2


@pytest.mark.parametrize("mixture", [Dense, Hashed, ExpertChoice, Gathered, Slots, NormedSlots, StackedSlots])
def test_experts_that_are_put_together_by_products_are_feedforwards(mixture: type[nn.Module]) -> None:
    assert [kind for kind, _ in kinds(mixture)] == ["attention", "feedforward"] * 2


def test_a_softly_mixed_expert_has_the_roles_of_any_other() -> None:
    assert kinds(Slots) == [("attention", False), ("feedforward", True)] * 2
    kit = ak.wrap(randomised(Model(block_of(Slots))), IDS)
    right = [f"blocks.{b}.mlp.experts.{e}.up" for b in range(2) for e in range(EXPERTS)]
    assert [site.path for site in kit.sites("lora", targets=["@feedforward.first"])] == right


@pytest.mark.parametrize("is_last", [True, False])
def test_streams_of_one_token_that_are_mixed_mix_no_tokens(is_last: bool) -> None:
    """Hyper-connections whose weights are computed, as in DeepSeek V4: the feed-forward is one."""

    class Streams(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.give, self.take = nn.Linear(2 * WIDTH, 2), nn.Linear(2 * WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            """Shape: (batch, tokens, 2, WIDTH)."""
            for norm, layer in ((self.norm1, self.attention), (self.norm2, self.mlp)):
                give, take = (linear(x.flatten(2)).sigmoid()[..., None] for linear in (self.give, self.take))
                x = x + give * layer(norm((take * x).sum(2)))[:, :, None]
            return x

    class Hyper(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)[:, :, None].expand(-1, -1, 2, -1)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x.sum(2) if is_last else x[:, :, 0]))

    anatomy, _ = discover(randomised(Hyper(Streams)), IDS)
    assert [s.kind for s in anatomy.sublayers] == ["attention", "feedforward"] * 2


@pytest.mark.parametrize("one_row", [True, False])
def test_a_weight_on_the_left_mixes_tokens_whatever_the_number_of_rows(one_row: bool) -> None:
    anatomy, _ = discover(randomised(Model(block_of(FromTheLeft))), IDS[:1] if one_row else IDS)
    assert [s.kind for s in anatomy.sublayers] == ["attention", "mixer"] * 2


def test_a_branch_that_starts_at_zero_is_what_it_will_be() -> None:
    class ReZero(OneContext):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    anatomy, _ = discover(Model(block_of(ReZero)).eval(), IDS)
    assert [s.kind for s in anatomy.sublayers] == ["attention", "mixer"] * 2
