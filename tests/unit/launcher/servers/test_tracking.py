"""How replicas reach the tracking servers, and what a backup must be, without a Docker engine.

`Servers` is a double of the engine's answers; the real ones are in tests/docker/test_compose.py.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from launcher.engines.docker.services import Service, read_services
from launcher.errors import EngineError
from launcher.servers.addresses import check_network_choice, join
from launcher.servers.archive import MANIFEST, ArchiveWriter, Contents, held, verify
from launcher.servers.compose import find_compose_file
from launcher.servers.track import provide_images
from starling.core.errors import DataError, UsageError
from tests.conftest import REPOSITORY

SECRET = "5f1c-not-to-be-seen"


def mlflow(status: str = "Up 3 minutes (healthy)", state: str = "running") -> Service:
    return Service(
        id="42",
        name="mlflow",
        image="starling-mlflow",
        state=state,
        status=status,
        networks=("starling",),
        volumes={"/run/starling-trainer": "starling_trainer", "/run/starling": "starling_secrets"},
        ports={5000: "127.0.0.1:5000"},
    )


class Servers:
    """A double of the engine."""

    def __init__(self, *services: Service, login: str = "on") -> None:
        self._services, self._login = services, login

    def services(self, project: str) -> Sequence[Service]:
        assert project == "starling"
        return self._services

    def environment(self, replica_id: str) -> Mapping[str, str] | None:
        return {"MLFLOW_LOGIN": self._login}

    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes:
        assert path == "/run/starling-trainer/mlflow_password"
        return SECRET.encode() + b"\n"


@pytest.fixture(autouse=True)
def _no_project_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPOSE_PROJECT_NAME", raising=False)


def test_a_container_gets_network_address_and_the_file_with_the_password_but_no_password() -> None:
    tracking = join(Servers(mlflow()), isolated=True)

    assert tracking.network == "starling"
    assert tracking.environment == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MLFLOW_TRACKING_USERNAME": "trainer",
        "MLFLOW_TRACKING_PASSWORD_FILE": "/run/starling-trainer/mlflow_password",
    }
    (mount,) = tracking.mounts
    assert (mount.kind, mount.source, mount.read_only) == ("volume", "starling_trainer", True)
    assert not tracking.passed


def test_a_process_gets_the_loopback_address_and_a_password_that_no_representation_shows() -> None:
    tracking = join(Servers(mlflow()), isolated=False)

    assert tracking.environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert tracking.passed == {"MLFLOW_TRACKING_PASSWORD": SECRET}
    assert SECRET not in repr(tracking)


@pytest.mark.parametrize("isolated", [True, False])
def test_servers_without_a_login_need_none(isolated: bool) -> None:
    tracking = join(Servers(mlflow(), login="off"), isolated=isolated)
    assert (set(tracking.environment), tracking.passed, tracking.mounts) == ({"MLFLOW_TRACKING_URI"}, {}, ())


@pytest.mark.parametrize(
    "services", [(), (mlflow("Exited (137) 2 hours ago", "exited"),), (mlflow("Created", "created"),)]
)
def test_servers_that_are_not_up_are_refused_with_the_command_that_starts_them(
    services: tuple[Service, ...],
) -> None:
    with pytest.raises(EngineError, match="not up; start them: launcher track up"):
        join(Servers(*services), isolated=True)


@pytest.mark.parametrize("status", ["Up 5 seconds (health: starting)", "Up 2 minutes (unhealthy)"])
def test_a_server_that_is_not_healthy_is_refused(status: str) -> None:
    with pytest.raises(EngineError, match=r"not healthy .*launcher track status"):
        join(Servers(mlflow(status)), isolated=True)


def test_another_network_beside_that_of_the_servers_is_refused() -> None:
    tracking = join(Servers(mlflow()), isolated=True)
    for fine in ("bridge", "starling"):
        check_network_choice(fine, tracking)
    with pytest.raises(UsageError, match="--network lab: --tracking joins the servers' network starling"):
        check_network_choice("lab", tracking)


def test_dockers_words_become_states() -> None:
    def item(service: str, state: str, status: str, once: str = "") -> dict[str, object]:
        labels = {"com.docker.compose.service": service, "starling.once": once}
        return {"Id": service, "Image": "i", "Labels": labels, "State": state, "Status": status}

    found = read_services(
        [
            item("secrets", "exited", "Exited (0) 1 second ago", "true"),
            item("stopped", "exited", "Exited (0) 1 second ago"),
            item("mlflow", "running", "Up 1 second (health: starting)"),
            item("agent", "restarting", "Restarting (1) 2 seconds ago"),
            item("postgres", "running", "Up 2 minutes (healthy)"),
        ]
    )
    services = {service.name: service for service in found}

    assert {name: (one.health, one.well) for name, one in services.items()} == {
        "agent": ("", False),
        "mlflow": ("starting", False),
        "postgres": ("healthy", True),
        "secrets": ("", True),
        "stopped": ("", False),
    }


def test_the_compose_file_beside_the_launcher_is_found_and_a_missing_one_is_named(tmp_path: Path) -> None:
    assert find_compose_file(None, tmp_path) == REPOSITORY / "docker-compose.yml"
    with pytest.raises(UsageError, match=r"--compose-file nowhere\.yml: no such file"):
        find_compose_file(Path("nowhere.yml"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes another user's file")
def test_another_users_compose_file_here_is_not_run_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "launcher.servers.compose.__file__", str(tmp_path / "site-packages/launcher/servers/compose.py")
    )
    here = tmp_path / "docker-compose.yml"
    here.write_text("# Experiment tracking\n")
    assert find_compose_file(None, tmp_path) == here
    os.chown(here, 12345, 12345)
    with pytest.raises(UsageError, match=r"another user \(uid 12345\).*--compose-file"):
        find_compose_file(None, tmp_path)
    assert find_compose_file(here, tmp_path) == here


class Recorder:
    """A double of Compose that writes down what would be run."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, ...]] = []

    def show(self, *words: str) -> None:
        self.shown.append(words)


class Images:
    """A double of the engine that has some images."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def resolve_image(self, image: str) -> str:
        if image not in self._names:
            raise EngineError(f"no image {image}")
        return "id"


def test_missing_images_are_built_or_fetched_only_where_asked() -> None:
    config = {
        "services": {
            "mlflow": {"image": "starling-mlflow", "build": {}},
            "postgres": {"image": "postgres:17"},
            "secrets": {"image": "postgres:17"},
            "there": {"image": "already"},
        }
    }
    compose = Recorder()
    with pytest.raises(
        EngineError, match=r"missing: postgres:17, starling-mlflow; .*launcher track up --build"
    ):
        provide_images(compose, config, Images("already"), build=False)
    assert compose.shown == []

    provide_images(compose, config, Images("already"), build=True)
    assert compose.shown == [("build", "mlflow"), ("pull", "postgres", "secrets")]
    provide_images(compose, config, Images("already", "postgres:17", "starling-mlflow"), build=True)
    assert len(compose.shown) == 2


def archive(path: Path, *, drop: str = "", extra: str = "", manifest: bytes | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        writer = ArchiveWriter(tar, {"created": "2026-01-02", "has_artifacts": True})
        for name in ("databases/mlflow.dump", "databases/starling.dump", "artifacts/1/run/best.pt"):
            if name != drop:
                writer.add(name, 4096, io.BytesIO(bytes(range(256)) * 16))
        if extra:
            writer.add(extra, 1, io.BytesIO(b"x"))
        if manifest is None:
            writer.seal()
        elif manifest:
            member = tarfile.TarInfo(MANIFEST)
            member.size = len(manifest)
            tar.addfile(member, io.BytesIO(manifest))
    return path


def test_a_whole_backup_is_accepted(tmp_path: Path) -> None:
    assert verify(archive(tmp_path / "a.tar")) == Contents(created="2026-01-02", has_artifacts=True, files=3)


def test_a_backup_cut_anywhere_or_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.tar").read_bytes()
    bad = tmp_path / "bad.tar"
    for cut in range(0, len(whole.rstrip(b"\0")), 509):
        bad.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"bad\.tar: "):
            verify(bad)
    with tarfile.open(tmp_path / "a.tar") as tar:
        payloads = [
            range(one.offset_data, one.offset_data + one.size, 397) for one in tar if one.name != MANIFEST
        ]
    for at in (at for payload in payloads for at in payload):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="is damaged"):
            verify(bad)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": "databases/starling.dump"}, "is damaged"),
        ({"extra": "artifacts/../../etc/passwd"}, "which no backup has"),
        ({"extra": "/etc/passwd"}, "which no backup has"),
        ({"extra": "databases/../x"}, "which no backup has"),
        ({"manifest": b""}, "has no manifest"),
        ({"manifest": b"[]"}, "manifest cannot be read"),
        ({"manifest": b"{"}, "manifest cannot be read"),
        ({"manifest": json.dumps({"format": 9}).encode()}, "has format 9"),
        ({"manifest": json.dumps({"format": 1, "sha256": {}}).encode()}, "is damaged"),
    ],
)
def test_what_is_no_backup_of_these_servers_is_refused_by_name(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        verify(archive(tmp_path / "a.tar", **options))  # type: ignore[arg-type]


def test_a_link_in_a_backup_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("artifacts/x")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with pytest.raises(DataError, match="which no backup has"):
        verify(tmp_path / "a.tar")


def test_a_backup_swapped_after_its_check_is_not_what_is_restored(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar")
    with held(path) as at:
        verify(path, at)
        path.rename(tmp_path / "aside")
        path.write_text("another")
        assert verify(path, at).files == 3
        with pytest.raises(DataError):
            verify(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a file"), held(tmp_path / "pipe"):
        raise AssertionError("not reached")
