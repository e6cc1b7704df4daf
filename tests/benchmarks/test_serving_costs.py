"""The table of what compensators cost in serving: fitted to records, and measured on CPU with tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import serving_costs
from benchmarks.kernels.serving_costs import fit, main, measure, rows_of, table_of
from vllm_milo.offline.served.costs import TABLE, LayerCosts

RESULTS = Path(serving_costs.__file__).parents[1] / "results"
RECORDS = [RESULTS / "linear-h100.json", RESULTS / "moe-layer-h100.json"]
BANDWIDTH = 2e12


def record(benchmark: str, costs: LayerCosts, sizes: dict[str, int], rank: int, factor_bytes: int) -> dict[str, Any]:
    """A record of layers that cost just this."""
    rows = []
    for shape, code_bytes in sizes.items():
        bare = costs.layer + costs.code_byte * code_bytes
        added = (2 if benchmark == "moe_layer" else 1) * costs.launch + costs.factor_byte * factor_bytes
        rows.append(row(shape, "milo", rank, code_bytes + factor_bytes, bare + added))
        rows.append({**rows[-1], "tokens": 16, "microseconds": 1e9})
        rows.append(row(shape, "milo-no-compensators", 0, code_bytes, bare))
        rows.append(row(shape, "marlin-int4-g128", 0, code_bytes, 1.0))
    return {
        "benchmark": benchmark,
        "ceilings": {"copy_bandwidth": BANDWIDTH},
        "environment": {"device": "made up"},
        "rows": rows,
    }


def row(shape: str, contender: str, rank: int, num_bytes: int, cost: float) -> dict[str, Any]:
    time = cost / BANDWIDTH * 1e6
    return {
        "shape": shape, "contender": contender, "tokens": 1, "rank": rank, "bytes": num_bytes, "microseconds": time
    }  # fmt: skip


DENSE = LayerCosts(2e7, 1.1, 5e6, 2.5)
EXPERTS = LayerCosts(4e7, 1.2, 4e6, 1.75)
SIZES = {"small": 10**6, "large": 10**7}


def rows(ranks: dict[int, int], of_experts: dict[int, int]) -> list[serving_costs.Row]:
    """Rows of records, one a rank; both arguments have the factors' bytes by rank."""
    records = [record("linear", DENSE, SIZES, *one) for one in ranks.items()]
    records += [record("moe_layer", EXPERTS, SIZES, *one) for one in of_experts.items()]
    return [row for number, one in enumerate(records) for row in rows_of(one, f"{number}.json")]


def test_costs_that_times_were_made_of_are_found_again():
    found = fit(rows({64: 10**5, 512: 8 * 10**5}, {16: 10**4, 64: 4 * 10**4}))
    assert found["dense"] == pytest.approx(DENSE)
    assert found["experts"] == pytest.approx(EXPERTS)


def test_experts_of_one_rank_cost_a_byte_of_dense_layers():
    """Both layers add as many bytes, so that only what a launch costs follows."""
    found = fit(rows({64: 10**5, 512: 8 * 10**5}, {16: 10**4}))["experts"]
    assert found.factor_byte == pytest.approx(DENSE.factor_byte)
    assert 2 * found.launch + found.factor_byte * 10**4 == pytest.approx(2 * EXPERTS.launch + 1.75e4)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match=r"dense: 2 rows are too few; measure more shapes or ranks"):
        fit(rows({64: 10**5}, {16: 10**4}))
    one = [row for row in rows({16: 1, 64: 2, 512: 3}, {}) if row.shape == "small"]
    with pytest.raises(ValueError, match=r"dense: 3 rows of layers of one size; measure more shapes"):
        fit(one)
    with pytest.raises(ValueError, match="all layers add the same bytes"):
        fit(rows({64: 10**5, 512: 10**5}, {16: 10**4}))
    falling = [row._replace(factor_cost=-row.factor_cost) for row in rows({64: 10**5, 512: 8 * 10**5}, {16: 10**4})]
    with pytest.raises(ValueError, match="measure again on a device that nothing else uses"):
        fit(falling)
    with pytest.raises(ValueError, match=r"x\.json: is a record of tune, not of linear or moe_layer"):
        rows_of({"benchmark": "tune"}, "x.json")


def test_the_shipped_table_is_made_of_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "costs.json"
    main(["-o", str(out), "--records", *map(str, RECORDS)])
    assert out.read_text() == TABLE.read_text()
    table = json.loads(out.read_text())
    for measured in table["measured"]:
        if measured["kind"] == "dense":
            assert measured["predicted_factor_cost"] == pytest.approx(measured["factor_cost"], rel=0.01)
    said = capsys.readouterr().out
    assert "| dense | mixtral-qkv | 512 | 38.3% | 47.9% | 48.0% |" in said


def test_layers_are_measured_at_one_token_and_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving_costs, "RANKS", {"dense": (16, 48), "experts": (16,)})
    records = measure(tmp_path / "costs", ["--shapes", "tiny", "--device", "cpu", "--point-seconds", "0.01"])
    assert [path.name for path in records] == ["dense-16.json", "dense-48.json", "experts-16.json"]
    found = [row for path in records for row in rows_of(json.loads(path.read_text()), path.name)]
    assert [(row.kind, row.shape, row.rank) for row in found] == [
        ("dense", "tiny", 16),
        ("dense", "tiny", 48),
        ("experts", "tiny", 16),
    ]
    assert all(row.code_bytes > 0 and row.factor_bytes > 0 and row.code_cost > 0 for row in found)
    with pytest.raises(ValueError, match="too few"):
        table_of(found)
