"""What some merge methods read beside a vector, measured on the hospital's training images with its own tuned model.

Diagonal Fisher information (arXiv 2111.09832) and the Gram matrices of layers' inputs (RegMean, arXiv 2212.09849).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from datavector.console import Progress
from datavector.layout import FLOAT, FloatArray, TensorSpec, write_tensors
from datavector.merge.statistics import FISHER, gram_inputs, layout_of
from datavector.model import BaseModel
from datavector.networks import preprocess

BATCH = 16


def write_statistics(
    kind: str,
    path: Path,
    network: nn.Module,
    base: BaseModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda _done, _total: None,
) -> None:
    """Writes the statistics of a kind, into a file that only its owner may read.

    Args:
        kind: "fisher" or "regmean".
        network: the hospital's own tuned model.
        images: uint8, shape (images, 3, size, size).
        labels: int64, shape (images,).
        progress: called with the images done and in all.
    Raises:
        DiskFull: no space is left.
    """
    network, layout = network.to(device).eval(), layout_of(kind, base)
    if kind == FISHER:
        found = _fisher(network, base, images, labels, device, progress)
    else:
        found = _regmean(network, base, images, device, progress)

    def tensor(spec: TensorSpec) -> FloatArray:
        if spec.name in found:
            return found[spec.name].float().cpu().numpy()
        # What has no gradient (BatchNorm statistics) is 0. Of a weight without a layer of its own the mean is taken.
        return np.zeros(spec.shape, FLOAT) if kind == FISHER else np.eye(spec.shape[0], dtype=FLOAT)

    write_tensors(path, layout, map(tensor, layout.tensors), mode=0o600)


def _fisher(
    network: nn.Module,
    base: BaseModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Mean over the images of the squared gradient of the label's log-probability, for each weight."""
    weights = dict(network.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for index in range(len(images)):
        logits = network(preprocess(images[index : index + 1].to(device), base.input))
        loss = functional.cross_entropy(logits, labels[index : index + 1].to(device))
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square() / len(images)
        progress(index + 1, len(images))
    return total


@torch.no_grad()
def _regmean(
    network: nn.Module, base: BaseModel, images: torch.Tensor, device: torch.device | str, progress: Progress
) -> dict[str, torch.Tensor]:
    """Sum of x x^T over the inputs x of each linear or convolutional layer (patches of an image, for the latter)."""
    grams: dict[str, torch.Tensor] = {}

    def add(name: str, layer: nn.Module, values: torch.Tensor) -> None:
        for image in torch.split(values, 1):  # the patches of a whole batch would take gigabytes
            rows = _rows(layer, image).double()
            grams[name] = grams.get(name, 0) + rows.T @ rows

    with ExitStack() as hooks:
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and gram_inputs(layer.weight.shape):
                handle = layer.register_forward_pre_hook(
                    lambda module, arguments, name=f"{name}.weight": add(name, module, arguments[0])
                )
                hooks.callback(handle.remove)
        for begin in range(0, len(images), BATCH):
            network(preprocess(images[begin : begin + BATCH].to(device), base.input))
            progress(min(begin + BATCH, len(images)), len(images))
    return grams


def _rows(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """A layer's inputs as rows, shape (places, inputs of one output)."""
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, values.shape[-1])
    assert isinstance(layer, nn.Conv2d)  # noqa: S101  the only other kind that is asked for
    patches = _patches(layer, values)
    return patches.transpose(1, 2).reshape(-1, layer.weight[0].numel())


def _patches(layer: nn.Conv2d, values: torch.Tensor) -> torch.Tensor:
    """(images, inputs x kernel, places); of a grouped convolution every group's, one after the other."""
    if isinstance(layer.padding, str):
        values = functional.pad(values, layer._reversed_padding_repeated_twice)
        padding: tuple[int, int] = (0, 0)
    else:
        padding = (layer.padding[0], layer.padding[1])
    unfolded = functional.unfold(values, layer.kernel_size, layer.dilation, padding, layer.stride)
    images, _, places = unfolded.shape
    return unfolded.reshape(images * layer.groups, -1, places)
