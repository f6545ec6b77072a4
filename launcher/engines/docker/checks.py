"""Checks of a Docker engine before `up` starts anything: the image, the GPU runtime, the socket's group."""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import docker.errors
import docker.types

from launcher.engines.base import Image
from launcher.engines.docker.client import Client
from launcher.engines.docker.troubles import refusal
from launcher.errors import EngineError

TRAINER_LABEL = "starling.trainer"
CUDA_LABEL = "starling.cuda"
"""Labels that our Dockerfile puts on the image."""

GPU_REMEDY = (
    "install the NVIDIA container toolkit, run `sudo nvidia-ctk runtime configure --runtime=docker`, restart Docker; "
    "or use --cpu N"
)
NO_GPU_RUNTIME = "could not select device driver"
_HOOK = "nvidia-container-runtime-hook"
_HOOK_PLACES = os.pathsep.join(("/usr/bin", "/usr/local/bin", "/usr/local/nvidia/toolkit"))


def find_image(client: Client, name: str) -> Image:
    """Return an image that the engine has, by name; raises EngineError that says how to build it."""
    try:
        attributes: dict[str, Any] = client.inspect_image(name)
    except docker.errors.NotFound:
        raise EngineError(
            f"no image {name} here, and none is ever pulled; build it: add --build, or in the project's folder: "
            f"docker build -t {name.removesuffix(':latest')} .  (or name another with --image)"
        ) from None
    found: Mapping[str, str] = (attributes.get("Config") or {}).get("Labels") or {}
    return Image(
        name=name,
        id=attributes["Id"],
        trainer=TRAINER_LABEL in found,
        cuda=found.get(CUDA_LABEL),
    )


def require_trainer(client: Client, image: Image, script: str) -> None:
    """Raise EngineError unless the image has the trainer's label or contains the trainer's script."""
    if image.trainer:
        return
    with _one_shot(client, image, ["true"]) as container:
        try:
            stream, _ = client.get_archive(container, script)
            stream.close()
        except docker.errors.NotFound:
            raise EngineError(
                f"image {image.name} is not one of this trainer's: it has no {script}; build one with --build and "
                "another --image, or start yours FROM the project's image"
            ) from None


def require_gpu_runtime(client: Client, about: Mapping[str, Any], image: Image, *, remote: bool) -> None:
    """Raise EngineError if the engine cannot give GPUs to containers.

    The engine reports NVIDIA's runtime, but neither a hook on its own PATH nor whether it uses CDI for `--gpus`. If
    neither runtime nor hook is found, the engine's answer to the start of an idle container with a GPU driver decides.
    """
    hook = not remote and (shutil.which(_HOOK) or shutil.which(_HOOK, path=_HOOK_PLACES))
    if hook or "nvidia" in (about.get("Runtimes") or {}):
        return
    gpu = docker.types.DeviceRequest(count=0, capabilities=[["gpu"]])
    try:
        with _one_shot(client, image, ["true"], device_requests=[gpu]) as container:
            client.start(container)
    except docker.errors.APIError as error:
        if NO_GPU_RUNTIME in refusal(error):
            raise EngineError(f"Docker has no GPU runtime; {GPU_REMEDY}") from None


def maps_users(about: Mapping[str, Any]) -> bool:
    """Return whether user ids inside containers differ from those outside: a rootless engine, or userns-remap."""
    options = [str(option) for option in about.get("SecurityOptions") or []]
    return any(option.startswith(("name=rootless", "name=userns")) for option in options)


def permission_words(path: str | None) -> str:
    """Return a message with the group that may use the socket, and how this user gets access."""
    words = f"Docker's socket {path}: permission denied" if path else "Docker's socket: permission denied"
    group = ""
    with contextlib.suppress(OSError, KeyError, TypeError):
        group = grp.getgrgid(os.stat(path or "").st_gid).gr_name
    if not group or group == "root":
        return (
            f"{words}; only root may use it: make it group docker's (its service's SocketGroup), or use sudo; "
            "or use --engine local"
        )
    return (
        f"{words}; it is for group {group}: sudo usermod -aG {group} $USER, then log in again "
        f"(or `newgrp {group}` in this terminal); or use --engine local"
    )


@contextlib.contextmanager
def _one_shot(client: Client, image: Image, command: list[str], **host: Any) -> Iterator[str]:
    """Create a container that is not listed as a replica, and remove it afterwards."""
    container: str = client.create_container(
        image.id,
        entrypoint=command,
        command=[],
        network_disabled=True,
        host_config=client.create_host_config(network_mode="none", **host),
    )["Id"]
    try:
        yield container
    finally:
        with contextlib.suppress(docker.errors.APIError):
            client.remove_container(container, force=True, v=True)
