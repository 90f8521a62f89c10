"""Properties follow the profile, and one that does not is refused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import profiles


def test_a_property_tries_its_share_of_the_examples() -> None:
    tried = []

    @profiles.examples(30)
    @given(st.integers())
    def property_(n: int) -> None:
        tried.append(n)

    property_()
    assert len(tried) == 30 * settings().max_examples // profiles.FULL


@pytest.mark.parametrize("own", [{"deadline": timedelta(seconds=1)}, {"derandomize": False}])
def test_a_property_with_settings_of_its_own_is_refused(own: dict[str, Any]) -> None:
    decorate = given(st.integers())
    profiles.check("like the others", decorate(lambda n: None))
    profiles.check("with fewer examples", profiles.examples(3)(decorate(lambda n: None)))
    with pytest.raises(pytest.UsageError, match="of its own has settings of its own: use examples"):
        profiles.check("of its own", settings(**own)(decorate(lambda n: None)))
