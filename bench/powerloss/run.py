"""Simulate many power losses in a process of its own, which a damaged store may crash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from bench.powerloss.check import Outcome
from bench.powerloss.replay import Recording, Rules, replay

_ROOT = Path(__file__).resolve().parents[2]


def outcomes(folder: Path, rules: Rules, numbers: Iterable[int]) -> Iterator[Outcome]:
    """Of these replays of the recording in ``folder``, in order."""
    left = list(numbers)
    while left:
        given = json.dumps([asdict(rules), left])
        command = [sys.executable, "-m", "bench.powerloss.run", str(folder)]
        with subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(given)
            child.stdin.close()
            for line in child.stdout:
                yield Outcome(**json.loads(line))
                left.pop(0)
        if child.returncode > 0:
            raise RuntimeError(f"{' '.join(command)} failed in replay {left[0]}")
        if child.returncode < 0:
            yield Outcome(left.pop(0), wrong=[f"ended the process by signal {-child.returncode}"])


def _child(folder: Path) -> None:
    given, numbers = json.load(sys.stdin)
    deaf, during = tuple(given["deaf"]), tuple(given["during"])
    rules = Rules(given["seed"], deaf, during)
    recording = Recording(folder)
    for number in numbers:
        outcome = replay(recording, number, rules, folder / "room")
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
