import pytest
import torch

from vllm_milo.kernels.packing import dequantize, dequantize_factor, pack_codes, unpack_codes
from vllm_milo.kernels.serving.layout import (
    from_units,
    join_scale_zero,
    raise_scales,
    repack_matrix,
    scale_exponents,
    to_units,
)


def test_golden_vector():
    words = pack_codes((torch.arange(32) % 8).to(torch.uint8))
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 5, 320)])
def test_pack_round_trip(shape):
    codes = torch.randint(0, 8, shape, dtype=torch.uint8)
    words = pack_codes(codes)
    assert words.shape == (*shape[:-1], shape[-1] * 3 // 32)
    assert torch.equal(unpack_codes(words), codes)


def test_codes_are_a_little_endian_bit_stream():
    codes = torch.randint(0, 8, (96,), dtype=torch.uint8)
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes))
    words = [word & 0xFFFFFFFF for word in pack_codes(codes).tolist()]
    assert stream == sum(word << (32 * i) for i, word in enumerate(words))


def test_refuses_a_partial_unit():
    with pytest.raises(ValueError, match="33 codes"):
        pack_codes(torch.zeros(33, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4 words"):
        unpack_codes(torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantize(group):
    codes = torch.randint(0, 8, (4, 128), dtype=torch.uint8)
    scale, zero = torch.rand(4, 128 // group).half(), (torch.rand(4, 128 // group) * 9 - 1).half()
    expected = scale.double().repeat_interleave(group, 1) * (codes.double() - zero.double().repeat_interleave(group, 1))
    found = dequantize(pack_codes(codes), scale, zero, group, torch.float64)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_dequantize_factor(bits):
    scale = torch.rand(5, 2).half()
    if bits == 16:
        factor = torch.randn(5, 128).bfloat16()
        assert torch.equal(dequantize_factor(factor, None, 16), factor.float())
        return
    values = torch.randint(0, 8, (5, 128), dtype=torch.uint8) if bits == 3 else torch.randint(-127, 128, (5, 128))
    stored = pack_codes(values) if bits == 3 else values.to(torch.int8)
    expected = (values.float() - (4 if bits == 3 else 0)) * scale.float().repeat_interleave(64, 1)
    assert torch.equal(dequantize_factor(stored, scale, bits), expected)
    with pytest.raises(ValueError, match="needs its scales"):
        dequantize_factor(stored, None, bits)


@pytest.mark.parametrize(("shape", "rows"), [((64, 128), 64), ((3, 192, 384), 64), ((48, 256), 16)])
def test_kernel_layout_round_trip(shape, rows):
    codes = torch.randint(0, 8, shape, dtype=torch.uint8)
    units = to_units(codes, rows)
    assert units.shape == (*shape[:-2], shape[-2] // rows, shape[-1] // 128, 3, rows, 4)
    assert units.numel() * 32 == codes.numel() * 3  # nothing wasted
    assert torch.equal(from_units(units), codes)


def test_repack_pads_half_a_unit_with_zeros():
    codes = torch.randint(0, 8, (128, 192), dtype=torch.uint8)
    packed = repack_matrix(pack_codes(codes))  # [unit, N/64, 3, 64, 4]
    found = from_units(packed.movedim(0, 1))
    assert torch.equal(found[:, :192], codes)
    assert not found[:, 192:].any()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_scale_and_zero_share_a_word(group):
    scale, zero = torch.rand(2, 64, 192 // 32).half(), torch.randn(2, 64, 192 // 32).half()
    scale, zero = scale[..., : 256 // group], zero[..., : 256 // group]
    words = join_scale_zero(scale, zero, group)
    groups = scale.shape[-1]
    assert words.shape == (2, -(-groups * group // 128), 64, 128 // group)
    flat = words.movedim(2, 1).flatten(2)  # [2, 64, groups]
    assert torch.equal((flat[..., :groups] & 0xFFFF).to(torch.int16).view(torch.float16), scale)
    assert torch.equal((flat[..., :groups] >> 16).to(torch.int16).view(torch.float16), zero)
    assert not flat[..., groups:].any()


def test_scales_are_raised_to_the_top_of_fp16():
    """Exactly, whatever their size; zeros, as of experts that are all zeros, and the largest of fp16 too."""
    largest = torch.tensor([65504.0, 1.0, 0.00999, 2.0**-24, 0.0, 2047 * 2.0**-11])
    scale = (largest[:, None, None] * torch.tensor([[1.0, 0.5], [0.25, 0.0]])).half()
    exponents = scale_exponents(scale)
    assert exponents.tolist() == [0, 15, 22, 30, 16, 16]
    raised = raise_scales(scale, exponents)
    assert torch.isfinite(raised).all()
    assert torch.equal(torch.ldexp(raised.double(), -exponents[:, None, None]), scale.double())
    assert (raised.amax((1, 2)) >= 2.0**15)[[0, 1, 2, 5]].all()
    assert torch.equal(scale_exponents(-scale), exponents)
