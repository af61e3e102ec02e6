"""The receiver: the one service that agents dial, over mutual TLS 1.3. It never imports torch.

It answers who is who, hands out base models, tasks and releases, takes vectors and calibration moments, and takes
vectors back. What follows from that is decided elsewhere: it only calls `wake`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from aggregator.calibration import Calibrations, Offer, batchnorm_channels
from aggregator.deny_list import DenyList
from aggregator.evaluation import TASK, OpenEvaluation, OpenEvaluations
from aggregator.gate import Behaviour, Call, Gate
from aggregator.metrics import Metrics
from aggregator.reconcile import newest_ready
from aggregator.registry import Registry
from aggregator.resources import MergePolicy, ModelVersion, Phase, last_sequence
from aggregator.server_keys import ServerKeys
from aggregator.settings import Limits, ReceiverSettings
from aggregator.statistics import StatisticsUploads
from aggregator.store import Store, Visit, find_bases
from aggregator.uploads import Arrival, Uploads
from datavector.errors import BaseModelError, NotFound, NotReady, ProtocolError, UsageError
from datavector.files import sha256_file
from datavector.merge.batchnorm import Moments
from datavector.model import DIGEST, FILES, BaseModel
from datavector.wire.chunks import CHUNK, MAX_MESSAGE, read_request
from datavector.wire.counts import from_counts_message
from datavector.wire.features import FeatureReader
from datavector.wire.moments import from_message, to_message
from datavector.wire.v1 import exchange_pb2
from datavector.wire.v1.exchange_pb2 import (
    BeginUploadReply,
    BeginVisitRequest,
    Chunk,
    DescribeReleaseReply,
    DescribeReleaseRequest,
    DescribeReply,
    DescribeRequest,
    EvaluateReply,
    EvaluateRequest,
    FetchRequest,
    FileInfo,
    ListTasksReply,
    ListTasksRequest,
    PolicyInfo,
    StatisticsInfo,
    Task,
    TaskKind,
    UploadOpen,
    UploadReply,
    UploadRequest,
    VectorInfo,
    VisitReply,
    WithdrawReply,
    WithdrawRequest,
)

log = logging.getLogger(__name__)


SERVICE = exchange_pb2.DESCRIPTOR.services_by_name["Exchange"]


class Receiver:
    """Serves the Exchange service.

    All state is touched in the event loop's thread only, so a step without `await` is atomic.

    Args:
        wake: called after every commit, withdrawal, finished visit and meeting.
        deny_lists: beside the file of the settings.

    Attributes:
        port: the port, once started.
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        settings: ReceiverSettings,
        wake: Callable[[], None],
        metrics: Metrics | None = None,
        deny_lists: Iterable[DenyList] = (),
    ) -> None:
        self.store = store
        self.registry = registry
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.port = 0
        self._wake = wake
        self._gate = Gate(settings.tls, settings.limits, self.metrics, deny_lists)
        self._bases: dict[str, BaseModel] = {}
        limits = settings.limits
        self._uploads = Uploads(
            store,
            registry,
            self.metrics,
            wake,
            max_open=limits.uploads_per_hospital,
            max_kept=limits.vectors_per_hospital,
        )
        self._calibrations = Calibrations(
            store,
            registry,
            self.metrics,
            wake,
            grace_seconds=limits.meeting_grace_seconds,
            poll_seconds=limits.poll_seconds,
        )
        self._evaluations = OpenEvaluations(store, registry, wake)
        self._statistics = StatisticsUploads(store, registry, self.metrics, wake)
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._watching: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Begins to listen.

        Returns:
            address:port.

        Raises:
            CertificateError: a certificate file cannot be used.
            UsageError: the address cannot be listened on.
        """
        tls, listen = self.settings.tls, self.settings.listen
        keys = ServerKeys(tls)
        self.metrics.certificate_expiry.set_function(keys.expiry)
        self._bases = {base.digest: base for base in await asyncio.to_thread(self.store.bases)}
        limits = self.settings.limits
        self._server = grpc.aio.server(options=_options(limits), maximum_concurrent_rpcs=limits.calls)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            self.port = self._server.add_secure_port(listen, keys.credentials())
        except RuntimeError as error:
            raise UsageError(
                f"{listen} cannot be listened on", remedy="give address:port, such as 0.0.0.0:8443, with a free port"
            ) from error
        await self._server.start()
        self._watching = [
            asyncio.create_task(keys.watch(), name="watch the certificate"),
            asyncio.create_task(self._gate.watch(), name="end the calls of those who are denied"),
        ]
        for name in ("", SERVICE.full_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return f"{listen.rpartition(':')[0]}:{self.port}"

    async def stop(self, grace: float | None = 5) -> None:
        """Takes no new calls, gives running ones `grace` seconds, and finishes commits."""
        for task in self._watching:
            task.cancel()
        await self._health.enter_graceful_shutdown()
        if self._server:
            await self._server.stop(grace)
        await self._uploads.finish_commits()

    def _handlers(self) -> grpc.GenericRpcHandler:
        """Every method of the service with its behaviour behind the gate."""
        behaviours: dict[str, Behaviour] = {
            "Describe": self._describe,
            "Fetch": self._fetch,
            "BeginUpload": self._begin_upload,
            "Upload": self._upload,
            "Withdraw": self._withdraw,
            "ListTasks": self._list_tasks,
            "BeginVisit": self._begin_visit,
            "CompleteVisit": self._complete_visit,
            "Meet": self._meet,
            "BeginStatistics": self._begin_statistics,
            "SendStatistics": self._send_statistics,
            "Evaluate": self._evaluate,
            "DescribeRelease": self._describe_release,
        }
        return grpc.method_handlers_generic_handler(
            SERVICE.full_name,
            {name: _handler(SERVICE.methods_by_name[name], self._gate(name, run)) for name, run in behaviours.items()},
        )

    # --- Base models, releases, files

    async def _describe(self, _: DescribeRequest, call: Call) -> DescribeReply:
        policies = []
        for policy in self.registry.policies():
            base = await self._base_of(policy)
            ready = self._ready(policy.name)
            policies.append(
                PolicyInfo(
                    name=policy.name,
                    base_digest=base.digest if base else "",
                    base_files=await _infos({name: base.path / name for name in FILES}) if base else (),
                    waiting_for=policy.status.waiting_for,
                    ready_version=ready.name if ready else "",
                    last_sequence=last_sequence(self.registry.vectors(), call.hospital, base.digest) if base else 0,
                )
            )
        return DescribeReply(hospital=call.hospital, policies=policies)

    async def _describe_release(self, request: DescribeReleaseRequest, _: Call) -> DescribeReleaseReply:
        policy = request.policy or self._only_policy()
        version = self._ready(policy)
        if version is None:
            sentences = {each.name: each.status.waiting_for for each in self.registry.policies()}
            waiting_for = sentences.get(policy, "")
            raise NotReady(
                f"policy {policy!r} has no Ready version" + (f" ({waiting_for})" if waiting_for else ""),
                remedy="try again later",
            )
        try:
            files = await _infos(self._release_files(version.name))
        except FileNotFoundError:
            raise NotReady(f"{version.name!r} was revoked just now", remedy="try again") from None
        return DescribeReleaseReply(version=version.name, files=files)

    async def _fetch(self, request: FetchRequest, call: Call) -> None:
        path = await self._source(request, call.hospital)
        size = path.stat().st_size
        if request.offset > size:
            raise ProtocolError(
                f"{request.file} has {size} bytes, none at {request.offset}", remedy="fetch it from its start"
            )
        with path.open("rb", buffering=0) as file:
            file.seek(request.offset)
            while block := await asyncio.to_thread(file.read, CHUNK):
                await call.write(Chunk(data=block))
                self.metrics.fetched_bytes.inc(len(block))

    async def _source(self, request: FetchRequest, hospital: str) -> Path:
        """The file that a request names; only names that this store has are ever made into paths."""
        match request.WhichOneof("source"):
            case "base_digest":
                base = await self._base(request.base_digest)
                files = {name: base.path / name for name in FILES}
            case "task_id" if request.task_id.endswith(f".{TASK}"):
                files = self._evaluated_files(self._evaluations.find(hospital, request.task_id))
            case "task_id":
                files = self._merged_files(self._calibrations.offer(hospital, request.task_id))
            case "release":
                files = self._release_files(request.release)
            case _:
                files = {}
        path = files.get(request.file)
        if path is None or not path.is_file():
            raise NotFound(
                f"there is no file {request.file!r} in what was asked for", remedy="fetch a file of its list"
            )
        return path

    def _release_files(self, name: str) -> dict[str, Path]:
        version = next((version for version in self.registry.versions() if version.name == name), None)
        if version is None or version.status.phase is not Phase.READY:
            raise NotReady(f"{name!r} is no Ready version", remedy="ask for the newest: datavector release fetch")
        folder = self.store.release(name)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}

    def _ready(self, policy: str) -> ModelVersion | None:
        """The newest Ready version of a policy."""
        return newest_ready(version for version in self.registry.versions() if version.spec.policy_ref == policy)

    def _only_policy(self) -> str:
        names = sorted(policy.name for policy in self.registry.policies())
        if len(names) != 1:
            raise NotFound(f"there are {len(names)} policies: {', '.join(names)}", remedy="name one: --policy NAME")
        return names[0]

    # --- Vectors

    async def _begin_upload(self, info: VectorInfo, call: Call) -> BeginUploadReply:
        return await self._uploads.begin(await self._arrival(info, call.hospital))

    async def _upload(self, _: object, call: Call) -> UploadReply:
        opening = await _opening(call)
        arrival = await self._arrival(opening.vector, call.hospital)
        vector = await self._uploads.receive(arrival, opening.offset, call.read)
        return UploadReply(vector=vector.name)

    async def _arrival(self, info: VectorInfo, hospital: str) -> Arrival:
        merged = [base for policy in self.registry.policies() if (base := await self._base_of(policy))]
        base = next((base for base in merged if base.digest == info.base_digest), None)
        if base is None:
            names = ", ".join(f"{base.name} ({base.digest})" for base in merged) or "none yet"
            raise BaseModelError(
                f"no policy merges vectors of the base model {info.base_digest[:80]!r}; merged are those of: {names}",
                remedy="fetch that base and train again",
            )
        return Arrival.parse(hospital, base, info)

    async def _withdraw(self, request: WithdrawRequest, call: Call) -> WithdrawReply:
        vectors, versions = self._uploads.withdraw(call.hospital, request.base_digest or None)
        self._statistics.withdraw(call.hospital, request.base_digest or None)
        self._wake()
        log.info("%s withdrew %d vectors (%.500r)", call.hospital, len(vectors), request.reason)
        return WithdrawReply(
            vectors=[vector.name for vector in vectors], revoked_versions=[version.name for version in versions]
        )

    # --- Tasks

    async def _list_tasks(self, _: ListTasksRequest, call: Call) -> ListTasksReply:
        tasks = []
        for offer in self._calibrations.offers(call.hospital):
            calibration = offer.calibration
            kind = TaskKind.TASK_KIND_RECALIBRATE_MEETING if offer.is_meeting else TaskKind.TASK_KIND_RECALIBRATE_VISIT
            with suppress(FileNotFoundError):  # the version was erased while its weights were read
                tasks.append(
                    Task(
                        id=offer.id,
                        kind=kind,
                        version=calibration.version,
                        base_digest=calibration.base_digest,
                        weights=await _infos(self._merged_files(offer)),
                        round=offer.round,
                        class_floor=calibration.class_floor,
                    )
                )
        for evaluation in self._evaluations.offers(call.hospital):
            with suppress(FileNotFoundError):
                tasks.append(
                    Task(
                        id=evaluation.id,
                        kind=TaskKind.TASK_KIND_EVALUATE,
                        version=evaluation.version,
                        base_digest=evaluation.base_digest,
                        weights=await _infos(self._evaluated_files(evaluation)),
                    )
                )
        for wanted in self._statistics.wanted(call.hospital, await self._asked_statistics()):
            tasks.append(
                Task(
                    id=wanted.id,
                    kind=TaskKind.TASK_KIND_STATISTICS,
                    base_digest=wanted.base_digest,
                    statistics=wanted.kind,
                    vector_sha256=wanted.vector_sha256,
                )
            )
        return ListTasksReply(tasks=tasks, poll_seconds=max(round(self.settings.limits.poll_seconds), 1))

    def _merged_files(self, offer: Offer) -> dict[str, Path]:
        calibration = offer.calibration
        return _by_name(self.store.merged(calibration.version, body) for body in calibration.bodies)

    def _evaluated_files(self, evaluation: OpenEvaluation) -> dict[str, Path]:
        return _by_name(self.store.restored(evaluation.version, model) for model in evaluation.models)

    async def _evaluate(self, request: EvaluateRequest, call: Call) -> EvaluateReply:
        evaluation = self._evaluations.find(call.hospital, request.task_id)
        base = await self._base(evaluation.base_digest)
        counts = {message.name: from_counts_message(message, len(base.classes)) for message in request.models}
        return EvaluateReply(waiting_for=self._evaluations.complete(call.hospital, evaluation, counts))

    async def _begin_visit(self, request: BeginVisitRequest, call: Call) -> None:
        for layer, moments in self._calibrations.pooled(call.hospital, request.task_id).items():
            await call.write(to_message(layer, moments))

    async def _complete_visit(self, _: object, call: Call) -> VisitReply:
        opened = _part(await call.read(), "open")
        offer = self._calibrations.visit(call.hospital, opened.task_id)
        base = await self._base(offer.calibration.base_digest)
        moments: dict[str, Moments] = {}
        channels = batchnorm_channels(base, offer.calibration.bodies)
        features, count = FeatureReader(dict.fromkeys(offer.calibration.bodies), len(base.classes), base.features), 0
        while (message := await call.read()) and message.WhichOneof("part") in ("layer", "features"):
            count += 1
            if message.WhichOneof("part") == "features":
                features.feed(message.features)
            elif message.layer.layer in moments:
                raise ProtocolError(f"layer {message.layer.layer!r} came twice", remedy="visit again")
            else:
                moments[message.layer.layer] = from_message(message.layer, channels)
        final = _part(message, "final")
        if final.layers != count:
            raise ProtocolError(f"{count} layers came, {final.layers} were sent", remedy="visit again")
        visit = Visit(call.hospital, final.images, offer.round, moments, features.finish(final.images))
        return VisitReply(waiting_for=self._calibrations.complete(call.hospital, offer, base, visit))

    async def _meet(self, _: object, call: Call) -> None:
        join = _part(await call.read(), "join")
        offer = self._calibrations.offer(call.hospital, join.task_id)
        if not offer.is_meeting:
            raise ProtocolError(f"{join.task_id!r} is no meeting", remedy="ask for tasks again")
        base = await self._base(offer.calibration.base_digest)
        await self._calibrations.meet(call.hospital, offer, base, join, call.read, call.write)

    async def _begin_statistics(self, info: StatisticsInfo, call: Call) -> BeginUploadReply:
        wanted = self._statistics.find(call.hospital, info.task_id, await self._asked_statistics())
        offset, committed = self._statistics.begin(wanted, await self._base(wanted.base_digest), info)
        return BeginUploadReply(offset=offset, committed=committed, vector=wanted.name)

    async def _send_statistics(self, _: object, call: Call) -> UploadReply:
        opening = await _opening(call)
        info = opening.statistics
        wanted = self._statistics.find(call.hospital, info.task_id, await self._asked_statistics())
        base = await self._base(wanted.base_digest)
        await self._statistics.receive(wanted, base, info, opening.offset, call.read)
        return UploadReply(vector=wanted.name)

    async def _asked_statistics(self) -> set[tuple[str, str]]:
        asked = set()
        for policy in self.registry.policies():
            if (kinds := policy.spec.method.statistics) and (base := await self._base_of(policy)):
                asked |= {(base.digest, kind) for kind in kinds}
        return asked

    # --- Base models

    async def _base(self, digest: str) -> BaseModel:
        """A base model of the store by digest. Verifying one takes a while, so those seen are remembered.

        Raises:
            NotFound: the store does not have it.
        """
        if digest not in self._bases and DIGEST.fullmatch(digest) and self.store.base_file(digest, FILES[0]):
            self._bases[digest] = await asyncio.to_thread(self.store.base, digest)
        if digest not in self._bases:
            raise NotFound(f"there is no base model {digest!r} here", remedy="ask which ones there are: Describe")
        return self._bases[digest]

    async def _base_of(self, policy: MergePolicy) -> BaseModel | None:
        reference = self.registry.base_reference(policy.spec.base_model_ref)
        match find_bases(self._bases.values(), reference):
            case [known]:
                return known
        try:
            base = await asyncio.to_thread(self.store.base, reference)
        except BaseModelError:
            return None
        return self._bases.setdefault(base.digest, base)


def _handler(method: MethodDescriptor, behaviour: Callable[..., Any]) -> grpc.RpcMethodHandler:
    """gRPC's description of a method. Uploads come as bytes: see datavector.wire.chunks."""
    kinds = {False: "unary", True: "stream"}
    make = getattr(grpc, f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}_rpc_method_handler")
    request = getattr(exchange_pb2, method.input_type.name)
    handler: grpc.RpcMethodHandler = make(
        behaviour,
        request_deserializer=None if request is UploadRequest else request.FromString,
        response_serializer=getattr(exchange_pb2, method.output_type.name).SerializeToString,
    )
    return handler


def _options(limits: Limits) -> list[tuple[str, int]]:
    age = int(limits.max_connection_age_seconds * 1000)
    return [
        ("grpc.max_concurrent_streams", limits.calls_per_hospital),
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
        ("grpc.max_connection_age_ms", age),
        ("grpc.max_connection_age_grace_ms", age),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        # A fixed window instead of one that grows with the link: what is in flight is lost when a link is cut, and is
        # in memory. 4 MiB carry 300 Mbit/s over a round trip of 100 ms.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4 << 20),
    ]


async def _opening(call: Call) -> UploadOpen:
    """The first message of an upload."""
    first = read_request(await call.read() or b"")
    if isinstance(first, memoryview) or first.WhichOneof("part") != "open":
        raise ProtocolError("an upload did not begin with its announcement", remedy="send open, chunks, final")
    return first.open


def _part(message: Any, name: str) -> Any:
    """The demanded part of a stream's message."""
    found = message.WhichOneof("part") if message is not None else "the stream's end"
    if found != name:
        raise ProtocolError(f"{name!r} was due, but {found!r} came", remedy="use a matching version")
    return getattr(message, name)


def _by_name(paths: Iterable[Path]) -> dict[str, Path]:
    return {path.name: path for path in paths}


async def _infos(files: dict[str, Path]) -> list[FileInfo]:
    """Name, size and digest of files.

    Raises:
        FileNotFoundError: one was erased meanwhile.
    """
    infos = []
    for name, path in files.items():
        status = path.stat()
        sha256 = await asyncio.to_thread(_sha256, path, status.st_size, status.st_mtime_ns, status.st_ino)
        infos.append(FileInfo(name=name, size=status.st_size, sha256=sha256))
    return infos


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, mtime_ns: int, inode: int) -> str:  # noqa: ARG001  they tell when it has changed
    return sha256_file(path)
