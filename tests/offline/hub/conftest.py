"""A Hub on this machine that the library takes for the real one, with a cache and a token of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_streams import by_layer, put
from huggingface_hub import constants
from tiny_models import cut_model


@pytest.fixture(scope="session")
def deep_model(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers of the bundled model, for shards of their own, with a third of their experts; not to be changed."""
    return cut_model(bundled_model, tmp_path_factory.mktemp("deep") / "model", layers=4, experts=4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def shards(hub: HubServer, deep_model: Path) -> list[str]:
    return put(hub, deep_model, by_layer)
