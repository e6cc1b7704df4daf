"""Whether a checkpoint is what was written, what the format asks for, and what its source model says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import ShardError
from vllm_milo.validation import read_format, validate_checkpoint
from vllm_milo.values import shown_name

from ..checkpoint.claim import refuse_unfinished
from ..checkpoint.damage import added_files, damaged_files, is_prose, stray_files
from ..checkpoint.manifest import MANIFEST_NAME, read_manifest
from ..checkpoint.output import is_milo_checkpoint
from ..errors import ConversionError
from ..progress import progress_bar
from .against_source import Likeness, compare_with_source

CONFIG = "config.json"
LARGEST = 5
"""How many of the largest errors are named."""
_SHOWN_PROBLEMS = 20


@dataclass
class Verdict:
    """What was found out about a checkpoint.

    Attributes:
        folder: of the checkpoint.
        files: number of the files that were read and compared with the manifest; None without a manifest.
        problems: what is wrong, each with the name of its file, tensor or matrix.
        notes: what differs and does no harm.
        likeness: to the source model; None where it was not compared.
    """

    folder: Path
    files: int | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    likeness: Likeness | None = None

    @property
    def good(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return what ``milo verify --json`` prints."""
        content = {"checkpoint": str(self.folder), "good": self.good, "files": self.files}
        content |= {"problems": self.problems, "notes": self.notes}
        if self.likeness is None:
            return content
        largest = {name: _json_number(error) for name, error in self.likeness.largest(LARGEST).items()}
        known: dict[str, Any] = {"mean_error": _json_number(self.likeness.mean), "largest_errors": largest}
        if self.likeness.head is not None:
            known["lm_head_error"] = _json_number(self.likeness.head)
        counts = {"matrices": len(self.likeness.errors), "copied_tensors": self.likeness.copied}
        return content | {"reference": counts | known}


def _json_number(value: float) -> float | None:
    """Return a number as JSON can hold it: null for NaN and infinity."""
    return value if math.isfinite(value) else None


def verify_checkpoint(folder: Path, reference: Path | None = None, progress: bool = False) -> Verdict:
    """Check a checkpoint's files by its manifest, then its format, then its weights against the source's.

    Whatever is wrong becomes one of the verdict's problems; the checks that are still possible go on.

    Args:
        folder: of the checkpoint.
        reference: folder of the model that it was made of, if its weights are to be compared.
        progress: show how far it is on stderr.

    Raises:
        ConversionError: there is no such folder, or its conversion has not ended.
        CheckpointError: nothing in the folder says that it was one.
    """
    refuse_unfinished(folder)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
    if (folder / CONFIG).is_file() and not (folder / MANIFEST_NAME).exists() and not is_milo_checkpoint(folder):
        read_format(folder)  # which says what it is not
    verdict = Verdict(folder)
    _check_files(verdict, progress)
    try:
        fmt = validate_checkpoint(folder)
        if reference is not None:
            verdict.likeness = compare_with_source(folder, fmt, reference, progress)
            verdict.problems += verdict.likeness.problems
    except (CheckpointError, ShardError, ConversionError) as error:
        verdict.problems.append(str(error))
    return verdict


def _check_files(verdict: Verdict, progress: bool) -> None:
    """Compare the files with the manifest."""
    folder = verdict.folder
    try:
        manifest = read_manifest(folder)
    except (CheckpointError, ShardError) as error:
        verdict.problems.append(str(error))
        return
    if manifest is None:
        verdict.notes.append(f"no {MANIFEST_NAME}: sizes and hashes of files were not checked")
        return
    sizes = [float(entry.size) for entry in manifest.values()]
    damaged = damaged_files(folder, progress_bar(list(manifest), "read", progress, "file", sizes), manifest)
    for name, wrong in damaged.items():
        place = verdict.notes if is_prose(name) else verdict.problems
        place.append(f"{name}: {wrong}")
    verdict.problems += stray_files(folder, manifest)
    if CONFIG not in manifest:
        verdict.problems.append(f"{MANIFEST_NAME}: does not name {CONFIG}, so nobody can tell whether it is right")
    added = added_files(folder, manifest)
    verdict.notes += [f"{shown_name(name)}: added, the manifest does not name it" for name in added[:_SHOWN_PROBLEMS]]
    verdict.files = len(manifest)


def format_verdict(verdict: Verdict) -> str:
    """Return the text that ``milo verify`` prints."""
    lines = [f"note: {note}" for note in verdict.notes]
    if verdict.files is not None:
        lines.append(f"files            {verdict.files} read and compared with {MANIFEST_NAME}")
    likeness = verdict.likeness
    if likeness is not None:
        lines.append(f"copied tensors   {likeness.copied} are the reference's bit for bit")
        lines.append(f"relative error   mean {likeness.mean:.4g} ({len(likeness.errors)} matrices)")
        lines += [f"  {error:<14.4g} {name}" for name, error in likeness.largest(LARGEST).items()]
        if likeness.head is not None:
            lines.append(f"lm_head          relative error {likeness.head:.4g}, stored as integers")
    shown = verdict.problems[:_SHOWN_PROBLEMS]
    lines += [f"problem: {problem}" for problem in shown]
    if len(shown) < len(verdict.problems):
        lines.append(f"… and {len(verdict.problems) - len(shown)} more problems")
    return "\n".join([*lines, f"{verdict.folder}: {'good' if verdict.good else 'NOT GOOD'}"])
