"""A site in a part of a model, and in the whole: the paths of both are known from one another."""

import pytest

from adapterkit.placement.spec import SiteSpec, located


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (("bert.layer.0", "bert.layer.0.norm"), ("layer.0", "layer.0.norm")),
        (("bert.layer.0", "bert"), ("layer.0", "")),  # the residual is read where the part itself is called
        (("layer.0", "layer.0.norm"), ("", "norm")),  # the host is the part
        (("layer.0", "layer.0"), ("", "")),
    ],
)
def test_paths_differ_at_their_start(whole: tuple[str, str], part: tuple[str, str]) -> None:
    def spec(path: str, residual: str) -> SiteSpec:
        return SiteSpec(
            path=path,
            host="Block",
            at="output",
            reads="residual",
            width=8,
            input_width=8,
            axis=-1,
            layer=None,
            residual=residual,
        )

    assert located(spec(*whole), part[0]) == spec(*part)
    assert located(spec(*part), whole[0]) == spec(*whole)
