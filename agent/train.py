"""Fine-tunes the base model on one hospital's images.

One loop, top to bottom. Everything random is drawn from (seed, epoch, step or image), never from what happened before,
so a training that was stopped anywhere, and started again, ends with the same bits as one that was not.
Several GPUs: the same file runs once per GPU under torchrun (`python -m agent.train JOB`).
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from agent.recalibrate import own_alone, recalibrate
from datavector.choice import Counts
from datavector.data.images import ImageSet
from datavector.errors import DataVectorError, Interrupted, NoImages, NotFinite, TrainingFailed, UsageError, recreate
from datavector.files import TEMPORARY, atomic_write, canonical_json, disk_full_at, write_json
from datavector.layout import FloatArray, TensorFile, write_tensors
from datavector.metrics import Confusion, accuracy, balanced_accuracy, confusion_matrix, reliability
from datavector.model import BaseModel
from datavector.networks import build, export_tensors, load_file, preprocess

FORMAT = "datavector-training/1"
CHECKPOINT, BEST, TUNED, RESULT = "checkpoint.pt", "best.safetensors", "tuned.safetensors", "result.json"
# How lines begin by which the first of several processes tells how it goes: an epoch's report, then its end.
EPOCH, DONE, FAILED = "training:epoch", "training:done", "training:failed"
WARM_UP = 0.1  # share of all steps
WORKERS = 4
# Images that a class without any is taken to have: so few that its output is left alone, but its logarithm is finite.
# Pushing absent classes down instead (half an image) costs the sum 8 points under label skew (.758 -> .676).
ABSENT = 1e-9
BATCHNORM_IMAGES = 1024  # most images over which the tuned model's statistics are measured
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class TrainSettings:
    """How to fine-tune.

    Attributes:
        batch_size: images a step, over all processes together.
        learning_rate: of AdamW, at its peak; above 1e-3 the vectors no longer add up.
        weight_decay: of weights; norms and biases have none.
        label_adjust: strength of the logit adjustment by the class frequencies (arXiv 2007.07314); 0 is plain
            cross-entropy.
        workers: processes that prepare images, per training process; they change no result. 0 takes none on a CPU,
            where training itself is the slow part, and up to WORKERS beside a GPU. None where a system cannot fork.
        device: "auto" takes a GPU where there is one.
        processes: 0 takes one for each GPU.
    """

    epochs: int = 16
    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    label_adjust: float = 1.0
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    processes: int = 0


@dataclass(frozen=True)
class EpochReport:
    """How an epoch went. Validation values are NaN where there are no validation images."""

    epoch: int  # 1 for the first
    epochs: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    val_balanced_accuracy: float
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        weights: file in the base model's layout, with exact BatchNorm statistics over the training images.
        epoch: the one that was kept, 1 for the first.
        images: training images.
        batchnorm_images: how many of them the statistics are from.
        validation: confusion matrix of the kept weights; all 0 without validation images.
        history: every epoch.
    """

    weights: Path
    epoch: int
    images: int
    batchnorm_images: int
    validation: Confusion
    history: tuple[EpochReport, ...]

    def tensors(self, base: BaseModel) -> dict[str, FloatArray]:
        """The tuned weights by name."""
        with TensorFile(self.weights, base.layout) as file:
            return {spec.name: file.read(spec.name) for spec in base.layout.tensors}


def train(
    base: BaseModel,
    train_set: ImageSet,
    val_set: ImageSet,
    settings: TrainSettings,
    folder: Path,
    *,
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Fine-tunes `base`, or goes on with what `folder` holds of the very same training, or returns its result.

    Args:
        val_set: tells whether an earlier epoch than the last is kept (`clearly_worse`); may be empty.
        folder: for checkpoints and the tuned weights.
        on_epoch: called after each epoch's checkpoint.
        stop: once it is set, training saves where it is and raises Interrupted.
    Raises:
        NoImages: fewer than two training images.
        UsageError: a GPU is demanded and there is none.
        NotFinite: training diverged.
        Interrupted: `stop` was set; the same call goes on from there.
        DiskFull: no space is left.
    """
    if len(train_set) < 2:
        raise NoImages(f"{len(train_set)} training images", remedy="give at least two; some hundred make sense")
    device = choose_device(settings.device)
    processes = settings.processes or max(1, torch.cuda.device_count() if device.type == "cuda" else 1)
    processes = min(processes, len(train_set) // 2)
    settings = replace(settings, processes=processes)
    job = Job(base, train_set.images, train_set.labels, val_set.images, val_set.labels, settings, folder)
    key = job.key(_precision(device))
    if (result := _finished(folder, key)) is not None:
        return result
    stop = stop or threading.Event()
    fitted = _fit_with_torchrun(job, key, on_epoch, stop) if processes > 1 else fit(job, key, device, on_epoch, stop)
    return _finish(job, key, fitted, train_set, val_set, device)


@dataclass(frozen=True)
class Job:
    """All that a training depends on."""

    base: BaseModel
    images: torch.Tensor
    labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    settings: TrainSettings
    folder: Path

    def key(self, precision: torch.dtype) -> str:
        """A digest of everything that changes the result: a checkpoint of another job is not gone on with.

        It reads all images, so a run asks for it once.

        Args:
            precision: what the device computes in; the state of float16's scaler is in a checkpoint.
        """
        relevant = {k: v for k, v in asdict(self.settings).items() if k not in ("workers", "device")}
        shapes = [self.images.shape, self.val_images.shape]
        digest = hashlib.sha256(canonical_json([FORMAT, self.base.digest, relevant, str(precision), *shapes]))
        for tensor in (self.labels, self.val_labels, self.images, self.val_images):
            for part in torch.split(tensor, 256):
                digest.update(np.ascontiguousarray(part.numpy()).data)
        return digest.hexdigest()


# --- The loop -------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a training is: `epoch` epochs and `step` steps of the next one are done."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0  # summed over the current epoch's steps
    best: int = 0
    best_score: float = 0.0  # highest balanced accuracy on the validation images
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    job: Job,
    key: str,
    device: torch.device,
    on_epoch: Callable[[EpochReport], None],
    stop: threading.Event,
    rank: int = 0,
    world: int = 1,
) -> Progress:
    """Trains until the last epoch; leaves the best weights in BEST and the whole state in CHECKPOINT, under `key`."""
    settings = job.settings
    _prepare(device)
    model = build(job.base).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster, on CPUs too
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    precision = _precision(device)
    scaler = GradScaler(device.type, enabled=precision is torch.float16)
    log_prior = class_log_prior(job.labels, len(job.base.classes)).to(device)

    progress = Progress()
    if (saved := _load_checkpoint(job.folder, key)) is not None:
        model.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        progress = Progress(**saved["progress"])

    def save(*, best: bool) -> None:
        if best:
            _write_weights(job.folder / BEST, job.base, model)
        parts = {"network": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        with atomic_write(job.folder / CHECKPOINT, mode=0o600) as file:
            _save({"format": FORMAT, "key": key, "progress": asdict(progress), **parts}, file)

    samples = Augmented(job.images, job.labels, settings.seed)
    steps, workers = len(epoch_batches(len(job.labels), settings, 0)), _workers(settings, device)
    while progress.epoch < settings.epochs:
        epoch, started, first = progress.epoch, time.monotonic(), progress.step
        batches = epoch_batches(len(job.labels), settings, epoch)[first:]
        loader = DataLoader(
            samples.at(epoch),
            batch_sampler=[batch[rank::world] for batch in batches],
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # images that are mapped into memory cannot be sent
            pin_memory=device.type == "cuda",
        )
        total_loss = torch.tensor(progress.loss, dtype=torch.float64, device=device)
        model.train()
        for images, labels in loader:
            if _anywhere(stop.is_set(), device, world):
                progress.loss = total_loss.item()
                _once(partial(save, best=False), device, rank, world)
                raise Interrupted(
                    f"training stopped in epoch {epoch + 1} of {settings.epochs}", remedy="start it again to go on"
                )
            rate = learning_rate(epoch * steps + progress.step, settings.epochs * steps, settings.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(_mixed(settings.seed, "step", epoch, progress.step, rank))  # dropout, stochastic depth
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
                logits = model(preprocess(images, job.base.input))
            loss = functional.cross_entropy(logits.float() + settings.label_adjust * log_prior, labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
            if world > 1:
                average([loss, *(each.grad for each in model.parameters() if each.grad is not None)])
            scaler.step(optimizer)
            scaler.update()
            total_loss += loss
            progress.step += 1
        if not total_loss.isfinite():
            raise NotFinite(f"training diverged in epoch {epoch + 1}", remedy="lower learning_rate and train again")

        confusion, val_loss = _validate(model, job, log_prior, device)
        report = EpochReport(
            epoch=epoch + 1,
            epochs=settings.epochs,
            train_loss=total_loss.item() / steps,
            val_loss=val_loss,
            val_accuracy=accuracy(confusion),
            val_balanced_accuracy=balanced_accuracy(confusion),
            learning_rate=rate,
            images_per_second=settings.batch_size * (steps - first) / (time.monotonic() - started),
        )
        progress.history.append(asdict(report))
        progress.best_score = max(progress.best_score, report.val_balanced_accuracy)  # NaN is never greater
        if not clearly_worse(report.val_balanced_accuracy, progress.best_score, len(job.val_labels)):
            progress.best = epoch + 1
        progress.epoch, progress.step, progress.loss = epoch + 1, 0, 0.0
        _once(partial(save, best=progress.best == progress.epoch), device, rank, world)
        if rank == 0:
            on_epoch(report)
    return progress


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first WARM_UP of all steps, then a cosine down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def class_log_prior(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """log of the training images' class frequencies, float32 (classes,); finite for absent classes, too."""
    counts = torch.bincount(labels, minlength=classes).double() + ABSENT
    return (counts / counts.sum()).log().float()


def clearly_worse(score: float, best: float, images: int) -> bool:
    """Whether an epoch's balanced accuracy is two standard errors or more below the best one.

    Only then an earlier epoch is kept: with few validation images the later one, of a lower learning rate, is the
    better guess. With 18 images a hospital, label skew: sum .758, against .699 for the lowest validation loss.
    """
    if not images:
        return False
    share = (best * images + 1) / (images + 2)  # Agresti and Coull: no certainty from few images
    return best - score > 2 * math.sqrt(share * (1 - share) / images)


def epoch_batches(images: int, settings: TrainSettings, epoch: int) -> list[list[int]]:
    """Image indices of each step of an epoch, over all processes; images that fill no batch wait for another epoch."""
    size = settings.batch_size - settings.batch_size % max(1, settings.processes) or settings.processes
    size = min(size, images)
    generator = torch.Generator().manual_seed(_mixed(settings.seed, "order", epoch))
    order = torch.randperm(images, generator=generator).tolist()
    return [order[begin : begin + size] for begin in range(0, images - size + 1, size)]


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replaces tensors by their means over all processes; an infinity in one of them reaches all.

    One sum over all tensors in the order given. DistributedDataParallel sums in buckets, which it divides anew after
    its first step: a training that goes on would round otherwise than one that was not stopped.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for tensor, mean in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """uint8 training images, each changed at random, in a way that depends on (seed, epoch, index) alone."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, seed: int, epoch: int = 0) -> None:
        self.images, self.labels, self.seed, self.epoch = images, labels, seed, epoch
        self.change = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.RandomAffine(degrees=10, translate=(0.05, 0.05), scale=(0.95, 1.05)),
                v2.ColorJitter(brightness=0.1, contrast=0.1),
            ]
        )

    def at(self, epoch: int) -> Augmented:
        return Augmented(self.images, self.labels, self.seed, epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mixed(self.seed, "image", self.epoch, index))
            return self.change(self.images[index]), self.labels[index]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    base: BaseModel,
    image_set: ImageSet,
    *,
    batch_size: int = EVALUATION_BATCH,
    device: torch.device | str = "cpu",
) -> Confusion:
    """Confusion matrix, int64 (classes, classes), of a network in eval mode on uint8 images."""
    logits = _logits(network, base, image_set.images, batch_size, torch.device(device))
    return confusion_matrix(image_set.labels.numpy(), logits.argmax(1).numpy(), len(base.classes))


def evaluate_counts(
    network: nn.Module, base: BaseModel, image_set: ImageSet, *, device: torch.device | str = "cpu"
) -> Counts:
    """What a network in eval mode makes of uint8 images, as counts alone."""
    logits = _logits(network, base, image_set.images, EVALUATION_BATCH, torch.device(device))
    labels, classes = image_set.labels.numpy(), len(base.classes)
    confusion = confusion_matrix(labels, logits.argmax(1).numpy(), classes)
    return Counts(confusion, reliability(labels, logits.double().softmax(1).numpy()))


def choose_device(wanted: str) -> torch.device:
    """ "auto", "cpu" or "cuda" to a device.

    Raises:
        UsageError: a GPU is demanded and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is cuda, but no GPU is visible", remedy="give the process a GPU, or set device = auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


# --- Its parts ------------------------------------------------------------------------------------------------


def _prepare(device: torch.device) -> None:
    """Same input, same bits, also on a GPU."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def _fit_with_torchrun(job: Job, key: str, on_epoch: Callable[[EpochReport], None], stop: threading.Event) -> Progress:
    """Runs `fit` in one process per GPU; the first one writes, and tells by lines of JSON how it goes."""
    outcome: Progress | DataVectorError | None = None
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.settings.processes}"]
    with _shared_images(job) as images:
        paths = {"base": str(job.base.path), "folder": str(job.folder), "images": str(images)}
        text = json.dumps({**paths, "settings": asdict(job.settings), "key": key})
        with subprocess.Popen(
            [sys.executable, *torchrun, "-m", "agent.train", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's SIGINT is for the agent, which ends them in order
        ) as process:
            threading.Thread(target=_pass_on, args=(stop, process), daemon=True).start()
            for line in process.stdout or ():
                kind, _, content = line.partition(" ")
                if kind == EPOCH:
                    on_epoch(EpochReport(**json.loads(content)))
                elif kind == DONE:
                    outcome = Progress(**json.loads(content))
                elif kind == FAILED:
                    outcome = recreate(**json.loads(content))
                else:
                    sys.stderr.write(line)
    if isinstance(outcome, Progress):
        return outcome
    if outcome is not None:
        raise outcome
    if stop.is_set():
        raise Interrupted("training stopped", remedy="start it again to go on")
    raise TrainingFailed(
        f"a training process ended with exit code {process.returncode}",
        remedy="see its output above; start it again to go on from the last checkpoint",
    )


@contextmanager
def _shared_images(job: Job) -> Iterator[Path]:
    """The images in a file for all processes. If this one is killed, `remove_leftovers` knows the file by its name."""
    tensors = {"images": job.images, "labels": job.labels, "val_images": job.val_images, "val_labels": job.val_labels}
    with disk_full_at(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=job.folder, prefix=".images.", suffix=TEMPORARY) as file:
            _save(tensors, file)
            file.flush()
            yield Path(file.name)


def _pass_on(stop: threading.Event, process: subprocess.Popen[str]) -> None:
    """Closes the processes' standard input once `stop` is set, which tells them to save and leave."""
    while process.poll() is None:
        if stop.wait(0.2) and process.stdin:
            process.stdin.close()
            return


def main() -> None:
    """One of several training processes, started by torchrun: `python -m agent.train JOB`, a text in JSON.

    It ends with exit code 0 also where training was stopped or failed for a reason that has a name, which the first
    process tells: for another code torchrun prints a traceback, and ends all others at once.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def tell(kind: str, content: Mapping[str, Any]) -> None:
        if rank == 0:
            print(kind, json.dumps(content), flush=True)

    try:
        progress = _fit_as_one_of_several(json.loads(sys.argv[1]), lambda it: tell(EPOCH, asdict(it)), rank, world)
        tell(DONE, asdict(progress))
    except DataVectorError as error:
        tell(FAILED, {"name": type(error).__name__, "message": error.message, "remedy": error.remedy})
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _fit_as_one_of_several(
    content: Mapping[str, Any], on_epoch: Callable[[EpochReport], None], rank: int, world: int
) -> Progress:
    base, settings = BaseModel.load(Path(content["base"])), TrainSettings(**content["settings"])
    tensors = torch.load(content["images"], mmap=True, weights_only=True)
    job = Job(base=base, settings=settings, folder=Path(content["folder"]), **tensors)
    device = choose_device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # Standard input ends when the agent wants an end, and also when the agent itself is gone.
    threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return fit(job, content["key"], device, on_epoch, stop, rank, world)


def _stop_at_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 1):  # sys.stdin's own lock, held here, would block a forked worker, which closes sys.stdin
        pass
    stop.set()


def _workers(settings: TrainSettings, device: torch.device) -> int:
    if "fork" not in multiprocessing.get_all_start_methods():
        return 0
    if settings.workers or device.type == "cpu":
        return settings.workers
    return min(WORKERS, (os.cpu_count() or 1) // settings.processes)


def _precision(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    # GPUs before Ampere emulate bfloat16, slowly; their float16 is real.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(network.parameters())
    return [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0},
    ]


def _mixed(*parts: object) -> int:
    """A 63-bit seed from whatever it shall depend on."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def _anywhere(it: bool, device: torch.device, world: int) -> bool:
    """Whether something is so in any process; all have to ask at the same point."""
    if world == 1:
        return it
    told = torch.tensor(float(it), device=device)
    distributed.all_reduce(told)
    return bool(told.item())


def _once(write: Callable[[], None], device: torch.device, rank: int, world: int) -> None:
    """Lets the first process write. If it cannot, all raise: none may wait for one that has left."""
    failure: DataVectorError | None = None
    if rank == 0:
        try:
            write()
        except DataVectorError as error:
            failure = error
    if _anywhere(failure is not None, device, world):
        raise failure or TrainingFailed("the first training process could not write", remedy="see what it says")


def _validate(network: nn.Module, job: Job, log_prior: torch.Tensor, device: torch.device) -> tuple[Confusion, float]:
    """Confusion matrix and training loss on the validation images."""
    classes = len(job.base.classes)
    if not len(job.val_labels):
        return np.zeros((classes, classes), dtype=np.int64), math.nan
    logits = _logits(network.eval(), job.base, job.val_images, EVALUATION_BATCH, device)
    loss = functional.cross_entropy(logits + job.settings.label_adjust * log_prior.cpu(), job.val_labels)
    return confusion_matrix(job.val_labels.numpy(), logits.argmax(1).numpy(), classes), float(loss)


@torch.no_grad()
def _logits(
    network: nn.Module, base: BaseModel, images: torch.Tensor, batch_size: int, device: torch.device
) -> torch.Tensor:
    network = network.to(device).eval()
    parts = [
        network(preprocess(batch.to(device), base.input)).float().cpu() for batch in torch.split(images, batch_size)
    ]
    return torch.cat(parts) if len(images) else torch.empty((0, len(base.classes)))


def _write_weights(path: Path, base: BaseModel, network: nn.Module) -> None:
    tensors = export_tensors(network)
    write_tensors(path, base.layout, (tensors[spec.name] for spec in base.layout.tensors), mode=0o600)


def _save(content: object, file: IO[bytes]) -> None:
    """torch.save, but an error of the operating system stays what it is: torch makes a RuntimeError of it."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _load_checkpoint(folder: Path, key: str) -> dict[str, Any] | None:
    """The checkpoint of this very training, on the CPU; None where it is absent, damaged, or another training's."""
    try:
        with (folder / CHECKPOINT).open("rb") as file:
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling what is damaged, or left by other software, raises nearly anything
        if "can't allocate memory" in str(error):  # torch has no class for it
            raise
        return None
    fits = isinstance(saved, dict) and saved.get("format") == FORMAT and saved.get("key") == key
    return saved if fits else None


def _finish(
    job: Job, key: str, fitted: Progress, train_set: ImageSet, val_set: ImageSet, device: torch.device
) -> TrainResult:
    """Restores exact BatchNorm statistics of the best epoch and writes the result; then the checkpoint can go."""
    network = build(job.base).to(device)
    load_file(network, job.folder / BEST, job.base.layout)
    measured = recalibrate(
        network, job.base, train_set, own_alone, max_images=BATCHNORM_IMAGES, seed=job.settings.seed, device=device
    )
    (job.folder / RESULT).unlink(missing_ok=True)  # an earlier training's, which must not vouch for these weights
    _write_weights(job.folder / TUNED, job.base, network)
    confusion = evaluate(network, job.base, val_set, device=device)
    content = {
        "key": key,
        "epoch": fitted.best,
        "images": len(train_set),
        "batchnorm_images": measured.images,
        "validation": confusion.tolist(),
        "history": fitted.history,
    }
    write_json(job.folder / RESULT, content)
    for name in (CHECKPOINT, BEST):
        (job.folder / name).unlink(missing_ok=True)
    return _result(job.folder, content)


def _finished(folder: Path, key: str) -> TrainResult | None:
    try:
        content = json.loads((folder / RESULT).read_text())
        return _result(folder, content) if content["key"] == key and (folder / TUNED).is_file() else None
    except (OSError, ValueError, KeyError):
        return None


def _result(folder: Path, content: Mapping[str, Any]) -> TrainResult:
    return TrainResult(
        weights=folder / TUNED,
        epoch=content["epoch"],
        images=content["images"],
        batchnorm_images=content["batchnorm_images"],
        validation=np.array(content["validation"], dtype=np.int64),
        history=tuple(EpochReport(**report) for report in content["history"]),
    )


if __name__ == "__main__":
    main()
