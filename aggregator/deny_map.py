"""The deny list of a cluster: a ConfigMap, watched through the API, as a mounted one is up to 90 seconds behind."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from aggregator.cluster import follow
from aggregator.deny_list import listed, parse_entries, unknown
from aggregator.kube import CONFIG_MAPS, Api, Object
from datavector.wire.certs import CertificateReport

log = logging.getLogger(__name__)

KEY = "denied"
WATCH_SECONDS = 20  # so that a connection which died is noticed within half a minute


class DenyMap:
    """The key `denied` of a ConfigMap, as text of a deny list.

    Without the ConfigMap or its key everybody is denied. In an outage of the API the last list holds.

    Args:
        changed: called from another thread when the list has been read.
    """

    def __init__(self, api: Api, name: str, changed: Callable[[], None]) -> None:
        self._api = api
        self._name = name
        self._changed = changed
        self._text: str | None = None
        self._entries: frozenset[str] | None = None
        self._read = threading.Event()
        self._stopping = threading.Event()

    def start(self) -> None:
        what = f"the deny list in ConfigMap {self._name}"
        thread = threading.Thread(
            target=follow, args=(what, self._load, self._watch, self._stopping), name="watch the deny list", daemon=True
        )
        thread.start()

    def stop(self) -> None:
        self._stopping.set()

    @property
    def missing(self) -> list[str]:
        """What has not been read yet."""
        return [] if self._read.is_set() else [f"the deny list {self._name}"]

    def names(self, peer: CertificateReport) -> bool:
        if self._entries is None:
            raise unknown()
        return listed(peer, self._entries)

    def _load(self) -> str:
        found: list[Object] = []
        resource_version = self._api.list(CONFIG_MAPS, found.append, name=self._name)
        self._take(found[0] if found else None)
        return resource_version

    def _watch(self, resource_version: str) -> str:
        for event, content in self._api.watch(CONFIG_MAPS, resource_version, name=self._name, seconds=WATCH_SECONDS):
            self._take(None if event == "DELETED" else content)
            resource_version = content["metadata"]["resourceVersion"]
        return resource_version

    def _take(self, content: Object | None) -> None:
        """Takes a state of the ConfigMap; None where it is not there."""
        text: str | None = ((content or {}).get("data") or {}).get(KEY)
        if text != self._text or not self._read.is_set():
            self._text, self._entries = text, None if text is None else parse_entries(text)
            if self._entries is None:
                lack = "is not there" if content is None else f"has no key {KEY!r}"
                log.error(
                    "the ConfigMap %s of namespace %s %s; EVERYBODY is denied", self._name, self._api.namespace, lack
                )
            else:
                log.info("denied are: %s", ", ".join(sorted(self._entries)) or "none")
        self._read.set()
        self._changed()
