"""docs/inference.md can be typed as it stands: its code runs on a release, Triton's configuration fits it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image

from datavector.release import write_release
from tests.datavector.release.samples import CLASSES, lineage, tiny, tiny_base
from tests.integration.processes import ENVIRONMENT, ROOT, free_port, until
from tests.integration.test_readme import blocks, typed

PAGE = (ROOT / "docs" / "inference.md").read_text()
LINES = [line for kind, text in blocks(PAGE) if kind == "console" for line in typed(text)]
LINES.remove("datavector release fetch --config agent.toml --output model")  # test_readme.py has an aggregator for it
TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}  # ONNX Runtime's and Triton's


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the page is: `model` is a release, and `image.jpg` an image."""
    folder = tmp_path_factory.mktemp("client")
    write_release(folder / "model", network=tiny(), base=tiny_base(folder / "base"), lineage=lineage())
    pixels = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.jpg")
    return folder


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_page_succeeds(folder: Path, line: str):
    run(folder, "bash", "-euc", line)


def test_the_python_example_prints_label_probability_and_version_of_each_image(folder: Path):
    lines = run(folder, sys.executable, "-c", code("load(path)")).splitlines()
    assert len(lines) == 2
    label, probability, version = re.fullmatch(r"(.+) ([\d.e-]+) (\S+)", lines[0]).groups()  # type: ignore[union-attr]
    assert label in CLASSES
    assert 1 / len(CLASSES) <= float(probability) <= 1
    assert version == lineage().version


def test_the_gpu_example_falls_back_to_the_cpu(folder: Path):
    assert "CPUExecutionProvider" in run(folder, sys.executable, "-c", code("preload_dlls"))


def test_the_lineage_example_names_every_hospital_with_its_vector(folder: Path):
    printed = run(folder, sys.executable, "-c", code("release.json"))
    for entry in lineage().inputs:
        assert f"{lineage().version} {entry['hospital']} {entry['sampleCount']} {entry['digest']}" in printed


def test_the_client_gets_the_models_answer_from_the_server(folder: Path):
    port = free_port()
    with server(folder, port):
        client = code("# client.py").replace("localhost:8000", f"127.0.0.1:{port}")
        printed = run(folder, sys.executable, "-c", client).strip()
    shape, values = re.fullmatch(r"(\[.*?\]) (\[.*\])", printed).groups()  # type: ignore[union-attr]
    image = np.asarray(Image.open(folder / "image.jpg"))[None]
    (expected,) = session(folder).run(["probabilities"], {"images": image})
    assert json.loads(shape) == list(expected.shape)
    assert np.allclose(json.loads(values), expected[0], atol=1e-6)


def test_tritons_configuration_says_of_inputs_and_outputs_what_the_model_says(folder: Path):
    text = (folder / "model" / "config.pbtxt").read_text()
    configured = {
        name: (kind, [int(size) for size in sizes.split(",")])
        for name, kind, sizes in re.findall(r'name: "(\w+)"\s+data_type: (\w+)\s+dims: \[([^]]+)\]', text)
    }
    opened = session(folder)
    model = {
        value.name: (TYPES[value.type], [size if isinstance(size, int) else -1 for size in value.shape[1:]])
        for value in (*opened.get_inputs(), *opened.get_outputs())
    }  # Triton's sizes leave the batch out, where there is a max_batch_size
    assert configured == model
    assert int(re.findall(r"max_batch_size: (\d+)", text)[0]) > 1
    for name in re.findall(r'label_filename: "(.+)"', text):
        assert len((folder / "model" / name).read_text().splitlines()) == len(CLASSES)


def test_the_manifests_mount_and_ask_what_the_page_says():
    shown = [document for kind, text in blocks(PAGE) if kind == "yaml" for document in yaml.safe_load_all(text)]
    manifests: dict[str, Any] = {document["kind"]: document for document in shown}
    assert set(manifests) == {"InferenceService", "Deployment", "Service"}
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert f'("", {container["ports"][0]["containerPort"]})' in code("# serve.py")
    assert manifests["Service"]["spec"]["selector"] == manifests["Deployment"]["spec"]["selector"]["matchLabels"]
    assert manifests["InferenceService"]["metadata"]["name"] in code("# client.py")


def code(mark: str) -> str:
    """The one Python block of the page that has this text."""
    (found,) = [text for kind, text in blocks(PAGE) if kind == "python" and mark in text]
    return found


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """Runs the page's server on loopback."""
    text = code("# serve.py").replace('("", 8000)', f'("127.0.0.1", {port})')
    with subprocess.Popen([sys.executable, "-c", text], cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: process.poll() is not None or is_ready(port), "the server")
            yield
        finally:
            process.kill()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=10):
            return True
    except OSError:
        return False


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / "model/1/model.onnx"), providers=["CPUExecutionProvider"])


def run(folder: Path, *command: str) -> str:
    """What a command prints, that must succeed; `datavector` is on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
