"""What every test shares: one private Ray cluster a session, no leftovers of the machine's own settings."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A deadline would be a timing assertion; the examples are few because the suite shares its cores.
settings.register_profile("rayemb", deadline=None, max_examples=40)
settings.load_profile("rayemb")

for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """This process connected to a private local cluster with 4 logical CPUs; gives its address."""
    from rayemb.cluster import ClusterConfig, connect

    with connect(ClusterConfig(num_cpus=4, object_store_mb=400)) as address:
        yield address
