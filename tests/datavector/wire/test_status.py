"""Errors that cross the wire."""

from __future__ import annotations

import grpc
import pytest

from datavector import errors
from datavector.errors import CertificateError, DataVectorError, NotFinite, Refused, Unreachable, WrongHospital
from datavector.wire.status import read_error, status_code, trailers

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DataVectorError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_itself(kind):
    sent = kind.__new__(kind)
    DataVectorError.__init__(sent, "ein Grund: café", remedy="do this")
    arrived = read_error(status_code(sent), str(sent), trailers(sent))
    assert type(arrived) is kind
    assert (arrived.message, arrived.remedy) == ("ein Grund: café", "do this")


def test_an_error_with_arguments_of_its_own_arrives_as_itself():
    sent = WrongHospital(certificate="north", claimed="south")
    arrived = read_error(status_code(sent), "", trailers(sent))
    assert str(arrived) == str(sent)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unreachable),
        (grpc.StatusCode.CANCELLED, Unreachable),
        (grpc.StatusCode.UNKNOWN, Unreachable),
        (grpc.StatusCode.INTERNAL, Unreachable),
        (grpc.StatusCode.UNAUTHENTICATED, CertificateError),
        (grpc.StatusCode.UNIMPLEMENTED, Refused),
    ],
)
def test_an_error_of_something_in_between_is_judged_by_its_code(code, kind):
    assert type(read_error(code, "no route", None)) is kind


def test_an_unknown_class_is_judged_by_its_code():
    newer = trailers(NotFinite("m", remedy="r"))
    renamed = (("datavector-error", "NotInventedYet"), *newer[1:])
    assert isinstance(read_error(grpc.StatusCode.UNAVAILABLE, "x", renamed), Unreachable)
