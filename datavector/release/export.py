"""From a torch network to one ONNX graph that begins with the raw image."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from onnxscript import ir
from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from datavector.errors import ReleaseError
from datavector.model import Input
from datavector.networks import preprocess
from datavector.release.probes import Images, Logits

OLDEST_OPSET = 18  # Resize has `antialias` from here on
PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one protobuf message, less room for the graph


class Served(nn.Module):
    """A network as clients see it: preprocessing before, probabilities after."""

    def __init__(self, network: nn.Module, input: Input) -> None:
        super().__init__()
        self.network = network
        self.input = input

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Squashes to the network's square with an antialiased bilinear filter, as training does.

        Args:
            images: uint8, shape (batch, height, width, 3), RGB.
        Returns:
            Logits and probabilities, float32, each of shape (batch, classes).
        """
        square = (self.input.size, self.input.size)
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = functional.interpolate(pixels, square, mode="bilinear", antialias=True, align_corners=False)
        logits = self.network(preprocess(pixels, self.input))
        return logits, logits.softmax(dim=1)


def torch_logits(served: Served, batches: Sequence[Images]) -> list[Logits]:
    """What torch answers: one array of shape (images, classes) for each batch of images of one shape."""
    with torch.inference_mode():
        return [served(torch.from_numpy(images))[0].numpy() for images in batches]


def export_onnx(served: Served, *, opset: int) -> ir.Model:
    """Translates a network with its preprocessing; batch, height and width stay open.

    BatchNorm is folded into the convolutions first, which every ONNX runtime would do as well: tracing takes a third
    less time. Nothing of the machine that exports (paths, stack traces) is in the result.

    Args:
        served: on the CPU; it is not changed.
    Raises:
        ReleaseError: torch cannot trace the network, ONNX cannot express it, or the file would exceed 2 GiB.
    """
    _demand_exportable(served, opset)
    size = served.input.size
    folded = fold_batchnorm(served, torch.zeros(2, size, size, 3, dtype=torch.uint8))
    example = torch.zeros(
        2, size + 5, size + 3, 3, dtype=torch.uint8
    )  # no two sizes alike, or torch ties them together
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch's exporter
            program = torch.onnx.export(
                folded,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits", "probabilities"],
                dynamic_shapes=({0: "batch", 1: "height", 2: "width"},),
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReleaseError(
            f"the network cannot be exported to ONNX opset {opset} ({type(error).__name__}: {reason})",
            remedy="use another opset or architecture",
        ) from error
    assert program is not None  # noqa: S101 - what dynamo=True returns
    model = program.model
    ClearMetadataAndDocStringPass()(model)
    return model


def fold_batchnorm(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy in which convolutions have the BatchNorm layer that follows them in their weights.

    One pass finds the pairs: a BatchNorm layer whose input is the very tensor that a convolution returned, each of them
    called once. A network that uses that tensor elsewhere too would change, so compare answers afterwards, as
    `write_release` does.

    Args:
        example: an input of the network.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    convolved: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by id; holding the tensor keeps its id its own
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    uses: Counter[nn.Module] = Counter()  # calls of a layer, and readings of a convolution's output by BatchNorm

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        uses[module] += 1
        if isinstance(module, nn.Conv2d):
            convolved[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in convolved:
            convolution = convolved[id(inputs[0])][0]
            pairs.append((convolution, module))
            uses[convolution] += 1

    hooks = [module.register_forward_hook(watch) for module in network.modules()]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in network.named_modules()}
    for convolution, norm in pairs:
        if uses[convolution] == 2 and uses[norm] == 1:
            network.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
            network.set_submodule(names[norm], nn.Identity())
    return network


def _demand_exportable(served: Served, opset: int) -> None:
    if opset < OLDEST_OPSET:
        raise ReleaseError(
            f"opset {opset} has no antialiased resize", remedy=f"set export.opset to {OLDEST_OPSET} or more"
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in served.state_dict().values())
    if size > PROTOBUF_LIMIT:
        raise ReleaseError(
            f"the weights have {size / 2**30:.1f} GiB, and an ONNX file holds at most 2 GiB",
            remedy="use a smaller architecture",
        )


def save_onnx(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes one self-contained file; `metadata` replaces the model's own."""
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    ir.save(model, path)
