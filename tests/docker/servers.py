"""The compose file's servers as a project of a test's own: brought up, asked, killed and taken down."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PYTHON_PATH
from tests.docker.conftest import AGENT, MLFLOW, POSTGRES, REPOSITORY, docker

OURS = (
    "MLFLOW_",
    "POSTGRES_",
    "STUDY_",
    "CLEARML_",
    "STARLING_",
    "COMPOSE_",
    "AWS_",
    "BASE",
    "PIP_",
    "REDIS_",
)
DEFAULT_EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


@dataclass(slots=True)
class Stack:
    """One project of our compose file, apart from any other on this machine."""

    project: str
    network: str
    settings: dict[str, str] = field(default_factory=dict)
    """Beside those that every test has: changes last until the next change."""

    def environment(self) -> dict[str, str]:
        """Return this process's environment with settings of this project alone, and no .env file."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        return own | {
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_ENV_FILES": "/dev/null",
            "POSTGRES_IMAGE": POSTGRES,
            "MLFLOW_IMAGE": MLFLOW,
            "CLEARML_AGENT_IMAGE": AGENT,
            "MLFLOW_PORT": "0",
            "STARLING_NETWORK": self.network,
            "PYTHONPATH": PYTHON_PATH,
            **self.settings,
        }

    def compose(self, *words: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """Run `docker compose`."""
        return self._run(["docker", "compose", *words], timeout_s=timeout_s)

    def launcher(
        self, *words: str, cwd: Path = REPOSITORY, timeout_s: float = 400.0
    ) -> subprocess.CompletedProcess[str]:
        """Run the `launcher` command line, where nobody answers its questions."""
        return self._run([sys.executable, "-m", "launcher", *words], cwd=cwd, timeout_s=timeout_s)

    def _run(
        self, words: list[str], timeout_s: float, cwd: Path = REPOSITORY
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=cwd, env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what the engine says of a service's container."""
        found: dict[str, Any] = json.loads(docker("inspect", f"{self.project}-{service}-1").stdout)[0]
        return found

    def password(self, user: str) -> str:
        """Return a user's password as the documented command prints it."""
        answer = self.launcher("track", "password", user)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def ask(
        self, path: str = DEFAULT_EXPERIMENT, *, user: str = "", body: object = None, **headers: str
    ) -> tuple[int, str]:
        """Return status and text of the MLflow server's answer; user is `name:password`."""
        port = self.compose("port", "mlflow", "5000").stdout.strip()
        request = urllib.request.Request(f"http://{port}{path}", headers=headers)
        if user:
            request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read().decode(errors="replace")
        except OSError as error:
            return 0, str(error)

    def check_health(self) -> int:
        """Run the health check of the MLflow server's container now, and return its exit code."""
        return self.compose(
            "exec", "-T", "mlflow", "python", "-SE", "/usr/local/lib/starling/healthy.py"
        ).returncode

    def wait_until(self, true: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
        """Wait for something to become true; fails with the logs of all services."""
        until = time.monotonic() + limit_s
        while not true():
            if time.monotonic() > until:
                pytest.fail(f"not {what}:\n" + self.compose("logs", "--tail", "30").stdout)
            time.sleep(0.5)

    def kill(self, service: str) -> None:
        """End a service's main process with SIGKILL, as the kernel would; `docker kill` counts as a wish."""
        pid = self.inspect(service)["State"]["Pid"]
        killer = ["--pid=host", "--entrypoint", "sh", POSTGRES, "-c", f"kill -9 {pid}"]
        answer = docker("run", "--rm", *killer)
        assert answer.returncode == 0, answer.stderr
