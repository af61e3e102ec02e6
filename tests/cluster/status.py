"""What a kubelet reports of a Pod with one container."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]


def pod_status(pod: Object, phase: str, state: Object, *, ready: bool, lost: bool = False) -> Object:
    """A Pod's status.

    Args:
        state: of its container: an object with "waiting", "running" or "terminated".
        lost: its node was lost.
    """
    container = pod["spec"]["containers"][0]
    conditions = [
        _condition("PodScheduled", True),
        _condition("Initialized", True),
        _condition("ContainersReady", ready),
        _condition("Ready", ready),
    ]
    if lost:
        conditions.append(_condition("DisruptionTarget", True) | {"reason": "DeletionByTaintManager"})
    reported = {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": ready,
        "started": ready,
        "restartCount": 0,
        "state": state,
    }
    return {
        "phase": phase,
        "startTime": pod["status"].get("startTime") or now(),
        "conditions": conditions,
        "containerStatuses": [reported],
    }


def waits_because(pod: Object) -> str | None:
    """Why a Pod's container waits, as its status says."""
    for container in pod["status"].get("containerStatuses", []):
        reason: str | None = container["state"].get("waiting", {}).get("reason")
        return reason
    return None


def now() -> str:
    """The time, as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _condition(kind: str, holds: bool) -> Object:
    return {"type": kind, "status": "True" if holds else "False", "lastTransitionTime": now()}
