"""The manifests of merge Jobs: pure functions from objects to JSON data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from aggregator.kube import Object
from aggregator.reconcile import Stage
from aggregator.resources import API_VERSION, GROUP, JobSettings, ModelVersion
from datavector.files import canonical_json

MANAGED_BY = "app.kubernetes.io/managed-by"
OWN = {MANAGED_BY: "datavector"}
VERSION, STAGE, TEMPLATE = f"{GROUP}/version", f"{GROUP}/stage", f"{GROUP}/template"
CONTAINER = "job"
STORE = "/store"
TERMINATION_LOG = "/dev/termination-log"
USER = 10001

LONGEST_NAME = 63  # of a Job: it becomes a label of its Pods


@dataclass(frozen=True)
class JobDefaults:
    """What a Job needs besides its policy.

    Attributes:
        image: where the policy names none.
        claim: PersistentVolumeClaim of the store.
        service_account: of the Pods; they get no token of it.
    """

    image: str
    claim: str
    service_account: str = "default"


def job_name(version: str, stage: Stage) -> str:
    """The one name of a version's Job of a stage; a long version's name is cut, and told apart by a digest."""
    name = f"{version}-{stage}"
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(version.encode()).hexdigest()[:10]
    return f"{version[: LONGEST_NAME - len(stage) - 12].rstrip('.-')}-{digest}-{stage}"


def merge_job(version: ModelVersion, stage: Stage, settings: JobSettings, defaults: JobDefaults) -> Object:
    """A Job that runs one stage of a version: owned by it, under restricted Pod security, without an API token.

    An exit code that tells of a bad input ends the Job at once; a Pod that was lost with its node does not count; any
    other failure counts towards the backoff limit.
    """
    shares = settings.parallelism if stage == "merge" else 1
    labels = {**OWN, "app.kubernetes.io/name": "datavector-job", VERSION: version.name, STAGE: stage}
    template = {"metadata": {"labels": labels}, "spec": _pod(version, stage, shares, settings, defaults)}
    digest = hashlib.sha256(canonical_json(template)).hexdigest()
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(version.name, stage),
            "labels": labels,
            "annotations": {TEMPLATE: digest},
            "ownerReferences": [
                {
                    "apiVersion": f"{GROUP}/{API_VERSION}",
                    "kind": version.kind_name,
                    "name": version.name,
                    "uid": version.metadata.uid,
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "spec": {
            **(_indexed(shares) if shares > 1 else {}),
            "backoffLimit": settings.backoff_limit,
            "ttlSecondsAfterFinished": settings.ttl_seconds_after_finished,
            "podReplacementPolicy": "Failed",  # never two Pods of one stage at once
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [1, 2]},
                    },
                ]
            },
            "template": template,
        },
    }


def _indexed(shares: int) -> dict[str, Any]:
    """An Indexed Job: each Pod finds the index of its share in its environment."""
    return {"completionMode": "Indexed", "completions": shares, "parallelism": shares}


def _pod(
    version: ModelVersion, stage: Stage, shares: int, settings: JobSettings, defaults: JobDefaults
) -> dict[str, Any]:
    sharing = [f"--share-of={shares}"] if shares > 1 else []
    container = {
        "name": CONTAINER,
        "image": settings.image or defaults.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "aggregator.job"],
        "args": [f"--termination-log={TERMINATION_LOG}", *sharing, STORE, version.name, stage],
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108  the Pod's own
        "resources": settings.resources.model_dump(),
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "store", "mountPath": STORE}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": defaults.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "nodeSelector": settings.node_selector,
        "tolerations": [each.model_dump(by_alias=True, exclude_none=True) for each in settings.tolerations],
        "imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets],
        "containers": [container],
        "volumes": [
            {"name": "store", "persistentVolumeClaim": {"claimName": defaults.claim}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    if settings.priority_class_name:
        pod["priorityClassName"] = settings.priority_class_name
    return pod
