"""Fault 36: what holds a replica in, by the engine's own word and by trying to get out of it.

One container an engine tries everything at once (`attacks.py`); each test reads its part of what it reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.engines.base import Mount
from starling.core.units import MIB
from tests.contract.conftest import WORLDS, World
from tests.contract.test_engines import ended

USER = 10001
PIDS = 64


@dataclass(frozen=True)
class Prisoner:
    """What a replica reported from inside, what its engine says of it, and its runs folder outside."""

    report: dict[str, Any]
    inspected: dict[str, Any]
    runs: Path
    podman: bool


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("podman", marks=pytest.mark.podman),
    ],
)
def prisoner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prisoner]:
    world: World = WORLDS[request.param](request, tmp_path_factory.mktemp(request.param))
    data = world.runs.parent / "data"
    data.mkdir(mode=0o777)
    os.chmod(data, 0o777)
    if os.geteuid() == 0:
        os.chown(world.runs, USER, USER)
    user = f"{USER}:{USER}" if os.geteuid() == 0 else f"{os.getuid()}:{os.getgid()}"
    mounts = (
        Mount(source=str(world.runs), target="/runs", read_only=False),
        Mount(source=str(data), target="/data"),
    )
    code = (Path(__file__).parent / "attacks.py").read_text()
    spec = world.spec(code, mounts=mounts, user=user, pids_limit=PIDS, memory_bytes=256 * MIB)
    replica_id = world.engine.create(spec)
    try:
        world.engine.start(replica_id)
        inspected = world.engine._inspect(replica_id)  # type: ignore[attr-defined]
        state = ended(world.engine, replica_id)
        said = list(world.engine.logs(replica_id))
        assert state.exit_code == 0, said
        yield Prisoner(json.loads(said[-1]), inspected, world.runs, request.param == "podman")
    finally:
        world.engine.remove(replica_id)


@pytest.mark.parametrize("place", ["/", "/etc", "/usr/src", "/opt", "/data", "/sys/fs/cgroup"])
def test_nothing_but_runs_and_tmp_can_be_written(prisoner: Prisoner, place: str) -> None:
    refused = ("EROFS", "EACCES", "ENOENT") if place == "/usr/src" else ("EROFS", "EACCES")
    assert prisoner.report[f"write {place}"] in refused
    assert prisoner.report["write /runs"] == prisoner.report["write /tmp"] == "done"
    assert "ro" in prisoner.report["mounts"]["/"]
    assert "ro" in prisoner.report["mounts"]["/data"]


def test_what_it_writes_in_runs_belongs_to_its_user(prisoner: Prisoner) -> None:
    expected = USER if os.geteuid() == 0 else os.getuid()
    assert (prisoner.runs / "here").stat().st_uid == expected
    assert prisoner.report["status"]["Uid"] == " ".join([str(expected)] * 4)
    assert prisoner.report["chown"] == "EPERM"


def test_no_capability_is_left_and_none_can_be_gained(prisoner: Prisoner) -> None:
    status = prisoner.report["status"]
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert prisoner.report["setuid files"], "the image has no setuid program to try"
    assert prisoner.report["su"] == status["Uid"]


@pytest.mark.parametrize(
    "attack",
    [
        "setuid", "setgid", "mount", "remount /", "umount /data", "chroot", "pivot_root", "mknod",
        "hostname", "clock", "nice", "raw socket", "bpf", "init_module", "reboot", "sysctl",
    ],
)  # fmt: skip
def test_what_only_root_may_do_is_refused(prisoner: Prisoner, attack: str) -> None:
    assert prisoner.report[attack] in ("EPERM", "EACCES", "EROFS", "ENOSYS")


def test_docker_refuses_a_user_namespace_and_podman_allows_one(prisoner: Prisoner) -> None:
    """Podman's own filter of system calls lets a process be root of a namespace that owns nothing of the machine's."""
    assert prisoner.report["unshare user"] == ("done" if prisoner.podman else "EPERM")


def test_a_fork_bomb_ends_at_the_limit_of_processes(prisoner: Prisoner) -> None:
    assert prisoner.report["fork bomb"] == "EAGAIN"
    assert PIDS // 2 < prisoner.report["forked"] < PIDS
    assert prisoner.inspected["HostConfig"]["PidsLimit"] == PIDS


def test_shared_memory_and_tmp_have_the_size_asked_for(prisoner: Prisoner) -> None:
    for place, attack in (("/dev/shm", "shared memory"), ("/tmp", "scratch")):
        assert prisoner.report[attack] == "ENOSPC"
        assert 15 * MIB <= prisoner.report[f"bytes in {place}"] <= 16 * MIB
        assert {"tmpfs", "nosuid", "nodev"} <= set(prisoner.report["mounts"][place])


def test_nothing_of_the_host_is_in_sight(prisoner: Prisoner) -> None:
    for kind in ("pid", "ipc", "net", "mnt", "uts"):
        assert prisoner.report["namespaces"][kind] != os.readlink(f"/proc/self/ns/{kind}")
    assert len(prisoner.report["processes"]) <= 3
    assert prisoner.report["interfaces"] == ["lo"]
    assert prisoner.report["block devices"] == []
    assert prisoner.report["sockets"] == []


def test_the_engine_says_the_same(prisoner: Prisoner) -> None:
    host, config = prisoner.inspected["HostConfig"], prisoner.inspected["Config"]
    assert host["Privileged"] is False
    assert not host["CapAdd"]
    assert host["CapDrop"] == ["ALL"] or len(host["CapDrop"]) > 10, "Podman lists them"
    assert [option.removesuffix(":true") for option in host["SecurityOpt"]] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"]
    assert host["Init"]
    assert host["Memory"] == host["MemorySwap"] == 256 * MIB
    assert not host["OomKillDisable"]
    assert host["ShmSize"] == 16 * MIB
    assert host["PidMode"] != "host"
    assert host["IpcMode"] != "host"
    assert host["NetworkMode"] == "none"
    assert not host["Devices"]
    assert host["RestartPolicy"]["Name"] in ("", "no")
    assert not config["Tty"]
    assert not config["OpenStdin"]
    writable = [mount["Destination"] for mount in prisoner.inspected["Mounts"] if mount["RW"]]
    assert writable == ["/runs"]


def test_logs_are_bounded(prisoner: Prisoner) -> None:
    log = prisoner.inspected["HostConfig"]["LogConfig"]
    assert log["Type"] == "json-file"
    if not prisoner.podman:  # which bounds its one file too, and does not tell so here: see test_podman
        assert log["Config"] == {"max-size": "10m", "max-file": "3"}
