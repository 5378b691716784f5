import pytest
from hypothesis import given

from adapterkit import AdapterNameError
from adapterkit.composition.names import check_name
from adapterkit.runtime.site import AdapterSite, adapter_name, module_key

from ..strategies import adapter_names


@given(adapter_names)
def test_a_name_is_read_back_from_its_module_name(name: str) -> None:
    assert adapter_name(module_key(name, dir(AdapterSite))) == name


@given(adapter_names)
def test_a_module_name_has_no_dot_and_hides_no_attribute(name: str) -> None:
    key = module_key(name, dir(AdapterSite))
    assert "." not in key
    assert not hasattr(AdapterSite, key)


def test_an_ordinary_name_stays_as_it_is() -> None:
    assert module_key("sst-2@org") == "sst-2@org"


@pytest.mark.parametrize(
    ("name", "found"),
    [("", "''"), (7, "7"), ("a\nb", r"a\\nb"), (" a", "' a'"), ("x" * 129, "129"), (None, "None"), ("\x00", "x00")],
)
def test_a_name_that_cannot_be_used_is_refused_with_what_was_found(name: object, found: str) -> None:
    with pytest.raises(AdapterNameError, match=found):
        check_name(name)
