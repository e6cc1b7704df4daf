"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_milo.validation import read_format
from vllm_milo.version import __version__

from ..checkpoint.manifest import CARD_NAME
from ..durable.files import flush
from ..errors import PassingError

_TEXT = """\
# {title}, 3 bits (compressed-tensors)

The weights of a MiLo checkpoint without compensators in the format `pack-quantized` of compressed-tensors, exported by
vllm-milo {version}: 3 bits, in groups, with zero points; codes, scales and zero points are the same.

Recipe: `{recipe}`

{made}
"""


def write_card(folder: Path, source: Path, command: str) -> None:
    """Write the card of a complete export, and flush it to disk.

    Args:
        folder: of the export, as it lies now.
        source: folder of the MiLo checkpoint.
        command: that asked for it, without paths of the machine; empty where it was none.

    Raises:
        PassingError: it cannot be written.
    """
    text = _TEXT.format(
        title=source.resolve().name,
        version=__version__,
        recipe=json.dumps(dict(read_format(source)[0].recipe)),
        made=f"```bash\n{command}\n```" if command else "By vllm-milo's exporter, called from Python.",
    )
    path = folder / CARD_NAME
    try:
        path.write_text(text, encoding="utf-8")
        flush(path)
    except OSError as error:
        raise PassingError(f"{path}: cannot be written: {error.strerror}") from error
