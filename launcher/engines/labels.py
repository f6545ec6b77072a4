"""The labels of replicas' containers. A container is ours only if all labels match exactly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from launcher.engines.base import ReplicaSpec
from starling.core.plain_json import parse_json
from starling.core.words import printable

FORMAT_LABEL = "starling.launcher"
FORMAT = "1"
OWNER_LABEL = "starling.owner"
FLEET_LABEL = "starling.fleet"
REPLICA_LABEL = "starling.replica"
DEVICE_LABEL = "starling.device"
SPEC_LABEL = "starling.spec"
PLAN_LABEL = "starling.plan"


def labels(spec: ReplicaSpec, owner: int) -> dict[str, str]:
    """Return the labels of a replica's container. No label holds a secret."""
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
    """Return whether the labels and the name are exactly those of a replica of this owner."""
    return owner_of(found, name) == owner


def owner_of(found: Mapping[str, str], name: str) -> int | None:
    """Return the owner's uid; None unless the labels and the name are exactly those of a replica.

    The name and the digest of the plan must agree too, because labels can be copied: an image made by `docker commit`
    passes its labels to every container.
    """
    plan = plan_of(found)
    owner = found.get(OWNER_LABEL, "")
    exact = (
        plan is not None
        and re.fullmatch("[0-9]{1,10}", owner)
        and found.get(FORMAT_LABEL) == FORMAT
        and found.get(REPLICA_LABEL) == name == plan.get("replica")
        and found.get(FLEET_LABEL) == plan.get("fleet")
        and found.get(DEVICE_LABEL) == plan.get("device")
    )
    return int(owner) if exact else None


def user_words(uid: int, *, remote: bool = False) -> str:
    """Return `user bob (uid 1001)`; only `uid 1001` if this machine does not know the user."""
    from launcher.hosts.processes import user_name

    name = f"uid {uid}" if remote else user_name(uid)
    return name if name == f"uid {uid}" else f"user {name} (uid {uid})"


def in_use_by(found: Mapping[str, str], name: str, *, remote: bool = False) -> str | None:
    """Return a message that another user's fleet has this name; None if the labels are not those of a replica."""
    owner = owner_of(found, name)
    if owner is None:
        return None
    return (
        f"fleet {printable(found[FLEET_LABEL])} is in use by {user_words(owner, remote=remote)}, whose replica {name} stays "
        "unchanged: give the training another --name"
    )


def plan_of(found: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the plan in the labels; None unless it is complete and matches its digest."""
    text = found.get(PLAN_LABEL, "")
    if hashlib.sha256(text.encode()).hexdigest() != found.get(SPEC_LABEL):
        return None
    try:
        plan = parse_json(text)
    except ValueError:
        return None
    return plan if isinstance(plan, dict) and isinstance(plan.get("runs"), str) else None
