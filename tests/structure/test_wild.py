"""Models that a grammar puts together of parts: presets and roles are right in them, or refused, and never wrong."""

import pytest
import torch
from hypothesis import Phase, given, settings

import adapterkit as ak
from benchmarks.zoo.wild import judge as judging
from benchmarks.zoo.wild.build import build
from benchmarks.zoo.wild.curated import curated
from benchmarks.zoo.wild.judge import judge
from benchmarks.zoo.wild.run import draw_many
from benchmarks.zoo.wild.spec import PARTS, Spec, parse
from benchmarks.zoo.wild.truth import bottleneck, outputs_of, weights_of

from ..strategies import wild_specs


@settings(max_examples=20, derandomize=True, phases=[Phase.generate])  # to shrink takes minutes; a spec is short
@given(wild_specs())
def test_a_preset_or_role_is_right_or_refused_in_any_model_of_the_grammar(spec: Spec) -> None:
    wrong = {question: reason for question, (outcome, reason) in judge(spec).items() if outcome == "wrong"}
    assert not wrong, f"--only {spec}"


# --- the judge itself -------------------------------------------------------------------------------------------------


def test_a_spec_is_its_line_of_text() -> None:
    for spec in (*curated(), *draw_many(200, seed=3)):
        assert parse(str(spec)) == spec


def test_every_part_is_in_a_curated_model() -> None:
    assert {part for spec in curated() for part in spec.parts()} == {
        (row, part) for row, parts in PARTS.items() for part in parts[1:]
    }


def test_parts_that_do_not_go_together_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="stream=nested,container=pairs: these streams are blocks' own"):
        parse("stream=nested,container=pairs")
    with pytest.raises(ValueError, match="norm=sideways"):
        parse("norm=sideways")


def test_the_truth_of_a_preset_is_its_formula_written_out() -> None:
    """One post-norm block, computed by hand, against the model that computes its own truth."""
    wild = build(parse("norm=post,container=tied"))
    block, x = wild.model.block, wild.inputs["x"]
    with torch.no_grad():
        h = wild.model.embed(x)
        for _ in range(3):
            branch = block.attn(h)
            h = block.attn_after(h + branch + bottleneck(branch, -1))
            branch = block.ff(h)
            h = block.ff_after(h + branch + bottleneck(branch, -1))
        right = wild.model.head(wild.model.norm(h))
    torch.testing.assert_close(next(outputs_of("houlsby", wild)), right)


def test_the_truth_of_a_role_is_the_projections_that_are_there() -> None:
    wild = build(parse("feedforward=moe,router=top1,container=tied,qkv=kv"))
    assert next(weights_of("@attention.v", wild)) == {("block.attn.kv", "", (("v", ((16, 32),)),))}
    assert next(weights_of("@feedforward.first", wild)) == {(f"block.ff.experts.{i}.up", "", ()) for i in range(3)}


@pytest.mark.parametrize("layout", PARTS["layout"])
def test_the_judge_sees_one_adapter_too_few(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ak.AdapterKit.add

    def without_one(kit: ak.AdapterKit, name: str, config: object, **settings: object) -> None:
        add(kit, name, config, exclude=["blocks.1.attn"], **settings)

    monkeypatch.setattr(ak.AdapterKit, "add", without_one)
    assert judge(parse(f"layout={layout}"))["houlsby"][0] == "wrong"


def test_the_judge_sees_a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "weights_of", lambda role, wild: iter([{("blocks.0.attn.k", "", ())}]))
    outcome, reason = judge(Spec())["@attention.q"]
    assert outcome == "wrong"
    assert "blocks.0.attn.q" in reason
