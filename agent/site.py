"""A hospital's place in the exchange: its settings, its connection, its ledger. Nothing here needs torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from agent.client import Client, Credentials, inside
from agent.ledger import REJOIN, WITHDRAWAL, Decision, Ledger, read_ledger
from agent.metrics import Metrics
from agent.proxy import find_proxy
from agent.settings import AgentSettings
from datavector.console import progress, say
from datavector.errors import DataVectorError, Interrupted, TryAgain, UsageError, recreate
from datavector.files import claim_folder, fsync, locked, remove_leftovers
from datavector.model import DIGEST
from datavector.release.checksums import SUMS, compare_sums

LEDGER, VECTOR = "ledger.jsonl", "vector.safetensors"
AGENT = "agent"  # whose a state folder is
WITHDRAW_SECONDS = 300  # a person waits, and may run it again: long enough for an aggregator that is started anew
FETCH_SECONDS = 120  # what arrived is kept, so that giving up costs nothing


@dataclass
class Site:
    """A running agent: its settings, its connection, and a way to stop it."""

    settings: AgentSettings
    client: Client
    metrics: Metrics
    stop: threading.Event = field(default_factory=threading.Event)


def stop_by_signal(exit_code: int) -> None:
    """Makes SIGTERM and SIGINT end the process, until `open_site` makes them end the work at the next safe point.

    The first process of a container would not notice a signal that nobody handles.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), b"stopped before anything was started; start it again to go on\n")
        raise SystemExit(exit_code)  # no Exception: libraries that are being imported would catch it

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


@contextmanager
def open_site(settings: AgentSettings, *, patience_seconds: float | None = None) -> Iterator[Site]:
    """Connects, and makes SIGTERM and SIGINT end the work at the next safe point, with Interrupted.

    Args:
        patience_seconds: how long calls keep trying; None for ever.
    """
    metrics = Metrics()

    def wait(sentence: str) -> None:
        metrics.retries.inc()
        say(f"aggregator {sentence}")  # the setting's name

    client = connect(settings, patience_seconds=patience_seconds, on_waiting=wait)
    metrics.certificate_expiry.set_function(client.expiry)
    site = Site(settings, client, metrics)

    def stop(_number: int, _frame: FrameType | None) -> None:
        if site.stop.is_set():
            os._exit(1)  # everything survives a kill
        os.write(sys.stderr.fileno(), b"stopping at the next safe point; a second signal stops at once\n")
        site.stop.set()
        client.interrupt()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with client:
        yield site


@contextmanager
def only_agent(state: Path) -> Iterator[None]:
    """Makes this the one agent that works in a state folder, and removes what killed ones left half-written.

    Raises:
        TryAgain: another one does. It may be ending: a new Job's Pod can be there before the old one's has gone.
    """
    taken = TryAgain(f"another agent uses the state folder {state}", remedy="stop it, or wait until it has ended")
    with locked(state / "lock", taken):
        remove_leftovers(state)
        yield


def connect(
    settings: AgentSettings, *, patience_seconds: float | None, on_waiting: Callable[[str], None] = say
) -> Client:
    """A connection as the settings and the environment's proxy say; `patience_seconds` is None to try for ever."""
    return Client(
        settings.aggregator,
        Credentials(settings.tls.certificate, settings.tls.key, settings.tls.ca),
        hospital=settings.hospital,
        ledger=Ledger(settings.state / LEDGER),
        on_waiting=on_waiting,
        patience_seconds=patience_seconds,
        proxy=find_proxy(settings.aggregator),
    )


def withdraw(settings: AgentSettings, *, base_digest: str, reason: str) -> None:
    """Takes this hospital's vectors back, and says which models are revoked by that.

    From now on nothing else leaves from this state folder, even while the aggregator cannot be reached.

    Args:
        base_digest: of the base model that is meant; empty for all.
    Raises:
        UsageError: there is no such folder, it is not the agent's, or that is no digest; nothing was decided.
        DataVectorError: the decision stands here, but the aggregator has not confirmed it.
    """
    _decide(settings.state, WITHDRAWAL, base_digest)
    nothing_leaves = f"nothing{f' for {base_digest}' if base_digest else ''} leaves from here any more"
    try:
        with open_site(settings, patience_seconds=WITHDRAW_SECONDS) as site:
            reply = site.client.withdraw(base_digest, reason=reason)
    except DataVectorError as error:
        cure = "" if isinstance(error, Interrupted) else f"{error.remedy}; then "
        raise recreate(
            type(error).__name__,
            f"{error.message}; {nothing_leaves}, but the aggregator has NOT been told yet, or has not confirmed it",
            f"{cure}run `datavector withdraw` again, until it says what was withdrawn",
        ) from error
    say(f"withdrawn: {', '.join(reply.vectors) or 'nothing was there'}")
    say(f"revoked: {', '.join(reply.revoked_versions) or 'no version contained it'}")
    say(f"{nothing_leaves}; to take part again, run `datavector rejoin`")


def rejoin(state: Path, *, base_digest: str) -> None:
    """Lets the agent of a state folder send again after a withdrawal; what was withdrawn stays so.

    Args:
        base_digest: of the base model that is meant; empty for all.
    Raises:
        UsageError: there is no such folder, it is not the agent's, or that is no digest; nothing was decided.
    """
    _decide(state, REJOIN, base_digest)
    say(
        f"this hospital takes part again{f' for {base_digest}' if base_digest else ''}; vectors that were withdrawn "
        "are not taken: train with another seed or images"
    )


def _decide(state: Path, what: Decision, base_digest: str) -> None:
    _demand_state(state)
    if base_digest and not DIGEST.fullmatch(base_digest):
        raise UsageError(
            f"--base {base_digest} is no digest of a base model",
            remedy="give sha256: and 64 digits, as `datavector agent ledger --json` shows; leave --base out for all",
        )
    claim_folder(state, AGENT)
    Ledger(state / LEDGER).decide(what, base_digest)


def fetch_release(settings: AgentSettings, output: Path, verify: Callable[[Path], None]) -> None:
    """Downloads the newest Ready release into the folder `output`, in place of an older one.

    It is gathered beside `output` and takes its place when it is whole and verified; cut off, it goes on from there.

    Args:
        verify: raises what is wrong with a release folder.
    Raises:
        UsageError: the folder holds something else.
        NotReady: there is none.
        Unreachable: nobody has answered for FETCH_SECONDS.
    """
    output = output.resolve()
    _demand_replaceable(output)
    partial, old = output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.old")
    with open_site(settings, patience_seconds=FETCH_SECONDS) as site:
        release = site.client.describe_release(settings.policy or "")
        targets = {inside(partial, file.name): file for file in release.files}
        with progress(f"release {release.version}") as show:
            for target, file in targets.items():
                site.client.fetch(file, target, release=release.version, on_progress=show)
    for path in partial.rglob("*"):
        if path.is_file() and path not in targets:  # of another version, which was cut off
            path.unlink()
    verify(partial)
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    fsync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
    say(f"{output}: {release.version}")


def _demand_replaceable(output: Path) -> None:
    """A folder may be replaced if it is empty, or a release with nothing else in it."""
    if output.is_file():
        strange: Sequence[str] = [output.name]
    elif (output / SUMS).is_file():
        strange = compare_sums(output).extra
    else:
        strange = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())
    if strange:
        raise UsageError(f"{output} holds other files ({strange[0]})", remedy="give an empty folder")


def print_ledger(state: Path, *, as_json: bool) -> None:
    """Prints everything that left, oldest first."""
    _demand_state(state)
    for entry in read_ledger(state / LEDGER):
        if as_json:
            print(json.dumps(vars(entry)))
        else:
            about = " ".join(part for part in (entry.version, entry.base[:19]) if part)
            size = f"{entry.bytes:>12,} bytes" if entry.bytes else f"{'':>18}"
            what = f"{entry.state:<11} {entry.what:<10} {size}  {entry.sha256[:16]:<16}"
            print(f"{entry.time}  {what}  {about} -> {entry.to}")


def _demand_state(state: Path) -> None:
    if not state.is_dir():
        raise UsageError(
            f"the state folder {state.absolute()} is no folder",
            remedy="give the agent's own with --state or --config; if it is lost, make an empty one",
        )
