"""What every test shares: one private Ray cluster a session, no leftovers of the machine's own settings."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline would be a timing assertion; the examples are few because the suite shares its cores.
settings.register_profile("rayemb", deadline=None, max_examples=40)
settings.load_profile("rayemb")

for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
    os.environ.pop(name, None)


# Tests that start clusters of their own.
CLUSTERS = ("cluster", "e2e", "faults", "mining", "pipeline", "serve", "tune", "test_cluster.py", "test_readme.py")


# First: the plugin reads the groups in a hook of the same name, and which comes first is otherwise left to the order in
# which plugins were found.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the suite: all that needs a cluster goes to one of them, in turn, the rest to the other.

    In turn, since two clusters starve each other on two cores; file by file, since files share what they set up.
    """
    here = Path(__file__).parent
    for item in items:
        room, *_ = item.path.relative_to(here).parts
        ray = room in CLUSTERS or "ray_cluster" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if ray else item.path.stem))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """This process connected to a private local cluster with 4 logical CPUs; gives its address."""
    from rayemb.cluster import ClusterConfig, connect

    with connect(ClusterConfig(num_cpus=4, object_store_mb=400)) as address:
        yield address
