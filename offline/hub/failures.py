"""What goes wrong with the Hub, each in one line that says what to do."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors

from ..errors import ConversionError
from ..hub_names import first_line

TOKEN = "set HF_TOKEN or run `hf auth login`"
_UNREACHED = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "ProxyError")
"""Classes of the library's HTTP client, which differs between its versions and shall not be imported here."""


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn the errors of the library into the converter's.

    Args:
        what: is asked for; begins the message.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # of the library, of its HTTP client and of the disk
        raise ConversionError(f"{what}: {_reason(error)}") from error


def status(error: BaseException) -> int | None:
    """Return the status of the Hub's answer, where an error is one."""
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None


def _reason(error: BaseException) -> str:
    """Return what is wrong and what to do. Classes come before those that they are derived from."""
    number = status(error)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"is gated, and the token may not read it ({number}); accept its terms at {constants.ENDPOINT} with your "
            f"account, then {TOKEN}"
        )
    if isinstance(error, errors.DisabledRepoError):
        return "was disabled on the Hugging Face Hub; there is nothing to download"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is neither such a folder nor such a model on the Hugging Face Hub; if it is private, {TOKEN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model has no such revision; name a branch, a tag or a whole commit hash"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the Hugging Face Hub lists this file but does not have it (404); was the model changed? Try again later"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"there is no token of the Hugging Face Hub; {TOKEN}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hugging Face Hub is not asked; unset it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.is_offline_mode():
            return (
                "there is no such folder, and the model is not, or not as a whole, in the Hub's cache "
                f"({constants.HF_HUB_CACHE}); HF_HUB_OFFLINE is set, so it is not downloaded: unset it"
            )
        cause = error.__cause__
        return _reason(cause) if cause is not None else _unreachable(error)
    if number == 401:
        return f"the Hugging Face Hub does not accept the token (401); {TOKEN}, with one that is valid"
    if number == 403:
        return f"the token may not do that (403): {first_line(error)}; {TOKEN}, with one that may"
    if number is not None:
        return f"the Hugging Face Hub answers {number}: {first_line(error)}; try again later"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full; free space, or set HF_HOME to a folder on another one ({constants.HF_HUB_CACHE})"
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in _UNREACHED:
        return _unreachable(error)
    if isinstance(error, LookupError | TypeError | AttributeError | json.JSONDecodeError):
        return (
            f"the answer of {constants.ENDPOINT} is none of a Hugging Face Hub's ({type(error).__name__}: "
            f"{first_line(error)}); is HF_ENDPOINT right, or a proxy in between?"
        )
    return f"{first_line(error)} ({type(error).__name__})"


def _unreachable(error: BaseException) -> str:
    return f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached: {first_line(error)}; is there a network?"
