"""``python -m bench.powerloss``: simulate power losses, and count the chunks that are lost."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench.powerloss.disk import DEAF
from bench.powerloss.recording import record
from bench.powerloss.replay import Recording, Rules
from bench.powerloss.run import outcomes
from bench.powerloss.workload import plan

MEMORY = Path("/dev/shm")  # what is synced there costs no time, and the disk is a model anyway


def main() -> int:
    given = _arguments()
    rules = Rules(given.seed, tuple(given.deaf), tuple(given.during))
    folder = given.recording
    if folder is None:
        where = given.folder or (MEMORY if MEMORY.is_dir() else None)
        folder = Path(tempfile.mkdtemp(prefix="powerloss-", dir=where))
        record(folder, plan(given.seed, given.steps, given.without))
    recording = Recording(folder)
    recording.check_complete()
    print(
        f"{len(recording.steps)} steps, {recording.count('cdurwts')} operations recorded, ", end=""
    )
    print(
        f"{recording.count('s')} syncs; the log explains every byte of {recording.count('k')} ",
        end="",
    )
    print("copies of the store and of the store at the end")
    began = time.monotonic()
    numbers = range(given.replays) if given.only is None else [given.only]
    seen, bad = [], []
    for outcome in outcomes(folder, rules, numbers):
        seen.append(outcome)
        if not outcome.is_good:
            bad.append(outcome)
            print(f"replay {outcome.replay}, {outcome.cut}:")
            for line in (*outcome.lost[:3], *outcome.wrong[:3]):
                print(f"  {line}")
    print("| replays | opened | refused, not yet made | chunks checked | lost | wrong | seconds |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    opened, refused = sum(o.opened for o in seen), sum(o.refused for o in seen)
    checked, lost = sum(o.checked for o in seen), sum(len(o.lost) for o in seen)
    wrong, seconds = sum(len(o.wrong) for o in seen), time.monotonic() - began
    print(f"| {len(seen)} | {opened} | {refused} | {checked} | {lost} | {wrong} | {seconds:.0f} |")
    if bad:
        print(f"{len(bad)} replays failed. One of them again, with the same options and:")
        print(f"  --recording {folder} --only {bad[0].replay}")
    elif given.recording is None:
        shutil.rmtree(folder)
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.powerloss", description=__doc__)
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the steps, and of the replays")
    parser.add_argument("--steps", type=int, default=400, help="done to the store")
    parser.add_argument("--without", nargs="+", default=[], help="kinds of steps to leave out")
    parser.add_argument("--during", nargs="+", default=[], help="kinds of steps to lose power in")
    parser.add_argument("--only", type=int, help="one replay, by its number")
    parser.add_argument("--recording", type=Path, help="one that was kept")
    parser.add_argument("--deaf", nargs="+", default=[], choices=DEAF, help="syncs to ignore")
    parser.add_argument("--folder", type=Path, help="where to work; by default in memory")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
