"""Whose is a container? Labels carry everything, and only an exact set of them makes one ours."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from launcher.engines.base import ReplicaSpec

FORMAT_LABEL = "starling.launcher"
FORMAT = "1"
OWNER_LABEL = "starling.owner"
FLEET_LABEL = "starling.fleet"
REPLICA_LABEL = "starling.replica"
DEVICE_LABEL = "starling.device"
SPEC_LABEL = "starling.spec"
PLAN_LABEL = "starling.plan"


def caller_ids(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the uid and gid of the person calling: behind `sudo`, those of the one who typed it."""
    uid, gid = os.getuid(), os.getgid()
    sudo_uid, sudo_gid = environment.get("SUDO_UID", ""), environment.get("SUDO_GID", "")
    if uid == 0 and sudo_uid.isdigit() and sudo_gid.isdigit():
        return int(sudo_uid), int(sudo_gid)
    return uid, gid


def labels(spec: ReplicaSpec, owner: int) -> dict[str, str]:
    """Return the labels that make a container ours. None holds a secret."""
    return {
        FORMAT_LABEL: FORMAT,
        OWNER_LABEL: str(owner),
        FLEET_LABEL: spec.fleet,
        REPLICA_LABEL: spec.name,
        DEVICE_LABEL: spec.device.label,
        SPEC_LABEL: spec.digest,
        PLAN_LABEL: spec.public_json(),
    }


def is_ours(found: Mapping[str, str], name: str, owner: int) -> bool:
    """Return whether labels and name are exactly those that this owner's launcher gives.

    Some of the labels are not enough, nor are copied ones on a container of another name (an image made by
    `docker commit` hands its labels to every container): the name and the digest of the plan must agree too.
    """
    plan = plan_of(found)
    return (
        plan is not None
        and found.get(FORMAT_LABEL) == FORMAT
        and found.get(OWNER_LABEL) == str(owner)
        and found.get(REPLICA_LABEL) == name == plan.get("replica")
        and found.get(FLEET_LABEL) == plan.get("fleet")
        and found.get(DEVICE_LABEL) == plan.get("device")
    )


def plan_of(found: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the plan in the labels; None unless it is whole and has the digest it claims."""
    text = found.get(PLAN_LABEL, "")
    if hashlib.sha256(text.encode()).hexdigest() != found.get(SPEC_LABEL):
        return None
    try:
        plan = json.loads(text)
    except ValueError:
        return None
    return plan if isinstance(plan, dict) and isinstance(plan.get("runs"), str) else None
