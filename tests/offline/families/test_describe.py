"""`milo families` and the list in docs/families.md are the table."""

from __future__ import annotations

import json
import re

import pytest
from readme import README

from vllm_milo.offline.cli import main
from vllm_milo.offline.families.describe import REFUSED_TITLES, TITLES, markdown, refused_rows, rows
from vllm_milo.offline.families.refused import REFUSED
from vllm_milo.offline.families.table import FAMILIES


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("families", markdown(TITLES, rows())), ("refused families", markdown(REFUSED_TITLES, refused_rows()))],
)
def test_the_readme_has_the_tables(name: str, wanted: str):
    (block,) = re.findall(rf"<!-- {name}:[^\n]*-->\n(.*?)<!-- end of {name} -->", README, flags=re.DOTALL)
    assert block.strip() == wanted, f"docs/families.md must have:\n{wanted}"


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["families"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", said, flags=re.MULTILINE) for name in (*FAMILIES, *REFUSED))
    assert "  refused because its layers hand on several residual streams" in said
    assert main(["families", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in found] == [*FAMILIES, *REFUSED]
    by_name = {row["model_type"]: row for row in found}
    assert "hyper-connections" in by_name["deepseek_v41"]["refused because"]
    row = by_name["deepseek_v3"]
    assert row["quantized"] == "attention (q, q_a, q_b, kv_a_proj_with_mqa, kv_b, o), dense FFN, shared, routed experts"
    assert row["kept as it is"] == "gate, what predicts further tokens"
    assert by_name["lfm2_moe"]["kept as it is"] == "gate, conv.in_proj, conv.out_proj"
