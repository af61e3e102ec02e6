"""Everything that happens to a namespace's objects, as watches of one's own see it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config, watch

RESOURCES = {
    "jobs": ("batch", "v1"),
    "datavectors": ("datavector.dev", "v1alpha1"),
    "mergepolicies": ("datavector.dev", "v1alpha1"),
    "modelversions": ("datavector.dev", "v1alpha1"),
}


class Changes:
    """Records the changes of Jobs and of the project's objects, each as (type, plural, object), oldest first.

    Attributes:
        on_change: called in a watching thread with how many there are.
    """

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.on_change: Callable[[int], None] = lambda _: None
        self._events: list[tuple[str, str, dict[str, Any]]] = []
        self._lock = threading.Lock()
        for plural in RESOURCES:
            threading.Thread(target=self._follow, args=(kubeconfig, namespace, plural), daemon=True).start()

    def __len__(self) -> int:
        return len(self._events)

    def of(self, plural: str) -> list[tuple[str, dict[str, Any]]]:
        """The types and objects of one kind's changes."""
        with self._lock:
            return [(kind, content) for kind, of, content in self._events if of == plural]

    def _follow(self, kubeconfig: Path, namespace: str, plural: str) -> None:
        api = client.CustomObjectsApi(config.new_client_from_config(str(kubeconfig)))
        group, version = RESOURCES[plural]
        stream = watch.Watch().stream(api.list_namespaced_custom_object, group, version, namespace, plural)
        try:
            for event in stream:
                with self._lock:
                    self._events.append((event["type"], plural, event["object"]))
                self.on_change(len(self._events))
        except (client.ApiException, urllib3.exceptions.HTTPError):
            return  # the test is over, and the cluster with it
