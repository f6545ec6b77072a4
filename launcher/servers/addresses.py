"""The addresses and logins of the tracking servers, for replicas and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from launcher.engines.base import Mount
from launcher.engines.docker.services import Service
from launcher.errors import EngineError
from launcher.options.request import Request
from launcher.servers.compose import project_name
from starling.core.errors import UsageError

PORT = 5000
URI_INSIDE = f"http://mlflow:{PORT}"
"""The server's address on its Docker network."""

ADMIN, TRAINER = "admin", "trainer"
SECRETS = "/run/starling"
TRAINER_SECRETS = "/run/starling-trainer"
PASSWORD_FILES = {ADMIN: f"{SECRETS}/mlflow_admin_password", TRAINER: f"{TRAINER_SECRETS}/mlflow_password"}

URI, USER = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME"
PASSWORD, PASSWORD_FILE = "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_PASSWORD_FILE"
OWN_PREFIX = "MLFLOW_TRACKING_"
"""The prefix of the user's variables that `--tracking` replaces."""
DEFAULT_NETWORK = "bridge"
MOST_SECRET_BYTES = 4096


class ServersEngine(Protocol):
    """The part of an engine that these functions need."""

    def services(self, project: str) -> Sequence[Service]: ...
    def environment(self, replica_id: str) -> Mapping[str, str] | None: ...
    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """The network, variables and mounts with which a replica logs to the servers."""

    network: str
    environment: Mapping[str, str]
    passed: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Secrets in variables, for processes of this machine, which mount nothing."""
    mounts: tuple[Mount, ...] = ()


def find_mlflow(engine: ServersEngine, project: str | None = None) -> Service | None:
    """Return the MLflow server's container; None if there is none."""
    found = engine.services(project or project_name())
    return next((service for service in found if service.name == "mlflow"), None)


def has_login(engine: ServersEngine, mlflow: Service) -> bool:
    """Return whether the server requires a login."""
    return (engine.environment(mlflow.id) or {}).get("MLFLOW_LOGIN", "on") != "off"


def read_password(engine: ServersEngine, mlflow: Service, user: str) -> str:
    """Return a user's password from the server's secrets; raises EngineError if there is none."""
    return read_secret(engine, mlflow, PASSWORD_FILES[user])


def read_secret(engine: ServersEngine, service: Service, path: str) -> str:
    """Return a secret from a file of a service's container; raises EngineError if the file does not exist."""
    secret = engine.read_file(service.id, path, MOST_SECRET_BYTES).decode().strip()
    if not secret:
        raise EngineError(f"{service.name} holds no {path}; bring it up again: launcher track up")
    return secret


def loopback_uri(mlflow: Service) -> str:
    """Return the address on the server's machine; empty if the server publishes no port."""
    return f"http://{mlflow.ports[PORT]}" if PORT in mlflow.ports else ""


def join(engine: ServersEngine, *, isolated: bool) -> Tracking:
    """Return how replicas log to the servers; raises EngineError with the remedy if the servers are down.

    Containers join the network and mount the volume with the trainer's password read-only: the password is in no
    variable, argument or label. Processes use the loopback port.
    """
    mlflow = find_mlflow(engine)
    if mlflow is None or mlflow.state in ("created", "exited"):
        raise EngineError("--tracking: the tracking servers are not up; start them: launcher track up")
    if not mlflow.up:
        raise EngineError(
            f"--tracking: the MLflow server is not healthy ({mlflow.status}); see `launcher track status`, "
            "or wait for it: launcher track up"
        )
    login = has_login(engine, mlflow)
    if not isolated:
        if not (uri := loopback_uri(mlflow)):
            raise EngineError("--tracking: the MLflow server has no port on this machine; set MLFLOW_PORT")
        passed = {PASSWORD: read_password(engine, mlflow, TRAINER)} if login else {}
        return Tracking(
            network="", environment={URI: uri, **({USER: TRAINER} if login else {})}, passed=passed
        )
    if not login:
        return Tracking(network=mlflow.networks[0], environment={URI: URI_INSIDE})
    return Tracking(
        network=mlflow.networks[0],
        environment={URI: URI_INSIDE, USER: TRAINER, PASSWORD_FILE: PASSWORD_FILES[TRAINER]},
        mounts=(Mount(kind="volume", source=mlflow.volumes[TRAINER_SECRETS], target=TRAINER_SECRETS),),
    )


def with_servers(request: Request, engine: ServersEngine) -> Request:
    """Return the request for replicas that log to the servers; raises EngineError if the servers are down."""
    isolated = request.entrypoint.isolated
    tracking = join(engine, isolated=isolated)
    if isolated:
        check_network_choice(request.network, tracking)
    own = {name: value for name, value in request.passed.items() if not name.startswith(OWN_PREFIX)}
    return replace(
        request,
        network=tracking.network or request.network,
        passed={**own, **tracking.passed},
        settings=tracking.environment,
        volumes=tracking.mounts,
    )


def check_network_choice(asked: str, tracking: Tracking) -> None:
    """Raise UsageError for a network other than the servers': a replica joins one network only."""
    if asked not in (DEFAULT_NETWORK, tracking.network):
        raise UsageError(
            f"--network {asked}: --tracking joins the servers' network {tracking.network}; leave out one of the two"
        )
