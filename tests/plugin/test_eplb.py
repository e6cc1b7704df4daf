"""Expert load balancing moves experts between places, which ragged compensators do not fit: it is refused at start."""

from __future__ import annotations

import pytest
from plugin_layers import create_experts, moe_layer

from vllm_milo.checkpoint import CheckpointError

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


def test_moving_experts_is_refused(monkeypatch: pytest.MonkeyPatch):
    from vllm.config import get_current_vllm_config

    monkeypatch.setattr(get_current_vllm_config().parallel_config, "enable_eplb", True)
    message = r"experts: MiLo does not support --enable-eplb: .* leave the option out"
    with pytest.raises(CheckpointError, match=message):
        create_experts(moe_layer())
    monkeypatch.undo()
    assert not create_experts(moe_layer()).supports_eplb
