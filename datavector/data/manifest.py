"""CSV manifests: `file,label[,split][,group]`, further columns allowed, one line per image (RFC 4180, UTF-8).

Relative paths are relative to the manifest's folder; absolute ones and `..` may lead anywhere, as the manifest is the
hospital's own. `split` is train, val (valid, validation), test or empty; `group` names the patient.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datavector.data.records import EXTENSIONS, SPLITS, Record, is_image
from datavector.errors import NoImages, UnreadableData
from datavector.files import atomic_write

COLUMNS = ("file", "label")


def read_manifest(path: Path) -> list[Record]:
    """The records of a manifest, sorted.

    Raises:
        UnreadableData: it cannot be read, a column is missing, or a line is wrong (the message names the line).
        NoImages: it has no line below its header.
    """
    return sorted(record for record, _ in _read(path, COLUMNS))


def read_by_column(path: Path, column: str) -> dict[str, list[Record]]:
    """The records of a manifest by the value of a further column, which may be empty; values and records sorted.

    Raises:
        As `read_manifest`.
    """
    found: dict[str, list[Record]] = {}
    for record, row in sorted(_read(path, (*COLUMNS, column)), key=lambda pair: pair[0]):
        found.setdefault((row[column] or "").strip(), []).append(record)
    return dict(sorted(found.items()))


def write_manifest(path: Path, records: Iterable[Record]) -> None:
    """Writes records with absolute paths, atomically. Splits are left out: who reads it decides."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("file", "label", "group"))
    writer.writerows((record.path.resolve(), record.label, record.group) for record in records)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _read(path: Path, columns: Sequence[str]) -> list[tuple[Record, Mapping[str, str | None]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            _demand_columns(path, rows.fieldnames or [], columns)
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableData(f"{path} cannot be read ({error})", remedy="save it as CSV in UTF-8") from error
    first: dict[Path, int] = {}
    records: list[tuple[Record, Mapping[str, str | None]]] = []
    for line, row in lines:
        record = _record(path, line, row)
        if (earlier := first.setdefault(record.path, line)) != line:
            raise _wrong(path, line, f"names {row['file']!r} again (first in line {earlier})", "keep one of the lines")
        records.append((record, row))
    if not records:
        raise NoImages(f"{path} lists no image", remedy="add a line file,label for each image")
    _demand_files(path, first)
    return records


def _demand_columns(path: Path, found: object, demanded: Sequence[str]) -> None:
    names = [str(name) for name in found] if isinstance(found, list) else []
    missing = [name for name in demanded if name not in names]
    if missing:
        separator = "; its columns must be separated by commas" if ";" in "".join(names) else ""
        raise UnreadableData(
            f"{path}, line 1: column {missing[0]!r} is missing, found are {', '.join(names) or 'none'}",
            remedy=f"begin the file with a line {','.join(demanded)} (split and group are optional){separator}",
        )


def _record(path: Path, line: int, row: Mapping[str, str | None]) -> Record:
    file, label, split, group = ((row.get(name) or "").strip() for name in ("file", "label", "split", "group"))
    if not file or not label:
        raise _wrong(path, line, f"has no {'label' if file else 'file'}", "fill it in, or remove the line")
    if split and split.lower() not in SPLITS:
        raise _wrong(path, line, f"has the unknown split {split!r}", "write train, val or test, or leave it empty")
    if not is_image(Path(file)):
        known = " ".join(name[1:] for name in EXTENSIONS)
        raise _wrong(path, line, f"names {file!r}, which is no image by its extension", f"use one of {known}")
    return Record(path.parent / file, label, SPLITS[split.lower()] if split else "", group)


def _demand_files(path: Path, lines: Mapping[Path, int]) -> None:
    absent = [image for image in lines if not image.is_file()]
    if absent:
        more = f"; {len(absent) - 1} more of {len(lines)} are absent too" if absent[1:] else ""
        raise _wrong(
            path,
            lines[absent[0]],
            f"names {absent[0]}, which is no readable file{more}",
            f"correct the paths: relative ones begin at {path.parent}",
        )


def _wrong(path: Path, line: int, what: str, remedy: str) -> UnreadableData:
    return UnreadableData(f"{path}, line {line}, {what}", remedy=remedy)
