"""What each process may do in its namespace, and accounts that may do just that."""

from __future__ import annotations

from typing import Any

from tests.cluster.client import Cluster

Rules = list[dict[str, Any]]


def rule(resources: str, verbs: str, *, group: str = "datavector.dev") -> dict[str, Any]:
    """A rule of a Role; resources and verbs are separated by spaces."""
    return {"apiGroups": [group], "resources": resources.split(), "verbs": verbs.split()}


RECEIVER: Rules = [
    rule("basemodels mergepolicies modelversions", "get list watch"),
    rule("datavectors", "get list watch create patch"),
]


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
