"""What `datavector merge` does with what it was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from datavector.checkpoints import merge_files
from datavector.console import progress, say
from datavector.errors import ConfigError
from datavector.merge import find, methods


def merge_command(
    base: Path, models: Sequence[Path], method: str, parameters: Sequence[str], output: Path, samples: Sequence[int]
) -> None:
    """Merges, shows how far it is, and says what came of it."""
    with progress(f"merging {len(models)} models") as show:
        statistics = merge_files(
            base, models, method, parse_parameters(parameters), output, samples=samples, progress=show
        )
    say(f"{output}: {method} of {len(models)} models, {output.stat().st_size:,} bytes")
    if statistics:
        say("its BatchNorm statistics are the base's: measure them again on your data before use")


def parse_parameters(texts: Sequence[str]) -> dict[str, float]:
    """
    Raises:
        ConfigError: one is not name=number.
    """
    parameters = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            parameters[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--param {text} is not name=number", remedy="such as --param density=0.2") from None
    return parameters


def show_methods() -> None:
    """Prints every method with its parameters' defaults and its paper."""
    table = Table("method", "parameters", "what it does")
    for name in methods():
        found = find(name)
        table.add_row(name, ", ".join(f"{key}={value:g}" for key, value in found.parameters.items()), found.summary)
    Console().print(table)
