"""Dynamic volumes for the node: each PersistentVolumeClaim gets a folder of this machine that every user may write."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config, watch

POLL_SECONDS = 0.1
PROVISIONER = "tests.datavector.dev/folder"
STORAGE_CLASS: dict[str, Any] = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
    "provisioner": PROVISIONER,
    "reclaimPolicy": "Retain",
}


class Volumes:
    """Provides volumes in a thread until it is closed."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        """Args:
        folder: for the volumes, which are gone with it.
        """
        self._api = client.CoreV1Api(config.new_client_from_config(str(kubeconfig)))
        self._folder = folder
        self._closing = threading.Event()
        threading.Thread(target=self._follow, name="volumes", daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def _follow(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                for event in watch.Watch().stream(self._api.list_persistent_volume_claim_for_all_namespaces):
                    claim = event["object"]
                    if event["type"] == "DELETED" and claim.spec.volume_name:
                        self._release(claim.spec.volume_name)
                    elif claim.status.phase == "Pending" and claim.spec.storage_class_name == "standard":
                        self._provide(claim)
            except (client.ApiException, urllib3.exceptions.HTTPError, OSError):
                continue  # the list begins anew: what was provided already is left as it is

    def _provide(self, claim: Any) -> None:
        name = f"pvc-{claim.metadata.uid}"
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        spec = client.V1PersistentVolumeSpec(
            capacity=claim.spec.resources.requests,
            access_modes=claim.spec.access_modes,
            storage_class_name=claim.spec.storage_class_name,
            host_path=client.V1HostPathVolumeSource(path=str(folder), type="Directory"),
            claim_ref=client.V1ObjectReference(
                api_version="v1",
                kind="PersistentVolumeClaim",
                name=claim.metadata.name,
                namespace=claim.metadata.namespace,
                uid=claim.metadata.uid,
            ),
        )
        body = client.V1PersistentVolume(metadata=client.V1ObjectMeta(name=name), spec=spec)
        try:
            self._api.create_persistent_volume(body)
        except client.ApiException as error:
            if error.status != 409:  # it has one already
                raise

    def _release(self, name: str) -> None:
        if (self._folder / name).is_dir():
            with contextlib.suppress(client.ApiException):  # it is gone already
                self._api.delete_persistent_volume(name)
            shutil.rmtree(self._folder / name, ignore_errors=True)
