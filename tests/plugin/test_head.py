"""The output head in 8 or 4 bits as a layer of vLLM: its rows, its kernel, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.head.layout import head_groups
from vllm_milo.kernels.integers import dequantize_integers, pack_integers

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]
VOCABULARY, HIDDEN = 330, 128
"""vLLM pads the first to 384."""


def make_head(bits: int, monkeypatch: pytest.MonkeyPatch, rank: int = 0, size: int = 1, prefix: str = "lm_head"):
    from vllm.model_executor.layers import vocab_parallel_embedding as embedding

    from vllm_milo.config import MiLoConfig

    monkeypatch.setattr(embedding, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(embedding, "get_tensor_model_parallel_world_size", lambda: size)
    config = MiLoConfig(MiLoFormat(lm_head_bits=bits))
    options = {"quant_config": config, "prefix": prefix, "params_dtype": torch.float32}
    return embedding.ParallelLMHead(VOCABULARY, HIDDEN, **options)


def make_tensors(bits: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    most = 2 ** (bits - 1)
    values = torch.randint(-most, most, (VOCABULARY, HIDDEN), generator=generator)
    scale = torch.rand(VOCABULARY, head_groups(bits, HIDDEN), generator=generator).half() / most
    return {"head_words": pack_integers(values, bits), "head_scale": scale}


def load(head: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(head, name)
        parameter.weight_loader(parameter, tensor)


def load_whole(head: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    load(head, tensors)
    head.quant_method.process_weights_after_loading(head)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_process_has_its_rows(bits: int, size: int, monkeypatch: pytest.MonkeyPatch):
    """Put together as vLLM does, without padding, logits are those of the whole head."""
    tensors = make_tensors(bits)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    parts = []
    for rank in range(size):
        head = make_head(bits, monkeypatch, rank, size)
        load(head, tensors)
        head.quant_method.process_weights_after_loading(head)
        parts.append(head.quant_method.apply(head, x))
        own = head.shard_indices.num_org_elements
        assert not parts[-1][:, own:].any()  # padding
    together = torch.cat(parts, 1)
    order = head.get_sharded_to_full_mapping()
    together = together if order is None else together[:, order]
    weight = dequantize_integers(tensors["head_words"], tensors["head_scale"], bits)
    assert torch.allclose(together[:, :VOCABULARY], x @ weight.T, atol=1e-4)


def test_other_heads_and_16_bits_stay_with_vllm(monkeypatch: pytest.MonkeyPatch):
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = make_head(16, monkeypatch)
    further = make_head(8, monkeypatch, prefix="model.layers.2.shared_head.head")
    for head in (plain, further):
        assert isinstance(head.quant_method, UnquantizedEmbeddingMethod)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head_scale"), r"layer lm_head: the checkpoint lacks lm_head\.head_scale"),
        (
            lambda tensors: tensors.update(head_scale=torch.ones(VOCABULARY, 2).half()),
            r"lm_head\.head_scale .*expected F16 \[330, 4\], found F16 \[330, 2\]",
        ),
        (
            lambda tensors: tensors.update(head_words=torch.zeros(384, 16, dtype=torch.int32)),
            r"lm_head\.head_words .*expected I32 \[330, 16\], found I32 \[384, 16\]",
        ),
    ],
)
def test_a_head_that_is_not_whole(change, message: str, monkeypatch: pytest.MonkeyPatch):
    tensors, head = make_tensors(4), make_head(4, monkeypatch)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_whole(head, tensors)


class Kernel:
    """Stands for a kernel of GPUs, and multiplies as one does."""

    def __init__(self, config, words: str, scale: str, zero: str) -> None:
        self.config, self.names = config, (words, scale, zero)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        words, scale = (getattr(layer, name) for name in self.names[:2])
        assert words.packed_dim == words.input_dim == 1
        assert words.output_dim == scale.output_dim == 0
        self.layout = words.packed_factor

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        words, scale = (getattr(layer, name) for name in self.names[:2])
        return torch.nn.functional.linear(x, dequantize_integers(words, scale, 32 // self.layout), bias)


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 32)])
def test_a_gpus_kernel_gets_what_it_takes(bits: int, group_size: int, monkeypatch: pytest.MonkeyPatch):
    from vllm.model_executor.kernels import linear
    from vllm.scalar_type import scalar_types

    from vllm_milo import compat

    monkeypatch.setattr(compat, "current_platform", SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False))
    monkeypatch.setattr(linear, "choose_mp_linear_kernel", lambda _: Kernel)
    head, tensors = make_head(bits, monkeypatch), make_tensors(bits)
    load(head, tensors)
    head.quant_method.process_weights_after_loading(head)
    config = head.quant_method.kernel.config
    assert config.full_weight_shape == config.partition_weight_shape == (HIDDEN, 384)
    assert config.weight_type == {8: scalar_types.uint8b128, 4: scalar_types.uint4b8}[bits]
    assert (config.group_size, config.zero_points, config.act_type) == (group_size, False, torch.float32)
    x = torch.randn(3, HIDDEN)
    weight = dequantize_integers(tensors["head_words"], tensors["head_scale"], bits)
    assert torch.allclose(head.quant_method.apply(head, x)[:, :VOCABULARY], x @ weight.T, atol=1e-4)
    assert head.weight.dtype == torch.int32  # what vLLM asks for where adapters come
    assert "weight" not in dict(head.named_parameters())


def test_no_kernel_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch):
    from vllm.model_executor.kernels import linear

    from vllm_milo import compat

    def none(_: object) -> None:
        raise ValueError("Failed to find a kernel\n that can implement it")

    monkeypatch.setattr(compat, "current_platform", SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False))
    with monkeypatch.context() as patch:
        patch.setattr(linear, "choose_mp_linear_kernel", none)
        with pytest.raises(
            CheckpointError, match=r"lm_head: lm_head_bits is 8, and no kernel of vLLM .* can implement"
        ):
            make_head(8, monkeypatch)
    monkeypatch.setattr(compat, "_WEIGHT_ONLY", ("vllm.nowhere.linear",))
    with pytest.raises(CheckpointError, match="this version of vLLM has no weight-only linear kernels"):
        make_head(8, monkeypatch)


@pytest.mark.parametrize(
    ("draft", "last", "outcome"), [(False, True, "refused"), (True, True, "dropped"), (False, False, "dropped")]
)
def test_a_model_that_asks_no_method_for_its_head(draft: bool, last: bool, outcome: str, monkeypatch):
    """Some of vLLM's models hand no configuration to their head, and would not know its tensors."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_milo import compat
    from vllm_milo.config import MiLoConfig

    takes = []
    monkeypatch.setattr(compat, "divert_weights", takes.append)
    monkeypatch.setattr(compat, "is_draft", lambda: draft)
    monkeypatch.setattr(compat, "holds_head", lambda: last)
    monkeypatch.setattr(compat, "architectures", lambda: ("GptOssForCausalLM",))
    config = MiLoConfig(MiLoFormat(lm_head_bits=8))
    for name in ("q_proj", "o_proj"):
        config.get_quant_method(ReplicatedLinear(64, 64, bias=False), f"model.layers.0.self_attn.{name}")
    (take,) = takes
    assert not take("model.embed_tokens.weight", torch.zeros(1))
    if outcome == "refused":
        with pytest.raises(CheckpointError, match=r"lm_head: stored in 8 bits, .* no quantized head in GptOss"):
            take("lm_head.head_words", torch.zeros(1))
    else:
        assert take("lm_head.head_words", torch.zeros(1))
