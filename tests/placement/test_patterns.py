import pytest
from torch import nn

from adapterkit import TargetError
from adapterkit.placement.match import match
from adapterkit.structure.paths import modules_by_path, nearest_to

from ..hosts.tiny import Tiny


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["classifier"], ["classifier"]),
        (["attention.out"], ["blocks.0.attention.out", "blocks.1.attention.out"]),
        (["blocks.*"], ["blocks.0", "blocks.1"]),
        (["blocks.1.norm_?"], ["blocks.1.norm_1", "blocks.1.norm_2"]),
        (["blocks.**.out"], ["blocks.0.attention.out", "blocks.1.attention.out"]),
        (["blocks.[1-9].up"], ["blocks.1.up"]),
        (["blocks.[!0].up"], ["blocks.1.up"]),
        (["re:blocks\\.0\\.(up|down)"], ["blocks.0.up", "blocks.0.down"]),
        ([""], [""]),
        (
            [lambda module, path: isinstance(module, nn.LayerNorm) and "0" in path],
            ["blocks.0.norm_1", "blocks.0.norm_2"],
        ),
        (["down", "up", "blocks.0.up"], ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
    ],
)
def test_a_pattern_matches_whole_components_of_a_suffix(post_norm: Tiny, targets: list[str], paths: list[str]) -> None:
    assert match(post_norm, targets) == paths


def test_a_pattern_does_not_match_part_of_a_component(post_norm: Tiny) -> None:
    with pytest.raises(TargetError, match=r"'ut' matches no module of Tiny, which has 24 modules\. "):
        match(post_norm, ["ut"])


def test_a_set_of_what_is_not_meant_matches_no_dot(post_norm: Tiny) -> None:
    with pytest.raises(TargetError, match="matches no module"):
        match(post_norm, ["blocks.1[!0]up"])


def test_excluded_modules_are_left_out(post_norm: Tiny) -> None:
    assert match(post_norm, ["norm_*"], ["blocks.0.**", "norm_2"]) == ["blocks.1.norm_1"]


def test_one_target_without_a_match_is_an_error_that_names_the_nearest(post_norm: Tiny) -> None:
    with pytest.raises(TargetError, match=r"'atention.out' matches no module of Tiny.*'attention.out'"):
        match(post_norm, ["up", "atention.out"])


def test_excluding_everything_is_an_error(post_norm: Tiny) -> None:
    with pytest.raises(TargetError, match="excluded"):
        match(post_norm, ["up"], ["blocks.**"])


def test_a_broken_regular_expression_is_an_error(post_norm: Tiny) -> None:
    with pytest.raises(TargetError, match=r"'re:\(' is not a pattern"):
        match(post_norm, ["re:("])


def test_a_predicate_that_is_never_true_is_named() -> None:
    def nothing(_module: nn.Module, _path: str) -> bool:
        return False

    with pytest.raises(TargetError, match="nothing"):
        match(nn.Linear(1, 1), [nothing])


def test_a_shared_module_is_matched_by_any_of_its_names_and_returned_once() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "second": layer, "third": nn.Linear(2, 2)})
    assert match(model, ["second"]) == ["first"]
    assert match(model, ["first", "second"]) == ["first"]


def test_the_insides_of_a_parametrisation_are_no_modules_of_the_user() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert list(modules_by_path(layer)) == [""]


def test_nearest_means_the_longest_shared_beginning() -> None:
    paths = ["h.0.ln", "h.1.ln", "ln"]
    assert nearest_to("h.1.mlp", paths) == ["h.1.ln"]
    assert nearest_to("top", paths) == paths


def test_a_class_is_no_predicate() -> None:
    with pytest.raises(
        TargetError, match=r"class Linear is no predicate: write lambda module, path: isinstance\(module, Linear"
    ):
        match(nn.Linear(2, 2), [nn.Linear])  # type: ignore[list-item]  # a likely mistake
