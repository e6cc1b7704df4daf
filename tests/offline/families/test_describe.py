"""`milo families` and the list in docs/families.md are the table."""

from __future__ import annotations

import json
import re

import pytest
from readme import README

from vllm_milo.offline.cli import main
from vllm_milo.offline.families.describe import TITLES, markdown
from vllm_milo.offline.families.table import FAMILIES


def test_the_readme_has_the_table():
    (block,) = re.findall(r"<!-- families:[^\n]*-->\n(.*?)<!-- end of families -->", README, flags=re.DOTALL)
    assert block.strip() == markdown(), f"docs/families.md must have:\n{markdown()}"


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["families"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", said, flags=re.MULTILINE) for name in FAMILIES)
    assert main(["families", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in rows] == list(FAMILIES)
    by_name = {row["model_type"]: dict(zip(TITLES, row.values(), strict=True)) for row in rows}
    row = by_name["deepseek_v3"]
    assert row["quantized"] == "attention (q, q_a, q_b, kv_a_proj_with_mqa, kv_b, o), dense FFN, shared, routed experts"
    assert row["kept as it is"] == "gate, what predicts further tokens"
    assert by_name["lfm2_moe"]["kept as it is"] == "gate, conv.in_proj, conv.out_proj"
