"""Measures BatchNorm statistics afresh: one forward pass in which every layer's moments can be pooled with others'.

At each BatchNorm layer the pass stops, gives away the moments of that layer's input, and goes on with the statistics
that come back: its own (a hospital's own model), pooled with what earlier visitors left (a visit), or pooled with
those of everybody connected (a meeting; equal to one train-mode pass over all images together). Measuring again in
eval mode with the statistics of an earlier pass diverges, so nobody does that here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datavector.data.images import ImageSet
from datavector.errors import TryAgain, WrongLayout
from datavector.merge.batchnorm import Moments, pool
from datavector.model import BaseModel
from datavector.networks import batchnorm_modules, preprocess

Exchange = Callable[[str, Moments], Moments]
"""Takes a layer's name and its own moments, gives the ones to normalise with."""

CHUNK = 1 << 24  # values that are widened to float64 at once (128 MiB)
LIVE_LAYERS = 4  # a layer's input, its output, a residual and the convolution's workspace are in memory together
MEMORY_SHARE = 0.5  # of what is free, for a visit or a meeting
FEWEST = 16  # images that a visit or a meeting is worth: of fewer, a deep layer's statistics are mostly noise
# Bytes for a hospital's own statistics, whatever is free: the same training must end in the same vector. It is room for
# 682 images with EfficientNet-Lite0 at 128 pixels, and several times what training takes (docs/batchnorm.md).
BUDGET = 4 << 30
# Limit, use and statistics of the control group's memory, and its files that can be dropped: versions 2 and 1.
CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@dataclass(frozen=True)
class Recalibration:
    """What one pass measured.

    Attributes:
        moments: of this hospital alone, by layer.
        logits: float32, shape (images, classes).
        images: how many were used.
        features: what the head took, float32, shape (images, features); None where nobody asked.
    """

    moments: dict[str, Moments]
    logits: torch.Tensor
    images: int
    features: torch.Tensor | None = None


def recalibrate(
    network: nn.Module,
    base: BaseModel,
    image_set: ImageSet,
    exchange: Exchange,
    *,
    max_images: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    budget: int = BUDGET,
) -> Recalibration:
    """One pass over a hospital's images; the network keeps the exchanged statistics afterwards.

    How many are used depends on the base model, `max_images` and `budget` alone, never on the memory that is free.

    Args:
        max_images: most images used. A choice is made at random, by `seed`.
        budget: bytes of memory for the pass.
    """
    room = budget // image_bytes(network.to(device), base, torch.device(device))
    chosen = choose_images(len(image_set), min(max_images, room), seed)
    return measure(network, base, image_set.images[chosen], exchange, device=device)


def chosen_in_memory(
    network: nn.Module,
    base: BaseModel,
    image_set: ImageSet,
    *,
    max_images: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    free: int | None = None,
) -> torch.Tensor:
    """Which images a visit or a meeting uses, as ascending indices: as many as memory allows now.

    Args:
        free: bytes of memory that are free; what `free_memory` finds where absent.
    Raises:
        TryAgain: there is room for fewer than FEWEST, and for fewer than are there.
    """
    device = torch.device(device)
    needed = image_bytes(network.to(device), base, device)
    room = int(MEMORY_SHARE * (free_memory(device) if free is None else free)) // needed
    if room < min(FEWEST, max_images, len(image_set)):
        raise TryAgain(
            f"memory has room for {room} images only",
            remedy="free some, or give the agent more; it tries again when it next asks for tasks",
        )
    return choose_images(len(image_set), min(max_images, room), seed)


def measure(
    network: nn.Module,
    base: BaseModel,
    images: torch.Tensor,
    exchange: Exchange,
    *,
    head: str | None = None,
    device: torch.device | str = "cpu",
) -> Recalibration:
    """One pass over just these images, uint8, shape (images, 3, size, size).

    Args:
        head: name of the layer whose input is wanted as features.
    """
    inputs, features = preprocess(images.to(device), base.input), list[torch.Tensor]()
    with full_precision(torch.device(device)), ExitStack() as hooks:
        if head:
            keep = network.get_submodule(head).register_forward_pre_hook(
                lambda _, arguments: features.append(arguments[0].float().cpu())
            )
            hooks.callback(keep.remove)
        moments, logits = forward_with_moments(network.to(device), inputs, exchange)
    return Recalibration(moments, logits.float().cpu(), len(images), features[0] if features else None)


def own_alone(_: str, own: Moments) -> Moments:
    """The exchange of a hospital's own model: exact statistics of its own images, in place of running averages."""
    return own


def pooled_with(others: dict[str, Moments], layer: str, own: Moments) -> Moments:
    """A visitor's own fresh moments, pooled with what earlier visitors left for that layer."""
    return pool([own, others[layer]]) if layer in others else own


@torch.no_grad()
def forward_with_moments(
    network: nn.Module, inputs: torch.Tensor, exchange: Exchange
) -> tuple[dict[str, Moments], torch.Tensor]:
    """One forward pass over all images in one batch, in eval mode but for fresh BatchNorm statistics.

    Args:
        network: left in eval mode, with the exchanged statistics.
        inputs: normalised images, float (N, 3, S, S), on the network's device.
        exchange: called once per layer, in the order of execution.
    Returns:
        The own moments by layer, and the logits (N, classes).
    Raises:
        WrongLayout: `exchange` gave back another number of channels.
    """
    own: dict[str, Moments] = {}

    def renew(name: str, layer: Any, values: torch.Tensor) -> None:
        own[name] = input_moments(values)
        pooled = exchange(name, own[name])
        if pooled.mean.shape != own[name].mean.shape:
            raise WrongLayout(
                f"pooled moments of {name} have {pooled.mean.size} channels, not {own[name].mean.size}",
                remedy="update the aggregator: it answered for another layer",
            )
        layer.running_mean.copy_(torch.from_numpy(pooled.mean))
        layer.running_var.copy_(torch.from_numpy(pooled.variance))

    network.eval()
    with ExitStack() as hooks:
        for name, layer in batchnorm_modules(network).items():
            handle = layer.register_forward_pre_hook(
                lambda module, arguments, name=name: renew(name, module, arguments[0])
            )
            hooks.callback(handle.remove)
        logits: torch.Tensor = network(inputs)
    return own, logits


def input_moments(values: torch.Tensor) -> Moments:
    """Moments per channel of a layer's input (N, C, ...), in float64: first the mean, then distances from it."""
    flat = values.flatten(2) if values.dim() > 2 else values[:, :, None]
    count = flat.shape[0] * flat.shape[2]
    chunks = torch.split(flat, max(1, CHUNK // max(1, flat.shape[1] * flat.shape[2])))
    mean = torch.stack([chunk.double().sum((0, 2)) for chunk in chunks]).sum(0) / count
    squares = [(chunk.double() - mean[:, None]).square().sum((0, 2)) for chunk in chunks]
    variance = torch.stack(squares).sum(0) / count
    return Moments(count, mean.cpu().numpy(), variance.cpu().numpy())


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Keeps a GPU's convolutions from rounding to TF32 (10 bits): a meeting equals one pass, wherever its parts run."""
    if device.type != "cuda":
        return nullcontext()
    now = torch.backends.cudnn
    flags: AbstractContextManager[None] = now.flags(
        enabled=now.enabled, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False
    )
    return flags


def choose_images(available: int, limit: int, seed: int) -> torch.Tensor:
    """Indices of the images to use, ascending: all, or `limit` of them (at least one) chosen by `seed`."""
    if limit >= available:
        return torch.arange(available)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, limit)].sort().values


@torch.no_grad()
def image_bytes(network: nn.Module, base: BaseModel, device: torch.device) -> int:
    """Bytes of memory that a pass takes for each image, judged by the largest BatchNorm input of one."""
    largest = 3 * base.input.size**2

    def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, math.prod(arguments[0].shape))

    with ExitStack() as hooks:
        for layer in batchnorm_modules(network).values():
            hooks.callback(layer.register_forward_pre_hook(note).remove)
        network.eval()(torch.zeros((1, 3, base.input.size, base.input.size), device=device))
    return LIVE_LAYERS * largest * 4


def free_memory(
    device: torch.device, *, machine: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that are free on a device: a GPU's, or the machine's within the limit of its control group.

    What torch keeps for its next tensors is free, and so are files that the system merely keeps in memory.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = _number(machine, "MemAvailable:") * 1024 if machine.exists() else 4 << 30
    for limit, used, statistics, droppable in CONTROL_GROUPS:
        if (groups / limit).exists() and (text := (groups / limit).read_text().strip()).isdigit():  # else "max"
            in_use = int((groups / used).read_text()) - _number(groups / statistics, droppable)
            free = min(free, int(text) - in_use)
    return max(free, 0)


def _number(file: Path, name: str) -> int:
    """The number after `name` at the begin of a line; 0 where no line begins so."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)
