"""The formats that are read. To add one, add an entry, and what names it in :mod:`.settings`."""

from __future__ import annotations

from .decode import dequantize_elements, dequantize_fp4, dequantize_packed
from .scheme import FLOATS, Format

_EXPONENTS = ("F8_E8M0", "U8")
"""Dtypes of scales that are powers of two, which are stored as exponents alone (ue8m0)."""

FINE_FP8 = Format("FP8 e4m3", "weight", ("F8_E4M3",), "weight_scale_inv", FLOATS, dequantize_elements, rounded=False)
"""As DeepSeek stores its models: the scale is called the inverse of one, and is what to multiply by."""
PLAIN_FP8 = FINE_FP8._replace(scale="weight_scale")
OWN_FP8 = FINE_FP8._replace(name="FP8 e4m3 (DeepSeek-V4)", scale="scale", scale_dtypes=(*_EXPONENTS, *FLOATS))
"""As DeepSeek-V4's makers store it: its scales have another name, and are exponents or, of V4-Flash-Base, float32."""
OWN_FP4 = Format("FP4 e2m1 (DeepSeek-V4)", "weight", ("I8", "U8"), "scale", _EXPONENTS, dequantize_fp4)
FLOAT = Format("FP8 e4m3 (compressed-tensors)", "weight", ("F8_E4M3",), "weight_scale", FLOATS, dequantize_elements)
INT8 = Format("INT8 (compressed-tensors)", "weight", ("I8",), "weight_scale", FLOATS, dequantize_elements)
PACKED = Format(
    "INT (compressed-tensors)",
    "weight_packed",
    ("I32",),
    "weight_scale",
    FLOATS,
    dequantize_packed,
    shape="weight_shape",
    zero="weight_zero_point",
    order="weight_g_idx",
)
MXFP4_EXPERTS = Format("MXFP4 (gpt-oss)", "blocks", ("U8",), "scales", ("U8",), dequantize_fp4)
"""The experts of a layer together: these are ends of names, of tensors that :mod:`.fused` describes."""
MXFP4 = Format("MXFP4 (compressed-tensors)", "weight_packed", ("U8",), "weight_scale", ("U8",), dequantize_fp4)

IGNORED = {
    **dict.fromkeys(
        ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale"),
        "static scales of activations, which MiLo leaves in 16 bits",
    ),
    **dict.fromkeys(
        ("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point", "prob_scale"),
        "scales of the attention's cache, which MiLo leaves in 16 bits",
    ),
}
"""Last parts of the names of tensors that quantized models may have beside their weights, and what they are."""
