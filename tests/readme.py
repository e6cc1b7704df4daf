"""Shell commands of the README and of docs/, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
"""All pages, the README first: others go on from what its commands made."""


def readme_commands() -> list[str]:
    """Commands of the pages' shell blocks, without comments, continued lines joined."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def readme_words(start: str) -> list[str]:
    """The words of the first command that starts so."""
    command = next(command for command in readme_commands() if command.startswith(start))
    return shlex.split(command)


def readme_snippets() -> list[str]:
    """The pages' blocks of Python."""
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
