"""The Kubernetes API: requests, lists and watches of one namespace, with errors that say what to do.

Objects are JSON data. Nothing else of the project imports the `kubernetes` package, which finds the API server and the
identity: a Pod's service account, else the kubeconfig of KUBECONFIG.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

from aggregator.resources import API_VERSION, GROUP, Resource
from datavector.errors import ApiConflict, ApiForbidden, ApiRejected, ApiUnavailable, ConfigError, ObjectMissing

SECONDS = urllib3.Timeout(connect=5, read=30)
PAGE = 500  # objects of one answer to a LIST
WATCH_SECONDS = 300  # after which the API server ends a watch
QUEUED = 2  # requests at once: of the reconciliation, and of a thread beside it

Object = dict[str, Any]
EventType = Literal["ADDED", "MODIFIED", "DELETED"]

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Kind:
    """A kind of objects, by the path of its API and its plural name."""

    api: str
    plural: str

    @classmethod
    def of(cls, resource: type[Resource]) -> Kind:
        return cls(f"apis/{GROUP}/{API_VERSION}", resource.plural)

    @property
    def full_name(self) -> str:
        """As RBAC and kubectl write it: jobs.batch."""
        group = self.api.split("/")[1] if self.api.startswith("apis/") else ""
        return f"{self.plural}.{group}" if group else self.plural


JOBS = Kind("apis/batch/v1", "jobs")
PODS = Kind("api/v1", "pods")
EVENTS = Kind("api/v1", "events")
CONFIG_MAPS = Kind("api/v1", "configmaps")


class Api:
    """Requests to the API server for one namespace. Any number of threads may share it.

    Every method raises ApiUnavailable where the server does not answer or cannot serve now, ApiForbidden where RBAC
    says no, ObjectMissing for an object or a kind that is not there, ApiConflict where an object has changed since
    it was read, and ApiRejected for content that the server refuses.

    Attributes:
        requests: sent so far, watches included.
    """

    def __init__(self, namespace: str | None = None) -> None:
        """
        Raises:
            ConfigError: there is no way to an API server.
        """
        configuration = _configuration()
        configuration.retries = False
        configuration.connection_pool_maxsize = 2 * QUEUED + 5  # each watch keeps one
        self.namespace = namespace or _own_namespace()
        self.server = configuration.host
        self.requests = 0
        self._client = ApiClient(configuration)
        self._counting = threading.Lock()

    def get(self, kind: Kind, name: str) -> Object:
        return self._json("GET", kind, name)

    def create(self, kind: Kind, content: Object) -> Object:
        """Creates an object; unknown fields are refused.

        Raises:
            ApiConflict: there is one of that name.
        """
        return self._json("POST", kind, query={"fieldValidation": "Strict"}, body=content)

    def patch(self, kind: Kind, name: str, content: Object, *, part: str = "") -> Object:
        """Merges `content` into an object (RFC 7386: null removes a field); unknown fields are refused.

        Args:
            content: with `metadata.resourceVersion`, the object must still be as it was then.
            part: "status" for that subresource.
        """
        return self._json("PATCH", kind, name, part, query={"fieldValidation": "Strict"}, body=content)

    def delete(self, kind: Kind, name: str) -> Object:
        """Deletes an object once all that it owns is gone; until then it is there, with a deletionTimestamp."""
        return self._json("DELETE", kind, name, body={"propagationPolicy": "Foreground"})

    def list(self, kind: Kind, take: Callable[[Object], object], *, selector: str = "", name: str = "") -> str:
        """Hands each object to `take`, page by page, so that never all of them are in memory as JSON data.

        Args:
            selector: of labels.
            name: of the one object that is meant.
        Returns:
            The resource version at which they were read.
        """
        query = {"limit": str(PAGE), "labelSelector": selector, "fieldSelector": _named(name)}
        while True:
            page = self._json("GET", kind, query=query)
            for content in page["items"]:
                take(content)
            if not (following := page["metadata"].get("continue")):
                return str(page["metadata"]["resourceVersion"])
            query["continue"] = following

    def count(self, kind: Kind) -> int:
        """How many objects there are, in one small answer."""
        page = self._json("GET", kind, query={"limit": "1"})
        return len(page["items"]) + int(page["metadata"].get("remainingItemCount", 0))

    def watch(
        self, kind: Kind, resource_version: str, *, name: str = "", seconds: int = WATCH_SECONDS
    ) -> Iterator[tuple[EventType, Object]]:
        """What changes from a resource version on, until the server ends the watch.

        Args:
            name: of the one object that is meant.
            seconds: after which the server ends it; a connection that has died is noticed half as long after that.
        Raises:
            ObjectMissing: the version is too old; list again.
        """
        query = {"watch": "true", "resourceVersion": resource_version, "timeoutSeconds": str(seconds)}
        query["fieldSelector"] = _named(name)
        timeout = urllib3.Timeout(connect=5, read=1.5 * seconds)
        answer = self._send("GET", kind, query=query, timeout=timeout, stream=True)
        try:
            for line in _lines(answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _error(event["object"].get("code", 500), event["object"], "watch", kind, "")
                yield event["type"], event["object"]
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ApiUnavailable(self.server, str(error)) from error
        finally:
            answer.close()

    def schema(self) -> Object:
        """The OpenAPI document of the project's kinds as the server has them; empty where it has none of them."""
        try:
            return self._json("GET", Kind(f"openapi/v3/apis/{GROUP}/{API_VERSION}", ""), cluster_wide=True)
        except ObjectMissing:
            return {}

    def _json(self, method: str, kind: Kind, *path: str, **options: Any) -> Object:
        answer = self._send(method, kind, *path, **options)
        try:
            content: Object = json.loads(answer.data)
        except ValueError as error:
            raise ApiUnavailable(self.server, f"its answer is no JSON: {error}") from error
        return content

    def _send(
        self,
        method: str,
        kind: Kind,
        *path: str,
        query: dict[str, str] | None = None,
        body: Object | None = None,
        timeout: urllib3.Timeout = SECONDS,
        stream: bool = False,
        cluster_wide: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        space = [] if cluster_wide else ["namespaces", self.namespace]
        parts = [part for part in (self.server, kind.api, *space, kind.plural, *path) if part]
        url = "/".join(parts) + ("?" + urlencode({k: v for k, v in query.items() if v}) if query else "")
        headers = {"Accept": "application/json", "User-Agent": "datavector"}
        headers |= {each["key"]: each["value"] for each in self._client.configuration.auth_settings().values()}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        with self._counting:
            self.requests += 1
        try:
            answer: urllib3.BaseHTTPResponse = self._client.rest_client.pool_manager.request(
                method,
                url,
                body=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=timeout,
                retries=False,
                preload_content=not stream,
            )
        except urllib3.exceptions.HTTPError as error:
            raise ApiUnavailable(self.server, str(error)) from error
        if answer.status >= 400:
            raise _error(answer.status, _status(answer.data), method, kind, "/".join(filter(None, path)))
        return answer


def _named(name: str) -> str:
    """The field selector of one object; with it, a Role may name the one that can be listed and watched."""
    return f"metadata.name={name}" if name else ""


def _configuration() -> Configuration:
    configuration = Configuration()
    try:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except ConfigException:
        try:
            load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)  # type: ignore[no-untyped-call]
        except (ConfigException, OSError, TypeError) as error:
            raise ConfigError(
                f"there is no way to a Kubernetes API server ({error})",
                remedy="run it as a Pod with a service account, or set KUBECONFIG",
            ) from error
    return configuration


def _own_namespace() -> str:
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.is_file() else "default"


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    buffer = bytearray()
    for block in answer.stream(1 << 16):
        *lines, rest = block.split(b"\n")
        for line in lines:
            yield bytes(buffer + line)
            buffer.clear()
        buffer += rest


def _status(content: bytes) -> Object:
    """The Status object of an answer that is an error."""
    try:
        status = json.loads(content)
    except ValueError:
        status = None
    return status if isinstance(status, dict) else {"message": content.decode(errors="replace").strip()[:500]}


def _error(code: int, status: Object, verb: str, kind: Kind, name: str) -> Exception:
    message = status.get("message") or status.get("reason") or f"HTTP {code}"
    match code:
        case 401 | 403:
            return ApiForbidden(f"{verb} {kind.full_name} {name}".strip(), message)
        case 404 | 410:
            return ObjectMissing(kind.full_name, name, message)
        case 409:
            return ApiConflict(f"{kind.full_name} {name}", message)
        case 400 | 405 | 413 | 415 | 422:
            return ApiRejected(f"{kind.full_name} {name}", message)
    return ApiUnavailable("the API server", message)
