"""Windows cover every token and batches fit their budget: properties and edge cases."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attlas.extract.batching import batches, padded_positions, windows
from attlas.extract.errors import Refusal

LENGTHS = st.lists(st.integers(1, 600), max_size=60)


@st.composite
def window_sizes(draw) -> tuple[int, int]:
    size = draw(st.integers(1, 20))
    return size, draw(st.integers(0, size - 1))


@given(count=st.integers(0, 200), size=st.integers(1, 20))
def test_without_overlap_every_token_is_in_exactly_one_window(count, size):
    ids = list(range(count))
    assert [i for _, window in windows(ids, size=size, stride=0) for i in window] == ids


@given(count=st.integers(0, 200), sizes=window_sizes())
def test_windows_overlap_by_the_stride_and_none_is_contained_in_the_previous_one(count, sizes):
    size, stride = sizes
    ids = list(range(count))
    cut = list(windows(ids, size=size, stride=stride))
    assert {i for _, window in cut for i in window} == set(ids)
    for first, window in cut:
        assert list(window) == ids[first : first + size]
    for (first, before), (second, after) in pairwise(cut):
        assert len(before) == size
        assert second == first + size - stride
        assert after[-1] > before[-1]


def test_the_last_window_is_short_but_never_only_overlap():
    assert [(f, list(w)) for f, w in windows(range(7), size=4, stride=1)] == [(0, [0, 1, 2, 3]), (3, [3, 4, 5, 6])]
    assert [(f, list(w)) for f, w in windows(range(8), size=4, stride=1)][-1] == (6, [6, 7])


def test_a_document_shorter_than_the_overlap_is_one_window():
    assert [(f, list(w)) for f, w in windows([5, 6], size=8, stride=5)] == [(0, [5, 6])]


def test_no_ids_give_no_window():
    assert list(windows([], size=8, stride=2)) == []


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, -1), (0, 0)])
def test_a_window_that_could_not_advance_is_refused_at_the_call(size, stride):
    with pytest.raises(Refusal):
        windows([1, 2, 3], size=size, stride=stride)


@given(lengths=LENGTHS, token_budget=st.integers(1, 2000))
def test_batches_contain_every_sequence_once_within_the_budget(lengths, token_budget):
    groups = batches(lengths, token_budget=token_budget)
    assert sorted(i for batch in groups for i in batch) == list(range(len(lengths)))
    for batch in groups:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= token_budget
    order = [i for batch in groups for i in batch]
    assert order == sorted(order, key=lambda i: (lengths[i], i))


@given(lengths=LENGTHS.filter(bool), token_budget=st.integers(1, 2000))
def test_no_batch_has_room_for_the_next_sequence(lengths, token_budget):
    groups = batches(lengths, token_budget=token_budget)
    for batch, following in pairwise(groups):
        assert (len(batch) + 1) * lengths[following[0]] > token_budget


def test_batches_of_known_lengths():
    assert batches([5, 9, 5, 30, 4], token_budget=18) == [[4, 0, 2], [1], [3]]
    assert batches([], token_budget=18) == []


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(Refusal, match="token_budget must be at least 1; got 0"):
        batches([1], token_budget=0)


def test_padded_positions_include_padding():
    assert padded_positions([4, 2, 6], [[0, 1], [2]]) == 2 * 4 + 6
    assert padded_positions([], []) == 0


@given(lengths=LENGTHS, token_budget=st.integers(1, 2000))
def test_there_are_at_least_as_many_positions_as_tokens(lengths, token_budget):
    assert padded_positions(lengths, batches(lengths, token_budget=token_budget)) >= sum(lengths)
