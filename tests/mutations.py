"""Random damage to a model folder: one to three things that a broken download or a stranger may have changed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DUPLICATE = "__duplicate__"
LONG = "a" * 100_000
NUMBERS = (0, -1, 1, 2, 3, 7, 10**7, 10**9, 2**40, 10**18, 2**63, -(2**63), 10**400, -(10**9))
FLOATS = (0.5, 64.0, 1e308, float("nan"), float("inf"), float("-inf"), -0.0)
TEXTS = (
    "",
    "x",
    "64",
    "milo",
    LONG,
    "\ud800",
    "a\0b",
    "../../x",
    "/etc/passwd",
    "é\u202e",
    "a\nTraceback b",
    "9" * 5000,
)
PATTERNS = ("re:(a*)*b", "re:(.*)*.*(.*)*x", "re:(", r"re:(a)\1", "re:" + "(" * 600, "re:" + "a?" * 400, "re:.*", "re:")
VALUES: tuple[Any, ...] = (
    *(None, True, False, *NUMBERS, *FLOATS, *TEXTS, *PATTERNS, [], {}, [[]], [{}], {"": ""}, {"a": 1}, [None]),
    *(["x"], [10**9], [1] * 3000, {"x": {"y": {"z": []}}}, dict.fromkeys((f"re:{n}" for n in range(500)), 8)),
    *(
        [*PATTERNS[:2]],
        {PATTERNS[0]: 8},
        {"model.layers.0.mlp.experts": 7},
        {"model.layers.0.mlp.experts": {"w1": [1]}},
    ),
)
NAMES = (
    *("", "x", "../x", "/abs", "a\0b", "a\nb", "\ud800", LONG, ".", "..", "weight", ".weight", "lm_head.weight"),
    *("model.layers.0.mlp.experts.999999999.gate_proj.weight", "model.layers.0.mlp.experts.999999999.up_proj.weight_u"),
    *("model.layers.999999999.mlp.down_proj.weight", f"model.layers.{'9' * 5000}.mlp.down_proj.weight"),
    *("model.layers.²..weight", "model.layers.٣.self_attn.q_proj.weight", "model.layers.00.self_attn.q_proj.weight"),
    *("model.layers.0.mlp.experts.01.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj", "a.layers.0.b.weight"),
    *("model.layers.0.self_attn.q_proj.weight_packed", "model.layers.1.mlp.experts.0.up_proj.weight_scale"),
    *("model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.experts.down_proj", "model.layers.0.x.weight"),
)
SHAPES = (
    [],
    [0],
    [0, 2**40],
    [2**40, 0],
    [2**40, 0, 64],
    [2**40],
    [1] * 40,
    [-1, -1],
    [0.5],
    ["a"],
    None,
    {},
    "ab",
    [[]],
)
FILES = ("../../secret.json", "/etc/passwd", "..", ".", "", "a\0b", "x/y.safetensors", "missing.safetensors", "\ud800")
DTYPES = ("F64", "I8", "U8", "F16", "BF16", "F32", "I32", "BOOL", "F4", "", "x" * 1000, "a\nb", None, 3, [], {})


def mutate(folder: Path, rng: random.Random) -> list[str]:
    """Change one to three things of a model folder; return what was changed, for the message of a failure."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size < 2**24)
        texts = [path for path in files if path.suffix == ".json" and path.name != "tokenizer.json"]
        shards = [path for path in files if path.suffix == ".safetensors"]
        kind = rng.random()
        if kind < 0.5 and texts:
            weights = [8 if path.name == "config.json" else 2 if path.name.startswith("m") else 1 for path in texts]
            done.append(_json(rng.choices(texts, weights)[0], rng))
        elif kind < 0.85 and shards:
            done.append(_header(rng.choice(shards), rng))
        elif files:
            done.append(_file(rng.choice([*files, *shards, *texts]), rng))
    return done


def _json(path: Path, rng: random.Random) -> str:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return f"{path.name}: is broken already"
    if rng.random() < 0.12:
        return _text(path, rng)
    holder, key = _place(content, rng)
    if holder is None:
        return f"{path.name}: nothing to change"
    what = _change(holder, key, rng, path.name)
    path.write_text(json.dumps(content).replace(DUPLICATE, ""), encoding="utf-8")
    return f"{path.name}: {what}"


def _place(content: Any, rng: random.Random) -> tuple[Any, Any]:
    """Return a random object or list inside JSON, and a key in it; deeper ones by and by less often."""
    found: tuple[Any, Any] = (None, None)
    while isinstance(content, dict | list) and content:
        key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
        if isinstance(content, dict) and "quantization_config" in content and rng.random() < 0.5:
            key = "quantization_config"
        found = content, key
        if rng.random() < 0.15:
            break
        content = content[key]
    return found


def _change(holder: Any, key: Any, rng: random.Random, file: str) -> str:
    kind = rng.random()
    value = rng.choice(FILES if "index" in file and rng.random() < 0.7 else VALUES)
    if kind < 0.12:
        del holder[key]
        return f"without {key!r:.80}"
    if kind < 0.2 and isinstance(holder, dict):
        name = rng.choice((*NAMES, *PATTERNS, *FILES))
        holder[name] = holder.pop(key)
        return f"{key!r:.80} renamed to {name!r:.80}"
    if kind < 0.27 and isinstance(holder, dict):
        holder[f"{key}{DUPLICATE}"] = value
        return f"{key!r:.80} twice, the second {value!r:.80}"
    if isinstance(holder[key], int) and kind < 0.7:
        value = rng.choice(NUMBERS)
    holder[key] = value
    return f"{key!r:.80} is {value!r:.80}"


def _text(path: Path, rng: random.Random) -> str:
    """Break a file as text."""
    text = path.read_text(encoding="utf-8", errors="replace")
    kind = rng.randrange(8)
    broken: tuple[bytes, ...] = (
        text[: len(text) // 2].encode(),
        b"",
        text.encode("utf-16"),
        b"\xef\xbb\xbf" + text.encode(),
        b"[" * 100_000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        rng.choice((b"null", b"[]", b"3", b'"x"', b"NaN", b"{}", b"[[[]]]")),
        text.replace(rng.choice(text or "x"), rng.choice('{}[]",:\0'), 1).encode(),
    )
    path.write_bytes(broken[kind])
    return f"{path.name}: broken as text, {kind}"


def _header(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        assert isinstance(header, dict)
        values = data[8 + length :]
    except (ValueError, AssertionError, RecursionError):
        return f"{path.name}: is broken already"
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    if not names or rng.random() < 0.15:
        new = rng.choice((0, 1, 2**60, 2**64 - 1, max(0, length - 1), length + 1, len(data) - 8, 10**9))
        path.write_bytes(new.to_bytes(8, "little") + data[8:])
        return f"{path.name}: header of {new} bytes"
    name = rng.choice(names)
    values, what = _change_tensor(header, name, values, rng)
    text = json.dumps(header).replace(DUPLICATE, "").encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return f"{path.name}: {name} {what}"


def _change_tensor(header: dict[str, Any], name: str, values: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change a tensor of a header; return the file's values and what was changed."""
    entry, kind = header[name], rng.randrange(11)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
        return values, f"dtype {entry['dtype']!r:.80}"
    if kind == 1:
        entry["shape"] = rng.choice(SHAPES)
        return values, f"shape {entry['shape']!r:.80}"
    if kind == 2:
        entry["data_offsets"] = rng.choice(
            ([0, 2**60], [-8, 8], [5, 3], [0, 4], [2**63, 2**64], [1.5, 2], None, "ab", [0])
        )
        return values, f"offsets {entry['data_offsets']}"
    if kind == 3:
        new = rng.choice(NAMES)
        header[new] = header.pop(name)
        return values, f"renamed to {new!r:.80}"
    if kind == 4:
        header[f"{name}{DUPLICATE}"] = rng.choice((entry, None, {}))
        return values, "twice"
    if kind == 5:
        key = rng.choice(list(entry))
        del entry[key]
        return values, f"without {key}"
    if kind == 6:
        header[name] = rng.choice(VALUES)
        return values, f"is {header[name]!r:.80}"
    if kind == 7:
        header["__metadata__"] = rng.choice(VALUES)
        return values, f"metadata {header['__metadata__']!r:.80}"
    if kind == 8:
        new, shape = rng.choice(NAMES), rng.choice(SHAPES)
        header[new] = {"dtype": rng.choice(("F32", "I32", "BF16")), "shape": shape, "data_offsets": [len(values)] * 2}
        return values, f"and an empty {new!r:.80} of {shape!r:.80}"
    if kind == 9 and isinstance(entry.get("shape"), list) and len(entry["shape"]) == 2:
        n, k = entry["shape"]
        entry["shape"] = rng.choice(
            ([k, n], [1, n, k], [n, k, 1], [n * 2, k // 2], [n // 2, k * 2], [n * k], [n * k, 1])
        )
        return values, f"reshaped to {entry['shape']}"
    new = rng.choice(NAMES)
    shape = rng.choice(([64, 64], [1, 64], [2, 64, 64], [64, 6]))
    size = 4 * shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
    header[new] = {
        "dtype": rng.choice(("F32", "I32")),
        "shape": shape,
        "data_offsets": [len(values), len(values) + size],
    }
    return values + bytes(size), f"and another {new!r:.80} of {shape}"


def _file(path: Path, rng: random.Random) -> str:
    """Truncate, replace or remove a file."""
    data = path.read_bytes()

    def place(make: Callable[[], object]) -> None:
        path.unlink()
        make()

    def flip() -> None:
        at = rng.randrange(max(1, min(len(data), 3000)))
        path.write_bytes(data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :])

    def sparse() -> None:
        with path.open("r+b") as file:
            file.truncate(2**40)

    outside = path.parent.parent / "outside"
    ways: dict[str, Callable[[], object]] = {
        "truncated": lambda: path.write_bytes(data[: rng.randrange(len(data) + 1)]),
        "empty": lambda: path.write_bytes(b""),
        "removed": path.unlink,
        "a folder": lambda: place(path.mkdir),
        "a dangling link": lambda: place(lambda: path.symlink_to("nowhere")),
        "a link to itself": lambda: place(lambda: path.symlink_to(path.name)),
        "a link outside": lambda: place(lambda: path.symlink_to(outside)),
        "a pipe": lambda: place(lambda: os.mkfifo(path)),
        "longer": lambda: path.write_bytes(data + b"x" * rng.choice((1, 8, 5000))),
        "a TiB": sparse,
        "with another byte": flip,
        "copied": lambda: shutil.copyfile(path, path.with_name(f"copy-{path.name[:200]}")),
    }
    way = rng.choice(list(ways))
    ways[way]()
    return f"{path.name}: {way}"
