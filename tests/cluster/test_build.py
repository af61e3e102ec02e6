"""Where Kubernetes cannot be built, one sentence says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.build import CONTROL_PLANE, CannotBuild, build


@pytest.fixture
def path_of_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the whole PATH, and an empty cache."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def write_go(folder: Path, script: str) -> None:
    """A program `go` that answers for its version, and then goes on as the script says."""
    (folder / "go").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "go").chmod(0o755)


def test_without_go_nothing_is_built(path_of_programs: Path):
    with pytest.raises(CannotBuild, match="there is no Go here"):
        build(CONTROL_PLANE)


def test_an_old_go_is_refused(path_of_programs: Path):
    write_go(path_of_programs, "echo go1.23.4")
    with pytest.raises(CannotBuild, match=r"needs Go 1\.24 or newer, and here is go1\.23\.4"):
        build(CONTROL_PLANE)


def test_a_build_that_fails_says_its_last_line_and_leaves_nothing(path_of_programs: Path, tmp_path: Path):
    write_go(path_of_programs, '[ "$1" = env ] && echo go1.26.0 && exit 0; echo first >&2; echo disk full >&2; exit 1')
    with pytest.raises(CannotBuild, match=r"\(control-plane\) could not be built: disk full"):
        build(CONTROL_PLANE)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["control-plane.lock"]


def test_what_is_built_is_found_again(path_of_programs: Path, tmp_path: Path):
    write_go(path_of_programs, '[ "$1" = env ] && echo go1.26.0 && exit 0; exit 0')
    folder = build(CONTROL_PLANE)
    write_go(path_of_programs, '[ "$1" = env ] && echo go1.26.0 && exit 0; exit 1')
    assert build(CONTROL_PLANE) == folder
    assert {path.name for path in folder.iterdir()} == set(CONTROL_PLANE.links)
