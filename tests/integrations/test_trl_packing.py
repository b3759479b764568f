"""Where rows are cut into micro-batches, against every way to cut them."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from sparkjoy.integrations.trl.packing import least_memory


def largest(cuts, lengths):
    return max((lengths[stop - 1] * (stop - first) for first, stop in pairwise(cuts)), default=0)


@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_the_largest_micro_batch_is_as_small_as_it_can_be(data, batches, size):
    lengths = sorted(data.draw(st.lists(st.integers(1, 30), max_size=min(8, batches * size))))
    cuts = least_memory(lengths, batches, size)
    assert (cuts[0], cuts[-1]) == (0, len(lengths))
    assert all(0 < stop - first <= size for first, stop in pairwise(cuts))
    ways = [
        [0, *inner, len(lengths)]
        for count in range(min(batches, len(lengths)))
        for inner in combinations(range(1, len(lengths)), count)
    ]
    ways = [way for way in ways if all(stop - first <= size for first, stop in pairwise(way))]
    if lengths:
        best = min(largest(way, lengths) for way in ways)
        assert largest(cuts, lengths) == best
        assert len(cuts) == min(len(way) for way in ways if largest(way, lengths) == best)
