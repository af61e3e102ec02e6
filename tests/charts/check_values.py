"""Tells whether the charts' values, their schemas and their READMEs agree; --write makes them so.

The sentences above the values in values.yaml are the source: they become the schema's descriptions, and the table in
README.md. What a value may be stands in values.schema.json alone, whose keys must be those of values.yaml.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHARTS = Path(__file__).parents[2] / "charts"
WITH_VALUES = ("aggregator", "agent")
BEGIN, END = "<!-- values -->\n", "<!-- end of values -->\n"

Json = dict[str, Any]


def sentences(text: str) -> dict[str, str]:
    """What stands right above each key of a values.yaml, by its dotted path."""
    found: dict[str, str] = {}
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        if said := re.match(r" *# ?(.*)", line):
            comment.append(said[1])
            continue
        if key := re.match(r"((?:  )*)([\w.-]+):", line):
            path = [*path[: len(key[1]) // 2], key[2]]
            found[".".join(path)] = " ".join(comment)
        comment = []
    return found


def leaves(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every key that a schema names, groups before what is in them; `global` is helm's own."""
    for name, part in schema.get("properties", {}).items():
        if path or name != "global":
            yield f"{path}{name}", part
            yield from leaves(part, f"{path}{name}.")


def differences(schema: Json, values: Json, path: str = "") -> Iterator[str]:
    """Keys that only one of the two has, and groups that would let a misspelt key pass."""
    known = set(schema["properties"]) - ({"global"} if not path else set())
    for name in sorted(known ^ values.keys()):
        yield f"{path}{name} is not in {'values.yaml' if name in known else 'values.schema.json'}"
    if schema.get("additionalProperties") is not False:
        yield f"{path or 'the schema'} takes unknown keys"
    for name in sorted(known & values.keys()):
        part = schema["properties"][name]
        if "type" not in part and "enum" not in part:
            yield f"{path}{name} has no type"
        if "properties" in part:
            yield from differences(part, values[name], f"{path}{name}.")


def table(schema: Json, values: Json, said: dict[str, str]) -> str:
    """The table of README.md. A group has a line where there is a sentence about it."""
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for path, part in leaves(schema):
        default = "" if "properties" in part else f"`{json.dumps(_at(values, path), ensure_ascii=False)}`"
        if said[path]:
            meaning = said[path].replace("|", "\\|").replace("<", "\\<")
            rows.append(f"| `{path}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def expected(chart: str) -> dict[Path, str]:
    """The text that schema and README of a chart should have, by path.

    Raises:
        SystemExit: the values and the schema have different keys, or a value has no sentence.
    """
    folder = CHARTS / chart
    text = (folder / "values.yaml").read_text()
    values, said = yaml.safe_load(text), sentences(text)
    schema = json.loads((folder / "values.schema.json").read_text())
    problems = list(differences(schema, values))
    if not problems:
        problems = [f"{path} has no sentence" for path, part in leaves(schema) if not said[path]]
    if problems:
        sys.exit(f"charts/{chart}: {'; '.join(problems)}")
    for path, part in leaves(schema):
        part["description"] = said[path]
    for part in [schema, *(each for _, each in leaves(schema))]:
        if "properties" in part:  # so that a value of null, which helm takes for absent, is refused by its name
            part["required"] = [name for name in part["properties"] if name != "global"]
    readme = (folder / "README.md").read_text()
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return {
        folder / "values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        folder / "README.md": f"{before}{BEGIN}{table(schema, values, said)}{END}{after}",
    }


def stale() -> list[str]:
    """Files that do not say what values.yaml says."""
    wanted = {path: text for chart in WITH_VALUES for path, text in expected(chart).items()}
    return [str(path.relative_to(CHARTS.parent)) for path, text in wanted.items() if path.read_text() != text]


def main() -> None:
    if "--write" in sys.argv:
        for chart in WITH_VALUES:
            for path, text in expected(chart).items():
                path.write_text(text)
        return
    if names := stale():
        sys.exit(f"not current: {', '.join(names)}; run `python tests/charts/check_values.py --write`")
    print("values, schemas and READMEs of the charts are current")


def _at(values: Json, path: str) -> Any:
    for name in path.split("."):
        values = values[name]
    return values


if __name__ == "__main__":
    main()
