"""Run examples/serve, as far as the tools that it needs are installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.api.conftest import ANN, Served

SERVE = Path(__file__).parents[2] / "examples" / "serve"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(running: Served) -> None:
    env = os.environ | {"URL": running.url, "KEY": ANN, "no_proxy": "*"}
    done = subprocess.run(["sh", SERVE / "curl.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert answers[-1]["deleted"] and "data: [DONE]" in done.stdout


def test_the_openai_client(running: Served) -> None:
    env = os.environ | {"RAGCACHE_KEY": ANN, "no_proxy": "*"}
    command = [sys.executable, str(SERVE / "client.py"), running.url]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "cached_tokens" in done.stdout, done.stderr


def test_the_container_is_what_the_service_needs() -> None:
    """Parsed, not built: that takes an engine and a network."""
    composed = yaml.safe_load((SERVE / "compose.yaml").read_text())
    one = composed["services"]["ragcache"]
    assert (SERVE / one["build"]["context"] / one["build"]["dockerfile"]).is_file()
    assert {v.partition(":")[0] for v in one["volumes"]} == composed["volumes"].keys()
    lines = re.sub(r"\\\n", " ", (SERVE / "Dockerfile").read_text()).splitlines()
    steps = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert steps[0] == "FROM" and {"USER", "VOLUME", "HEALTHCHECK", "EXPOSE"} <= set(steps)
    for line in lines:
        for source in line.split()[1:-1] if line.startswith("COPY") else ():
            assert (SERVE.parents[1] / source).exists(), source
