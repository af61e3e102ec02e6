"""The outbox where things happen in an unlucky order, against an API that lets the test come in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aggregator.cluster import Cache
from aggregator.kube import Kind
from aggregator.outbox import OutboxRegistry
from aggregator.resources import DataVector, ModelVersion, Phase
from datavector.errors import ApiConflict, ApiRejected, ApiUnavailable
from tests.aggregator.objects import policy, vector, version
from tests.integration.processes import until

Content = dict[str, Any]
NORTH, SOUTH = vector("north"), vector("south")


class MemoryApi:
    """Objects in memory.

    Attributes:
        fault: raised by every call, if set.
        on_create: called after an object was created, before the answer arrives.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Content] = {}
        self.fault: Callable[[str], Exception | None] = lambda name: None
        self.on_create: Callable[[], object] = lambda: None
        self._version = 0

    def create(self, kind: Kind, content: Content) -> Content:
        name = content["metadata"]["name"]
        if error := self.fault(name):
            raise error
        if name in self.objects:
            raise ApiConflict(name, "AlreadyExists")
        answer = self._write(content)
        self.on_create()
        return answer

    def get(self, kind: Kind, name: str) -> Content:
        return self.objects[name]

    def patch(self, kind: Kind, name: str, content: Content) -> Content:
        known = self.objects[name]
        return self._write({**known, "spec": {**known["spec"], **content["spec"]}})

    def consents(self) -> dict[str, str]:
        return {name: content["spec"]["consent"] for name, content in self.objects.items()}

    def _write(self, content: Content) -> Content:
        self._version += 1
        metadata = {**content["metadata"], "resourceVersion": str(self._version)}
        self.objects[metadata["name"]] = {**content, "metadata": metadata}
        return self.objects[metadata["name"]]


@pytest.fixture
def api() -> MemoryApi:
    return MemoryApi()


@pytest.fixture
def open_outbox(api: MemoryApi, tmp_path: Path) -> Iterator[Callable[[], OutboxRegistry]]:
    """Opens the same outbox, as a receiver does at its start; nothing is sent before `start`."""
    with ExitStack() as stack:

        def open_it() -> OutboxRegistry:
            registry = OutboxRegistry(api, Cache(), tmp_path / "outbox")  # type: ignore[arg-type]
            stack.callback(registry.stop)
            return registry

        yield open_it


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "outbox").iterdir()}


def sent(registry: OutboxRegistry) -> None:
    until(lambda: not registry.waiting(), "an empty outbox")


def consents(registry: OutboxRegistry) -> dict[str, str]:
    return {each.name: each.spec.consent.value for each in registry.vectors()}


def test_a_withdrawal_while_the_vector_is_created_is_not_lost(api, open_outbox, tmp_path):
    registry = open_outbox()

    def withdraw_now() -> None:
        registry.withdraw("north", None)
        assert consents(registry) == {"north-1": "Withdrawn"}

    api.on_create = withdraw_now
    registry.add_vector(NORTH)
    registry.start()
    sent(registry)
    assert api.consents() == consents(registry) == {"north-1": "Withdrawn"}
    assert files(tmp_path) == set()


def test_a_vector_that_never_arrived_is_on_record_as_withdrawn(api, open_outbox):
    registry = open_outbox()
    taken_back, _ = registry.withdraw("north", None, [NORTH])
    assert [each.name for each in taken_back] == ["north-1"]
    assert not registry.add_vector(NORTH).granted
    registry.start()
    sent(registry)
    assert api.consents() == {"north-1": "Withdrawn"}


def test_a_withdrawal_of_one_base_leaves_the_others(open_outbox):
    registry = open_outbox()
    other = vector("north", 2, base="sha256:" + "c" * 64)
    registry.add_vector(NORTH)
    registry.add_vector(other)
    registry.withdraw("north", NORTH.spec.base_model_ref)
    assert consents(registry) == {"north-1": "Withdrawn", "north-2": "Granted"}


def test_what_waits_is_there_after_opening_again_and_revokes_at_once(api, open_outbox):
    first = open_outbox()
    first.add_vector(NORTH)
    first.add_vector(SOUTH)
    first.withdraw("north", None)
    again = open_outbox()
    ready = version(policy(), NORTH, SOUTH, phase=Phase.READY)
    content = ready.dump()
    again.cache.observe(ModelVersion, {**content, "metadata": {**content["metadata"], "resourceVersion": "1"}})
    assert consents(again) == {"north-1": "Withdrawn", "south-1": "Granted"}
    assert [each.status.phase for each in again.versions()] == [Phase.REVOKED]
    assert [each.name for each in again.waiting()] == ["north-1", "south-1"]


def test_a_file_that_came_back_after_a_crash_does_not_grant_what_was_withdrawn(api, open_outbox):
    first = open_outbox()
    first.add_vector(NORTH)
    api.create(Kind.of(DataVector), vector("north", withdrawn=True).dump())
    again = open_outbox()
    again.start()
    sent(again)
    assert api.consents() == consents(again) == {"north-1": "Withdrawn"}


def test_a_refused_vector_stays_and_holds_up_nothing(api, open_outbox, tmp_path, caplog):
    api.fault = lambda name: ApiRejected(name, "no such field") if name == "north-1" else None
    registry = open_outbox()
    registry.add_vector(NORTH)
    registry.add_vector(SOUTH)
    registry.start()
    until(lambda: api.objects, "the other vector")
    until(lambda: len(registry.waiting()) == 1, "one file less")
    registry.add_vector(vector("west"))  # wakes it: the refused one is tried again
    until(lambda: len(api.objects) == 2, "the third vector")
    assert files(tmp_path) == {"north-1.json"}
    assert caplog.text.count("the API server refuses north-1") == 1
    api.fault = lambda name: None
    registry.add_vector(vector("east"))
    sent(registry)
    assert set(api.objects) == {"north-1", "south-1", "west-1", "east-1"}


def test_a_fault_of_the_program_is_logged_and_tried_again(api, open_outbox, caplog):
    faults = [KeyError("spec"), ApiUnavailable("here", "busy")]
    api.fault = lambda name: faults.pop() if faults else None
    registry = open_outbox()
    registry.add_vector(NORTH)
    registry.start()
    sent(registry)
    assert "KeyError" in caplog.text
    assert api.consents() == {"north-1": "Granted"}


def test_nothing_goes_from_the_outbox_after_its_end(api, open_outbox, tmp_path):
    registry = open_outbox()
    api.on_create = registry.stop
    registry.add_vector(NORTH)
    registry.start()
    until(lambda: api.objects and all(each.name != "outbox" for each in threading.enumerate()), "the thread's end")
    assert files(tmp_path) == {"north-1.json"}
