"""A finished checkpoint goes to the Hub; whether it may is asked before the hours that it takes to make one."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import get_token

from ..errors import ConversionError
from ..hub_names import first_line
from .failures import TOKEN, one_line, status

MARK = "milo_report.json"
"""A file of every MiLo checkpoint; a repository with weights and without it holds another model."""


def check_target(repository: str) -> None:
    """Check what can be known of an upload before there is anything to upload. Nothing is created.

    Raises:
        ConversionError: there is no token, it may not write, the Hub cannot be reached, or the repository holds a model
            that is no MiLo checkpoint.
    """
    what = f"--push-to {repository}"
    with one_line(what):
        if constants.is_offline_mode():
            raise ConversionError(f"{what}: HF_HUB_OFFLINE is set; unset it, or upload later without this option")
        if get_token() is None:
            raise LocalTokenNotFoundError
        api = HfApi()
        _check_token(what, repository.partition("/")[0], api.whoami())
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            return
        files = {file.rfilename for file in info.siblings or []}
        if MARK not in files and any(name.endswith((".safetensors", ".bin", ".gguf")) for name in files):
            raise ConversionError(
                f"{what}: the repository holds a model that is no MiLo checkpoint; choose another name"
            )
        _check_access(what, api, repository)


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a checkpoint; return its address.

    Shards of an earlier checkpoint that the new one does not replace are removed from the repository; its history keeps
    them.

    Raises:
        ConversionError: says how to upload it later.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a MiLo checkpoint",
            delete_patterns=["*.safetensors"],
        )
    except (Exception, KeyboardInterrupt) as error:  # of the library, of its HTTP client, and of threads within it
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
        raise ConversionError(
            f"--push-to {repository}: the upload failed: {reason}; the checkpoint {folder} is whole, upload it later "
            f"with `hf upload {repository} {shlex.quote(str(folder))} .`"
        ) from error
    return f"{constants.ENDPOINT}/{repository}"


def _check_token(what: str, owner: str, account: dict[str, Any]) -> None:
    """Refuse a token that is for reading, or of an account that is not in the organization.

    What a fine-grained token may do is decided for each repository, so nothing of it is known here.
    """
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConversionError(f"{what}: the token may only read; {TOKEN}, with one that may write")
    known = {account.get("name"), *(one.get("name") for one in account.get("orgs", []))}
    if role == "write" and owner not in known:
        raise ConversionError(
            f"{what}: the token is of {account.get('name')}, who is not in an organization {owner}; choose another name"
        )


def _check_access(what: str, api: HfApi, repository: str) -> None:
    """Refuse an existing repository that the token may not write to, where the library can ask that."""
    if "write" not in inspect.signature(api.auth_check).parameters:
        return
    try:
        api.auth_check(repository, write=True)
    except Exception as error:
        if status(error) in (401, 403, 404):
            raise ConversionError(f"{what}: the token may not write to it; {TOKEN}, with one that may") from error
        raise
