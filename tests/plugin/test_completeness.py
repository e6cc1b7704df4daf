"""Every parameter of a model must be loaded, also those that are not quantized."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plugin_layers import PREFIX, make_format, make_layer

from vllm_milo.checkpoint import CheckpointError

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank")]


class Model(torch.nn.Module):
    """A tied head, a module under two names, a quantized layer with a bias, and a router's own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 4)
        self.head = torch.nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight
        self.runner = torch.nn.Module()
        self.runner.gate = torch.nn.Linear(4, 4, bias=False)
        self.gate = self.runner.gate
        self.o_proj = make_layer("column", make_format({f"{PREFIX}.o_proj": 8}), [128], f"{PREFIX}.o_proj")
        self.bias = torch.nn.Parameter(torch.empty(4))
        self.o_proj.also_here = self.bias  # as a layer of experts has its router's
        self.register_buffer("rotary", torch.empty(4))
        self.nothing = torch.nn.Parameter(torch.empty(0))


def check(loaded: set[str] | None) -> None:
    from vllm_milo.models.completeness import check_loaded

    check_loaded(Model(), loaded, quantized=True)


def test_whole_models_are_accepted():
    check({"embed.weight", "gate.weight", "bias"})
    check({"head.weight", "runner.gate.weight", "bias", "something.else"})
    check(None)  # the model does not say


@pytest.mark.parametrize("name", ["embed.weight", "gate.weight", "bias"])
def test_what_was_not_loaded_is_named(name: str):
    shown = {"gate.weight": r"runner\.gate\.weight"}.get(name, name)
    with pytest.raises(CheckpointError, match=rf"Model: .* no tensor that vLLM loads as {shown}; .* --model-loader"):
        check({"embed.weight", "gate.weight", "bias"} - {name})


def test_many_are_counted(monkeypatch: pytest.MonkeyPatch):
    from vllm_milo.models import completeness

    monkeypatch.setattr(completeness, "_SHOWN", 1)
    with pytest.raises(CheckpointError, match=r"loads as bias and 2 more; "):
        check(set())


class TestLoaders:
    """Whether vLLM's loader is made to check, as a loader that builds a model asks for the methods of its layers."""

    @pytest.fixture
    def loader(self):
        from vllm.config.load import LoadConfig
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        from vllm_milo import compat

        class Loader(DefaultModelLoader):
            def build(self, model_config, check) -> None:
                (lambda: compat.check_after_loading(check))()

        return lambda **extra: Loader(LoadConfig(model_loader_extra_config=extra))

    def test_checks_by_itself(self, loader):
        found, one = [], loader()
        one.build(None, lambda *arguments, **_: found.append(arguments))
        assert one.enable_weights_track
        one.track_weights_loading("model", {"a"}, quantized=True)
        assert found == [("model", {"a"})]

    @pytest.mark.parametrize("decided", [False, True])
    def test_users_decision_stays(self, loader, decided: bool):
        one = loader(enable_weights_track=decided)
        one.build(None, print)
        assert one.enable_weights_track is decided
        assert "track_weights_loading" not in vars(one)

    def test_drafts_and_other_loaders_are_left_alone(self, loader):
        from vllm_milo import compat

        one = loader()
        one.build(SimpleNamespace(runner_type="draft"), print)
        assert one.enable_weights_track is None
        del one.enable_weights_track  # as older versions have it
        one.build(None, print)
        assert "track_weights_loading" not in vars(one)
        compat.check_after_loading(print)  # nobody loads
