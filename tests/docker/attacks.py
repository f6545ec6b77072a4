"""Run inside a replica: try to get out of it, and print as JSON what became of each try.

The value is an errno's name for a refusal, `done` for a success. Standard library only; it is handed to `python3 -c`.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import time

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000
REPORT = {}


def attempt(name, act):
    try:
        act()
    except OSError as error:
        REPORT[name] = errno.errorcode.get(error.errno, str(error.errno))
    else:
        REPORT[name] = "done"


def call(function, *words):
    if getattr(LIBC, function)(*words) == -1:
        raise OSError(ctypes.get_errno(), function)


def write(path, data="x"):
    with open(path, "w") as file:
        file.write(data)


def fill(folder):
    """Write a hundred times more than there should be room for; count what fits."""
    path, room = f"{folder}/fill", 0
    try:
        with open(path, "wb", buffering=0) as file:
            while room < 1600 << 20:
                room += file.write(b"x" * (1 << 20))
    finally:
        REPORT[f"bytes in {folder}"] = room
        os.unlink(path)


def fork_bomb():
    children = []
    try:
        while len(children) < 5000:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
    finally:
        REPORT["forked"] = len(children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def status_of(pid):
    with open(f"/proc/{pid}/status") as file:
        return {name.rstrip(":"): " ".join(rest) for name, *rest in (line.split() for line in file)}


def options_of(place):
    with open("/proc/mounts") as file:
        rows = [line.split() for line in file]
    return next(([row[2], *row[3].split(",")] for row in rows if row[1] == place), [])


for place in ("/", "/etc", "/usr/src", "/opt", "/data", "/sys/fs/cgroup", "/proc/sys/kernel"):
    attempt(f"write {place}", lambda place=place: write(f"{place}/here"))
attempt("write /runs", lambda: write("/runs/here"))
attempt("write /tmp", lambda: write("/tmp/here"))
attempt("sysctl", lambda: write("/proc/sys/kernel/core_pattern", "|/tmp/x"))
attempt("setuid", lambda: os.setuid(0))
attempt("setgid", lambda: os.setgid(0))
attempt("chown", lambda: os.chown("/runs/here", 0, 0))
attempt("mount", lambda: call("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, None))
attempt("remount /", lambda: call("mount", None, b"/", None, 0x20, None))
attempt("umount /data", lambda: call("umount2", b"/data", 2))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("pivot_root", lambda: call("syscall", 155, b"/tmp", b"/tmp"))
attempt("mknod", lambda: os.mknod("/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(8, 0)))
attempt("hostname", lambda: socket.sethostname("x"))
attempt("clock", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))
attempt("nice", lambda: os.nice(-5))
attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt("bpf", lambda: call("syscall", 321, 0, None, 0))
attempt("init_module", lambda: call("syscall", 175, None, 0, b""))
attempt("reboot", lambda: call("reboot", 0))
attempt("shared memory", lambda: fill("/dev/shm"))
attempt("scratch", lambda: fill("/tmp"))
attempt("fork bomb", fork_bomb)

REPORT["status"] = status_of("self")
with subprocess.Popen(["su"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as su:
    su.stderr.read(1)  # it asks for a password, so it is what it can be
    REPORT["su"] = status_of(su.pid)["Uid"]
    su.kill()
REPORT["setuid files"] = [name for name in ("/bin/su", "/usr/bin/su") if os.stat(name).st_mode & stat.S_ISUID]
REPORT["processes"] = [name for name in os.listdir("/proc") if name.isdigit()]
REPORT["namespaces"] = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
REPORT["interfaces"] = [name for _, name in socket.if_nameindex()]
REPORT["block devices"] = [
    name for name in os.listdir("/dev") if stat.S_ISBLK(os.lstat(f"/dev/{name}").st_mode)
]
REPORT["sockets"] = [
    path
    for path in (
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/podman/podman.sock",
        "/run/containerd/containerd.sock",
    )
    if os.path.exists(path)
]
REPORT["mounts"] = {place: options_of(place) for place in ("/", "/tmp", "/dev/shm", "/data", "/runs")}
# Last, since it changes who this process is.
attempt("unshare user", lambda: call("unshare", CLONE_NEWUSER | CLONE_NEWNS))
print(json.dumps(REPORT))
