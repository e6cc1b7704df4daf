"""Dense layers kept in 16 bits, and in 8, against float64, in the interpreter (fp16) and on the GPU (and bf16)."""

from __future__ import annotations

import pytest
import torch
from random_layers import random_linear, relative_error

from vllm_milo.kernels import ops
from vllm_milo.kernels.launch import processors
from vllm_milo.kernels.resident import WIDE_BYTES
from vllm_milo.kernels.serving.dense import wide
from vllm_milo.kernels.serving.dense.codes import GROUP, HIGH_BYTE, MOST_ERROR, code_bytes, encode, meanings
from vllm_milo.kernels.serving.dense.wide import (
    CODE_TILES,
    SPREAD_CODE_TILES,
    SPREAD_TILES,
    TILES,
    WideTile,
    wide_linear,
    wide_tile,
)
from vllm_milo.kernels.weights import LinearWeights

TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 4e-3}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SIZES = [(128, 256), (96, 352), (40, 96), (17, 32), (320, 1024)]


def random_layer(tokens: int, n: int, k: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    shapes = (tokens, k), (n, k), (n,)
    return [torch.randn(shape).to(dtype).to(device) for shape in shapes]


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17])
def test_matches_float64(tokens: int, n: int, k: int, biased: bool, dtype: torch.dtype, kernel_device: str):
    x, weight, bias = random_layer(tokens, n, k, dtype, kernel_device)
    tile = next((tile for most, tile in TILES.items() if tokens <= most), None)
    found = wide_linear(x, [weight], bias if biased else None, tile)
    assert found.shape == (tokens, n)
    assert found.dtype == dtype
    assert relative_error(found, exact(x, weight, bias if biased else None)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [11, 33])
@pytest.mark.parametrize("tile", [*TILES.values(), WideTile(16, 64, 2, 3), WideTile(64, 64, 4, 2)])
def test_every_tile(tile: WideTile, tokens: int, dtype: torch.dtype, kernel_device: str):
    x, weight, bias = random_layer(tokens, 176, 416, dtype, kernel_device)
    assert relative_error(wide_linear(x, [weight], bias, tile), exact(x, weight, bias)) < TOLERANCE[dtype]


def decoded(weights: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weights that the codes stand for, in float64."""
    _, codes, scale = weights
    return meanings(dtype, codes.device)[codes.int()].double() * of_weights(scale, codes.shape[1])


def of_weights(scale: torch.Tensor, k: int) -> torch.Tensor:
    """The scale of each weight, in float64, of scales [groups, N]."""
    return scale.double().T.repeat_interleave(GROUP, 1)[:, :k]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(8, 4096), (60, 2048), (128, 352)])
@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_the_gate_of_a_router(tokens: int, n: int, k: int, dtype: torch.dtype, kernel_device: str):
    x, weight, _ = random_layer(tokens, n, k, dtype, kernel_device)
    found = wide_linear(x, [weight], None, SPREAD_TILES[32])
    assert relative_error(found, exact(x, weight, None)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16])
def test_few_tokens_read_codes(tokens: int, n: int, k: int, biased: bool, dtype: torch.dtype, kernel_device: str):
    x, weight, bias = random_layer(tokens, n, k, dtype, kernel_device)
    weights = [torch.full_like(weight, torch.nan), *encode(weight)]
    found = wide_linear(x, weights, bias if biased else None, CODE_TILES[0])
    assert found.shape == (tokens, n)
    assert found.dtype == dtype
    assert relative_error(found, exact(x, decoded(weights, dtype), bias if biased else None)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 16, 33])
@pytest.mark.parametrize("tile", [*CODE_TILES, *SPREAD_CODE_TILES, WideTile(16, 128, 1, 3), WideTile(32, 128, 2, 4)])
def test_every_tile_of_codes(tile: WideTile, tokens: int, dtype: torch.dtype, kernel_device: str):
    x, weight, bias = random_layer(tokens, 80, 2600, dtype, kernel_device)
    weights = [weight, *encode(weight)]
    expected = exact(x, decoded(weights, dtype), bias)
    assert relative_error(wide_linear(x, weights, bias, tile), expected) < TOLERANCE[dtype]


def test_few_tokens_read_codes_and_more_16_bits(kernel_device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wide, "processors", lambda _: 2)
    x, weight, _ = random_layer(17, 64, 96, torch.float16, kernel_device)
    weights = [weight, *encode(weight)]
    for tokens, multiplied in ((8, decoded(weights, torch.float16)), (9, weight)):
        found = ops.wide_linear(x[:tokens], weights, None, "triton")
        assert relative_error(found, exact(x[:tokens], multiplied, None)) < TOLERANCE[torch.float16]


def test_a_warp_takes_weights_of_one_scale(kernel_device: str):
    x, weight, _ = random_layer(1, 32, 512, torch.float16, kernel_device)
    with pytest.raises(ValueError, match="must divide the 128 weights of a scale"):
        wide_linear(x, [weight, *encode(weight)], None, WideTile(16, 256, 1, 3))


@pytest.mark.parametrize("dtype", list(HIGH_BYTE))
def test_codes_are_the_nearest(dtype: torch.dtype):
    weight = torch.randn(1500, 160).to(dtype)
    weight[3] = 0
    weight[1400] *= 1000
    weight[:, 130:] *= 1e-3
    codes, scale = encode(weight)
    known = meanings(dtype)
    assert bool((known[1:] > known[:-1]).all())
    assert 0 in known
    assert scale.shape == (2, 1500)
    scale = of_weights(scale, 160)
    tried = (weight[..., None].double() - known.double() * scale[..., None]).abs()
    chosen = tried.gather(-1, codes.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, tried.amin(-1), rtol=1e-4, atol=1e-6)
    assert bool((chosen <= 1.001 * scale).all()), "half of the largest step, which is 2"


@pytest.mark.parametrize("dtype", list(HIGH_BYTE))
def test_codes_cost_a_percent(dtype: torch.dtype):
    weight = torch.randn(256, 4096).to(dtype)
    error = relative_error(decoded([weight, *encode(weight)], dtype), weight.double())
    assert 0.004 < error < 0.009


@pytest.mark.parametrize("tokens", [0, 3])
def test_strided_and_empty_input_of_more_dimensions(tokens: int, kernel_device: str):
    _, weight, _ = random_layer(1, 128, 64, torch.float16, kernel_device)
    x = torch.randn(2, tokens, 128).half().to(kernel_device)[..., ::2]
    found = ops.wide_linear(x, [weight], None, "triton")
    assert found.shape == (2, tokens, 128)
    if tokens:
        assert relative_error(found, exact(x, weight, None)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("tokens", "outputs", "ours"),
    [
        (1, 2048, SPREAD_TILES[32]),
        (8, 6144, TILES[8]),
        (8, 16384, None),
        (9, 6144, TILES[16]),
        (17, 2048, SPREAD_TILES[32]),
        (17, 2560, None),
        (33, 2048, None),
        (16, 4096, TILES[16]),
        (17, 6144, None),
        (1, 8, SPREAD_TILES[32]),
        (17, 128, SPREAD_TILES[32]),
        (33, 128, None),
        (16, 768, SPREAD_TILES[32]),
    ],
)
def test_the_library_is_asked_where_it_is_quicker(
    tokens: int, outputs: int, ours: WideTile | None, monkeypatch: pytest.MonkeyPatch
):
    """By measurements on 132 multiprocessors: more tokens, and too many programs."""
    monkeypatch.setattr(wide, "processors", lambda _: 132)
    monkeypatch.setattr(wide, "shared_memory", lambda _: 227 * 1024)
    assert wide_tile(tokens, outputs, 4096, torch.device("cuda")) == ours


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "ours"),
    [
        (1, 128, 4096, None),
        (1, 2560, 2048, SPREAD_CODE_TILES[1]),
        (9, 2560, 2048, None),
        (16, 3072, 4096, SPREAD_CODE_TILES[1]),
        (1, 2048, 4096, SPREAD_CODE_TILES[0]),
        (16, 2048, 4096, SPREAD_CODE_TILES[0]),
        (8, 2048, 2048, SPREAD_CODE_TILES[0]),
        (9, 2048, 2048, None),
        (1, 4096, 4096, SPREAD_CODE_TILES[1]),
        (16, 4096, 4096, SPREAD_CODE_TILES[1]),
        (16, 6144, 4096, CODE_TILES[0]),
        (8, 6144, 2048, CODE_TILES[0]),
        (9, 6144, 2048, None),
        (8, 14336, 4096, CODE_TILES[0]),
        (16, 14336, 4096, CODE_TILES[1]),
        (17, 6144, 4096, None),
        (1, 99999, 4096, None),
    ],
)
def test_codes_are_read_by_few_tokens(
    tokens: int, outputs: int, inputs: int, ours: WideTile | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wide, "processors", lambda _: 132)
    monkeypatch.setattr(wide, "shared_memory", lambda _: 227 * 1024)
    assert wide_tile(tokens, outputs, inputs, torch.device("cuda"), in_codes=True) == ours


def test_a_layer_is_encoded_where_its_codes_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wide, "processors", lambda _: 132)
    monkeypatch.setattr(wide, "shared_memory", lambda _: 99 * 1024)
    assert [ops.streams(n, 4096, torch.device("cuda"), in_codes=True) for n in (128, 2048, 4096, 16384)] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [([96, 40], [8, 0], 96, 32, 16), ([128, 64], [16, 8], 256, 64, 3)])
def test_a_layer_in_3_bits_is_encoded(
    case: tuple, dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wide, "processors", lambda _: 4)
    widths, ranks, k, group, bits = case
    weights, spec = random_linear(widths, ranks, k, group, bits)
    moved = LinearWeights(*(values.to(kernel_device) for values in weights))
    kept = ops.expand_linear(moved, spec, dtype, "triton")
    codes, error = ops.encode_linear(kept)
    x = torch.randn(4, k).to(dtype).to(kernel_device)
    found = ops.wide_linear(x, [torch.full_like(kept, torch.nan), *codes], None, "triton")
    exact_codes = relative_error(decoded([kept, *codes], dtype), kept)
    assert error == pytest.approx(exact_codes, rel=1e-3)
    assert relative_error(found, x.double() @ kept.double().T) < 3 * error + TOLERANCE[dtype]


def test_bytes_are_counted():
    for k in (256, 130):
        weight = torch.randn(24, k).half()
        assert sum(part.nbytes for part in encode(weight)) == code_bytes(24, k)
    assert (weight.element_size() * 24 * 256 + code_bytes(24, 256)) == WIDE_BYTES * 24 * 256


def test_outliers_cost_their_group_alone():
    weight = torch.randn(8, 4096).half()
    assert ops.encode_linear(weight)[1] < 0.008
    weight[:, 7] = 60
    encoded, found = ops.encode_linear(weight)
    off = decoded([weight, *encoded], torch.float16) - weight.double()
    assert found == pytest.approx(float(off.norm() / weight.double().norm()), rel=1e-3)
    assert off[:, GROUP:].norm() / weight[:, GROUP:].double().norm() < 0.008
    assert off[:, :GROUP].norm() / off.norm() > 0.9


def test_outliers_everywhere_are_seen():
    weight = torch.randn(8, 4096).half()
    weight[:, ::64] = 10
    assert ops.encode_linear(weight)[1] < MOST_ERROR
    weight = torch.randn(8, 4096).bfloat16()
    weight[:, ::GROUP] = 60
    assert ops.encode_linear(weight)[1] > MOST_ERROR


def test_fewer_programs_fit_where_there_is_less_shared_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wide, "processors", lambda _: 132)
    monkeypatch.setattr(wide, "shared_memory", lambda _: 99 * 1024)
    tiles = [wide_tile(1, 16 * 132 * programs, 4096, torch.device("cuda")) for programs in (2, 3)]
    assert tiles == [TILES[8], None]
    gates = [wide_tile(tokens, 128, 2048, torch.device("cuda")) for tokens in (1, 16, 33)]
    assert gates == [SPREAD_TILES[32], SPREAD_TILES[32], None]


def test_more_tokens_than_any_tile_has_go_to_the_library_at_once(monkeypatch: pytest.MonkeyPatch, kernel_device: str):
    x, weight, bias = random_layer(33, 64, 64, torch.float16, kernel_device)
    asked, multiplied, real = [], [], wide.multiply_wide
    monkeypatch.setattr(wide, "wide_tile", lambda *given, **_: asked.append(given[0]) or SPREAD_TILES[32])
    monkeypatch.setattr(wide, "multiply_wide", lambda *given: multiplied.append(len(given[0])) or real(*given))
    for tokens in (32, 33):
        found = ops.wide_linear(x[:tokens], [weight], bias, "triton")
        assert relative_error(found, exact(x[:tokens], weight, bias)) < TOLERANCE[torch.float16]
    assert (asked, multiplied) == ([32], [33])


def test_the_operator_chooses(monkeypatch: pytest.MonkeyPatch, kernel_device: str):
    x, weight, bias = random_layer(3, 64, 64, torch.float16, kernel_device)
    asked, real = [], wide.multiply_wide
    monkeypatch.setattr(wide, "multiply_wide", lambda *given: asked.append(len(given[0])) or real(*given))
    for tokens in (1, 3):
        monkeypatch.setattr(wide, "wide_tile", lambda *given, **_: TILES[8] if given[0] < 3 else None)
        ops.wide_linear(x[:tokens], [weight], bias, "triton")
    assert asked == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("in_codes", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 48, 100])
def test_opcheck_and_graph(tokens: int, in_codes: bool):
    outputs = 16 * processors(torch.device("cuda"))
    x, weight, bias = random_layer(tokens, outputs, 256, torch.bfloat16, "cuda")
    weights = [weight, *(encode(weight) if in_codes else ())]
    torch.library.opcheck(torch.ops.milo.wide_linear.default, (x, weights, bias))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.wide_linear(x, weights, bias, "triton")
    fresh = torch.randn(tokens, 256).bfloat16().to("cuda")
    x.copy_(fresh)
    out.fill_(float("nan"))
    graph.replay()
    multiplied = decoded(weights, torch.bfloat16) if in_codes and tokens <= 8 else weight
    assert relative_error(out, exact(fresh, multiplied, bias)) < TOLERANCE[torch.bfloat16]
