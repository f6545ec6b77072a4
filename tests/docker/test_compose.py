"""`docker compose up -d`: the MLflow server on PostgreSQL, and the ClearML agent that waits for its credentials."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.docker.conftest import AGENT, MLFLOW, POSTGRES, REPOSITORY, docker, missing, require_images

pytestmark = pytest.mark.docker

OURS = ("MLFLOW_", "POSTGRES_", "STUDY_", "CLEARML_", "STARLING_NETWORK", "COMPOSE_", "AWS_", "BASE", "PIP_")
LOG_A_RUN = """
import pathlib, mlflow
with mlflow.start_run(experiment_id=mlflow.create_experiment("from-a-replica")) as run:
    mlflow.log_metric("metrics/mAP_0.5:0.95", 0.25, step=3)
    pathlib.Path("/tmp/results.csv").write_text("epoch")
    mlflow.log_artifact("/tmp/results.csv")
client = mlflow.MlflowClient()
print(client.get_run(run.info.run_id).data.metrics, [item.path for item in client.list_artifacts(run.info.run_id)])
"""


@dataclass(frozen=True, slots=True)
class Stack:
    """One project of our compose file, apart from any other on this machine."""

    project: str
    network: str

    def compose(self, *words: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` with settings of this test's own and no .env file."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        environment |= {
            "POSTGRES_IMAGE": POSTGRES,
            "MLFLOW_IMAGE": MLFLOW,
            "CLEARML_AGENT_IMAGE": AGENT,
            "MLFLOW_PORT": "0",
            "STARLING_NETWORK": self.network,
        }
        return subprocess.run(
            ["docker", "compose", "--env-file", "/dev/null", "--project-name", self.project, *words],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what the engine says of a service's container."""
        found: dict[str, Any] = json.loads(docker("inspect", f"{self.project}-{service}-1").stdout)[0]
        return found

    def wait_for(self, service: str, health: str, limit_s: float = 120.0) -> None:
        """Wait for a service's health; fails with the logs of all."""
        until = time.monotonic() + limit_s
        while self.inspect(service)["State"].get("Health", {}).get("Status") != health:
            if time.monotonic() > until:
                pytest.fail(f"{service} is not {health}:\n" + self.compose("logs", "--tail", "30").stdout)
            time.sleep(1)


@pytest.fixture(scope="module")
def compose(engine: None) -> None:
    """Ask for Compose v2."""
    if docker("compose", "version").returncode:
        missing("there is no Docker Compose v2")


@pytest.fixture(scope="module")
def stack(compose: None) -> Iterator[Stack]:
    """Bring the whole stack up, without credentials, and take it down with its volumes."""
    require_images([MLFLOW, AGENT, POSTGRES])
    name = f"starling-test-{uuid.uuid4().hex[:8]}"
    stack = Stack(project=name, network=name)
    try:
        answer = stack.compose("up", "--detach")
        assert answer.returncode == 0, answer.stderr
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")


def settings(compose_words: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    answer = compose_words("config", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    values: dict[str, Any] = json.loads(answer.stdout)
    return values


def test_file_is_valid_without_any_setting_and_publishes_to_this_machine_only(compose: None) -> None:
    services = settings(Stack(project="starling", network="starling").compose)["services"]

    assert set(services) == {"postgres", "mlflow", "clearml-agent"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert [port["host_ip"] for port in ports] == ["127.0.0.1"]
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())
    assert not any("docker.sock" in json.dumps(service) for service in services.values())


def test_every_variable_is_documented_in_the_example() -> None:
    used = set()
    for path in (REPOSITORY / "docker-compose.yml", *(REPOSITORY / "deploy").glob("compose.*.yml")):
        for piece in path.read_text().split("${")[1:]:
            used.add(piece.split(":")[0].split("}")[0])
    example = (REPOSITORY / ".env.example").read_text().splitlines()
    documented = {
        line.lstrip("#").split("=")[0] for line in example if "=" in line and not line.startswith("# ")
    }

    assert used == documented


def test_database_is_published_only_where_asked_and_then_to_this_machine(compose: None) -> None:
    stack = Stack(project="starling", network="starling")
    files = ("--file", "docker-compose.yml", "--file", "deploy/compose.study.yml")
    services = settings(lambda *words: stack.compose(*files, *words))["services"]

    assert [port["host_ip"] for port in services["postgres"]["ports"]] == ["127.0.0.1"]


@pytest.mark.slow
def test_searches_have_a_database_of_their_own_and_see_no_other(stack: Stack, trainer_image: str) -> None:
    stack.wait_for("postgres", "healthy")
    password = stack.compose("exec", "-T", "postgres", "cat", "/run/starling/study_password").stdout

    def open_as_a_replica(database: str) -> subprocess.CompletedProcess[str]:
        return docker(
            "run", "--rm", "--network", stack.network, "-e", f"PGPASSWORD={password}", trainer_image, "python", "-c",
            "import pathlib; from app.search.storage import open_storage; "
            f"print(open_storage('postgresql://starling@postgres/{database}', pathlib.Path('/tmp/a/b')).where)",
        )  # fmt: skip

    until = time.monotonic() + 60
    while (answer := open_as_a_replica("starling")).returncode and time.monotonic() < until:
        time.sleep(1)  # the role is made a moment after the server answers
    assert answer.stdout.strip() == "postgresql://starling@postgres:5432/starling (study a/b)", answer.stderr
    other = open_as_a_replica("mlflow")
    assert other.returncode != 0
    assert "permission denied" in other.stderr
    assert password not in stack.compose("logs", "postgres").stdout


@pytest.mark.slow
def test_mlflow_becomes_healthy_and_answers_on_the_loopback_port(stack: Stack) -> None:
    stack.wait_for("mlflow", "healthy")
    port = stack.compose("port", "mlflow", "5000").stdout.strip()

    with urllib.request.urlopen(
        f"http://{port}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=10
    ) as answer:
        assert json.load(answer)["experiment"]["name"] == "Default"
    assert port.startswith("127.0.0.1:")


@pytest.mark.slow
def test_trainer_on_the_network_logs_metrics_and_artifacts_by_name(stack: Stack, trainer_image: str) -> None:
    stack.wait_for("mlflow", "healthy")

    answer = docker(
        "run", "--rm", "--network", stack.network, "-e", "MLFLOW_TRACKING_URI=http://mlflow:5000",
        "-e", "MLFLOW_HTTP_REQUEST_MAX_RETRIES=1", trainer_image, "python", "-c", LOG_A_RUN,
    )  # fmt: skip

    assert answer.stdout.splitlines()[-1] == "{'metrics/mAP_0.5:0.95': 0.25} ['results.csv']", answer.stderr


@pytest.mark.slow
def test_a_host_name_of_strangers_is_refused(stack: Stack) -> None:
    stack.wait_for("mlflow", "healthy")
    port = stack.compose("port", "mlflow", "5000").stdout.strip()
    request = urllib.request.Request(
        f"http://{port}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": "elsewhere.example"}
    )

    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=10)

    assert refusal.value.code == 403


@pytest.mark.slow
def test_agent_without_credentials_says_once_what_to_set_and_waits(stack: Stack) -> None:
    time.sleep(3)
    state = stack.inspect("clearml-agent")

    assert (state["State"]["Running"], state["RestartCount"]) == (True, 0)
    lines = docker("logs", state["Id"]).stdout.splitlines()
    assert len(lines) == 1
    for name in ("CLEARML_API_HOST", "CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY", ".env"):
        assert name in lines[0]


@pytest.mark.slow
def test_no_password_stands_in_what_docker_shows(stack: Stack) -> None:
    password = stack.compose(
        "exec", "-T", "postgres", "cat", "/run/starling/postgres_password"
    ).stdout.strip()

    assert len(password) >= 24
    for service in ("postgres", "mlflow", "clearml-agent"):
        assert password not in json.dumps(stack.inspect(service))
        assert password not in docker("top", f"{stack.project}-{service}-1", "-ef").stdout


@pytest.mark.slow
def test_mlflow_is_unhealthy_while_the_database_is_down_and_recovers(stack: Stack) -> None:
    stack.wait_for("mlflow", "healthy")
    stack.compose("stop", "--timeout", "5", "postgres")

    stack.wait_for("mlflow", "unhealthy", limit_s=90)
    stack.compose("start", "postgres")
    stack.wait_for("mlflow", "healthy", limit_s=90)
    assert stack.inspect("mlflow")["RestartCount"] == 0


@pytest.mark.slow
def test_agent_stops_at_once(stack: Stack) -> None:
    began = time.monotonic()
    stack.compose("stop", "--timeout", "10", "clearml-agent")

    assert time.monotonic() - began < 8
