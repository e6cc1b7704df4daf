"""Names the module in which hidden states of a layer first become NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConversionError
from ..families.family import Family
from ..source.finite import is_finite
from ..source.streamed_model import StreamedModel

NARROW = (
    "float16 ends at 65504: set dtype in the model's config.json to bfloat16 if it was trained in that, or convert it "
    "on --device cpu, which takes float32"
)
BROKEN_MODEL = "is the source model broken? If it is not, use another text, or --calibration none"
BROKEN_CODES = "give it more bits (--budget-bits, --group-size), keep it as it is (--ignore), or use --calibration none"


def refuse_broken(
    model: StreamedModel,
    family: Family,
    index: int,
    module: torch.nn.Module,
    before: torch.Tensor,
    after: torch.Tensor,
    quantized: bool,
) -> None:
    """Raise where a layer made hidden states that are not finite.

    Args:
        model: whose layer it is.
        family: of the model.
        index: of the layer.
        module: the layer, with the weights that it ran with.
        before: hidden states before the layer, [W, T, H].
        after: hidden states after it.
        quantized: whether the layer ran with quantized weights.

    Raises:
        ConversionError: names the layer, the first module that put out what is not finite, and the window.
    """
    if is_finite(after):
        return
    window = next(number for number, states in enumerate(after) if not is_finite(states))
    name = family.layer_name(index)
    inner = _first_broken(lambda: model.run(index, module, before[window : window + 1]), module)
    place = family.checkpoint_name(f"{name}.{inner}") if inner else name
    advice = BROKEN_CODES if quantized else NARROW if after.dtype == torch.float16 else BROKEN_MODEL
    raise ConversionError(
        f"{name}: {'quantized, ' if quantized else ''}its hidden states hold NaN or Inf on window {window} of the "
        f"calibration text, at first in what {place} puts out ({after.dtype}); {advice}"
    )


@torch.no_grad()
def _first_broken(run: Callable[[], Any], module: torch.nn.Module) -> str:
    """Return the name of the first module inside ``module`` whose output is not finite; empty for none of them."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def see(_: Any, args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if not found and isinstance(first, torch.Tensor) and not is_finite(first):
                found.append(name)

        return see

    hooks = [part.register_forward_hook(hook(name)) for name, part in module.named_modules() if name]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""
