"""What a release holds, and how it comes into being."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import ExifTags, Image
from torch import nn

from datavector.data.images import resize
from datavector.errors import ReleaseError
from datavector.model import BaseModel
from datavector.networks import preprocess
from datavector.release import verify_release, write_release
from datavector.release.card import model_card
from datavector.release.export import Served, export_onnx, fold_batchnorm, torch_logits
from datavector.release.predict import predict
from datavector.release.probes import draw_probes, load_probes
from datavector.release.runtime import onnx_logits, open_session
from tests.datavector.release.samples import ARCHITECTURES, CLASSES, INPUT, lineage, tiny, tiny_base

RealRelease = Callable[[str], tuple[Path, nn.Module, BaseModel]]
FILES = (
    "1/model.onnx",
    "MODEL_CARD.md",
    "SHA256SUMS",
    "config.pbtxt",
    "labels.txt",
    "probes.npz",
    "release.json",
    "report.html",
)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_architectures_answer_as_torch_does_on_images_of_any_shape(
    architecture: str, real_release: RealRelease
) -> None:
    release, network, base = real_release(architecture)
    rng = np.random.default_rng(0)
    shapes = ((1, 64, 64), (3, 33, 57), (2, 301, 120), (1, 128, 128), (5, 65, 63), (1, 700, 1), (1, 1, 1))
    batches = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes] + draw_probes()
    expected = torch_logits(Served(network, base.input), batches)
    found = onnx_logits(open_session(release, gpu=False), batches)
    assert np.concatenate(expected).std(axis=0).min() > 1e-3  # else the next line could not fail
    for left, right in zip(expected, found, strict=True):
        np.testing.assert_allclose(right, left, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_release_of_a_real_architecture_verifies(architecture: str, real_release: RealRelease) -> None:
    report = verify_release(real_release(architecture)[0])
    assert report.ok, report.checks


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="this system has no sha256sum")
def test_everybodys_sha256sum_checks_a_release(tiny_release: Path) -> None:
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tiny_release).returncode == 0


def test_a_release_holds_the_files_of_a_triton_model(tiny_release: Path) -> None:
    assert tuple(contents(tiny_release)) == FILES
    assert (tiny_release / "labels.txt").read_text(encoding="utf-8").splitlines() == list(CLASSES)
    config = (tiny_release / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert "dims: [ -1, -1, 3 ]" in config
    assert config.count("dims: [ 4 ]") == 2


def test_release_json_says_where_the_release_comes_from(tiny_release: Path) -> None:
    found = json.loads((tiny_release / "release.json").read_text(encoding="utf-8"))
    assert found["version"] == "brain-0123456789"
    assert found["created"] == "2026-01-02T03:04:05+00:00"
    assert found["classes"] == list(CLASSES)
    assert found["inputs"][1] == {
        "vector": "south-2",
        "hospital": "south",
        "digest": f"sha256:{'b' * 64}",
        "sampleCount": 80,
    }
    assert found["method"] == {"name": "sum", "parameters": {"scale": 1.0}}
    assert found["calibration"]["hospitals"] == ["north", "south"]
    assert (found["weights_sha256"], found["calibrated_sha256"]) == ("1" * 64, "2" * 64)
    assert found["opset"] == 20
    assert found["parity"]["max_abs_difference"] <= 1e-4 < found["parity"]["logit_spread"]


def test_the_model_card_names_hospitals_calibration_and_limits(tiny_release: Path) -> None:
    card = (tiny_release / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| north | 120 |" in card
    assert "`visit`, by north, south, over 200 images" in card
    assert "sum (scale = 1.0)" in card
    assert "unvalidated" in card
    assert "not a medical device" in card


def test_the_model_cards_client_turns_an_image_upright_as_predict_does(tiny_release: Path, tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    Image.fromarray(draw_probes()[2][0]).save(tmp_path / "image.png", exif=orientation)
    card = (tiny_release / "MODEL_CARD.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    program = found[1].replace('"1/', f'"{tiny_release}/1/') + "print(probabilities.tolist())"
    shown = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    (expected,) = predict(tiny_release, [tmp_path / "image.png"])
    assert json.loads(shown.stdout) == pytest.approx(list(expected["probabilities"].values()), abs=1e-6)


def test_a_name_cannot_write_markup_into_the_model_card(tiny_release: Path) -> None:
    description = json.loads((tiny_release / "release.json").read_text(encoding="utf-8"))
    description["inputs"][0]["hospital"] = "x|<b>\n# y"
    description["head"] = {"kind": "closed-form", "hospitals": ["a"], "images": 9, "note": "as merged for <b>|c"}
    card = model_card(description)
    assert r"| x\|\<b\> \# y | 120 |" in card
    assert r"as merged for \<b\>\|c" in card


def test_the_probes_are_photographs_of_several_shapes_with_torchs_logits(tiny_release: Path) -> None:
    images, logits = load_probes(tiny_release / "probes.npz")
    assert len({batch.shape for batch in images}) == len(images) == len(logits) >= 3
    for batch in images:
        assert batch.dtype == np.uint8
        assert batch.std() > 10  # something is drawn on them
        steps = np.abs(np.diff(batch.astype(int), axis=2)).mean()
        assert steps < batch.std()  # and it is no noise


def test_nothing_of_the_machine_is_in_the_model(tiny_release: Path) -> None:
    model = onnx.load(tiny_release / "1/model.onnx")
    assert [node.name for node in model.graph.node if node.doc_string or node.metadata_props] == []
    content = (tiny_release / "1/model.onnx").read_bytes()
    assert not re.search(rb"\.py\b|stack_trace|site-packages|" + re.escape(str(Path.home()).encode()) + rb"/", content)


def test_the_same_inputs_give_the_same_bytes_in_another_process(tiny_release: Path, tmp_path: Path) -> None:
    program = """
from pathlib import Path
from datavector.release import write_release
from tests.datavector.release.samples import lineage, tiny, tiny_base
write_release(Path("release"), network=tiny(), base=tiny_base(Path("base")), lineage=lineage())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert contents(tmp_path / "release") == contents(tiny_release)


def test_the_graph_sees_what_training_saw(tiny_release: Path) -> None:
    """Training rounds the resized pixels to whole numbers; beyond that half step nothing may differ."""
    image = draw_probes()[2][0]
    trained_on = preprocess(resize(image, 24)[None], INPUT)
    with torch.no_grad():
        expected = tiny()(trained_on).numpy()
    found = onnx_logits(open_session(tiny_release, gpu=False), [image[None]])[0]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_exporting_leaves_the_network_as_it_was() -> None:
    network = tiny()
    before = copy.deepcopy(network.state_dict())
    export_onnx(Served(network, INPUT).eval(), opset=20)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_folding_batchnorm_changes_no_answer() -> None:
    network, images = tiny(), torch.randn(3, 3, 24, 24)
    folded = fold_batchnorm(network, images[:1])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        assert torch.allclose(folded(images), network(images), atol=1e-5)


class Branching(nn.Module):
    """Two BatchNorm layers read one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images)
        sum_: torch.Tensor = self.first(features) + 2 * self.second(features)
        return sum_


class Repeating(nn.Module):
    """One convolution and one BatchNorm layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        once: torch.Tensor = self.norm(self.conv(images))
        return once + self.conv(once)


@pytest.mark.parametrize("kind", [Branching, Repeating])
def test_layers_that_are_used_twice_are_not_folded(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, images = kind(), torch.randn(8, 3, 8, 8)
    network(images)  # statistics
    for module in network.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    with torch.no_grad():
        assert torch.allclose(fold_batchnorm(network, images)(images), network(images), atol=1e-5)


def test_a_complete_release_that_is_there_already_is_left_as_it_is(altered: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in altered.rglob("*")}
    later = lineage(created="2027-01-01T00:00:00+00:00")
    assert write_release(altered, network=tiny(), base=tiny_base(tmp_path / "base"), lineage=later) == altered
    assert {path: path.stat().st_mtime_ns for path in altered.rglob("*")} == before


def test_what_a_killed_run_left_behind_is_replaced(tmp_path: Path, tiny_release: Path) -> None:
    partial = tmp_path / ".release.partial"
    (partial / "1").mkdir(parents=True)
    (partial / "1/model.onnx").write_bytes(b"half")
    write_release(tmp_path / "release", network=tiny(), base=tiny_base(tmp_path / "base"), lineage=lineage())
    assert not partial.exists()
    assert contents(tmp_path / "release") == contents(tiny_release)


@pytest.mark.parametrize("damage", ["altered", "no sums", "other version"])
def test_something_else_in_its_place_is_neither_used_nor_replaced(altered: Path, tmp_path: Path, damage: str) -> None:
    wanted = lineage()
    match damage:
        case "altered":
            (altered / "labels.txt").write_text("x\n")
        case "no sums":
            (altered / "SHA256SUMS").unlink()
        case "other version":
            wanted = lineage(version="brain-ffffffffff")
    before = contents(altered)
    with pytest.raises(ReleaseError, match="release"):
        write_release(altered, network=tiny(), base=tiny_base(tmp_path / "base"), lineage=wanted)
    assert contents(altered) == before


def broken(kind: str) -> nn.Module:
    network = tiny()
    with torch.no_grad():
        match kind:
            case "constant":
                network.head.weight.zero_()  # type: ignore[union-attr, operator]
            case "not finite":
                network.head.weight[0, 0] = float("nan")  # type: ignore[union-attr, index, operator]
    return network


@pytest.mark.parametrize("kind", ["constant", "not finite"])
def test_a_network_whose_logits_mean_nothing_is_not_released(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="hardly depend on the image"):
        write_release(tmp_path / "r", network=broken(kind), base=tiny_base(tmp_path / "b"), lineage=lineage())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_opset_without_antialiased_resize_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="opset 17"):
        write_release(tmp_path / "r", network=tiny(), base=tiny_base(tmp_path / "b"), lineage=lineage(), opset=17)


class Untraceable(nn.Module):
    """Its work depends on the values of its input, which no graph can say."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits if float(images.mean()) > 0.1 else 2 * logits


def test_a_network_that_no_graph_can_express_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="cannot be exported"):
        write_release(tmp_path / "r", network=Untraceable().eval(), base=tiny_base(tmp_path / "b"), lineage=lineage())
