"""One model with adapters of every method, made once for each test file: it is only read."""

import pytest
from torch import Tensor

import adapterkit as ak

from .helpers import with_every_method


@pytest.fixture(scope="module")
def made() -> tuple[ak.AdapterKit, Tensor]:
    return with_every_method()


@pytest.fixture(scope="module")
def shared_kit(made: tuple[ak.AdapterKit, Tensor]) -> ak.AdapterKit:
    """Activate in a `with` block alone, and change nothing: other tests of the file use it too."""
    return made[0]


@pytest.fixture(scope="module")
def batch(made: tuple[ak.AdapterKit, Tensor]) -> Tensor:
    """Token ids, (batch 4, seq 6)."""
    return made[1]
