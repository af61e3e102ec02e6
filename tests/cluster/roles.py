"""Accounts that may do just what a Role says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.cluster.client import Cluster

Rules = list[dict[str, Any]]

ROLES = Path(__file__).parents[2] / "charts" / "aggregator" / "roles"
RECEIVER: Rules = yaml.safe_load((ROLES / "receiver.yaml").read_text())["rules"]


def rule(resources: str, verbs: str, *, group: str = "datavector.dev") -> dict[str, Any]:
    """A rule of a Role; resources and verbs are separated by spaces."""
    return {"apiGroups": [group], "resources": resources.split(), "verbs": verbs.split()}


def make_account(cluster: Cluster, namespace: str, name: str, rules: Rules) -> None:
    """Makes a service account with a Role of these rules; with one that is there, gives it these rules instead."""
    here = {"name": name, "namespace": namespace}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": here, "rules": rules}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": here,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", **here}],
    }
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": here}
    objects = {"apiVersion": "v1", "kind": "List", "items": [account, role, binding]}
    cluster.kubectl("apply", "-f", "-", input=objects)
