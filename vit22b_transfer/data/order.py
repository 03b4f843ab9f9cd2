"""The order of examples: stateless shuffles and mixture schedules, in numpy alone.

Everything here is a pure function of a position in the endless stream of examples, so
that a run resumed at step N costs no more than one started at step 0.
"""

import dataclasses
import functools
import zlib

import numpy as np
from jaxtyping import Int64, UInt64

from vit22b_transfer import UserError

_ROUNDS = 8
_ALL = (1 << 64) - 1
_ONE = 1 << 32  # fixed-point 1.0 of mixture shares
# Keeps the keys of examples apart from those of their order (digits of pi).
_OF_EXAMPLES = 0x243F6A8885A308D3


def stream_key(seed: int, name: str) -> int:
    """The key of one task's stream, so that tasks of equal size are not in step."""
    return (seed << 32) ^ zlib.crc32(name.encode())


def shuffled_records(
    positions: Int64[np.ndarray, " positions"], num_records: int, key: int
) -> Int64[np.ndarray, " positions"]:
    """Record read at each position of an endless, reshuffled repetition of the records.

    Positions [e * num_records, (e + 1) * num_records) hold each record exactly once, in
    an order of that epoch's own.

    A Feistel network permutes [0, 2^bits), the smallest such range that holds the
    records; results beyond them are permuted again until they fall inside
    (cycle walking; Black and Rogaway 2002). Time and memory do not depend on
    `num_records`.
    """
    if num_records < 1:
        raise UserError(f"cannot order {num_records} records.")
    keys = _epoch_keys(positions // num_records, key)
    values = (positions % num_records).astype(np.uint64)
    # Fewer than 6 bits give a Feistel network too few permutations to choose from.
    bits = max(6, (num_records - 1).bit_length())
    outside = np.ones(len(values), bool)
    while outside.any():
        values[outside] = _permuted(values[outside], keys[outside], bits)
        outside = values >= _word(num_records)
    return values.astype(np.int64)


def example_keys(
    epochs: Int64[np.ndarray, " n"], records: Int64[np.ndarray, " n"], key: int
) -> Int64[np.ndarray, " n"]:
    """64 bits for each record in each epoch, from which random numbers may be drawn.

    Those of one epoch differ from each other.
    """
    keys = _mixed(_epoch_keys(epochs, key) ^ _word(_OF_EXAMPLES))
    return _mixed(keys + records.astype(np.uint64)).view(np.int64)


def _epoch_keys(epochs: Int64[np.ndarray, " n"], key: int) -> UInt64[np.ndarray, " n"]:
    low, high = _word(key & _ALL), _word((key >> 64) & _ALL)
    return _mixed(_mixed(epochs.astype(np.uint64) ^ low) + high)


def _permuted(
    values: UInt64[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], bits: int
) -> UInt64[np.ndarray, " n"]:
    """A permutation of [0, 2^bits) for each key: an unbalanced Feistel network."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    high, low = values >> _word(low_bits), values & _mask(low_bits)
    for round_number in range(_ROUNDS):
        noise = _mixed(keys + low * _word(2 * _ROUNDS + 1) + _word(round_number))
        # The halves change places, and with them their widths.
        high, low = low, high ^ (noise & _mask(high_bits))
        low_bits, high_bits = high_bits, low_bits
    return (high << _word(low_bits)) | low


def _mixed(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A bijective hash of 64-bit words (the finalizer of SplitMix64)."""
    values = values + _word(0x9E3779B97F4A7C15)
    values = (values ^ (values >> _word(30))) * _word(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _word(27))) * _word(0x94D049BB133111EB)
    return values ^ (values >> _word(31))


def _word(value: int) -> np.uint64:
    return np.uint64(value)


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


@dataclasses.dataclass(frozen=True)
class MixtureSchedule:
    """Which member of a mixture gives the example at each position of its stream.

    Members are dealt out evenly rather than drawn. Member 0, of share p_0, takes the
    positions where floor(p_0 * t + 1/2) rises; what it leaves over is itself a stream,
    from which member 1 takes its share of the rest, and so on. So a member's own
    position is a count in closed form. Shares are exact to 2^-33.

    Of the first t positions member k of n gets p_k * t, give or take at most

        (1 + p_k / R_1 + ... + p_k / R_k) / 2,    R_j = p_j + ... + p_(n-1),

    without the 1 for the last; never more than (n - 1) / 2. For if the rest that is
    left for member j is R_j * t + d_j, member j takes p_j / R_j of it plus a rounding
    e_j of at most 1/2, and leaves d_(j+1) = d_j * R_(j+1) / R_j - e_j. So
    d_k = -R_k * (e_0 / R_1 + ... + e_(k-1) / R_k), of which member k takes p_k / R_k,
    plus e_k; the last takes all of its rest, e_(n-1) = 0.
    """

    rates: tuple[float, ...]

    def __post_init__(self):
        if not self.rates or min(self.rates) <= 0:
            raise UserError(f"mixture rates must be positive, got {self.rates}.")

    @functools.cached_property
    def _shares_of_rest(self) -> tuple[int, ...]:
        """Share of each member in what the members before it leave, times 2^32."""
        rests = [sum(self.rates[i:]) for i in range(len(self.rates))]
        shares = [
            round(_ONE * rate / rest)
            for rate, rest in zip(self.rates, rests, strict=True)
        ]
        return (*shares[:-1], _ONE)

    def members(
        self, positions: Int64[np.ndarray, " positions"]
    ) -> tuple[
        Int64[np.ndarray, " positions"],
        Int64[np.ndarray, " positions"],
    ]:
        """(member, position in the member's own stream) at each position."""
        member = np.full(len(positions), -1, np.int64)
        own = np.zeros(len(positions), np.int64)
        rest = positions
        for number, share in enumerate(self._shares_of_rest):
            taken = _share_of(rest, share)
            here = (member < 0) & (_share_of(rest + 1, share) > taken)
            member[here], own[here] = number, taken[here]
            rest = rest - taken
        return member, own

    def counts(
        self, lengths: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, "members n"]:
        """Number of positions each member gets among the first `lengths`."""
        counts, rest = [], lengths
        for share in self._shares_of_rest:
            counts.append(_share_of(rest, share))
            rest = rest - counts[-1]
        return np.stack(counts)


def _share_of(lengths: Int64[np.ndarray, " n"], share: int) -> Int64[np.ndarray, " n"]:
    """floor(lengths * share / 2^32 + 1/2), exact for lengths up to 2^62."""
    whole, part = lengths >> 32, lengths & (_ONE - 1)
    scaled = part.astype(np.uint64) * _word(share) + _word(_ONE // 2)
    return whole * share + (scaled >> _word(32)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class HostShard:
    """The rows of a batch that one host reads: block `index` of `count` equal ones."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> range:
        """Rows of a batch of `batch_size` that this host reads."""
        if batch_size % self.count:
            raise UserError(
                f"batch_size {batch_size} does not divide among {self.count} hosts; "
                f"use a multiple of {self.count}."
            )
        size = batch_size // self.count
        return range(self.index * size, (self.index + 1) * size)


@dataclasses.dataclass(frozen=True)
class ReadingPlan:
    """What one host reads at each step of an endless stream cut into batches."""

    batch_size: int
    seed: int
    schedule: MixtureSchedule = MixtureSchedule((1.0,))
    shard: HostShard = HostShard()

    def members(
        self, step: int
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """(member, position in its stream) of each of this host's rows."""
        rows = self.shard.rows(self.batch_size)
        start = step * self.batch_size
        positions = np.arange(start + rows.start, start + rows.stop, dtype=np.int64)
        return self.schedule.members(positions)

    def records(
        self, step: int, member: int, num_records: int, key: int
    ) -> Int64[np.ndarray, " rows"]:
        """Records of `member` in this host's rows, in their order."""
        return shuffled_records(self._positions(step, member), num_records, key)

    def example_keys(
        self, step: int, member: int, num_records: int, key: int
    ) -> Int64[np.ndarray, " rows"]:
        """`example_keys` of the same rows: they know nothing of step, batch or host."""
        positions = self._positions(step, member)
        records = shuffled_records(positions, num_records, key)
        return example_keys(positions // num_records, records, key)

    def _positions(self, step, member):
        members, positions = self.members(step)
        return positions[members == member]

    def rows_before(self, step: int, member: int) -> int:
        """Number of this host's rows that `member` gives before `step`."""
        rows = self.shard.rows(self.batch_size)
        starts = np.arange(step, dtype=np.int64) * self.batch_size
        counts = self.schedule.counts(starts + rows.stop)[member]
        return int((counts - self.schedule.counts(starts + rows.start)[member]).sum())
