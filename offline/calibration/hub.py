"""A calibration text from a dataset of the Hugging Face Hub, of which no more is read than fills the windows.

The library ``datasets`` does the reading; it is needed for this alone, and may be absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConversionError
from ..hub_names import REPOSITORY, first_line, is_file_name
from .documents import COLUMNS, Document, document_of

SHUFFLED = 256
"""Rows that are read ahead, to be taken in an order of the seed's."""
DOWNLOAD = "or download the dataset and pass a file: a UTF-8 text, or .jsonl"
_NAME = re.compile(rf"({REPOSITORY})(?::([^:/\s]*))?(?::([^:/\s]+))?")


class HubName(NamedTuple):
    """A dataset ``org/name``, its configuration and split; None where it has one only, or the first will do."""

    dataset: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        return ":".join([self.dataset, self.config or "", self.split or ""]).rstrip(":")


def hub_name(how: str) -> HubName | None:
    """Return what ``org/name``, ``org/name:config``, ``org/name:config:split`` or ``org/name::split`` names.

    None for whatever is a file, ends like one, or has another form.
    """
    found = _NAME.fullmatch(how)
    if found is None or is_file_name(found[1]) or Path(how).is_file():
        return None
    return HubName(found[1], found[2] or None, found[3] or None)


def hub_documents(name: HubName, seed: int) -> Iterator[Document]:
    """Yield the documents of a dataset, in an order of the seed's.

    Raises:
        ConversionError: the library is missing, the dataset is not there or cannot be reached, or no column of it
            holds texts or chats.
    """
    rows = _split(_load(name), name).shuffle(seed=seed, buffer_size=SHUFFLED)
    column = None
    for row in _read(rows, name):
        column = column or _column(rows.column_names or list(row), name)
        document = document_of({column: row.get(column)})
        if document is not None:  # datasets hold empty lines
            yield document


def _load(name: HubName) -> Mapping[str, Any]:
    """Return the splits of a dataset, none of which is read yet."""
    try:
        import datasets
    except ImportError as error:
        raise ConversionError(
            f"{name}: there is no such file; to read the dataset of this name from the Hugging Face Hub, install the "
            f"library: pip install datasets (or vllm-milo[datasets]), {DOWNLOAD}"
        ) from error
    try:
        return datasets.load_dataset(name.dataset, name.config, streaming=True)
    except FileNotFoundError as error:
        raise ConversionError(
            f"{name}: there is neither such a file nor such a dataset on the Hugging Face Hub: {first_line(error)}"
        ) from error
    except Exception as error:  # of the library, and of what it reads with: it has no class for them
        raise _unreadable(name, error) from error


def _split(splits: Mapping[str, Any], name: HubName) -> Any:
    """Return the split that is named, or else ``train``, or else the first."""
    if name.split is None:
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    if name.split not in splits:
        raise ConversionError(
            f"{name}: the dataset has no split {name.split!r}; it has {', '.join(splits)}, given as NAME:CONFIG:SPLIT"
        )
    return splits[name.split]


def _read(rows: Iterable[Mapping[str, Any]], name: HubName) -> Iterator[Mapping[str, Any]]:
    """Iterate over the rows of a dataset, each of which may have to come over the network."""
    reading = iter(rows)
    while True:
        try:
            row = next(reading)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(name, error) from error
        yield row


def _column(columns: list[str], name: HubName) -> str:
    for column in COLUMNS:
        if column in columns:
            return column
    raise ConversionError(
        f"{name}: the dataset has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, but {', '.join(columns)}; "
        f"write what is wanted of it to a .jsonl file and pass that"
    )


def _unreadable(name: HubName, error: Exception) -> ConversionError:
    if isinstance(error, ConnectionError | TimeoutError):
        reason = f"cannot be reached: {first_line(error)}; is there a network? Try again, {DOWNLOAD}"
    else:
        reason = f"cannot be read: {first_line(error)} ({type(error).__name__}); {DOWNLOAD}"
    return ConversionError(f"{name}: there is no such file, and the dataset of this name {reason}")
