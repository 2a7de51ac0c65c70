from collections.abc import Iterator

import pytest
from frugal import frugal
from hypothesis import HealthCheck, settings

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
