"""Measures BatchNorm statistics afresh: one forward pass in which every layer's moments can be pooled with others'.

At each BatchNorm layer the pass stops, gives away the moments of that layer's input, and goes on with the statistics
that come back: its own (a hospital's own model), pooled with what earlier visitors left (a visit), or pooled with
those of everybody connected (a meeting; equal to one train-mode pass over all images together). Measuring again in
eval mode with the statistics of an earlier pass diverges, so nobody does that here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datavector.data.images import ImageSet
from datavector.errors import WrongLayout
from datavector.merge.batchnorm import Moments
from datavector.model import BaseModel
from datavector.networks import batchnorm_modules, preprocess

Exchange = Callable[[str, Moments], Moments]
"""Takes a layer's name and its own moments, gives the ones to normalise with."""

CHUNK = 1 << 24  # values that are widened to float64 at once (128 MiB)
LIVE_LAYERS = 4  # a layer's input, its output, a residual and the convolution's workspace are in memory together
MEMORY_SHARE = 0.5  # of what is free


@dataclass(frozen=True)
class Recalibration:
    """What one pass measured.

    Attributes:
        moments: of this hospital alone, by layer.
        logits: float32, shape (images, classes).
        images: how many were used.
    """

    moments: dict[str, Moments]
    logits: torch.Tensor
    images: int


def recalibrate(
    network: nn.Module,
    base: BaseModel,
    image_set: ImageSet,
    exchange: Exchange,
    *,
    max_images: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Recalibration:
    """One pass over a hospital's images; the network keeps the exchanged statistics afterwards.

    Args:
        max_images: most images used; memory may allow fewer. A choice is made at random, by `seed`.
    """
    chosen = images_in_memory(network, base, image_set, max_images=max_images, seed=seed, device=device)
    return measure(network, base, chosen, exchange, device=device)


def images_in_memory(
    network: nn.Module,
    base: BaseModel,
    image_set: ImageSet,
    *,
    max_images: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The images of a pass: uint8, shape (images, 3, size, size), as many as memory allows now."""
    device = torch.device(device)
    limit = min(max_images, affordable_images(network.to(device), base, device))
    return image_set.images[choose_images(len(image_set), limit, seed)]


def measure(
    network: nn.Module,
    base: BaseModel,
    images: torch.Tensor,
    exchange: Exchange,
    *,
    device: torch.device | str = "cpu",
) -> Recalibration:
    """One pass over just these images, uint8, shape (images, 3, size, size)."""
    inputs = preprocess(images.to(device), base.input)
    moments, logits = forward_with_moments(network.to(device), inputs, exchange)
    return Recalibration(moments, logits.float().cpu(), len(images))


def own_alone(_: str, own: Moments) -> Moments:
    """The exchange of a hospital's own model: exact statistics of its own images, in place of running averages."""
    return own


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


def choose_images(available: int, limit: int, seed: int) -> torch.Tensor:
    """Indices of the images to use, ascending: all, or `limit` of them chosen by `seed`."""
    if limit >= available:
        return torch.arange(available)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, limit)].sort().values


@torch.no_grad()
def affordable_images(network: nn.Module, base: BaseModel, device: torch.device) -> int:
    """How many images fit into memory at once, judged by the largest BatchNorm input of one of them."""
    largest = 3 * base.input.size**2

    def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, math.prod(arguments[0].shape))

    with ExitStack() as hooks:
        for layer in batchnorm_modules(network).values():
            hooks.callback(layer.register_forward_pre_hook(note).remove)
        network.eval()(torch.zeros((1, 3, base.input.size, base.input.size), device=device))
    return max(1, int(MEMORY_SHARE * free_memory(device)) // (LIVE_LAYERS * largest * 4))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: a GPU's, or the machine's within the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 4 << 30)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)
