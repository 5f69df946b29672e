"""What this package bears: damaged checkpoints, killed runs, failed requests, saves from several processes.

    python benchmarks/faults.py --seed 0                             # all of it
    python benchmarks/faults.py --kinds checkpoints --checkpoints 200

A fault is survived where what was asked for is done, or a `ValueError` or `OSError` with a message of ours says why
not, and nothing that was saved is lost or wrong. Exits with status 1 where a fault was not survived.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # worker processes import the kinds by their full name

from benchmarks.fault_kinds import checkpoints, requests, runs, saves
from benchmarks.fault_kinds.outcome import Outcome


KINDS = {
    "checkpoints": "mutated checkpoints of every format are loaded",
    "runs": "a training run is killed, its closing included, and resumed: weights bit for bit",
    "requests": "each request of a push and of pulls fails once",
    "saves": "two processes save with accelerate's idiom",
}


def main() -> int:
    """Run the kinds of faults that are asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--checkpoints", type=int, default=2000, help="mutated checkpoints (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="kills of a run (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=12, help="saves by two processes (default: %(default)s)")
    asked = parser.parse_args()
    todo = {
        "checkpoints": lambda: checkpoints.run(asked.seed, asked.checkpoints),
        "runs": lambda: runs.run(asked.seed, asked.kills),
        "requests": lambda: requests.run(asked.seed),
        "saves": lambda: saves.run(asked.seed, asked.saves),
    }
    outcomes = []
    for kind in asked.kinds:
        outcomes.append(todo[kind]())
        sys.stdout.write(table(outcomes[-1:]))  # at once: the next kind takes minutes
    if len(outcomes) > 1:
        sys.stdout.write(table(outcomes))
    return int(any(outcome.survived < outcome.tried for outcome in outcomes))


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for each kind, then a line for each fault that was not survived."""
    rows = ["| faults | tried | survived |", "|---|---:|---:|"]
    for outcome in outcomes:
        rows.append(f"| {KINDS.get(outcome.kind, outcome.kind)} | {outcome.tried} | {outcome.survived} |")
    failures = [f"- {outcome.kind}: {failure}" for outcome in outcomes for failure in outcome.failures]
    return "\n".join([*rows, "", *failures, ""])


if __name__ == "__main__":
    sys.exit(main())
