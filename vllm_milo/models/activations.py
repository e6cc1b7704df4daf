"""What the experts of a layer compute between their GEMMs, as vLLM's layer says it; what is not known is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_milo.kernels.reference import ACTIVATIONS, UNGATED_ACTIVATIONS
from vllm_milo.kernels.weights import STEP
from vllm_milo.values import CheckpointError

_CHANGES = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
"""What vLLM passes, with the layer or with its description, where the activation is not what its name says."""
_OPENAI = "swigluoai"
"""vLLM's name of gpt-oss's activation, whose constants it does not pass, and which lets gate and up alternate."""
_OPENAI_CONSTANTS = (7.0, 1.702, 1.0)
_UNINTERLEAVED = "swigluoai_uninterleave"
_STEP_LIMIT = 7.0
"""Of Step-3.5's experts, whose class in vLLM refuses any other and passes none."""
KNOWN = (*ACTIVATIONS, *UNGATED_ACTIVATIONS, _OPENAI, _UNINTERLEAVED, STEP)


class Activation(NamedTuple):
    """The activation of a layer of experts.

    Attributes:
        name: by which :class:`..kernels.weights.MoESpec` knows it.
        limit: of gate and up, 0 for none.
        alpha: of SiLU's sigmoid.
        beta: added to up.
        interleaved: whether the layer's biases of gate and up alternate.
    """

    name: str
    limit: float = 0.0
    alpha: float = 1.0
    beta: float = 0.0
    interleaved: bool = False


def read_activation(layer: Any, moe: Any, prefix: str) -> Activation:
    """Return the activation of a layer of experts.

    Args:
        layer: vLLM's.
        moe: vLLM's description of it.
        prefix: its name, for messages.

    Raises:
        CheckpointError: it has a name, or constants with a name, that MiLo does not compute; or the layer says that it
            has a gate and the activation that it has none, or the other way round.
    """
    name = str(getattr(layer.activation, "value", layer.activation))
    found = {key: _value(key, layer, moe) for key in _CHANGES}
    stated = {key: value for key, value in found.items() if value is not None}
    if name not in KNOWN:
        raise _unknown(prefix, f"the activation {name!r} (known are {', '.join(KNOWN)})")
    if bool(moe.is_act_and_mul) is (name in UNGATED_ACTIVATIONS):
        without = "without a gate" if name not in UNGATED_ACTIVATIONS else "with a gate"
        raise _unknown(prefix, f"experts {without} and the activation {name!r}")
    if name == _OPENAI and all(stated.get(k, v) == v for k, v in zip(_CHANGES, _OPENAI_CONSTANTS, strict=True)):
        return Activation("silu", *_OPENAI_CONSTANTS, interleaved=True)
    limit, alpha, beta = found.values()
    if name == STEP and limit in (None, _STEP_LIMIT) and alpha is None and beta is None:
        return Activation(name, _STEP_LIMIT)
    if name == _UNINTERLEAVED and limit:
        return Activation("silu", limit, 1.0 if alpha is None else alpha, 0.0 if beta is None else beta)
    if name == "silu" and limit and alpha is None and beta is None:
        return Activation(name, limit)
    if stated or name in (_OPENAI, _UNINTERLEAVED, STEP):
        listed = ", ".join(f"{key} {value}" for key, value in stated.items()) or "no swiglu_limit"
        raise _unknown(prefix, f"a clamped or scaled activation of this kind ({name} with {listed})")
    return Activation(name)


def _value(key: str, *owners: Any) -> float | None:
    """Return a constant that one of the owners states; 0 or less of a limit is one that nobody can mean."""
    values = [float(value) for owner in owners if (value := getattr(owner, key, None)) is not None]
    return values[0] if values else None


def _unknown(prefix: str, what: str) -> CheckpointError:
    return CheckpointError(f"{prefix}: MiLo does not support {what}; serve the model unquantized")
