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


# Groups that start clusters, those that take longest first, and their rooms.
CLUSTERS = {
    "e2e": ("e2e", "test_readme.py"),
    "faults": ("faults", "cluster", "test_cluster.py"),
    "ray": ("mining", "pipeline", "serve", "tune"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Three processes share the suite, of which two mostly wait for clusters to start.

    What needs a cluster goes to one of three groups, each in turn in one process, since clusters take memory; the rest
    goes file by file to whoever is free, since files share what they set up.
    """
    here = Path(__file__).parent
    order = {}
    for item in items:
        room, *_ = item.path.relative_to(here).parts
        own = "ray" if "ray_cluster" in getattr(item, "fixturenames", ()) else item.path.stem
        group = next((name for name, rooms in CLUSTERS.items() if room in rooms), own)
        item.add_marker(pytest.mark.xdist_group(group))
        order[item] = [*CLUSTERS, group].index(group)
    items.sort(key=lambda item: order[item])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """This process connected to a private local cluster with 4 logical CPUs; gives its address."""
    from rayemb.cluster import ClusterConfig, connect

    with connect(ClusterConfig(num_cpus=4, object_store_mb=400)) as address:
        yield address
