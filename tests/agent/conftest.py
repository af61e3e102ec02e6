from pathlib import Path

import pytest
import torch

from agent.settings import AgentSettings, Data, Tls
from datavector.data.images import ImageSet
from datavector.data.records import Record
from datavector.model import BaseModel
from datavector.networks import create_base

SIZE = 32
CLASSES = ("dark", "red", "bright")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """MobileNetV3: BatchNorm, dropout, and quick at 32 pixels."""
    return create_base(
        tmp_path_factory.mktemp("base"), architecture="mobilenet_v3_small", classes=CLASSES, size=SIZE, seed=0
    )


def noisy_colours(images: int, seed: int, *, shift: int = 0) -> ImageSet:
    """Images of three colours with noise, which can be learned."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % len(CLASSES)
    colours = torch.tensor([[40, 40, 40], [200, 40, 40], [200, 200, 200]])[labels]
    noise = torch.randint(-40, 41, (images, 3, SIZE, SIZE), generator=generator)
    pixels = (colours[:, :, None, None] + noise + shift).clamp(0, 255).to(torch.uint8)
    records = tuple(Record(Path(f"{index}.png"), CLASSES[label]) for index, label in enumerate(labels.tolist()))
    return ImageSet(pixels, labels, records, ())


@pytest.fixture(scope="session")
def train_set() -> ImageSet:
    return noisy_colours(26, 1)


@pytest.fixture(scope="session")
def val_set() -> ImageSet:
    return noisy_colours(9, 2)


@pytest.fixture(scope="session")
def sites() -> list[ImageSet]:
    """Three hospitals of different size and brightness."""
    return [noisy_colours(count, 10 + count, shift=shift) for count, shift in ((5, 0), (12, 30), (8, -25))]


def settings_of(state: Path, data: Path | None = None, *, max_corrupt: float = 0.05) -> AgentSettings:
    """Settings of an agent that dials nobody."""
    tls = Tls(certificate=Path("c"), key=Path("k"), ca=Path("a"))
    chosen = Data(path=data, max_corrupt=max_corrupt) if data else None
    return AgentSettings(hospital="north", aggregator="localhost:1", state=state, tls=tls, data=chosen)
