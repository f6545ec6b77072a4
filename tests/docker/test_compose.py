"""The servers of `docker compose`, run for real: MLflow with its login on PostgreSQL, and the ClearML agent that waits.

The services of the profile `clearml-server` are official images that cannot be had here: their part of the file is
checked, and its secrets are drawn for real; they do not run.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_LAYOUT
from tests.docker.conftest import AGENT, MLFLOW, POSTGRES, REPOSITORY, docker, missing, require_images
from tests.docker.servers import Stack

pytestmark = pytest.mark.docker

EVERYDAY = {"secrets", "postgres", "mlflow", "clearml-agent"}
CLEARML = {
    f"clearml-{part}"
    for part in ("apiserver", "elasticsearch", "fileserver", "mongo", "redis", "secrets", "webserver")
}


@dataclass(frozen=True, slots=True)
class Training:
    """What one replica left behind."""

    name: str
    table: str
    """Its results.csv on the host."""
    seen: str
    """The plan, and all that Docker shows of the container."""


@pytest.fixture(scope="module")
def compose(engine: None) -> None:
    """Ask for Compose v2."""
    if docker("compose", "version").returncode:
        missing("there is no Docker Compose v2")


@pytest.fixture(scope="module")
def stack(compose: None) -> Iterator[Stack]:
    """Bring the whole stack up by the documented command, without settings, and take it down with its volumes."""
    require_images([MLFLOW, AGENT, POSTGRES])
    name = f"starling-test-{uuid.uuid4().hex[:8]}"
    stack = Stack(project=name, network=name)
    try:
        answer = stack.launcher("track", "up")
        assert answer.returncode == 0, answer.stderr
        assert "mlflow: healthy" in answer.stdout
        assert "launcher up --tracking" in answer.stdout
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="module")
def training(stack: Stack, trainer_image: str, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Train one epoch in a replica of `launcher up --tracking`."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "runs").mkdir()
    name = uuid.uuid4().hex[:8]
    words = ["up", "--tracking", "--cpu", "1", "--image", trainer_image, "--settle", "0", "--memory", "2g"]
    arguments = [
        "--data",
        "bccd.yaml",
        "--weights",
        "",
        "--cfg",
        str(TINY_LAYOUT),
        "--img",
        "64",
        "--epochs",
        "1",
    ]
    arguments += ["--batch", "16", "--project", "kept", "--name", name]
    plan = stack.launcher(*words, "--dry-run", "--", *arguments, cwd=folder)
    try:
        answer = stack.launcher(*words, "--", *arguments, cwd=folder)
        assert answer.returncode == 0, answer.stderr
        container = f"kept-{name}-cpu0"
        inspected = docker("inspect", container).stdout
        ended = docker("wait", container, timeout_s=500).stdout.strip()
        said = docker("logs", container)
    finally:
        stack.launcher("kill-all", "--yes", f"kept/{name}", cwd=folder)
    assert ended == "0", said.stdout + said.stderr
    return Training(
        name=name,
        table=(folder / "runs" / "kept" / name / "results.csv").read_text(),
        seen="\n".join([plan.stdout, inspected, said.stdout, said.stderr]),
    )


def what_is_kept(stack: Stack) -> dict[str, Any]:
    """Return the training's run with its table among the artifacts, as a user of the API sees them."""
    user = "trainer:" + stack.password("trainer")
    status, text = stack.ask("/api/2.0/mlflow/experiments/get-by-name?experiment_name=kept", user=user)
    assert status == 200, text
    experiment = json.loads(text)["experiment"]["experiment_id"]
    _, text = stack.ask("/api/2.0/mlflow/runs/search", user=user, body={"experiment_ids": [experiment]})
    (run,) = json.loads(text)["runs"]
    where = f"{experiment}/{run['info']['run_id']}/artifacts/results.csv"
    status, table = stack.ask(f"/api/2.0/mlflow-artifacts/artifacts/{where}", user=user)
    assert status == 200, table
    return {"info": run["info"], "metrics": run["data"]["metrics"], "table": table}


@pytest.fixture(scope="module")
def kept(stack: Stack, training: Training) -> dict[str, Any]:
    """Return what the server keeps of the training before anything happens to it."""
    return what_is_kept(stack)


@pytest.mark.parametrize(
    ("words", "services"),
    [
        ((), EVERYDAY),
        (("--file", "docker-compose.yml", "--file", "deploy/compose.gpu.yml"), EVERYDAY),
        (("--file", "docker-compose.yml", "--file", "deploy/compose.study.yml"), EVERYDAY),
        (("--profile", "clearml-server"), EVERYDAY | CLEARML),
    ],
    ids=["everyday", "gpu", "study", "clearml-server"],
)
def test_every_form_of_the_file_is_valid_without_settings_and_open_to_this_machine_only(
    compose: None, words: tuple[str, ...], services: set[str]
) -> None:
    answer = Stack(project="starling", network="starling").compose(*words, "config", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)["services"]

    assert set(found) == services
    ports = [port["host_ip"] for service in found.values() for port in service.get("ports", [])]
    assert ports
    assert set(ports) == {"127.0.0.1"}
    assert bool(found["postgres"].get("ports")) == ("deploy/compose.study.yml" in words)
    for service in found.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges"]
        assert not service.get("privileged")
    assert "docker.sock" not in answer.stdout


def test_the_databases_of_clearml_are_in_a_network_that_leads_nowhere(compose: None) -> None:
    stack = Stack(project="starling", network="starling")
    config = json.loads(stack.compose("--profile", "clearml-server", "config", "--format", "json").stdout)

    assert config["networks"]["clearml-backend"]["internal"] is True
    for name in ("clearml-elasticsearch", "clearml-mongo", "clearml-redis"):
        assert set(config["services"][name]["networks"]) == {"clearml-backend"}
        assert "ports" not in config["services"][name]


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


def test_clearmls_secrets_are_drawn_once_and_none_is_the_published_one(compose: None) -> None:
    require_images([POSTGRES])
    name = f"starling-test-{uuid.uuid4().hex[:8]}"
    stack = Stack(project=name, network=name)
    draw = ("--profile", "clearml-server", "run", "--rm", "-T", "--no-deps")
    try:
        texts = []
        for _ in range(2):
            assert stack.compose(*draw, "clearml-secrets").returncode == 0
            shown = stack.compose(*draw, "--entrypoint", "sh", "clearml-secrets", "-c", "cat /config/*")
            texts.append(shown.stdout)
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5")

    assert texts[0] == texts[1]
    secrets = re.findall(r'"([0-9a-f]{48})"', texts[0])
    # The password, the session's and the token's secret, and a key and a secret for each of four system users.
    assert len(set(secrets)) == 1 + 2 + 8


@pytest.mark.slow
def test_status_names_each_server_in_words_and_is_a_success(stack: Stack) -> None:
    words = stack.launcher("track", "status")
    report = json.loads(stack.launcher("track", "status", "--json").stdout)

    assert words.returncode == 0, words.stderr
    assert re.search(r"mlflow +Up .*\(healthy\)", words.stdout)
    assert re.search(r"clearml-agent +Up .*waits for ClearML's credentials", words.stdout)
    assert re.search(r"secrets +done", words.stdout)
    assert (report["well"], report["login"], report["network"]) == (True, True, stack.network)
    assert {service["name"] for service in report["services"]} == EVERYDAY


def test_status_without_servers_says_none_and_is_no_success(compose: None) -> None:
    answer = Stack(project="starling-test-none", network="none").launcher("track", "status")
    assert (answer.returncode, answer.stdout.startswith("none: ")) == (1, True)


def test_missing_images_are_named_with_the_remedy_and_nothing_starts(compose: None) -> None:
    stack = Stack(project="starling-test-none", network="none", settings={"MLFLOW_IMAGE": "no-such-image"})
    answer = stack.launcher("track", "up")

    assert answer.returncode == 5
    assert (
        "images are missing: no-such-image; build and fetch them: launcher track up --build" in answer.stderr
    )
    assert stack.compose("ps", "--all", "--quiet").stdout == ""


def test_a_password_that_is_too_short_is_named_and_no_server_starts(compose: None, tmp_path: Path) -> None:
    require_images([MLFLOW, AGENT, POSTGRES])
    (tmp_path / "mlflow_admin_password").write_text("short\n")
    name = f"starling-test-{uuid.uuid4().hex[:8]}"
    stack = Stack(project=name, network=name, settings={"STARLING_SECRETS": str(tmp_path)})
    try:
        answer = stack.launcher("track", "up")
        assert answer.returncode == 5
        assert "mlflow_admin_password: needs at least 12 characters" in answer.stderr
        assert stack.inspect("postgres")["State"]["Status"] == "created"
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")


def test_a_server_without_a_login_is_refused_where_others_could_reach_it(engine: None) -> None:
    require_images([MLFLOW])
    for setting, words in (
        ("MLFLOW_BIND=0.0.0.0", "anyone there could write"),
        ("MLFLOW_LOGIN=no", "on or off"),
    ):
        answer = docker("run", "--rm", "--network", "none", "-e", "MLFLOW_LOGIN=off", "-e", setting, MLFLOW)
        assert (answer.returncode, words in answer.stderr) == (1, True)


@pytest.mark.slow
def test_only_those_who_log_in_are_answered_and_a_trainer_may_not_administer(stack: Stack) -> None:
    trainer, admin = f"trainer:{stack.password('trainer')}", f"admin:{stack.password('admin')}"

    for nobody in ("", "admin:password1234", "trainer:"):
        assert stack.ask(user=nobody)[0] == 401
        assert stack.ask("/metrics", user=nobody)[0] == 401
    assert json.loads(stack.ask(user=trainer)[1])["experiment"]["name"] == "Default"
    newcomer = {"username": "eve", "password": "long-enough-to-pass"}
    assert stack.ask("/api/2.0/mlflow/users/create", user=trainer, body=newcomer)[0] == 403
    assert (
        stack.ask("/api/2.0/mlflow/experiments/delete", user=trainer, body={"experiment_id": "0"})[0] == 403
    )
    assert stack.ask("/metrics", user=trainer)[0] == 403
    status, metrics = stack.ask("/metrics", user=admin)
    assert status == 200
    assert 'mlflow_http_request_total{method="GET",status="200"}' in metrics


@pytest.mark.slow
def test_a_host_name_of_strangers_is_refused(stack: Stack) -> None:
    assert stack.ask(user="admin:" + stack.password("admin"), Host="elsewhere.example")[0] == 403


@pytest.mark.slow
def test_a_replica_joins_by_itself_and_its_training_is_on_the_server(
    stack: Stack, training: Training, kept: dict[str, Any]
) -> None:
    assert f"--network {stack.network}" in training.seen
    assert not [user for user in ("trainer", "admin") if stack.password(user) in training.seen]
    assert (kept["info"]["run_name"], kept["info"]["status"]) == (training.name, "FINISHED")
    assert kept["metrics"]
    assert kept["table"] == training.table


@pytest.mark.slow
def test_processes_get_the_published_port_and_show_no_password(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    words = ("up", "--engine", "local", "--tracking", "--cpu", "1", "--dry-run", "--", "--data", "bccd.yaml")
    plan = stack.launcher(*words, cwd=tmp_path)

    assert plan.returncode == 0, plan.stderr
    port = stack.compose("port", "mlflow", "5000").stdout.strip()
    assert f"MLFLOW_TRACKING_URI=http://{port}" in plan.stdout
    assert "MLFLOW_TRACKING_PASSWORD" in plan.stdout
    assert stack.password("trainer") not in plan.stdout


@pytest.mark.slow
def test_agent_without_credentials_says_once_what_to_set_and_waits(stack: Stack) -> None:
    state = stack.inspect("clearml-agent")

    assert (state["State"]["Running"], state["RestartCount"]) == (True, 0)
    lines = docker("logs", state["Id"]).stdout.splitlines()
    assert len(lines) == 1
    for name in ("CLEARML_API_HOST", "CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY", ".env"):
        assert name in lines[0]


@pytest.mark.slow
def test_searches_have_a_database_of_their_own_and_see_no_other(stack: Stack, trainer_image: str) -> None:
    password = stack.compose("exec", "-T", "postgres", "cat", "/run/starling/study_password").stdout

    def open_as_a_replica(database: str) -> subprocess.CompletedProcess[str]:
        return docker(
            "run", "--rm", "--network", stack.network, "-e", f"PGPASSWORD={password}", trainer_image, "python", "-c",
            "import pathlib; from starling.search.storage.storage import open_storage; "
            f"print(open_storage('postgresql://starling@postgres/{database}', pathlib.Path('/tmp/a/b')).where)",
        )  # fmt: skip

    answer = open_as_a_replica("starling")
    assert answer.stdout.strip() == "postgresql://starling@postgres:5432/starling (study a/b)", answer.stderr
    other = open_as_a_replica("mlflow")
    assert other.returncode != 0
    assert "permission denied" in other.stderr


@pytest.mark.slow
def test_no_secret_stands_in_what_docker_shows(stack: Stack) -> None:
    show = "for file in /run/starling/* /run/starling-trainer/*; do cat $file; echo; done"
    words = ("run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "secrets", "-c", show)
    secrets = stack.compose(*words).stdout.split()

    assert len(secrets) == 5
    assert len({len(secret) for secret in secrets}) == 1
    for service in EVERYDAY:
        shown = json.dumps(stack.inspect(service)) + docker("logs", f"{stack.project}-{service}-1").stdout
        shown += docker("top", f"{stack.project}-{service}-1", "-ef").stdout
        assert not [secret for secret in secrets if secret in shown]


@pytest.mark.slow
def test_health_is_that_of_the_way_to_the_database(stack: Stack) -> None:
    assert stack.check_health() == 0
    stack.compose("stop", "--timeout", "5", "postgres")
    try:
        assert stack.ask("/health")[0] == 200
        assert stack.check_health() != 0
    finally:
        stack.compose("start", "postgres")
    stack.wait_until(lambda: stack.check_health() == 0, "healthy again")
    assert stack.inspect("mlflow")["RestartCount"] == 0


@pytest.mark.slow
def test_servers_that_are_killed_come_back_with_all_they_had(stack: Stack, kept: dict[str, Any]) -> None:
    for service in ("postgres", "mlflow"):
        stack.kill(service)

    stack.wait_until(
        lambda: all(stack.inspect(service)["RestartCount"] for service in ("postgres", "mlflow")), "restarted"
    )
    stack.wait_until(lambda: stack.check_health() == 0, "healthy again")
    assert what_is_kept(stack) == kept


@pytest.mark.slow
def test_agent_stops_at_once(stack: Stack) -> None:
    began = time.monotonic()
    stack.compose("stop", "--timeout", "10", "clearml-agent")

    assert time.monotonic() - began < 8
    status = stack.launcher("track", "status")
    assert status.returncode == 1
    assert re.search(r"clearml-agent +stopped", status.stdout)


@pytest.mark.slow
def test_down_and_up_loses_nothing_and_spares_what_is_not_of_the_project(
    stack: Stack, kept: dict[str, Any]
) -> None:
    guest = docker(
        "run", "--detach", "--rm", "--network", stack.network, "--entrypoint", "sleep", POSTGRES, "120"
    )
    try:
        down = stack.launcher("track", "down")
        spared = docker("inspect", "--format", "{{.State.Running}}", guest.stdout.strip()).stdout.strip()
    finally:
        docker("kill", guest.stdout.strip())
    assert down.returncode == 0, down.stderr
    assert "volumes kept" in down.stdout
    assert "stays while replicas are in it" in down.stdout
    assert spared == "true"
    refused = stack.launcher(
        "up", "--tracking", "--cpu", "1", "--image", POSTGRES, "--", "--data", "bccd.yaml"
    )
    assert refused.returncode == 5
    assert "not up; start them: launcher track up" in refused.stderr

    assert stack.launcher("track", "up").returncode == 0
    assert what_is_kept(stack) == kept


@pytest.mark.slow
def test_a_backup_brings_everything_back_after_the_volumes_are_gone(
    stack: Stack, kept: dict[str, Any], tmp_path: Path
) -> None:
    backup, cut = tmp_path / "servers.tar", tmp_path / "cut.tar"
    made = stack.launcher("track", "backup", str(backup))
    assert made.returncode == 0, made.stderr
    assert backup.stat().st_mode & 0o777 == 0o600
    drawn = [stack.password("admin"), stack.password("trainer")]
    assert not [password for password in drawn if password.encode() in backup.read_bytes()]
    again = stack.launcher("track", "backup", str(backup))
    assert (again.returncode, "exists" in again.stderr) == (2, True)

    asked = stack.launcher("track", "down", "--volumes")
    assert (asked.returncode, stack.inspect("mlflow")["State"]["Running"]) == (2, True)
    user = docker("run", "--detach", "--rm", "--volume", f"{stack.project}_trainer:/t", "--entrypoint", "sleep", POSTGRES, "99")  # fmt: skip
    in_use = stack.launcher("track", "down", "--volumes", "--yes")
    docker("rm", "--force", user.stdout.strip())
    assert in_use.returncode == 5
    assert f"{stack.project}_trainer is in use" in in_use.stderr
    assert stack.launcher("track", "down", "--volumes", "--yes").returncode == 0
    assert docker("volume", "ls", "--quiet", "--filter", f"name={stack.project}_").stdout == ""

    cut.write_bytes(backup.read_bytes()[:-15000])
    assert stack.launcher("track", "restore", "--yes", str(cut)).returncode == 3
    # The new servers take their passwords from the user's own files.
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mlflow_admin_password").write_text("per cent % and 'quotes'\n")
    stack.settings["STARLING_SECRETS"] = str(tmp_path / "own")
    restored = stack.launcher("track", "restore", "--yes", str(backup))
    assert restored.returncode == 0, restored.stderr
    assert what_is_kept(stack) == kept
    assert stack.ask(user="admin:per cent % and 'quotes'")[0] == 200
    assert stack.ask(user=f"admin:{drawn[0]}")[0] == 401
    assert stack.password("trainer") != drawn[1]
