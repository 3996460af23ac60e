"""Runs the systems in processes, and asks them in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.peers.comparison import Measured, Record, without_end
from bench.peers.prompts import Workload
from bench.peers.protocol import Answered, Ask, Loaded, Mode, Setup
from bench.results import ROOT
from ragcache.types import Prompt

SETTLE_S = 0.25  # threads of the system before may still spin, waiting for more work


class SystemFailed(Exception):
    """A system could not be started, loaded or asked; the message is its row in the table."""


@dataclass
class Process:
    """A running system."""

    name: str
    popen: subprocess.Popen[str]
    measured: Measured = field(init=False)

    def __post_init__(self) -> None:
        self.measured = Measured(self.name, None, [])

    def send(self, message: Any) -> dict[str, Any]:
        """The reply. Raises SystemFailed."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        try:
            self.popen.stdin.write(json.dumps(asdict(message)) + "\n")
            self.popen.stdin.flush()
            line = self.popen.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemFailed(f"the process ended with status {self.popen.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SystemFailed(reply["error"])
        return reply

    def load(self, setup: Setup) -> None:
        began = time.perf_counter()
        loaded = read_loaded(self.send(setup))
        spent = time.perf_counter() - began
        self.measured = replace(self.measured, loaded=loaded, load_s=spent)

    def ask(self, mode: str, prompt: Prompt, answer: int) -> Answered:
        chunks = [list(chunk) for chunk in prompt.chunks]
        ask = Ask(mode, list(prompt.prefix), chunks, list(prompt.question), answer)
        time.sleep(SETTLE_S)
        answered = Answered(**self.send(ask))
        peak = max(self.measured.peak_mib, answered.peak_mib)
        self.measured = replace(self.measured, peak_mib=peak)
        return answered

    def record(self, record: Record) -> None:
        self.measured = replace(self.measured, records=[*self.measured.records, record])

    def fail(self, why: str) -> None:
        self.measured = replace(self.measured, error=why)


def read_loaded(reply: dict[str, Any]) -> Loaded:
    return Loaded(**{**reply, "modes": [Mode(**mode) for mode in reply["modes"]]})


@contextmanager
def started(name: str, python: str, threads: int, log: Path) -> Iterator[Process]:
    """The process of a system, in the environment of ``python``; what it prints goes to ``log``.

    Raises SystemFailed if there is no such interpreter.
    """
    number = str(threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [python, "-m", f"bench.peers.systems.{name}"]
    with log.open("w", encoding="utf-8") as told:
        try:
            popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
                text=True,
            )
        except OSError as error:
            raise SystemFailed(
                f"{python} cannot be started ({error.strerror}): run `python -m bench.peers.setup`"
            ) from error
        try:
            yield Process(name, popen)
        finally:
            popen.kill()
            popen.communicate()


def measure(
    pythons: Mapping[str, str],
    setup: Setup,
    workload: Workload,
    end: set[int],
    logs: Path,
    tell: Callable[[str], None],
) -> list[Measured]:
    """Ask every system every prompt in every mode.

    The systems are loaded one after another and stay loaded. They take turns prompt by prompt, so
    that a disturbance affects all alike. Every second prompt is asked in the reverse order. A
    system that fails is not asked again, and keeps the reason.
    """
    logs.mkdir(parents=True, exist_ok=True)
    failed: dict[str, Measured] = {}
    with ExitStack() as running:
        processes: list[Process] = []
        for name, python in pythons.items():
            try:
                log = logs / f"{name}.log"
                one = running.enter_context(started(name, python, setup.threads, log))
                one.load(setup)
                processes.append(one)
                tell(f"{name}: loaded in {one.measured.load_s:.0f} s")
                for prompt in workload.warm:
                    for mode in _modes(one):
                        one.ask(mode.name, prompt, setup.answer)
            except SystemFailed as error:
                processes = [p for p in processes if p.name != name]
                failed[name] = Measured(name, None, [], error=f"{error}")
                tell(f"{name}: {error}")
        for number in range(len(workload.asked)):
            for one in processes[:: 1 - number % 2 * 2]:
                if not one.measured.error:
                    try:
                        _turn(one, number, workload, setup.answer, end, tell)
                    except SystemFailed as error:
                        one.fail(f"{error}")
                        tell(f"{one.name}: {error}")
        found = {one.name: one.measured for one in processes} | failed
    return [found[name] for name in pythons]


def _turn(
    one: Process,
    number: int,
    workload: Workload,
    answer: int,
    end: set[int],
    tell: Callable[[str], None],
) -> None:
    asked = workload.asked[number]
    for mode in _modes(one)[:: 1 - number % 2 * 2]:
        got = one.ask(mode.name, asked.prompt, answer)
        again = None
        if mode.name != mode.full:
            again = one.ask(mode.name, asked.again, 1).ttft_s
        tokens = without_end(got, end)
        one.record(Record(number, mode.name, tokens, got.ttft_s, got.computed, again))
        later = "" if again is None else f", again {again:.3f} s"
        tell(f"prompt {number + 1}: {one.name}, {mode.name}: {got.ttft_s:.3f} s{later}")


def _modes(one: Process) -> Sequence[Mode]:
    assert one.measured.loaded is not None
    return one.measured.loaded.modes


def default_pythons(environments: Path) -> dict[str, str]:
    """The interpreter of every system: those that ``python -m bench.peers.setup`` makes, and for
    vLLM the one of `make test-vllm` if it is there."""
    shared = ROOT / ".venv-vllm"
    vllm = shared if (shared / ".ready").exists() else environments / "vllm"
    return {
        "ragcache": sys.executable,
        "transformers": sys.executable,
        "llama_cpp": str(environments / "llama_cpp" / "bin" / "python"),
        "vllm": str(vllm / "bin" / "python"),
        "kvboost": str(environments / "kvboost" / "bin" / "python"),
    }
