"""Arguments that name a model of the Hugging Face Hub become folders here; checkpoints go to the Hub."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import ShardError
from vllm_milo.values import size_text

from ..errors import ConversionError
from ..evaluation.verify import verify_checkpoint
from ..hub_names import REPOSITORY, ModelName, model_name

if TYPE_CHECKING:
    from ..hub.listing import Listing
    from ..source.reader import Shards

PLACES = ("model", "checkpoint", "reference")
"""Arguments that name a folder, or a model of the Hub."""


def filled(text: str) -> str:
    """Return an argument, which must not be empty: as a path it would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; is a shell variable unset?")
    return text


def path(text: str) -> Path:
    """Return the file or folder that an argument names."""
    return Path(filled(text))


def model_place(text: str) -> Path | ModelName:
    """Return the folder or the model of the Hub that an argument names; what exists is a folder."""
    return model_name(text) or path(text)


def target_repository(text: str) -> str:
    """Return the argument of ``--push-to``, after checking its form."""
    if not re.fullmatch(REPOSITORY, text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a repository; give org/name")
    return text


def run(arguments: argparse.Namespace) -> None:
    """Run a subcommand, with models of the Hub downloaded, and push what it made where that is asked for.

    A subcommand with ``headers_only`` gets a folder without weights. One with ``check`` is asked, with such a folder,
    whether it could run at all, before the weights are downloaded.

    Raises:
        ConversionError, CheckpointError, ShardError: the subcommand's, and what goes wrong with the Hub.
    """
    target = getattr(arguments, "push_to", None)
    if target is None and getattr(arguments, "private", False):
        raise ConversionError("--private is for --push-to alone")
    if target is not None:
        from ..hub.upload import check_target  # like all of hub/ only where it is needed: the library takes a second

        check_target(target)
    if getattr(arguments, "delete_source_shards", False) and not isinstance(arguments.model, ModelName):
        raise ConversionError(
            f"--delete-source-shards: {arguments.model} is a folder, from which nothing is deleted; the option is for "
            f"models of the Hugging Face Hub, org/name"
        )
    with contextlib.ExitStack() as stack:
        names = {place: getattr(arguments, place, None) for place in PLACES}
        for place, name in names.items():
            if isinstance(name, ModelName):
                setattr(arguments, place, stack.enter_context(_folder(arguments, place, name)))
        made = arguments.run(arguments)
    if target is not None and made is not None:
        _push(made, target, arguments)


@contextlib.contextmanager
def _folder(arguments: argparse.Namespace, place: str, name: ModelName) -> Iterator[Path]:
    """Yield the folder that stands for a model of the Hub."""
    from ..hub import download, headers, shards
    from ..hub.listing import look_up

    headers_only = getattr(arguments, "headers_only", False) or getattr(arguments, "dry_run", False)
    streamed = getattr(arguments, "delete_source_shards", False)
    if download.is_offline():
        if streamed:
            raise ConversionError("--delete-source-shards downloads, and HF_HUB_OFFLINE is set; leave one of them out")
        yield download.cached(name)
        return
    listing = look_up(name)
    if streamed and not headers_only:
        yield _streamed(arguments, name, listing)
        return
    if headers_only:
        if missing := listing.missing_bytes:
            print(
                f"note: {name}: only headers are read; the whole takes a download of {size_text(missing)}",
                file=sys.stderr,
            )
        with headers.stand_in(listing) as folder, _called(name, folder):
            if streamed:
                arguments.shards = shards.HubShards(listing, folder, folder)
            yield folder
        return
    check = getattr(arguments, "check", None)
    if check is not None and listing.missing_bytes:
        with headers.stand_in(listing) as folder, _called(name, folder):
            trial = copy.copy(arguments)
            setattr(trial, place, folder)
            check(trial)
    yield download.download(listing)


def _streamed(arguments: argparse.Namespace, name: ModelName, listing: Listing) -> Path:
    """Return the folder of a model's settings, and let the arguments hold its shards, which come when they are used.

    The conversion's own checks need no weights, so nothing is to be tried before.
    """
    from ..hub import download, headers, shards

    settings = download.download_settings(listing)
    with headers.stand_in(listing) as folder, _called(name, folder):
        held: Shards = shards.HubShards(listing, folder, settings)
    arguments.shards = held
    return settings


@contextlib.contextmanager
def _called(name: ModelName, folder: Path) -> Iterator[None]:
    """Let what is printed and raised speak of the model, not of the folder that stands for it for a moment."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except (ConversionError, CheckpointError, ShardError) as error:
        raise type(error)(str(error).replace(str(folder), str(name))) from error
    finally:
        print(said.getvalue().replace(str(folder), str(name)), end="")


def _push(folder: Path, target: str, arguments: argparse.Namespace) -> None:
    from ..hub.upload import upload

    verdict = verify_checkpoint(folder, progress=not arguments.quiet)
    if not verdict.good:
        raise ConversionError(f"{folder}: is not pushed to {target}: {verdict.problems[0]}")
    print(f"{folder}: pushed to {upload(folder, target, arguments.private)}")
