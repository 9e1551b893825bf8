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


# Tests that start clusters of their own. Faults first: they are timed, and the rest of the suite begins with what is
# quiet.
CLUSTERS = ("faults", "cluster", "mining", "pipeline", "serve", "test_cluster.py", "test_readme.py")
# Likewise, in processes of their own, and for minutes; the longest first.
APART = ("tune", "e2e")


# First: the plugin reads the groups in a hook of the same name, and which comes first is otherwise left to the order in
# which plugins were found.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the suite: most of what needs a cluster goes to one of them, in turn, the rest to the other.

    In turn, since two clusters starve each other on two cores; file by file, since files share what they set up. What
    is apart comes last, to whichever process is free: it waits for its own processes more than it computes.
    """
    here = Path(__file__).parent
    order: dict[pytest.Item, int] = {}
    for item in items:
        room, *_ = item.path.relative_to(here).parts
        if room in APART:
            group, order[item] = f"{room}.{item.path.stem}", 2 + APART.index(room)
        elif room in CLUSTERS or "ray_cluster" in getattr(item, "fixturenames", ()):
            group, order[item] = "ray", 0 if room == CLUSTERS[0] else 1
        else:
            group, order[item] = item.path.stem, 1
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=order.__getitem__)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """This process connected to a private local cluster with 4 logical CPUs; gives its address."""
    from rayemb.cluster import ClusterConfig, connect

    with connect(ClusterConfig(num_cpus=4, object_store_mb=400)) as address:
        yield address
