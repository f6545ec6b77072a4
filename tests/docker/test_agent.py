"""The ClearML agent's container: one agent, or one a GPU, that end with it.

`clearml-agent` and `nvidia-smi` are doubles here: the real agent needs a ClearML server, and `each` needs GPUs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docker.conftest import AGENT, docker, require_images

pytestmark = pytest.mark.docker

AGENT_DOUBLE = """#!/bin/sh
echo "agent: $* skip=${CLEARML_AGENT_SKIP_PIP_VENV_INSTALL:-}"
echo $$ > "/tmp/$(echo "$*" | tr -dc 0-9)"
exec sleep 120
"""
CREDENTIALS = (
    "CLEARML_API_HOST=http://nowhere",
    "CLEARML_API_ACCESS_KEY=k",
    "CLEARML_API_SECRET_KEY=not-to-be-seen",
)

Start = Callable[..., str]


@pytest.fixture
def start(engine: None, tmp_path: Path) -> Iterator[Start]:
    """Start the agent's image with the doubles in it; the containers go with the test."""
    require_images([AGENT])
    names = []

    def script(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(*settings: str, gpus: str = "") -> str:
        name = f"starling-test-{uuid.uuid4().hex[:8]}"
        names.append(name)
        words = [word for setting in (*CREDENTIALS, *settings) for word in ("--env", setting)]
        agent = script("clearml-agent", AGENT_DOUBLE)
        words += ["--volume", f"{agent}:/opt/agent/bin/clearml-agent:ro"]
        if gpus:
            smi = script("nvidia-smi", f"#!/bin/sh\nprintf '{gpus}'\n")
            words += ["--volume", f"{smi}:/usr/local/bin/nvidia-smi:ro"]
        answer = docker("run", "--detach", "--init", "--cap-drop", "ALL", "--name", name, *words, AGENT)
        assert answer.returncode == 0, answer.stderr
        return name

    yield run
    docker("rm", "--force", *names)


def logs_with(name: str, *words: str) -> str:
    """Return a container's output once it holds all of `words`."""
    until = time.monotonic() + 20
    while True:
        answer = docker("logs", name)
        text = answer.stdout + answer.stderr
        if all(word in text for word in words):
            return text
        assert time.monotonic() < until, text
        time.sleep(0.2)


def exit_code(name: str) -> str:
    return docker("wait", name, timeout_s=30).stdout.strip()


def test_one_agent_for_all_gpus_is_the_containers_own_process_in_the_trainers_python(start: Start) -> None:
    # Any program stands for the trainer's Python: what counts is that it is named to the agent.
    name = start(
        "CLEARML_AGENT_DEVICES=--gpus all", "CLEARML_QUEUE=gpus", "CLEARML_AGENT_PYTHON=/usr/bin/env"
    )

    text = logs_with(name, "agent: daemon")
    assert "agent: daemon --foreground --queue gpus --create-queue --gpus all skip=/usr/bin/env" in text
    assert "not-to-be-seen" not in text
    docker("stop", "--time", "10", name)
    assert exit_code(name) == "143"


def test_an_agent_on_each_gpu_all_end_with_the_container(start: Start) -> None:
    name = start("CLEARML_AGENT_DEVICES=each", gpus=r"0\n3\n")

    logs_with(name, "one agent a GPU (0 3)", "--gpus 0", "--gpus 3")
    began = time.monotonic()
    docker("stop", "--time", "10", name)
    assert time.monotonic() - began < 8
    assert exit_code(name) == "143"


def test_an_agent_that_dies_ends_the_container_so_that_docker_starts_all_again(start: Start) -> None:
    name = start("CLEARML_AGENT_DEVICES=each", gpus=r"0\n3\n")

    logs_with(name, "--gpus 0", "--gpus 3")
    docker("exec", name, "sh", "-c", "kill -9 $(cat /tmp/3)")
    assert exit_code(name) == "1"
    assert "an agent has ended; starting all again" in logs_with(name)


def test_agents_for_each_gpu_where_none_is_seen_are_told_once_and_wait(start: Start) -> None:
    name = start("CLEARML_AGENT_DEVICES=each")

    assert "compose.gpu.yml" in logs_with(name, "sees no GPU")
    assert docker("inspect", "--format", "{{.State.Running}}", name).stdout.strip() == "true"
