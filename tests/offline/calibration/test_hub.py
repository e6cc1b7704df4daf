"""Datasets of the Hugging Face Hub as a calibration text: by a stub of the library, and by it itself where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_models import TEXT

from vllm_milo.offline.calibration import choose
from vllm_milo.offline.calibration.choose import TextOptions, calibration_windows
from vllm_milo.offline.calibration.hub import HubName, hub_documents, hub_name
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.tokens import load_tokenizer

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


class Rows:
    """A split of a stub dataset; notes how it is shuffled and how far it is read."""

    def __init__(self, rows: list[Any], columns: list[str] | None = None) -> None:
        self.rows, self.column_names, self.read, self.shuffled = rows, columns, 0, {}

    def shuffle(self, **how: int) -> Rows:
        self.shuffled = how
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            self.read += 1
            yield row


class Hub(ModuleType):
    """Stands for the library; knows one dataset, or fails."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.splits: dict[str, Rows] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def load_dataset(self, name: str, config: str | None, streaming: bool) -> dict[str, Rows]:
        self.asked.append((name, config, streaming))
        if self.error is not None:
            raise self.error
        return self.splits


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    found = Hub()
    monkeypatch.setitem(sys.modules, "datasets", found)
    monkeypatch.chdir(tmp_path)
    return found


def read(name: str) -> list[Any]:
    found = hub_name(name)
    assert found is not None
    return list(hub_documents(found, seed=3))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("HuggingFaceH4/ultrachat_200k", ("HuggingFaceH4/ultrachat_200k", None, None)),
        ("org/name-1.5:en", ("org/name-1.5", "en", None)),
        ("org/name:en:test", ("org/name", "en", "test")),
        ("org/name::test", ("org/name", None, "test")),
        ("name", None),
        ("nowhere.txt", None),
        ("folder/nowhere.txt", None),
        ("folder/nowhere.JSONL", None),
        ("a/b/c", None),
        ("/org/name", None),
        ("./name", None),
        ("../name", None),
        ("org/na me", None),
        (".", None),
        ("", None),
    ],
)
def test_names(how: str, expected: tuple[str | None, ...] | None):
    found = hub_name(how)
    assert found == (None if expected is None else HubName(*expected))
    assert found is None or str(found) == how


def test_a_file_is_a_file(hub: Hub, tmp_path: Path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("A text.", encoding="utf-8")
    assert hub_name("org/name") is None
    assert hub_name("org/other") is not None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"id": 1, "text": "One."}, {"id": 2, "text": ""}, {"id": 3, "text": None}, {"text": "Two."}],
            ["One.", "Two."],
        ),
        ([{"prompt": "Why?", "messages": CHAT}], [CHAT]),
        ([{"conversations": SHARED}], [CHAT]),
        ([{"messages": CHAT, "text": "Why? So."}], ["Why? So."]),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_columns(hub: Hub, rows: list[dict[str, Any]], expected: list[Any], known: bool):
    """A stream may tell its columns or not."""
    hub.splits = {"train": Rows(rows, list(rows[0]) if known else None)}
    assert read("org/name") == expected
    assert hub.asked == [("org/name", None, True)]
    assert hub.splits["train"].shuffled["seed"] == 3


def test_splits(hub: Hub):
    hub.splits = {name: Rows([{"text": name}]) for name in ("test", "train", "rest")}
    assert read("org/name") == ["train"]
    assert read("org/name:en:rest") == ["rest"]
    assert hub.asked[-1] == ("org/name", "en", True)
    with pytest.raises(
        ConversionError, match="org/name::val: the dataset has no split 'val'; it has test, train, rest"
    ):
        read("org/name::val")
    del hub.splits["train"]
    assert read("org/name") == ["test"]


def test_other_columns_are_named(hub: Hub):
    hub.splits = {"train": Rows([{"question": "Why?", "answer": "So."}])}
    message = "org/name: the dataset has no column text, messages or conversations, but question, answer; write"
    with pytest.raises(ConversionError, match=message):
        read("org/name")


class DatasetNotFoundError(FileNotFoundError):
    """As the library's."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("Dataset 'org/name' doesn't exist."), "neither such a file nor such a dataset.*exist$"),
        (
            ConnectionError("Couldn't reach it"),
            "cannot be reached: Couldn't reach it; is there a network.* pass a file",
        ),
        (TimeoutError(), "cannot be reached: TimeoutError; is there a network"),
        (ValueError("Config name is missing.\nPick one"), r"cannot be read: Config name is missing \(ValueError\); or"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_cannot_be_read(hub: Hub, error: Exception, message: str, later: bool):
    hub.error = None if later else error
    hub.splits = {"train": Rows([{"text": "One."}, error])}
    if later and isinstance(error, FileNotFoundError):
        message = "cannot be read: "
    with pytest.raises(ConversionError, match=message) as caught:
        read("org/name")
    assert str(caught.value).startswith("org/name: there is n")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, small_model: Path, tmp_path: Path, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    out = tmp_path / "out"
    assert main(["quantize", str(small_model), "-o", str(out), "--calibration", "org/name", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "org/name: there is no such file; to read the dataset of this name" in error
    assert "pip install datasets (or vllm-milo[datasets])" in error
    assert "or download the dataset and pass a file" in error
    assert not out.exists()


def test_no_more_is_read_than_fills_the_windows(hub: Hub, small_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "WINDOW", 32)
    hub.splits = {"train": Rows([{"text": f"The {number} old men. " * 8} for number in range(1000)])}
    windows = calibration_windows(ModelReader(small_model), "org/name", TextOptions(windows=9))
    assert windows.shape == (9, 32)
    assert 3 < hub.splits["train"].read < 12
    assert load_tokenizer(small_model).decode(windows[0]).startswith("The 0 old men. The 0 old men.")
    hub.splits = {"train": Rows([{"text": "The old men."}])}
    with pytest.raises(ConversionError, match=r"has \d+ tokens; it needs at least 256, 8 windows of 32"):
        calibration_windows(ModelReader(small_model), "org/name", TextOptions(windows=9))


def test_a_conversion_along_a_dataset(hub: Hub, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "WINDOW", 32)
    hub.splits = {"train": Rows([{"messages": CHAT}] * 100)}
    few = ["--calibration-windows", "2", "--learn-steps", "1", "--max-rounds", "1", "--device", "cpu", "--quiet"]
    assert main(["quantize", str(small_model), "-o", "out", "--calibration", "org/name:en", *few]) == 0
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["calibration"] == "org/name:en"
    assert recipe["calibration_tokens"] == 64


def test_chats_go_by_the_template(hub: Hub, small_model: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    monkeypatch.setattr(choose, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(choose, "WINDOW", 32)
    hub.splits = {"train": Rows([{"conversations": SHARED}] * 100)}
    windows = calibration_windows(ModelReader(small_model), "org/name", TextOptions(windows=2))
    assert tokenizer.decode(windows[0]).startswith("[user]Why?[assistant]So.")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The real library, which takes a folder for the dataset of that name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    lines = [json.dumps({"id": number, "text": f"{number} men."}) for number in range(40)]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "test.jsonl").write_text(json.dumps({"id": 0, "text": "The test."}), encoding="utf-8")
    return found


def test_the_real_library(library: ModuleType, tmp_path: Path):
    found, again = read("org/name"), read("org/name")
    assert sorted(found) == sorted(f"{number} men." for number in range(40))
    assert found == again
    assert found != list(hub_documents(HubName("org/name", None, None), seed=4))
    assert read("org/name::test") == ["The test."]
    with pytest.raises(ConversionError, match=r"no split 'val'; it has (train, test|test, train)"):
        read("org/name::val")
    with pytest.raises(ConversionError, match=r"cannot be read: BuilderConfig 'en' not found.* \(ValueError\)"):
        read("org/name:en")
    with pytest.raises(ConversionError, match=r"org/other: .* cannot be reached"):
        read("org/other")
    (tmp_path / "org" / "name" / "train.jsonl").write_text('{"question": "Why?"}', encoding="utf-8")
    (tmp_path / "org" / "name" / "test.jsonl").unlink()
    with pytest.raises(ConversionError, match="no column text, messages or conversations, but question;"):
        read("org/name")


def test_names_of_files_that_are_not_there(small_model: Path, tmp_path: Path, capsys, hub: Hub):
    """As before there were datasets."""
    assert not Path("folder/nowhere.txt").exists()
    for how in ("folder/nowhere.txt", "nowhere", "."):
        assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--calibration", how]) == 1
        assert f"{how}: cannot be read as UTF-8 text" in capsys.readouterr().err
    assert not hub.asked


def test_a_file_that_is_there_asks_no_hub(hub: Hub, small_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path):
    asked: list[Conversion] = []
    monkeypatch.setattr("vllm_milo.offline.cli.quantize.carry_out", lambda plan, *_: asked.append(plan.conversion))
    monkeypatch.setattr("vllm_milo.offline.cli.quantize.print_summary", lambda summary: None)
    monkeypatch.setattr(choose, "WINDOW", 32)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text(TEXT.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["quantize", str(small_model), "-o", "out", "--calibration", "org/name", "--device", "cpu"]) == 0
    assert asked[0].text.windows.shape == (32, 32)
    assert not hub.asked
