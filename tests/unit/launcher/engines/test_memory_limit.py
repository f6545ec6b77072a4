"""The local engine's memory limit: by cgroup where one can be made, else by looking."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.engines.local import memory_limit
from launcher.engines.local.memory_limit import MemoryLimit
from starling.core.cgroups import count_oom_kills
from starling.core.units import MIB

HOG = "import time; x = bytearray(b'x' * 150_000_000); time.sleep(60)"
WATCHER = f"""
import json, os, subprocess, sys, time
from launcher.engines.local.memory_limit import MemoryLimit
os.setsid()
limit = MemoryLimit("none", 100 << 20, root=sys.argv[1])
assert limit.kept_by == "watch"
small = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
hog = subprocess.Popen([sys.executable, "-c", {HOG!r}], start_new_session=True)
deadline = time.monotonic() + 30
while hog.poll() is None and time.monotonic() < deadline:
    limit.look()
    time.sleep(0.02)
told, alive = limit.oom_killed, small.poll() is None
limit.close()
print(json.dumps([hog.poll(), told, alive, small.wait(5)]))
"""


def test_without_a_cgroup_the_largest_process_is_killed_and_told_and_the_rest_ends_with_the_replica(
    tmp_path: Path,
) -> None:
    """In a process of its own, whose children are a replica's; the hog has even left the session."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[-9, true, true, -9]\n", done.stderr


def test_a_cgroup_keeps_the_limit_and_leaves_nothing() -> None:
    limit = MemoryLimit(f"starling-test-{os.getpid()}", 64 * MIB)
    if limit.kept_by != "cgroup":
        pytest.skip("no cgroup can be made here")
    done = subprocess.run([sys.executable, "-c", HOG], preexec_fn=limit.enter, check=False)
    assert done.returncode == -9
    assert limit.oom_killed
    made = memory_limit.find_cgroup(f"starling-test-{os.getpid()}")
    assert made
    memory_limit.remove_cgroup(made)
    assert not os.path.exists(made)


def test_a_cgroup_of_version_2_is_made_beside_ours_and_only_where_that_keeps_every_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain folders are the double of a version 2 hierarchy, whose memory this machine's kernel may not offer."""
    own = tmp_path / "user.slice" / "session-1.scope"
    own.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("memory pids")
    monkeypatch.setattr(memory_limit, "_own_cgroups", lambda: "0::/user.slice/session-1.scope")
    assert memory_limit.make_cgroup("a", 64 * MIB, str(tmp_path)) is None, "memory is not handed down"
    (own.parent / "cgroup.subtree_control").write_text("cpu memory")
    made = memory_limit.make_cgroup("a", 64 * MIB, str(tmp_path))
    assert made == str(own.parent / "a")
    assert (own.parent / "a" / "memory.max").read_text() == str(64 * MIB)
    assert (own.parent / "a" / "memory.swap.max").read_text() == "0"
    assert count_oom_kills(Path(made)) is None
    (own.parent / "a" / "memory.events").write_text("oom 3\noom_kill 2\n")
    assert count_oom_kills(Path(made)) == 2
    (own / "memory.max").write_text("1000000")
    assert memory_limit.make_cgroup("b", 64 * MIB, str(tmp_path)) is None, (
        "a sibling would escape our own limit"
    )


def test_pages_of_files_do_not_count(tmp_path: Path) -> None:
    """The decoded cache is mapped by every replica; the kernel takes those pages back without killing anybody."""
    (tmp_path / "cache").write_bytes(b"x" * 30_000_000)
    code = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096]); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "cache")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0 < memory_limit.memory_of(child.pid) < 20_000_000
        child.communicate(b"\n")


def test_looking_is_cheap_enough_for_four_times_a_second() -> None:
    limit = MemoryLimit("none", 1 << 50, root="/nonexistent")
    began = time.process_time()
    limit.look()
    assert time.process_time() - began < 0.1
