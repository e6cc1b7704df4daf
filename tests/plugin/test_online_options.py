"""The choices of a model that is quantized while it is loaded."""

from __future__ import annotations

import json
import re

import pytest
from readme import README

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.online.options import OnlineOptions


def test_options_of_a_model_that_is_quantized_at_load():
    """The README's, and what is refused."""
    [overrides] = re.findall(r"--hf-overrides '(\{.*?\})'", README)
    text = json.loads(overrides)["quantization_config_dict_json"]
    assert OnlineOptions.from_json(text) == OnlineOptions(budget_bits=3.4, max_rounds=3)
    assert OnlineOptions.from_json('{"ignore": ["lm_head"]}') == OnlineOptions(ignore=("lm_head",))
    assert OnlineOptions.from_json('{"budget_bits": null, "ignore": null}') == OnlineOptions()
    for wrong, message in (
        ("{", "is no JSON"),
        ("[]", "must be a JSON object of some of budget_bits, group_size, max_rounds, ignore"),
        ('{"bits": 3}', "must be a JSON object of some of"),
        ('{"budget_bits": "3"}', "budget_bits must be a number of bits above 0, found '3'"),
        ('{"budget_bits": true}', "budget_bits must be a number"),
        ('{"budget_bits": NaN}', "budget_bits must be a number"),
        ('{"group_size": 96}', "group_size must be one of 32, 64, 128, found 96"),
        ('{"max_rounds": 0}', "max_rounds must be a number above 0"),
        ('{"ignore": "lm_head"}', "ignore must be a list of names"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            OnlineOptions.from_json(wrong)
