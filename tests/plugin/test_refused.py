"""Matrices that vLLM would load wrongly are refused when the model is built."""

from __future__ import annotations

import pytest
from plugin_layers import PREFIX, make_format, make_layer

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.models.refused import refuse_permuted

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


@pytest.mark.parametrize("architecture", ["Llama4ForCausalLM", "Llama4ForConditionalGeneration"])
@pytest.mark.parametrize("leaf", ["q_proj", "k_proj"])
def test_rows_that_vllm_reorders(architecture: str, leaf: str):
    message = rf"{leaf}: vLLM reorders .* q_proj and k_proj as it loads .* --ignore 're:\.\*self_attn"
    with pytest.raises(CheckpointError, match=message):
        refuse_permuted([f"{PREFIX}.{leaf}"], [architecture])


def test_others_are_accepted():
    refuse_permuted([f"{PREFIX}.v_proj", f"{PREFIX}.o_proj"], ["Llama4ForCausalLM"])
    refuse_permuted([f"{PREFIX}.q_proj"], ["MixtralForCausalLM", "LlamaForCausalLM"])
    refuse_permuted([f"{PREFIX}.q_proj"], [])


def test_layers_of_such_models(monkeypatch: pytest.MonkeyPatch):
    from vllm_milo import compat

    monkeypatch.setattr(compat, "architectures", lambda: ("Llama4ForCausalLM",))
    with pytest.raises(CheckpointError, match="vLLM reorders"):
        make_layer("qkv", make_format(), [512, 128, 128], f"{PREFIX}.qkv_proj", 2)
    make_layer("qkv", MiLoFormat(ignore=(r"re:.*self_attn\.[qkv]_proj",)), [512, 128, 128], f"{PREFIX}.qkv_proj", 2)
    make_layer("row", make_format(), [128], f"{PREFIX}.o_proj")
