"""The registry in a cluster: custom resources, read from a cache that watches keep current, written through the API."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from aggregator.kube import Api, Kind, Object
from aggregator.reconcile import withdraw
from aggregator.resources import (
    KINDS,
    BaseModelResource,
    DataVector,
    MergePolicy,
    ModelVersion,
    Part,
    Resource,
    utc_now,
)
from datavector.errors import ApiConflict, DataVectorError, ObjectMissing

log = logging.getLogger(__name__)

AnyResource = TypeVar("AnyResource", bound=Resource)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before the API server is asked again

_FIELDS: dict[frozenset[str], set[str]] = {}
_METADATA = ("name", "creationTimestamp", "uid", "resourceVersion", "generation")


def decode(kind: type[AnyResource], content: Object) -> AnyResource:
    """An object of the API as the project's type, without the rest of its metadata.

    Raises:
        pydantic.ValidationError: it is not what this program understands.
    """
    metadata = {key: content["metadata"][key] for key in _METADATA if key in content["metadata"]}
    resource = kind.parse(
        {
            "apiVersion": content["apiVersion"],
            "metadata": metadata,
            "spec": content["spec"],
            "status": content.get("status", {}),
        }
    )
    _share(resource)
    return resource


def _share(part: Part) -> None:
    """Keeps once what many objects have: names of the fields that were set (half of an object's memory), and texts."""
    fields = part.__pydantic_fields_set__
    object.__setattr__(part, "__pydantic_fields_set__", _FIELDS.setdefault(frozenset(fields), fields))
    values = part.__dict__
    for name, value in values.items():
        if type(value) is str:
            values[name] = sys.intern(value)
        elif isinstance(value, Part):
            _share(value)
        elif type(value) is tuple:
            for each in value:
                if isinstance(each, Part):
                    _share(each)


class Cache:
    """What is known of a namespace's objects. Threads may share it; older news never replaces newer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[type[Resource], dict[str, Resource]] = {kind: {} for kind in KINDS}
        self._ignored: dict[type[Resource], set[str]] = {kind: set() for kind in KINDS}
        self._listed = dict.fromkeys(KINDS, 0)  # resource version of the last list
        self._newest: dict[type[Resource], dict[str, int]] = {kind: {} for kind in KINDS}  # since then; gone ones, too

    def all(self, kind: type[AnyResource]) -> list[AnyResource]:
        with self._lock:
            return list(self._objects[kind].values())  # type: ignore[arg-type]

    def get(self, kind: type[AnyResource], name: str) -> AnyResource | None:
        with self._lock:
            return self._objects[kind].get(name)  # type: ignore[return-value]

    def size(self, kind: type[Resource]) -> int:
        """How many objects there are, those that this program does not understand included."""
        with self._lock:
            return len(self._objects[kind].keys() | self._ignored[kind])

    def observe(self, kind: type[Resource], content: Object, *, gone: bool = False) -> bool:
        """Takes note of an object's newest state, from a watch or from the answer to a request.

        Returns:
            Whether that is news.
        """
        name, version = content["metadata"]["name"], int(content["metadata"]["resourceVersion"])
        with self._lock:
            if version <= max(self._listed[kind], self._newest[kind].get(name, 0)):
                return False
            resource = None if gone else _decoded(kind, content)
            self._newest[kind][name] = version
            self._ignored[kind].discard(name)
            if resource is not None:
                self._objects[kind][name] = resource
            elif gone:
                self._objects[kind].pop(name, None)
            else:
                self._ignored[kind].add(name)
        return True

    def forget(self, kind: type[Resource], name: str) -> None:
        with self._lock:
            self._objects[kind].pop(name, None)
            self._ignored[kind].discard(name)

    def complete(self) -> bool:
        """Whether this program understands every object."""
        with self._lock:
            return not any(self._ignored.values())

    def load(self, api: Api, kind: type[Resource]) -> str:
        """Replaces what is known of a kind by what the API server has, but for what was observed since.

        Returns:
            The resource version from which a watch goes on.
        """
        found: dict[str, Resource] = {}
        ignored: set[str] = set()

        def take(content: Object) -> None:
            if (resource := _decoded(kind, content)) is not None:
                found[resource.name] = resource
            else:
                ignored.add(content["metadata"]["name"])

        resource_version = api.list(Kind.of(kind), take)
        listed = int(resource_version)
        with self._lock:
            newest = {name: version for name, version in self._newest[kind].items() if version > listed}
            since = {name: resource for name, resource in self._objects[kind].items() if name in newest}
            self._objects[kind] = {name: found[name] for name in found if name not in newest} | since
            self._ignored[kind] = (ignored - newest.keys()) | (self._ignored[kind] & newest.keys())
            self._listed[kind], self._newest[kind] = listed, newest
        return resource_version


def _decoded(kind: type[AnyResource], content: Object) -> AnyResource | None:
    """The object, or None (and a line in the log) where this program does not understand it."""
    try:
        return decode(kind, content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        log.error(
            "%s %s is left alone: %s: %s; it may have been made by a newer version of this program",
            kind.kind_name, content["metadata"]["name"], where, first["msg"],
        )  # fmt: skip
        return None


class ClusterRegistry:
    """The registry of the operator: reads come from the cache, every write is in the API when it returns.

    Attributes:
        cache: kept current by whoever watches; every answer to a write goes into it at once.
    """

    def __init__(self, api: Api, cache: Cache) -> None:
        self._api = api
        self.cache = cache

    def policies(self) -> list[MergePolicy]:
        return self.cache.all(MergePolicy)

    def vectors(self) -> list[DataVector]:
        return self.cache.all(DataVector)

    def versions(self) -> list[ModelVersion]:
        return self.cache.all(ModelVersion)

    def base_models(self) -> list[BaseModelResource]:
        return self.cache.all(BaseModelResource)

    def base_reference(self, reference: str) -> str:
        base = self.cache.get(BaseModelResource, reference)
        return base.spec.artifact_digest if base else reference

    def complete(self) -> bool:
        return self.cache.complete()

    def add_vector(self, vector: DataVector) -> DataVector:
        return self._add(vector)

    def add_version(self, version: ModelVersion) -> ModelVersion:
        added = self._add(version)
        if not added.status.conditions:
            self.save(added.with_phase(added.status.phase, now=utc_now()))
        return added

    def save(self, *changed: Resource) -> None:
        """Writes the objects' status, each only if it is still as it was when that was planned.

        Raises:
            ApiConflict: one is not; the objects before it are written.
        """
        for resource in changed:
            kind, name = type(resource), resource.name
            status: dict[str, Any] = resource.model_dump(mode="json", by_alias=True, include={"status"})
            metadata = {"resourceVersion": resource.metadata.resource_version}
            try:
                answer = self._api.patch(Kind.of(kind), name, {"metadata": metadata, **status}, part="status")
            except ApiConflict:
                self._read_again(kind, name)
                raise
            except ObjectMissing:
                self.cache.forget(kind, name)
                raise
            self.cache.observe(kind, answer)

    def withdraw(
        self, hospital: str, base_digest: str | None, arriving: Collection[DataVector] = ()
    ) -> tuple[list[DataVector], list[ModelVersion]]:
        vectors = [*self.vectors(), *(vector for vector in arriving if not self.cache.get(DataVector, vector.name))]
        taken_back, revoked = withdraw(vectors, self.versions(), hospital, base_digest, utc_now())
        for vector in taken_back:
            self.withdraw_vector(vector)
        self.save(*(version for version in revoked if self.cache.get(ModelVersion, version.name) != version))
        return taken_back, revoked

    def withdraw_vector(self, vector: DataVector) -> None:
        """Makes sure that a vector is there, and withdrawn."""
        added = self._add(vector)
        if added.granted:
            spec = {"spec": {"consent": "Withdrawn"}}
            self.cache.observe(DataVector, self._api.patch(Kind.of(DataVector), vector.name, spec))

    def _add(self, resource: AnyResource) -> AnyResource:
        kind = type(resource)
        content = resource.dump()
        content["metadata"] = {"name": resource.name}
        content.pop("status", None)  # a subresource of its own
        try:
            answer = self._api.create(Kind.of(kind), content)
        except ApiConflict:
            answer = self._api.get(Kind.of(kind), resource.name)
        self.cache.observe(kind, answer)
        return decode(kind, answer)

    def _read_again(self, kind: type[Resource], name: str) -> None:
        try:
            self.cache.observe(kind, self._api.get(Kind.of(kind), name))
        except ObjectMissing:
            self.cache.forget(kind, name)


class Feed:
    """Keeps a cache current by watching the API, with a thread for each kind; an outage is waited out.

    After an outage everything is listed again, so nothing that was deleted meanwhile stays.
    """

    def __init__(self, api: Api, cache: Cache, kinds: Iterable[type[Resource]], changed: Callable[[], None]) -> None:
        self._api = api
        self._cache = cache
        self._changed = changed
        self._stopping = threading.Event()
        self._loaded = {kind: threading.Event() for kind in kinds}

    def start(self) -> None:
        for kind in self._loaded:
            threading.Thread(target=self._follow, args=(kind,), name=f"watch {kind.plural}", daemon=True).start()

    def wait_until_loaded(self, seconds: float) -> bool:
        """Whether every kind has been listed once, after waiting `seconds` for each at most."""
        return all(event.wait(seconds) for event in self._loaded.values())

    @property
    def missing(self) -> list[str]:
        """The kinds that have not been listed yet, by their plural names."""
        return [kind.plural for kind, event in self._loaded.items() if not event.is_set()]

    def stop(self) -> None:
        self._stopping.set()

    def _follow(self, kind: type[Resource]) -> None:
        follow(kind.plural, partial(self._load, kind), partial(self._watch, kind), self._stopping)

    def _load(self, kind: type[Resource]) -> str:
        resource_version = self._cache.load(self._api, kind)
        self._loaded[kind].set()
        self._changed()
        return resource_version

    def _watch(self, kind: type[Resource], resource_version: str) -> str:
        for event, content in self._api.watch(Kind.of(kind), resource_version):
            self._cache.observe(kind, content, gone=event == "DELETED")
            resource_version = content["metadata"]["resourceVersion"]
            self._changed()
        return resource_version


def follow(what: str, load: Callable[[], str], watch: Callable[[str], str], stopping: threading.Event) -> None:
    """Lists something and watches it until told to stop; an outage is waited out, and all is listed again after it.

    Args:
        load: lists; returns the resource version from which a watch goes on.
        watch: takes that; returns the one from which the next goes on.
    """
    pause, said = FIRST_PAUSE, set[str]()
    while not stopping.is_set():
        try:
            resource_version = load()
            if said:
                log.info("%s can be read again", what)
            pause, said = FIRST_PAUSE, set()
            with contextlib.suppress(ObjectMissing):  # the version is too old, or the kind is gone: list again
                while not stopping.is_set():
                    resource_version = watch(resource_version)
        except Exception as error:  # a thread that ended would leave what is known as it is for ever
            said = {complain(error, said)}
        stopping.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def complain(error: Exception, said: Collection[str]) -> str:
    """Logs an error, unless that has been said.

    Returns:
        Its text.
    """
    if str(error) not in said:
        log.warning("%s", error, exc_info=None if isinstance(error, DataVectorError) else error)
    return str(error)
