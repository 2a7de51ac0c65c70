from collections.abc import Iterator

import pytest
from frugal import frugal
from hypothesis import HealthCheck, settings
from through_inductor import ENABLED, through_inductor

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def cheap_compiles() -> Iterator[None]:
    with frugal():
        yield


@pytest.fixture(scope="session", autouse=True)
def place_of_the_pass() -> Iterator[None]:
    """With MST_FX_ENABLE=1 in the environment, the whole suite takes the way of `enable`."""
    if ENABLED:
        with through_inductor():
            yield
    else:
        yield
