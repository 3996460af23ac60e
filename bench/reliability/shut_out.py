"""A tenant asks while another one attacks: ``python -m bench.reliability shut-out``.

One attack after another, each while a victim asks small questions by retrieval over its own
documents. A first token that takes :data:`MOST_S`, an answer but 200 and a service that is not
ready afterwards are violations. Then a job is left under way, and the process is ended.
"""

from __future__ import annotations

import random
import time
from functools import partial

from bench.reliability.child import Child, Send
from bench.reliability.hostile import Attack, attacks
from bench.reliability.outcome import Outcome, scratch
from bench.reliability.running import Running
from bench.serve import documents, questions

FULL, SHORT = 43, 4  # attacks
MOST_S = 2.0  # to a victim's first token
ENDS_S = 10.0  # from SIGTERM to the end
_LEAST = 3  # questions beside an attack
_ATTACK_S = 30.0  # that an attack is looked at


def run(rounds: int, seed: int) -> Outcome:
    every, rng = attacks(), random.Random(seed)
    names = list(every)
    chosen = names[:rounds] if rounds >= len(names) else rng.sample(names, rounds)
    outcome = Outcome(f"{len(chosen)} attacks")
    asked = iter(questions() * 1000)
    with scratch() as folder, Running(folder) as running:
        running.add([{"id": d.id, "text": d.text} for d in documents(20)])
        for _ in range(5):
            running.ask(next(asked))
        for name in chosen:
            alone = [running.ask(next(asked)).ttft_s for _ in range(3)]
            began, times = time.perf_counter(), list[float]()
            with Child(partial(_attack, every[name], running)) as child:
                while len(times) < _LEAST or (
                    child.running and time.perf_counter() - began < _ATTACK_S
                ):
                    told = running.ask(next(asked))
                    times.append(told.ttft_s)
                    if told.status != 200:
                        outcome.violations.append(f"{told.status} for the victim beside {name}")
                    if told.ttft_s >= MOST_S:
                        outcome.violations.append(f"{MOST_S} s to a first token beside {name}")
                    time.sleep(0.02)
                took = time.perf_counter() - began
                [came] = child.read()
            with running.client() as client:
                ready = client.get("/ready").status_code
            if ready != 200:
                outcome.violations.append(f"/ready is {ready} after {name}")
            outcome.figures.append(
                f"{name}: {came} in {took:.1f} s; {len(times)} first tokens in "
                f"{max(times):.2f} s at most, {max(alone):.2f} s before"
            )
        outcome.violations += _end(running, every["job, 3 MiB of prose"], outcome)
    return outcome


def _attack(attack: Attack, running: Running, send: Send) -> None:
    send(attack(running))


def _end(running: Running, job: Attack, outcome: Outcome) -> list[str]:
    """End the service while it splits a job's documents."""
    job(running)
    running.stop()
    took = running.ended_s()
    outcome.figures.append(f"SIGTERM amid a job: ended in {took:.1f} s")
    return [f"SIGTERM took {took:.1f} s"] if took > ENDS_S else []
