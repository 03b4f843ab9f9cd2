"""Stateless shuffles, mixture schedules and reading plans."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vit22b_transfer.data.order import (
    HostShard,
    MixtureSchedule,
    ReadingPlan,
    example_keys,
    shuffled_records,
    stream_key,
)


@given(st.integers(1, 3000), st.integers(0, 5), st.integers(0, 2**40))
def test_every_epoch_holds_every_record_once(size, epoch, seed):
    positions = np.arange(epoch * size, (epoch + 1) * size)
    records = shuffled_records(positions, size, stream_key(seed, "task"))
    assert sorted(records) == list(range(size))


def test_order_is_a_function_of_position_alone():
    everything = shuffled_records(np.arange(500), 70, key=3)
    part = shuffled_records(np.arange(333, 444), 70, key=3)
    np.testing.assert_array_equal(part, everything[333:444])


def test_epochs_seeds_and_tasks_have_orders_of_their_own():
    size = 100
    epochs = shuffled_records(np.arange(2 * size), size, stream_key(0, "a"))
    orders = [
        epochs[:size],
        epochs[size:],
        shuffled_records(np.arange(size), size, stream_key(1, "a")),
        shuffled_records(np.arange(size), size, stream_key(0, "b")),
        np.arange(size),
    ]
    for first in range(len(orders)):
        for second in range(first):
            # Two independent orders of 100 agree in about one place.
            assert (orders[first] == orders[second]).sum() < 10


@pytest.mark.parametrize("size", [3, 5, 7, 64])
def test_each_record_comes_equally_often_at_each_place(size):
    epochs = 4000
    orders = shuffled_records(np.arange(size * epochs), size, key=1)
    counts = np.stack(
        [np.bincount(place, minlength=size) for place in orders.reshape(-1, size).T]
    )
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 4 * np.sqrt(2 * freedom)


def test_ten_million_records_cost_no_more_than_their_positions():
    positions = np.arange(10**12, 10**12 + 100)
    records = shuffled_records(positions, 10_000_019, key=5)
    assert records.max() < 10_000_019
    assert len(set(records)) == 100


def test_keys_of_examples_are_a_function_of_epoch_and_record_that_looks_random():
    key, records = stream_key(0, "task"), np.arange(4096)
    epochs = [example_keys(np.full(4096, e), records, key) for e in range(3)]
    found = np.stack([*epochs, example_keys(0 * records, records, key + 1)])
    assert len(set(found.ravel())) == found.size
    bits = np.unpackbits(found.astype("<i8").view(np.uint8)).reshape(4, 4096, 64)
    # Half of the bits are set, of each and of what two share: epochs and neighbours.
    pairs = [bits[:1] ^ bits[1:], bits[:, 1:] ^ bits[:, :-1]]
    for mean in (bits.mean(axis=1), *(pair.mean(axis=1) for pair in pairs)):
        assert np.abs(mean - 0.5).max() < 5 * 0.5 / np.sqrt(4095)


def test_hosts_and_batches_have_the_keys_of_their_records_and_epochs():
    schedule, size = MixtureSchedule((2.0, 1.0)), 5
    whole = [ReadingPlan(12, 0, schedule).example_keys(s, 0, size, 7) for s in range(6)]
    halves = ReadingPlan(6, 0, schedule)
    parts = [halves.example_keys(step, 0, size, 7) for step in range(12)]
    hosts = [ReadingPlan(12, 0, schedule, HostShard(i, 2)) for i in range(2)]
    shares = [host.example_keys(s, 0, size, 7) for s in range(6) for host in hosts]
    for found in (parts, shares):
        np.testing.assert_array_equal(np.concatenate(found), np.concatenate(whole))
    positions = np.arange(48)
    records = shuffled_records(positions, size, 7)
    want = example_keys(positions // size, records, 7)
    np.testing.assert_array_equal(np.concatenate(whole), want)


RATES = st.lists(st.floats(0.01, 100), min_size=1, max_size=8).map(tuple)


@given(RATES, st.integers(0, 10**9))
def test_members_count_through_their_own_streams(rates, start):
    schedule = MixtureSchedule(rates)
    positions = np.arange(start, start + 300)
    members, own = schedule.members(positions)
    before = schedule.counts(np.array([start]))[:, 0]
    for member in range(len(rates)):
        mine = own[members == member]
        np.testing.assert_array_equal(mine, before[member] + np.arange(len(mine)))
    after = schedule.counts(np.array([start + 300]))[:, 0]
    np.testing.assert_array_equal(
        np.bincount(members, minlength=len(rates)), after - before
    )


# Broke a guessed bound of 2.5: it comes within a tenth of the true one.
FAR_FROM_ITS_SHARE = (21.0, 1.0, 1.0, 1.0, 1.0, 1.0, 21.0)


def distances_and_bounds(rates):
    """How far each member gets from its share of 3000 positions, and at most may."""
    lengths = np.arange(3000)
    counts = MixtureSchedule(rates).counts(lengths)
    assert (counts.sum(axis=0) == lengths).all()
    shares = np.array(rates) / sum(rates)
    rests = np.cumsum(shares[::-1])[::-1]
    roundings = np.array(
        [1 + share * sum(1 / rests[1 : k + 1]) for k, share in enumerate(shares)]
    )
    roundings[-1] -= 1  # the last takes all that is left
    distances = np.abs(counts - np.outer(shares, lengths)).max(axis=1)
    return distances, roundings / 2


@given(RATES)
@example(FAR_FROM_ITS_SHARE)
def test_members_are_never_further_from_their_share_than_is_said(rates):
    distances, bounds = distances_and_bounds(rates)
    # Shares are rounded to 2^-33, of 3000 positions.
    assert np.all(distances <= bounds + 1e-5)
    assert np.all(bounds <= max(len(rates) - 1, 0) / 2 + 1e-9)


def test_the_bound_of_the_distance_is_no_larger_than_it_needs_to_be():
    distances, bounds = distances_and_bounds(FAR_FROM_ITS_SHARE)
    assert distances[-1] > 0.9 * bounds[-1]


def test_shares_are_exact_after_a_trillion_positions():
    counts = MixtureSchedule((1.0, 3.0)).counts(np.array([10**12]))
    assert counts[:, 0].tolist() == [10**12 // 4, 3 * 10**12 // 4]


def test_a_mixture_without_positive_rates_is_an_error():
    with pytest.raises(ValueError, match="positive"):
        MixtureSchedule((1.0, 0.0))


def test_hosts_together_read_the_rows_of_one_host():
    schedule = MixtureSchedule((2.0, 1.0))
    whole = ReadingPlan(12, 0, schedule)
    hosts = [ReadingPlan(12, 0, schedule, HostShard(i, 3)) for i in range(3)]
    for step in (0, 7):
        parts = [host.members(step) for host in hosts]
        for column in (0, 1):
            joined = np.concatenate([part[column] for part in parts])
            np.testing.assert_array_equal(joined, whole.members(step)[column])


def test_rows_before_a_step_are_those_read_until_then():
    plan = ReadingPlan(8, 0, MixtureSchedule((0.3, 0.5, 0.2)), HostShard(1, 2))
    read = np.concatenate([plan.members(step)[0] for step in range(9)])
    for member in range(3):
        assert plan.rows_before(9, member) == (read == member).sum()
        assert plan.rows_before(0, member) == 0


def test_rows_that_do_not_divide_among_hosts_are_an_error():
    with pytest.raises(ValueError, match="batch_size 10 .* 4 hosts"):
        HostShard(0, 4).rows(10)
