"""What clients do with a release: `datavector predict`, and five lines of onnxruntime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from datavector.errors import ReleaseError
from datavector.model import BaseModel
from datavector.release.predict import predict
from datavector.release.probes import draw_probes
from tests.datavector.release.samples import ARCHITECTURES, CLASSES

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs of three shapes, as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    for number, batch in enumerate(draw_probes()):
        Image.fromarray(batch[0]).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_an_image_gets_its_label_and_every_classs_probability(tiny_release: Path, images: list[Path]) -> None:
    results = list(predict(tiny_release, images))
    assert [result["image"] for result in results] == [str(image) for image in images]
    for result in results:
        assert list(result["probabilities"]) == list(CLASSES)
        assert sum(result["probabilities"].values()) == pytest.approx(1)
        assert result["probability"] == max(result["probabilities"].values())
        assert result["probabilities"][result["label"]] == result["probability"]
        assert result["version"] == "brain-0123456789"
    assert len({result["probability"] for result in results}) == len(images)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_five_lines_of_onnxruntime_agree_with_predict(
    architecture: str,
    real_release: Callable[[str], tuple[Path, nn.Module, BaseModel]],
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = real_release(architecture)[0]
    monkeypatch.chdir(release.parent)
    for path, expected in zip(images, predict(release, images), strict=True):
        # fmt: off
        import numpy as np, onnxruntime as ort; from PIL import Image  # noqa: E401, E702, I001
        session = ort.InferenceSession("release/1/model.onnx")
        image = np.asarray(Image.open(path).convert("RGB"))[None]
        probabilities = session.run(["probabilities"], {"images": image})[0][0]
        labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
        # fmt: on
        assert dict(zip(labels, probabilities.tolist(), strict=True)) == pytest.approx(expected["probabilities"])
        assert labels[probabilities.argmax()] == expected["label"]


def test_an_unreadable_image_is_one_line_and_the_others_go_on(
    tiny_release: Path, images: list[Path], tmp_path: Path
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(images[0].read_bytes()[:1000])
    results = list(predict(tiny_release, [images[0], torn, tmp_path / "absent.png", images[1]]))
    assert ["error" in result for result in results] == [False, True, True, False]
    assert set(results[1]) == {"image", "error"}
    assert "torn.png" in results[1]["error"]


def test_a_file_whose_name_is_no_utf_8_is_classified_and_named(tiny_release: Path, images: list[Path], tmp_path: Path):
    image = tmp_path / os.fsdecode(b"M\xfcller.png")
    try:
        shutil.copy(images[0], image)
    except OSError as error:
        pytest.skip(f"this file system takes names in UTF-8 only ({error.strerror})")
    command = [sys.executable, "-m", "datavector", "predict", tiny_release, image, tmp_path / os.fsdecode(b"\xfc.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found, absent = (json.loads(line) for line in done.stdout.splitlines())
    assert (found["image"], absent["image"]) == (str(image), str(tmp_path / os.fsdecode(b"\xfc.png")))
    assert found["label"] in CLASSES
    assert "1 of 2 images could not be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_photograph_is_turned_upright_and_deep_grey_is_scaled(tiny_release: Path, tmp_path: Path) -> None:
    upright = Image.fromarray(draw_probes()[2][0])
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    grey = np.asarray(upright.convert("L")).astype(np.uint16)
    grey = (grey - grey.min()) * 16  # 12 bits
    Image.fromarray(grey).save(tmp_path / "deep.png")
    flat = np.rint(grey * (255 / grey.max())).astype(np.uint8)
    Image.fromarray(flat).save(tmp_path / "flat.png")
    names = ("upright.png", "turned.png", "deep.png", "flat.png")
    found = [result["probabilities"] for result in predict(tiny_release, [tmp_path / name for name in names])]
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[3])
    assert found[2] != pytest.approx(found[0])


def test_predicting_needs_only_onnxruntime_numpy_and_pillow(tiny_release: Path, images: list[Path]) -> None:
    program = """
import json, sys
from pathlib import Path
from datavector.release.predict import predict
print(json.dumps(next(predict(Path(sys.argv[1]), [Path(sys.argv[2])]))["label"]))
heavy = {"torch", "torchvision", "onnx", "onnxscript", "grpc", "pydantic", "safetensors", "cryptography"}
sys.exit(f"imported: {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_release), str(images[0])], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) in CLASSES


def test_a_missing_or_damaged_release_is_one_clear_error_at_once(altered: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="does not exist"):
        predict(tmp_path / "nowhere", [])
    (altered / "1/model.onnx").write_bytes(b"damaged")
    with pytest.raises(ReleaseError, match="cannot load"):
        predict(altered, [])
