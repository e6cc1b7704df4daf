"""The plan of a conversion: all that the headers of the source decide, checked before a byte is computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vllm_milo.checkpoint import CompensatorFormat, MiLoFormat
from vllm_milo.dtypes import MODEL_DTYPES, safetensors_name
from vllm_milo.head.layout import PLAIN_BITS
from vllm_milo.names import find_key
from vllm_milo.shards import TensorEntry
from vllm_milo.version import __version__

from ..calibration import memory
from ..calibration.generated_text import OWN_TEXT
from ..checkpoint.claim import Claim
from ..checkpoint.companions import Companions, check_objects, find_companions
from ..checkpoint.matrices import group_table, rank_table
from ..conversion import Conversion
from ..errors import ConversionError
from ..families.family import Family
from ..nouns import Matrix, Recipe
from ..ranks.plan import Pass, assume_ranks, known_from_headers, plan_ranks
from ..source.ignore import check_ignore, kept_experts, refuse_unknown, unknown_modules, without_ignored
from ..source.layers import Layer
from ..source.reader import ModelReader
from . import disk
from .devices import find_device, find_devices
from .head import refuse_no_head
from .kept import Kept, find_kept
from .layout import arrange
from .pieces import refuse_large_matrices, solver_weights
from .shards import shard_uses
from .splits import allowed_splits, narrow_groups
from .tensors import bytes_of, bytes_of_json, planned_tensors, refuse_broken_plan

LEARN_ROUNDS = "learn_rounds"
"""Names, in a checkpoint's recipe, in how many rounds experts were trained, where memory was too small for one."""
MOST_BITS = 16
"""Of a weight: no budget is spent beyond the source's own."""


@dataclass(frozen=True)
class Plan:
    """What a conversion is going to do.

    Attributes:
        reader: the source model, opened once.
        out: folder of the checkpoint.
        conversion: recipe, ranks, text, device.
        layers: of the model, with the matrices to quantize in each.
        ranks: of these matrices, by name; where ``exact`` is false, an even share of what their policies give in all.
        exact: whether headers decide the ranks; kurtosis takes a pass over the weights. Along a calibration text the
            ranks of a layer are shared anew by what its roles turn out to need, within its bits.
        batch_weights: most weights that the solver gets at once, by the memory of the devices.
        layout: of a conversion along a text in memory.
        tensors: what will be written, by name, by these ranks.
        companions: the source's other files that come along.
        warnings: what the user should know.
    """

    reader: ModelReader
    out: Path
    conversion: Conversion
    layers: list[Layer]
    ranks: Mapping[str, int]
    exact: bool
    batch_weights: int
    layout: memory.Layout
    tensors: Mapping[str, TensorEntry]
    companions: Companions
    warnings: list[str]

    @property
    def matrices(self) -> list[Matrix]:
        """Return the matrices that will be quantized, in the order of the layers."""
        return [source.matrix for layer in self.layers for source in layer.matrices]

    @property
    def devices(self) -> list[torch.device]:
        """Return where the arithmetic will run."""
        return _devices(self.conversion)

    @property
    def device(self) -> torch.device:
        """Return where all of it will run that is not spread."""
        return self.devices[0]

    def format(self, ranks: Mapping[str, int] | None = None) -> MiLoFormat:
        """Return the checkpoint's format with these ranks, or with the planned ones."""
        return _format(self.reader, self.matrices, self.conversion, self.ranks if ranks is None else ranks, self.layout)

    def config(self, fmt: MiLoFormat) -> dict[str, Any]:
        """Return the config.json of a checkpoint of this format."""
        return _stated(self.reader) | {"quantization_config": fmt.to_dict()}

    @property
    def quantized_bytes(self) -> int:
        """Return the bytes of codes, scales, zero points and factors."""
        names = {f"{matrix.name}." for matrix in self.matrices}
        held = {name: e for name, e in self.tensors.items() if f"{name.rpartition('.')[0]}." in names}
        return bytes_of({name: e for name, e in held.items() if not name.endswith(".bias")})

    @property
    def tensor_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return bytes_of(self.tensors)

    @property
    def disk_bytes(self) -> int:
        """Return the most bytes of all files: tensors and companions, about what headers, index and report take, and
        what the ranks leave of a budget, which measured ranks may use."""
        written = bytes_of_json(self.tensors, self.config(self.format()))
        return self.tensor_bytes + self._unspent_bytes + self.companions.size + written

    @property
    def peak_disk_bytes(self) -> int:
        """Return the most bytes that the conversion takes on the disk on its way.

        A layer is there twice until the shards with its tensors are complete; where the whole model is trained after
        its layers, all are until the end. Shards of a source that are downloaded as they are used count too, and hidden
        states that memory is too small for.
        """
        text, twice = self.conversion.text, self.tensor_bytes + self._unspent_bytes
        if text is None or text.tune is None:
            twice = min(twice, self.conversion.shard_bytes + max(self._source_bytes(layer) for layer in self.layers))
        return self.disk_bytes + twice + self._shard_bytes + self._states_bytes

    @property
    def _states_bytes(self) -> int:
        text = self.conversion.text
        if text is None or self.layout.states != memory.States.DISK:
            return 0
        return memory.states_need(self.reader, text.windows.numel(), self.conversion.device)

    @property
    def _shard_bytes(self) -> int:
        return self.reader.shards.peak_bytes(shard_uses(self.reader, self.layers))

    def _source_bytes(self, layer: Layer) -> int:
        """Return the bytes of a layer in the source, which are more than it has quantized."""
        names = {source.tensor for source in layer.matrices} | set(layer.others)
        return bytes_of({name: self.reader.tensors[name] for name in names})

    @property
    def _unspent_bytes(self) -> int:
        budget = self.conversion.budget_bits
        if budget is None or self.conversion.policies:
            return 0
        return max(0, int(min(budget, MOST_BITS) * self.weights / 8) - self.quantized_bytes)

    @property
    def weights(self) -> int:
        """Return the number of quantized weights."""
        return sum(matrix.n * matrix.k for matrix in self.matrices)

    @property
    def bits_per_weight(self) -> float:
        """Return the stored bits of a quantized weight, everything counted."""
        return 8 * self.quantized_bytes / self.weights

    @cached_property
    def splits(self) -> list[int]:
        """Return the tensor parallel sizes that the checkpoint can be served with."""
        return allowed_splits(
            self.matrices, self.kept.matrices, self.format(), self.ranks, self.reader.config, self.reader.family
        )

    @cached_property
    def kept(self) -> Kept:
        """Return the matrices that ``--ignore`` keeps out."""
        return find_kept(self.reader, self.layers)

    @property
    def memory(self) -> memory.Need:
        """Return about how much memory the conversion takes."""
        return predict_memory(self.reader, self.conversion, self.layout)

    def along(self, conversion: Conversion, claim: Claim) -> Plan:
        """Return the plan with another recipe's rounds and text, which change neither ranks nor tensors.

        Raises:
            ConversionError: the text does not fit into memory, or what it takes on the way not on the disk.
        """
        plan = replace(self, conversion=conversion, layout=_layout(self.reader, conversion, self.out, claim))
        plan.refuse_full_disk(claim)
        return plan

    def refuse_full_disk(self, claim: Claim) -> None:
        """Refuse an output that its file system has no room for, beside what ``claim`` holds of it already.

        Raises:
            ConversionError: with what it takes on the way, and what there is.
        """
        if claim.published is None:
            disk.refuse_what_does_not_fit(self.out, self.peak_disk_bytes, claim.held_bytes, self._shard_bytes)


def make_plan(reader: ModelReader, out: Path, conversion: Conversion, claim: Claim | None = None) -> Plan:
    """Check everything that can be known, and return what a conversion will do. Nothing is written, no weight read.

    Args:
        reader: the source model.
        out: folder of the checkpoint.
        conversion: what decides it.
        claim: of ``out``, entered or checked; without one, the plan checks it.

    Raises:
        ConversionError, CheckpointError: the output is not safe or not writable, the options contradict each other or
            the model, a tensor cannot be stored, or memory or disk do not suffice.
    """
    if claim is None:
        claim = Claim(out, reader.folder, conversion.overwrite, conversion.resume)
        claim.check()
    devices = _devices(conversion)
    layout = _layout(reader, conversion, out, claim)
    layers, unknown = _quantized_layers(reader, conversion.ignore)
    matrices = [source.matrix for layer in layers for source in layer.matrices]
    conversion = _narrowed(conversion, matrices, reader.family)
    refuse_large_matrices(matrices, devices, conversion.device_memory)
    refuse_no_head(reader, conversion.lm_head_bits)
    unranked = _unranked(reader, matrices, conversion, layout)
    choice = conversion.rank_choice
    exact = known_from_headers(choice)
    if exact:
        ranks, warnings = plan_ranks(Pass(reader, layers, find_device("cpu"), False), choice, conversion.recipe)
    else:
        ranks, warnings = assume_ranks(matrices, choice, conversion.recipe), []
    fmt = replace(unranked, ranks=rank_table(matrices, ranks))
    config = _stated(reader) | {"quantization_config": fmt.to_dict()}
    tensors = planned_tensors(reader, layers, fmt, ranks, str(safetensors_name(str(reader.dtype))))
    refuse_broken_plan(reader.folder, tensors, fmt, config)
    companions = find_companions(reader.folder)
    check_objects(companions)
    warnings = [*warnings, *reader.source.view.notes, *companions.warnings]
    if unknown:
        warnings.append(
            f"{next(iter(unknown))} and the like are copied as they are; vLLM may refuse to load what "
            f"{reader.family.model_type} does not have"
        )
    elements = solver_weights(devices, conversion.device_memory)
    plan = Plan(reader, out, conversion, layers, ranks, exact, elements, layout, tensors, companions, warnings)
    plan.refuse_full_disk(claim)
    return plan


def decide_format(reader: ModelReader, conversion: Conversion) -> tuple[MiLoFormat, Recipe, list[Matrix]]:
    """Return the format of what a conversion without a text makes, where headers decide its ranks.

    Returns:
        The format, the recipe with the groups that were decided, and the matrices that are quantized.

    Raises:
        ConversionError, CheckpointError: the options contradict each other or the model.
    """
    layers, _ = _quantized_layers(reader, conversion.ignore)
    matrices = [source.matrix for layer in layers for source in layer.matrices]
    conversion = _narrowed(conversion, matrices, reader.family)
    unranked = _unranked(reader, matrices, conversion, memory.SIMPLE)
    choice = conversion.rank_choice
    ranks, _ = plan_ranks(Pass(reader, layers, find_device("cpu"), False), choice, conversion.recipe)
    return replace(unranked, ranks=rank_table(matrices, ranks)), conversion.recipe, matrices


def _narrowed(conversion: Conversion, matrices: Sequence[Matrix], family: Family) -> Conversion:
    """Return the conversion with smaller groups where it wants experts that can be split."""
    recipe, budget = conversion.recipe, conversion.budget_bits
    if not conversion.splittable or budget is None or conversion.policies:
        return conversion
    return replace(conversion, recipe=replace(recipe, narrow=narrow_groups(matrices, recipe, budget, family)))


def _quantized_layers(reader: ModelReader, ignore: Sequence[str]) -> tuple[list[Layer], Collection[str]]:
    """Return the layers with what of them is quantized, and the modules that the family does not know."""
    unknown = unknown_modules(reader)
    check_ignore(ignore, reader.matrices, list(unknown))
    refuse_unknown(unknown, ignore, reader.family)
    layers = [without_ignored(layer, (*reader.ignore, *ignore)) for layer in reader.layers]
    if not any(layer.matrices for layer in layers):
        raise ConversionError("--ignore leaves no matrix to quantize")
    return layers, unknown


def _unranked(
    reader: ModelReader, matrices: Sequence[Matrix], conversion: Conversion, layout: memory.Layout
) -> MiLoFormat:
    """Return the format without ranks, after a look at whether it holds every matrix."""
    unranked = _format(reader, matrices, conversion, dict.fromkeys((matrix.name for matrix in matrices), 0), layout)
    for matrix in matrices:
        unranked.check_matrix(matrix.name, matrix.n, matrix.k, unranked.module_group_size(matrix.name))
    return unranked


def predict_memory(reader: ModelReader, conversion: Conversion, layout: memory.Layout = memory.SIMPLE) -> memory.Need:
    """Return about how much memory a conversion takes.

    Raises:
        ConversionError: there is no such device.
    """
    text, device = conversion.text, conversion.device
    batch = solver_weights(_devices(conversion), conversion.device_memory)
    tokens = 0 if text is None else text.windows.numel()
    if text is None:
        working = memory.plain_need(reader, batch)
    else:
        working = memory.streamed_need(reader, tokens, device, layout)
        working = max(working, memory.solving_need(reader, tokens, batch, device, layout))
        working = max(working, memory.tuning_need(reader, device)) if text.tune else working
        working = max(working, memory.writing_need(reader, device)) if text.name == OWN_TEXT else working
    need = memory.whole_need(reader, working, device, conversion.shard_bytes, tokens, layout)
    further = len(conversion.more_devices) * memory.process_need(reader, batch, device)
    return need._replace(host=need.host + further)


def _layout(reader: ModelReader, conversion: Conversion, out: Path, claim: Claim) -> memory.Layout:
    """Return how the text is laid out in memory, in no fewer rounds than finished layers were trained in."""
    if conversion.text is None:
        return memory.SIMPLE
    if conversion.recipe.method != "milo":
        raise ConversionError(f"--method {conversion.recipe.method} cannot use a calibration; use --method milo")
    free, before = disk.free_bytes(out), claim.decided.get("recipe", {}).get(LEARN_ROUNDS)
    where = (_devices(conversion), conversion.device_memory, conversion.shard_bytes, free)
    return arrange(reader, conversion.text.windows, *where, rounds=before if isinstance(before, int) else 1)


def _devices(conversion: Conversion) -> list[torch.device]:
    return find_devices([conversion.device, *conversion.more_devices])


def _format(
    reader: ModelReader,
    matrices: Sequence[Matrix],
    conversion: Conversion,
    ranks: Mapping[str, int],
    layout: memory.Layout,
) -> MiLoFormat:
    group_size, exceptions = group_table(matrices, conversion.recipe)
    ignore = (*reader.ignore, *conversion.ignore)
    # the plugin looks experts up by the name of their module alone, whichever names the user gave
    unnamed = [name for name in kept_experts(reader.matrices, matrices) if find_key(ignore, name) is None]
    return MiLoFormat(
        group_size=group_size,
        groups=exceptions,
        compensator=CompensatorFormat(conversion.recipe.factor_bits),
        ranks=rank_table(matrices, ranks),
        ignore=(*ignore, *unnamed),
        recipe=_recipe_record(reader, conversion, layout),
        lm_head_bits=conversion.lm_head_bits,
    )


def _stated(reader: ModelReader) -> dict[str, Any]:
    """Return what config.json says of a checkpoint beside its format.

    That is what it says of the model, and the dtype that its tensors have where it states none: 16-bit factors have it.
    """
    config = reader.whole_config | dict(reader.family.states)
    stated = str(reader.config.get("dtype", reader.config.get("torch_dtype")))
    if safetensors_name(stated) in MODEL_DTYPES:
        return config
    return config | {"dtype": str(reader.dtype).removeprefix("torch.")}


def _decided(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON; smaller groups of some matrices and integer zero points only where there are any."""
    optional = ("narrow", "integer_zeros")
    return {name: value for name, value in asdict(recipe).items() if name not in optional or value}


def _recipe_record(reader: ModelReader, conversion: Conversion, layout: memory.Layout) -> dict[str, Any]:
    policies = ",".join(f"{policy.name}={policy.rank}" for policy in conversion.policies)
    record = {"tool": f"vllm-milo {__version__}", "ranks": policies, **_decided(conversion.recipe)}
    if conversion.lm_head_bits != PLAIN_BITS:
        record["lm_head_bits"] = conversion.lm_head_bits
    if reader.source.view.format is not None:
        record["source_format"] = reader.source.view.format
    if conversion.budget_bits is not None:
        record["budget_bits"] = conversion.budget_bits
        if conversion.serving_share is not None and not conversion.policies:
            record["serving_share"] = conversion.serving_share
    if conversion.measures_ranks:
        record["measured_ranks"] = True
    text = conversion.text
    if text is None:
        return record | {"calibration": "none"} if conversion.recipe.method == "milo" else record
    record |= {"calibration": text.name, "calibration_tokens": text.windows.numel(), "learn_steps": text.learn.steps}
    if layout.rounds > 1 and text.learn.steps:
        record[LEARN_ROUNDS] = layout.rounds
    return record | {"tune_steps": text.tune.steps} if text.tune else record
