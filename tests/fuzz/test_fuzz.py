"""A short run over all readers: `run.py` makes a long one, and repeats a case."""

import harness
import pytest
import run

CASES = 40


@pytest.mark.slow
@pytest.mark.parametrize("module", harness.modules())
def test_damaged_files_are_read_or_refused_with_their_name(module):
    found = [(module, reader) for reader in harness.readers(module)]
    plan = run.plan_of(found, CASES)
    outcomes = list(harness.run(plan, seed=0))
    faults = [
        f"{outcome.kind}: run.py --reader {outcome.reader!r} --case {outcome.number}: "
        + outcome.text
        for outcome in outcomes
        if outcome.kind in harness.FAULTS
    ]
    assert not faults
    # Most of the damage is noticed, and not all readings fail alike.
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds.count("refused") > len(kinds) // 3 and "read" in kinds


def test_every_kind_of_fault_is_seen_and_the_next_case_goes_on():
    module = "faulty_readers"
    plan = [(module, reader.name, 0, 2) for reader in harness.readers(module)]
    outcomes = [
        outcome
        for entry in plan
        for outcome in harness.run(
            [entry], seed=0, seconds=2.0 if entry[1] == "slow" else harness.PATIENCE
        )
    ]
    numbers = [(reader, number) for _, reader, _, count in plan for number in (0, 1)]
    assert [(each.reader, each.number) for each in outcomes] == numbers
    for _, name, _, _ in plan:
        kinds = {outcome.kind for outcome in outcomes if outcome.reader == name}
        # A case may write what was there.
        assert name in kinds and kinds <= {name, "read"}


def test_a_case_is_the_same_whenever_it_is_made(tmp_path):
    reader = harness.readers("faulty_readers")[0]
    one, two = (harness.Case(reader, str(tmp_path / name)) for name in "ab")
    made = [case.changes(seed=3, number=n) for case in (one, two) for n in range(50)]
    assert made[:50] == made[50:]
    assert len({str(changes) for changes in made}) > 40
