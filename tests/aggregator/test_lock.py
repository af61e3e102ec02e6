"""One process to a store: a second one is refused, or waits for the first to end."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from aggregator.lock import alone
from datavector.errors import UsageError


def test_a_second_aggregator_is_refused(tmp_path: Path):
    with alone(tmp_path), pytest.raises(UsageError, match="another aggregator uses the store"), alone(tmp_path):
        pass


def test_a_receiver_that_takes_anothers_place_waits_for_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    began = threading.Event()

    def take_its_place() -> None:
        with alone(tmp_path, patient=True):
            began.set()

    with alone(tmp_path):
        second = threading.Thread(target=take_its_place)
        second.start()
        while "waiting for the process to end" not in capsys.readouterr().out:
            assert second.is_alive()
        assert not began.is_set()
    second.join(10)
    assert began.is_set()
