"""A hospital's place in the exchange: its settings, its connection, its ledger. Nothing here needs torch."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from agent.client import Client, Credentials
from agent.ledger import Ledger, read_ledger
from agent.metrics import Metrics
from agent.settings import AgentSettings
from datavector.console import progress, say
from datavector.errors import UsageError
from datavector.monitoring import serve_metrics

LEDGER = "ledger.jsonl"


@dataclass
class Site:
    """A running agent: its settings, its connection, and a way to stop it."""

    settings: AgentSettings
    client: Client
    metrics: Metrics
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def open_site(settings: AgentSettings) -> Iterator[Site]:
    """Connects, and makes SIGTERM and SIGINT end the work at the next safe point, with exit code 0."""
    metrics = Metrics()
    if settings.metrics_port:
        serve_metrics(metrics.registry, settings.metrics_port)

    def wait(sentence: str) -> None:
        metrics.retries.inc()
        say(sentence)

    client = connect(settings, patience_seconds=None, on_waiting=wait)
    site = Site(settings, client, metrics)

    def stop(_number: int, _frame: FrameType | None) -> None:
        site.stop.set()
        client.interrupt()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with client:
        yield site


def connect(
    settings: AgentSettings, *, patience_seconds: float | None, on_waiting: Callable[[str], None] = say
) -> Client:
    """A connection as the settings say; `patience_seconds` is None to keep trying for ever."""
    return Client(
        settings.aggregator,
        Credentials(settings.tls.certificate, settings.tls.key, settings.tls.ca),
        hospital=settings.hospital,
        ledger=Ledger(settings.state / LEDGER),
        on_waiting=on_waiting,
        patience_seconds=patience_seconds,
    )


def withdraw(settings: AgentSettings, *, base_digest: str, reason: str) -> None:
    """Takes this hospital's vectors back, and says which models are revoked by that."""
    with open_site(settings) as site:
        reply = site.client.withdraw(base_digest, reason=reason)
    say(f"withdrawn: {', '.join(reply.vectors) or 'nothing was there'}")
    say(f"revoked: {', '.join(reply.revoked_versions) or 'no version contained it'}")


def fetch_release(settings: AgentSettings, output: Path) -> None:
    """Downloads the newest Ready release into the folder `output`.

    Raises:
        UsageError: the folder holds something else.
        NotReady: there is none.
    """
    with open_site(settings) as site:
        release = site.client.describe_release(settings.policy or "")
        names = {file.name for file in release.files}
        strange = [path for path in output.rglob("*") if path.is_file() and str(path.relative_to(output)) not in names]
        if strange:
            raise UsageError(f"{output} holds other files ({strange[0].name})", remedy="give an empty folder")
        with progress(f"release {release.version}") as show:
            for file in release.files:
                site.client.fetch(file, output / file.name, release=release.version, on_progress=show)
    say(f"{output}: {release.version}")


def print_ledger(state: Path, *, as_json: bool) -> None:
    """Prints everything that left, oldest first."""
    if not state.is_dir():
        raise UsageError(f"{state} is no folder", remedy="give the agent's state folder, or its configuration file")
    for entry in read_ledger(state / LEDGER):
        if as_json:
            print(json.dumps(vars(entry)))
        else:
            about = " ".join(part for part in (entry.version, entry.base[:19]) if part)
            size = f"{entry.bytes:>12,} bytes" if entry.bytes else f"{'':>18}"
            what = f"{entry.state:<11} {entry.what:<10} {size}  {entry.sha256[:16]:<16}"
            print(f"{entry.time}  {what}  {about} -> {entry.to}")
