"""The actions of `launcher track`: start the servers and wait until they are healthy, remove them, show them."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import click

from launcher.console import confirmed, say
from launcher.engines.docker.docker import DockerEngine
from launcher.engines.docker.services import Service
from launcher.engines.opening import find_host, open_docker
from launcher.errors import EngineError
from launcher.servers.addresses import (
    PASSWORD_FILES,
    URI_INSIDE,
    find_mlflow,
    has_login,
    loopback_uri,
    read_password,
    read_secret,
)
from launcher.servers.compose import Compose, find_compose_file, last_words, project_name
from starling.core.errors import UsageError

POLL_S = 0.5
CRASHING_S = 20.0
"""A server that still crashes this long after its first crash counts as failed."""

LAST_LINES = 15
"""The number of log lines shown of a server that does not become healthy."""

MAP_COUNT, MAP_COUNT_NEEDED = Path("/proc/sys/vm/max_map_count"), 262144
CLEARML_PASSWORD = "/opt/clearml/config/password"
CLEARML_WEB_PORT = 80


def open_compose(file: Path | None, profiles: Iterable[str] = ()) -> Compose:
    """Return the project's compose file; raises UsageError if it cannot be found."""
    return Compose(file=find_compose_file(file), profiles=tuple(profiles))


def open_servers_engine() -> DockerEngine:
    """Return the engine that the servers run on; raises EngineError if it does not answer."""
    return open_docker(find_host("docker"))


def connect(compose: Compose) -> tuple[Compose, DockerEngine]:
    """Return the compose file and the engine that the servers run on; raises EngineError without an engine."""
    engine = open_servers_engine()
    return replace(compose, environment=engine.host.environment), engine


def bring_up(compose: Compose, *, build: bool, limit_s: float) -> None:
    """Start every service, wait until all are healthy, and print the addresses; raises EngineError with the remedy."""
    start_all(*connect(compose), build=build, limit_s=limit_s)


def start_all(compose: Compose, engine: DockerEngine, *, build: bool, limit_s: float) -> None:
    """Start every service, as `bring_up` does, on an engine that is already open."""
    config = compose.config()
    _check_map_count(config, engine)
    provide_images(compose, config, engine, build=build)
    with tempfile.TemporaryFile() as said:
        starter = subprocess.Popen(
            compose.words("up", "--detach", "--no-build", "--pull", "never"),
            env=compose.environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        _wait_until_well(compose, config, engine, starter, said, limit_s)
    for line in whereabouts(engine, config["name"]):
        say(line)


def provide_images(compose: Compose, config: Mapping[str, Any], engine: DockerEngine, *, build: bool) -> None:
    """Build or fetch missing images; without `build`, raises EngineError that names them."""
    missing = {
        name: service
        for name, service in config["services"].items()
        if not _has_image(engine, service["image"])
    }
    if not missing:
        return
    if not build:
        images = sorted({service["image"] for service in missing.values()})
        raise EngineError(
            f"images are missing: {', '.join(images)}; build and fetch them: launcher track up --build"
        )
    own = [name for name, service in missing.items() if "build" in service]
    foreign = [name for name in missing if name not in own]
    if own:
        compose.show("build", *own)
    if foreign:
        compose.show("pull", *foreign)


def take_down(compose: Compose, *, volumes: bool, yes: bool) -> None:
    """Stop and remove the project's containers, and with `volumes`, after a confirmation, its volumes."""
    compose, engine = connect(compose)
    config = compose.config()
    kept = _volumes(compose, config)
    if not kept and not engine.services(config["name"]):
        say(f"none: project {config['name']} has nothing here")
        return
    if volumes and not yes:
        say("these volumes hold every run, artifact, study and password of the servers:")
        for name in kept:
            say(f"  {name}")
        if not confirmed("remove them for good?", "--volumes"):
            raise UsageError("nothing removed; a backup first: launcher track backup FILE")
    guests = _guests(compose, config)
    failure = None
    try:
        compose.read("down", "--timeout", "30", *(["--volumes"] if volumes else []))
    except EngineError as error:
        # Compose removes everything else, then fails for a network or a volume that others use.
        failure = error
    left = _volumes(compose, config) if volumes else []
    if failure and (engine.services(config["name"]) or not (guests or left)):
        raise failure
    if left:
        in_use = (_names(compose, "--all", "--filter", f"volume={volume}") for volume in left)
        users = sorted({name for names in in_use for name in names})
        raise EngineError(
            f"the servers are removed, but {', '.join(left)} is in use by {', '.join(users)}; end what uses it "
            "(replicas: launcher kill-all), then again: launcher track down --volumes"
        )
    say(f"project {config['name']}: servers removed" + (", volumes too" if volumes else "; volumes kept:"))
    if not volumes:
        say("  " + ", ".join(kept))
        say("  the same again: launcher track up")
    if guests:
        say(f"the network stays while replicas are in it: {', '.join(guests)}; they go on, and send later")


def show_status(*, as_json: bool) -> int:
    """Print the servers and their addresses; return 0 if all are healthy, else 1."""
    engine, project = open_servers_engine(), project_name()
    services = engine.services(project)
    well = bool(services) and all(service.well for service in services)
    if as_json:
        click.echo(json.dumps(_described(engine, project, services, well), indent=2))
    elif not services:
        say(f"none: project {project} is not up; start it: launcher track up")
    else:
        width = max(len(service.name) for service in services)
        for service in services:
            say(f"{service.name:<{width}}  {words_for(engine, service)}")
        for line in whereabouts(engine, project):
            say(line)
    return 0 if well else 1


def words_for(engine: DockerEngine, service: Service) -> str:
    """Return a service's state in words."""
    if service.done:
        return "done"
    if service.state == "exited":
        return f"stopped ({service.status})"
    waits = service.name == "clearml-agent" and service.up
    if waits and not (engine.environment(service.id) or {}).get("CLEARML_API_ACCESS_KEY"):
        return f"{service.status}, waits for ClearML's credentials in .env"
    return service.status


def whereabouts(engine: DockerEngine, project: str) -> list[str]:
    """Return the addresses of the servers for people and trainers, one line each; empty if MLflow is down."""
    mlflow = find_mlflow(engine, project)
    if mlflow is None or not mlflow.up:
        return []
    login = "log in as admin: launcher track password" if has_login(engine, mlflow) else "no login"
    lines = [
        f"MLflow    {loopback_uri(mlflow) or 'no port on this machine'}  ({login})",
        f"trainers  launcher up --tracking …  (network {mlflow.networks[0]}, {URI_INSIDE})",
    ]
    for service in engine.services(project):
        if service.name == "clearml-webserver" and CLEARML_WEB_PORT in service.ports:
            where = service.ports[CLEARML_WEB_PORT]
            lines.append(f"ClearML   http://{where}  (log in as admin: launcher track password clearml)")
    return lines


def show_password(user: str) -> None:
    """Print only a user's password, for use in a pipe; raises EngineError if there is no password."""
    engine = open_servers_engine()
    if user in PASSWORD_FILES:
        mlflow = find_mlflow(engine)
        if mlflow is None:
            raise EngineError("the MLflow server does not exist; start it: launcher track up")
        if not has_login(engine, mlflow):
            raise EngineError("the MLflow server has no login (MLFLOW_LOGIN=off in .env)")
        say(read_password(engine, mlflow, user))
        return
    server = next((one for one in engine.services(project_name()) if one.name == "clearml-apiserver"), None)
    if server is None:
        raise EngineError(
            "the ClearML server does not exist; start it: launcher track up --profile clearml-server"
        )
    say(read_secret(engine, server, CLEARML_PASSWORD))


def _wait_until_well(
    compose: Compose,
    config: Mapping[str, Any],
    engine: DockerEngine,
    starter: subprocess.Popen[bytes],
    said: IO[bytes],
    limit_s: float,
) -> None:
    """Say each change of a service's state until all are healthy; raises EngineError with the log of a failed one."""
    began = time.monotonic()
    shown: dict[str, str] = {}
    crashed_at: dict[str, float] = {}
    while True:
        ended = starter.poll()
        services = {
            one.name: one for one in engine.services(config["name"]) if one.name in config["services"]
        }
        for service in services.values():
            state = "done" if service.done else service.health or service.state
            if shown.get(service.name) != state and state != "created":
                shown[service.name] = state
                say(f"[{time.monotonic() - began:4.0f} s] {service.name}: {state}")
        well = len(services) == len(config["services"]) and all(one.well for one in services.values())
        if ended == 0 and well:
            return
        now = time.monotonic()
        crashing = [name for name, one in services.items() if one.state == "restarting"]
        looping = any(now - crashed_at.setdefault(name, now) > CRASHING_S for name in crashing)
        if ended or looping or now - began > limit_s:
            starter.terminate()
            said.seek(0)
            why = last_words(said.read()) if ended else f"not healthy after {now - began:.0f} s"
            raise EngineError(_failure(compose, list(services.values()), why))
        time.sleep(POLL_S)


def _failure(compose: Compose, services: Sequence[Service], text: str) -> str:
    if "port is already allocated" in text or "address already in use" in text:
        return f"{text}; another program has the port: end it, or choose another in .env (MLFLOW_PORT, …)"
    for service in services:
        if not service.well and service.state != "created":
            logs = compose.read("logs", "--no-color", "--tail", str(LAST_LINES), service.name)
            last = "\n  ".join(logs.decode(errors="replace").splitlines())
            return f"{service.name}: {service.status}: {text}; it said:\n  {last}"
    return text


def _has_image(engine: DockerEngine, image: str) -> bool:
    try:
        engine.resolve_image(image)
    except EngineError:
        return False
    return True


def _check_map_count(config: Mapping[str, Any], engine: DockerEngine) -> None:
    """Raise EngineError if vm.max_map_count is too low for Elasticsearch, which would end at once."""
    if "clearml-elasticsearch" not in config["services"] or engine.host.remote:
        return
    try:
        count = int(MAP_COUNT.read_text())
    except (OSError, ValueError):
        return
    if count < MAP_COUNT_NEEDED:
        raise EngineError(
            f"Elasticsearch needs vm.max_map_count of {MAP_COUNT_NEEDED} and this machine has {count}: "
            f"sudo sysctl -w vm.max_map_count={MAP_COUNT_NEEDED} (and in /etc/sysctl.d, to last)"
        )


def _volumes(compose: Compose, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the project's volumes that exist."""
    own = f"label=com.docker.compose.project={config['name']}"
    return sorted(compose.docker("volume", "ls", "--quiet", "--filter", own).split())


def _names(compose: Compose, *filters: str) -> list[str]:
    return compose.docker("ps", *filters, "--format", "{{.Names}}").split()


def _guests(compose: Compose, config: Mapping[str, Any]) -> list[str]:
    """Return the names of containers in the project's network that do not belong to the project."""
    found = []
    for network in config.get("networks", {}).values():
        own = f"label=com.docker.compose.project={config['name']}"
        filters = ["--filter", f"network={network['name']}"]
        found += sorted(set(_names(compose, *filters)) - set(_names(compose, *filters, "--filter", own)))
    return found


def _described(engine: DockerEngine, project: str, services: Sequence[Service], well: bool) -> dict[str, Any]:
    mlflow = find_mlflow(engine, project)
    return {
        "project": project,
        "well": well,
        "services": [
            {
                "name": service.name,
                "state": service.state,
                "health": service.health,
                "well": service.well,
                "words": words_for(engine, service),
                "image": service.image,
            }
            for service in services
        ],
        "url": loopback_uri(mlflow) if mlflow else "",
        "url_inside": URI_INSIDE,
        "network": mlflow.networks[0] if mlflow and mlflow.networks else "",
        "login": mlflow is not None and has_login(engine, mlflow),
    }
