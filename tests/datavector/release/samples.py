"""A lineage, and networks to release."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from datavector.model import BaseModel, Input, save_base
from datavector.networks import export_tensors
from datavector.release import Lineage

CLASSES = ("glioma", "meningioma", "no tumour", "hypophysäre Läsion")
INPUT = Input(24, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))  # of Tiny
ARCHITECTURES = ("resnet18", "mobilenet_v3_small", "efficientnet_lite0")


def lineage(version: str = "brain-0123456789", **changes: object) -> Lineage:
    values = {
        "version": version,
        "created": "2026-01-02T03:04:05+00:00",
        "inputs": [
            {"dataVector": "north-1", "hospital": "north", "digest": f"sha256:{'a' * 64}", "sampleCount": 120},
            {"dataVector": "south-2", "hospital": "south", "digest": f"sha256:{'b' * 64}", "sampleCount": 80},
        ],
        "inputs_hash": "0123456789abcdef",
        "method": "sum",
        "parameters": {"scale": 1.0},
        "calibration": {
            "mode": "visit",
            "hospitals": ["north", "south"],
            "images": 200,
            "note": "1 visit(s) a hospital",
        },
        "evaluation": {},
        "weights_sha256": "1" * 64,
        "calibrated_sha256": "2" * 64,
    }
    return Lineage(**{**values, **changes})  # type: ignore[arg-type]


def settle(network: nn.Module, size: int) -> nn.Module:
    """Gives random weights the BatchNorm statistics of random images, so that logits depend on the image."""
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()
    with torch.no_grad():
        network(torch.randn(16, 3, size, size, generator=generator))
    return network.eval()


class Tiny(nn.Module):
    """Conv, BatchNorm, and a head whose logits are of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.head(torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3)))
        return features


def tiny() -> nn.Module:
    torch.manual_seed(2)
    return settle(Tiny(), 24)


def tiny_base(path: Path) -> BaseModel:
    return save_base(
        path,
        name="tiny",
        architecture="tiny",
        classes=CLASSES,
        input=INPUT,
        head_seed=2,
        pretrained="",
        tensors=export_tensors(tiny()),
    )
