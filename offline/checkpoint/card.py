"""The model card of a checkpoint, README.md: what it was made of and how, how to serve it, and what was measured.

The manifest leaves it out: people edit cards, and `milo eval --update-card` writes into them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vllm_milo.head.layout import PLAIN_BITS
from vllm_milo.version import __version__

from ..durable.files import flush
from ..errors import ConversionError, PassingError
from ..hub_names import hub_origin
from .inspect import inspect_checkpoint, name_group_sizes
from .manifest import CARD_NAME

TAGS = ["milo", "3-bit", "moe", "vllm", "quantized"]
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What the source's card says that holds for the checkpoint too."""
OUT = "OUT"
"""Stands for the checkpoint's folder."""
BEGIN, END = "<!-- milo eval -->", "<!-- end of milo eval -->"
"""Between these lines stands what was measured; all else of a card is left as it is."""
_TEXT = """\
# {title}

{source} with its matrices quantized to 3 bits plus low-rank compensators (MiLo,
[arXiv 2504.02658](https://arxiv.org/abs/2504.02658)) by vllm-milo {version}.

| | |
|---|---|
| stored bits a weight | {bits:.3f}: codes, scales, zero points and compensators of {weights} |
| all tensors | {gib:.3f} GiB |
| format | 3 bits, {groups}, compensators in {factor_bits} bits{head} |
| recipe | `{recipe}` |

## Serve it

It needs vLLM with the plugin vllm-milo beside it:

```bash
vllm serve {served} --quantization milo
```

## How it was made

{made}
"""


class CardNotes(NamedTuple):
    """What a card says beside what the folders tell.

    Attributes:
        command: that made the checkpoint, without paths of the machine; empty where it was no command.
        repository: of the Hub that the checkpoint goes to, or None.
    """

    command: str = ""
    repository: str | None = None


class Measured(NamedTuple):
    """What was measured on one text."""

    text: str
    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int


def write_card(folder: Path, source: Path, notes: CardNotes) -> None:
    """Write the card of a complete checkpoint, and flush it to disk.

    It does not name the folder, so that equal conversions give equal files, and folders may be renamed.

    Args:
        folder: of the checkpoint, as it lies now.
        source: folder of the model that it was made of.
        notes: what the folders do not tell.

    Raises:
        CheckpointError, ShardError: the checkpoint is not valid.
        PassingError: the card cannot be written.
    """
    origin, said = hub_origin(source), _source_metadata(source)
    base = origin[0] if origin else said.get("base_model")
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        tags=list(TAGS),
        **{key: said[key] for key in _INHERITED if isinstance(said.get(key), str | list)},
    )
    title = origin[0].rpartition("/")[2] if origin else source.resolve().name
    report = inspect_checkpoint(folder)
    text = _TEXT.format(
        title=f"{title}, 3 bits (MiLo)",
        source=f"[{origin[0]}](https://huggingface.co/{origin[0]}) (commit `{origin[1]}`)" if origin else title,
        version=__version__,
        bits=report["bits_per_weight"],
        weights=f"{report['quantized_weights']:,} quantized weights{_name_kept(report)}",
        gib=report["bytes"] / 2**30,
        groups=name_group_sizes(report),
        factor_bits=report["compensator_bits"],
        head=_name_head(report),
        recipe=json.dumps(report["recipe"]),
        served=notes.repository or OUT,
        made=f"```bash\n{notes.command}\n```" if notes.command else "By vllm-milo's converter, called from Python.",
    )
    _write(folder / CARD_NAME, ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _name_head(report: Mapping[str, Any]) -> str:
    """Return what a card says of an output head that is quantized; nothing of any other."""
    head = report["lm_head"]
    quantized = head is not None and head["bits"] < PLAIN_BITS
    return f"; lm_head in {head['bits']} bits, which the bits a weight do not count" if quantized else ""


def _name_kept(report: Mapping[str, Any]) -> str:
    """Return what a card says of the matrices that are not quantized; nothing where all are."""
    if not report["kept_weights"]:
        return ""
    bits = report["bits_per_weight_with_kept"]
    return f"; {bits:.3f} with {report['kept_weights']:,} weights of layers that are kept as they were"


def update_card(folder: Path, reference: Path, measured: Sequence[Measured]) -> None:
    """Write what was measured into the card of a checkpoint, in place of what was measured before.

    Args:
        folder: of the checkpoint; it gets a card where it has none.
        reference: the model that it was made of and compared with.
        measured: on each text.

    Raises:
        ConversionError: the card cannot be read or written.
    """
    path = folder / CARD_NAME
    if not path.exists():
        write_card(folder, reference, CardNotes())
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # of the YAML's parser, which edits by hand may bring about
        raise ConversionError(f"{path}: its metadata cannot be read: {error}; correct or remove it") from error
    data = card.data
    assert isinstance(data, ModelCardData)
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = [result for row in measured for result in _results(row)]
    section = f"{BEGIN}\n{_table(measured)}\n{END}"
    old = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), flags=re.DOTALL)
    text, found = old.subn(lambda _: section, card.text, count=1)
    card.text = text if found else f"{card.text.rstrip()}\n\n{section}\n"
    _write(path, card)


def _source_metadata(source: Path) -> Mapping[str, Any]:
    """Return what the source's card states in its metadata; nothing where there is none that can be read."""
    path = source / CARD_NAME
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's file, which must not end a conversion
        return {}


def _results(row: Measured) -> list[EvalResult]:
    values = {"perplexity": row.perplexity, "kl_divergence": row.kl, "top1_agreement": row.top1}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=row.text,
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in values.items()
    ]


def _table(measured: Sequence[Measured]) -> str:
    lines = [
        "## Measured",
        "",
        "Against the original model, by `milo eval --reference`: KL divergence in nats a token, agreement on the "
        "likeliest token, and perplexity.",
        "",
        "| text | KL | top-1 | perplexity | of the original | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in measured:
        perplexities = f"{row.perplexity:.4f} | {row.reference_perplexity:.4f}"
        lines.append(f"| {row.text} | {row.kl:.4f} | {row.top1:.4f} | {perplexities} | {row.tokens} |")
    return "\n".join(lines)


def _write(path: Path, card: ModelCard) -> None:
    try:
        path.write_text(str(card).rstrip() + "\n", encoding="utf-8")
        flush(path)
    except OSError as error:
        raise PassingError(f"{path}: cannot be written: {error.strerror}") from error
