"""A release that was altered does not verify, and the report names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datavector.errors import ReleaseError
from datavector.release import verify_release
from datavector.release.checksums import write_sums
from datavector.release.probes import load_probes, save_probes
from tests.datavector.release.test_write import FILES


def test_an_untouched_release_verifies(tiny_release: Path) -> None:
    report = verify_release(tiny_release)
    assert report.ok, report.checks
    assert [check.name for check in report.checks] == [
        "files",
        "onnx",
        "opset",
        "metadata",
        "labels",
        "report",
        "interface",
        "spread",
        "parity",
    ]


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(name: str, altered: Path, data: st.DataObject) -> None:
    original = (altered / name).read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    content = bytearray(original)
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (altered / name).write_bytes(content)
    try:
        failure = failure_of(altered)
    finally:
        (altered / name).write_bytes(original)
    if name != "SHA256SUMS":
        assert f"altered: {name}" in failure


def failure_of(release: Path) -> str:
    """What is wrong with a release, in words."""
    try:
        report = verify_release(release)
    except ReleaseError as error:
        return str(error)
    assert not report.ok
    return "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.ok)


@pytest.mark.parametrize(
    "change",
    [
        lambda sums: sums[:-1] + b"\x0b",  # which str.splitlines takes for an end of line, sha256sum does not
        lambda sums: sums[:-1],
        lambda sums: b"".join(sorted(sums.splitlines(keepends=True), reverse=True)),
        lambda sums: sums + sums.splitlines(keepends=True)[-1],
        lambda sums: sums.upper(),
    ],
    ids=["another last byte", "no last byte", "another order", "a line twice", "capitals"],
)
def test_checksums_in_another_form_are_refused(change: Callable[[bytes], bytes], altered: Path) -> None:
    sums = altered / "SHA256SUMS"
    sums.write_bytes(change(sums.read_bytes()))
    with pytest.raises(ReleaseError, match="no list of SHA-256 checksums"):
        verify_release(altered)


def test_a_missing_and_an_extra_file_are_named(altered: Path) -> None:
    (altered / "labels.txt").rename(altered / "etiquettes.txt")
    assert "missing: labels.txt; not listed: etiquettes.txt" in failure_of(altered)


def test_an_altered_model_is_not_loaded(altered: Path) -> None:
    (altered / "1/model.onnx").write_bytes(b"anything")
    assert [check.name for check in verify_release(altered).checks] == ["files"]


@pytest.mark.parametrize("content", [None, b"", b"no sums here\n", b"\xff\xfe"])
def test_a_folder_without_checksums_is_no_release(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(ReleaseError, match="SHA256SUMS"):
        verify_release(tmp_path)


def test_a_folder_that_does_not_exist_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="cannot be read"):
        verify_release(tmp_path / "nowhere")


def another_label(release: Path) -> None:
    text = (release / "labels.txt").read_text(encoding="utf-8")
    (release / "labels.txt").write_text(text.replace("glioma", "nothing"), encoding="utf-8")


def another_hospitals_vector(release: Path) -> None:
    description = json.loads((release / "release.json").read_text(encoding="utf-8"))
    description["inputs"][0]["digest"] = f"sha256:{'c' * 64}"
    (release / "release.json").write_text(json.dumps(description), encoding="utf-8")


def another_opset_in_json(release: Path) -> None:
    description = json.loads((release / "release.json").read_text(encoding="utf-8"))
    description["opset"] = 19
    (release / "release.json").write_text(json.dumps(description), encoding="utf-8")


def another_releases_report(release: Path) -> None:
    text = (release / "report.html").read_text(encoding="utf-8")
    (release / "report.html").write_text(text.replace("brain-0123456789", "brain-ffffffffff"), encoding="utf-8")


def no_report(release: Path) -> None:
    (release / "report.html").unlink()


def no_json(release: Path) -> None:
    (release / "release.json").write_text("{")


def model(release: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    loaded = onnx.load(release / "1/model.onnx")
    change(loaded)
    onnx.save(loaded, release / "1/model.onnx")


def other_weights(release: Path) -> None:
    def change(loaded: onnx.ModelProto) -> None:
        largest = max(loaded.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        largest.raw_data = (np.frombuffer(largest.raw_data, "<f4") * np.float32(1.05)).tobytes()

    model(release, change)


def fixed_height(release: Path) -> None:
    def change(loaded: onnx.ModelProto) -> None:
        loaded.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 128
        del loaded.graph.value_info[:]

    model(release, change)


def invalid_node(release: Path) -> None:
    def change(loaded: onnx.ModelProto) -> None:
        loaded.graph.node[0].op_type = "Transposition"

    model(release, change)


def no_model(release: Path) -> None:
    (release / "1/model.onnx").write_bytes(b"\x00not a model")


def constant_logits(release: Path) -> None:
    images, logits = load_probes(release / "probes.npz")
    save_probes(release / "probes.npz", images, [np.zeros_like(rows) for rows in logits])


def no_probes(release: Path) -> None:
    np.savez(release / "probes.npz")


@pytest.mark.parametrize(
    ("alter", "check"),
    [
        (another_label, "labels"),
        (another_hospitals_vector, "metadata"),
        (another_opset_in_json, "opset"),
        (another_releases_report, "report"),
        (no_report, "report"),
        (no_json, "metadata"),
        (other_weights, "parity"),
        (fixed_height, "interface"),
        (invalid_node, "onnx"),
        (no_model, "onnx"),
        (constant_logits, "spread"),
        (no_probes, "parity"),
    ],
)
def test_fresh_checksums_do_not_hide_an_alteration(alter: Callable[[Path], None], check: str, altered: Path) -> None:
    alter(altered)
    write_sums(altered)
    report = verify_release(altered)
    assert report.checks[0].ok
    assert check in [each.name for each in report.checks if not each.ok]
