"""What a model or a dataset of the Hugging Face Hub is called, and when an argument that names no file means one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
"""The form of ``org/name``."""
FILE_ENDS = (
    *(".txt", ".jsonl", ".json", ".md", ".csv", ".parquet", ".gz", ".zip"),
    *(".safetensors", ".gguf", ".bin", ".pt"),
)
"""What has the form of a repository's name but ends so was meant as a file."""
_MODEL = re.compile(rf"({REPOSITORY})(?:@([^@\s]+))?")


class ModelName(NamedTuple):
    """A model ``org/name`` and its branch, tag or commit; None for the default branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def model_name(text: str) -> ModelName | None:
    """Return what ``org/name`` or ``org/name@revision`` names; None for whatever exists here or has another form."""
    found = _MODEL.fullmatch(text)
    if found is None or is_file_name(found[1]) or Path(text).exists():
        return None
    return ModelName(found[1], found[2])


def is_file_name(repository: str) -> bool:
    """Return whether what looks like a repository ends like a file."""
    return repository.lower().endswith(FILE_ENDS)


def hub_origin(folder: Path) -> tuple[str, str] | None:
    """Return the repository and commit of a folder in the Hub's cache; None for any other folder."""
    root = folder.resolve()
    home = root.parent.parent.name
    if root.parent.name != "snapshots" or not home.startswith("models--"):
        return None
    return home.removeprefix("models--").replace("--", "/", 1), root.name


def first_line(error: BaseException) -> str:
    """Return the first line that an error of a library says, without its full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
