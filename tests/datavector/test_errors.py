"""Every error for people says what is wrong and what to do, and knows its exit code and its status on the wire."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datavector import errors
from datavector.errors import ConfigError, DataVectorError, DiskFull, Refused, UsageError, WrongHospital, recreate

STATUSES = {
    "ABORTED", "FAILED_PRECONDITION", "INTERNAL", "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE",
}  # fmt: skip


def tree(root: type[DataVectorError] = DataVectorError) -> Iterator[type[DataVectorError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)
def test_every_error_is_documented_and_has_a_status_that_grpc_knows(kind):
    assert kind.__doc__
    assert kind.status in STATUSES
    assert kind.exit_code in (0, 1, 2)


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_drawing(kind):
    assert kind.__name__ in errors.__doc__


def test_an_error_reads_as_what_is_wrong_and_what_to_do():
    error = DataVectorError("the cat is out", remedy="call it")
    assert (error.message, error.remedy, str(error)) == ("the cat is out", "call it", "the cat is out; call it")


def test_using_it_wrongly_has_an_exit_code_of_its_own():
    assert (DataVectorError.exit_code, UsageError.exit_code, ConfigError.exit_code) == (1, 2, 2)


def test_a_wrong_hospital_names_both():
    error = WrongHospital(certificate="north", claimed="south")
    assert isinstance(error, Refused)
    assert "'north'" in error.message
    assert "'south'" in error.message


def test_a_full_disk_says_where():
    assert "/data" in DiskFull(Path("/data")).message
    assert "350 MiB" in DiskFull(Path("/data"), needed=350 << 20).message


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)
def test_an_error_that_another_process_told_of_is_the_same_again(kind):
    again = recreate(kind.__name__, "the cat is out", "call it")
    assert (type(again), again.message, again.remedy) == (kind, "the cat is out", "call it")


def test_errors_need_nothing_but_the_standard_library():
    script = "import sys, datavector.errors; print({'grpc', 'numpy', 'torch', 'pydantic'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
