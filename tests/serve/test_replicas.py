"""Where replicas go: apart, and never so that one finds no room."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from rayemb.serve.replicas import per_node


def test_replicas_are_shared_out_over_the_nodes_that_have_room() -> None:
    two = {"gateway": 2, "embedder": 2, "shard-0": 2}
    assert per_node(two, 1.0, [4, 4, 4]) == dict.fromkeys(two, 1)
    assert per_node({"gateway": 5}, 1.0, [8, 8]) == {"gateway": 3}
    assert per_node(two, 1.0, [16]) == {}
    # One of each is more than the second node holds.
    assert per_node(two, 1.0, [16, 2]) == {}
    # A head without CPUs takes none, and is no reason to put more on one of the others.
    assert per_node(two, 1.0, [0, 3, 3]) == dict.fromkeys(two, 1)
    assert per_node(two, 1.0, []) == {}
    assert per_node({"gateway": 1000}, 0.001, [64, 64]) == {}  # Serve takes no bound above 100


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 7), min_size=1),
    st.lists(st.integers(0, 12), max_size=5),
    st.randoms(use_true_random=False),
)
def test_within_the_bounds_every_replica_finds_room_in_whatever_order_they_come(
    replicas: dict[str, int], cpus: list[int], random: Random
) -> None:
    bounds = per_node(replicas, 1.0, cpus)
    if not bounds:
        return
    held = [dict.fromkeys(replicas, 0) for _ in cpus]
    coming = [name for name, count in replicas.items() for _ in range(count)]
    random.shuffle(coming)
    for name in coming:
        room = [
            node
            for node, has in enumerate(cpus)
            if held[node][name] < bounds[name] and sum(held[node].values()) + 1 <= has
        ]
        assert room, (bounds, held, name)
        held[random.choice(room)][name] += 1
