"""Pages of the documentation as a person follows them: their blocks of code, files to write and commands to type."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
FILE = re.compile(r"# (\S+\.yaml)\n")


def page(name: str, replacements: Mapping[str, str] | None = None) -> str:
    """A page's text, with other names, and less to compute and to wait for; what is replaced must be there.

    Args:
        name: path below the project, such as docs/hospital.md.
        replacements: what stands instead of what the page shows.
    """
    text = (ROOT / name).read_text()
    for shown, instead in (replacements or {}).items():
        assert shown in text, f"{name} does not show {shown!r}"
        text = text.replace(shown, instead)
    return text


def section(text: str, heading: str) -> str:
    """What is below a heading, sections below it included.

    Raises:
        LookupError: there is no such heading.
    """
    outside = re.sub(r"^```.*?^```", lambda block: re.sub("^#", " ", block[0], flags=re.M), text, flags=re.S | re.M)
    found = list(HEADING.finditer(outside))
    for number, each in enumerate(found):
        if each[2] == heading:
            ends = (later.start() for later in found[number + 1 :] if len(later[1]) <= len(each[1]))
            return text[each.end() : next(ends, len(text))]
    raise LookupError(f"no section {heading!r}")


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each block of code, in their order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def typed(block: str) -> list[str]:
    """The commands after the prompts of a block."""
    return [line[2:] for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]


def steps(text: str) -> Iterator[tuple[str, str]]:
    """What a reader does, in its order: a file's name and content, or an empty name and a command.

    A block of YAML is a file where its first line is a comment with the name.
    """
    for language, content in blocks(text):
        if language == "yaml" and (named := FILE.match(content)):
            yield named[1], content
        elif language == "console":
            for line in typed(content):
                yield "", line


@dataclass
class Terminal:
    """A shell in a folder, as a reader has it open; it keeps what was typed and printed.

    Attributes:
        folder: where commands run and files are written.
        environment: of the commands.
        transcript: where everything is written down.
    """

    folder: Path
    environment: Mapping[str, str]
    transcript: Path

    def follow(self, text: str) -> dict[str, str]:
        """Does what a part of a page says; what each command printed.

        Raises:
            AssertionError: a command failed; the message is what it printed.
        """
        done = {}
        for name, content in steps(text):
            if name:
                (self.folder / name).write_text(content)
            else:
                done[content] = self.type(content)
        return done

    def type(self, line: str) -> str:
        """Runs one line; what it printed, errors included."""
        answer = subprocess.run(
            ["bash", "-o", "pipefail", "-ec", line],
            cwd=self.folder, env=dict(self.environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with self.transcript.open("a") as file:
            file.write(f"$ {line}\n{answer.stdout}\n")
        assert answer.returncode == 0, f"$ {line}\n{answer.stdout}"
        return answer.stdout
