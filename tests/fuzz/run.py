"""Damaged files by the hundred thousand: which readers raise what they should not.

    python tests/fuzz/run.py --cases 100000
    python tests/fuzz/run.py --cases 2000 --reader npz --seed 7
    python tests/fuzz/run.py --reader npz --seed 7 --case 1234 --keep /tmp/case

prints a table, and each fault with what repeats it. The exit code is 1 with a fault.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# The package of this tree, whichever is installed.
sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:3]]

import harness  # noqa: E402

_SHOWN = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="over all readers")
    parser.add_argument("--reader", action="append", help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one here, with a traceback")
    parser.add_argument(
        "--keep", help="with --case: the folder to write its files into"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        plan, seed, report = json.loads(args.child)
        harness.child(plan, seed, report)
        return 0
    found = [
        (module, reader)
        for module in harness.modules()
        for reader in harness.readers(module)
        if not args.reader or reader.name in args.reader
    ]
    if not found:
        parser.error(f"no reader is called {args.reader}")
    if args.case is not None:
        return _one(found[0][1], args)
    plan = plan_of(found, args.cases)
    outcomes, shown = [], {}
    try:
        for outcome in harness.run(plan, args.seed):
            outcomes.append(outcome)
            if outcome.kind in harness.FAULTS:
                # One line for each place that raises.
                place = (outcome.reader, outcome.kind, outcome.text.split(": ")[0])
                shown[place] = shown.get(place, 0) + 1
                if shown[place] <= (_SHOWN if outcome.kind != "raw" else 1):
                    print(
                        f"{outcome.kind}: --reader {outcome.reader} --seed {args.seed} "
                        f"--case {outcome.number}: {outcome.text}",
                        flush=True,
                    )
    except KeyboardInterrupt:
        print(f"stopped after {len(outcomes)} cases")
    print(harness.table(outcomes))
    return int(bool(shown))


def plan_of(found, cases: int) -> list[tuple[str, str, int, int]]:
    """How many cases each reader gets."""
    total = sum(reader.share for _, reader in found)
    return [
        (module, reader.name, 0, max(1, round(cases * reader.share / total)))
        for module, reader in found
    ]


def _one(reader, args) -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        folder = args.keep or os.path.join(root, reader.name)
        case = harness.Case(reader, folder)
        for name, content in case.changes(args.seed, args.case).items():
            path = Path(folder, name)
            print(f"{name}: {content if content is None else content[:300]!r}")
            path.unlink() if content is None else path.write_bytes(content)
        reader.read(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
