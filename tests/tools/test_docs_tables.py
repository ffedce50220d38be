"""The computed tables of docs/cost.md and docs/scaling.md are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY
from tools import docs_tables, scaling
from tools.scaling import CALL, FLOPS, HOP_INSIDE, HOP_OUTSIDE, INSIDE

UPDATE = "run python -m tools.docs_tables docs/cost.md docs/scaling.md"


@pytest.mark.integration
def test_the_tables_of_the_scaling_page_are_up_to_date() -> None:
    page = (REPOSITORY / "docs/scaling.md").read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == 4
    assert docs_tables.fill(page, docs_tables.scaling_tables()) == page, UPDATE


@pytest.mark.slow
def test_the_tables_of_the_cost_page_are_up_to_date() -> None:
    page = (REPOSITORY / "docs/cost.md").read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == 5
    assert docs_tables.fill(page, docs_tables.cost_tables()) == page, UPDATE


def test_the_assumptions_of_the_scaling_page_are_those_of_the_code() -> None:
    page = " ".join((REPOSITORY / "docs/scaling.md").read_text(encoding="utf-8").split())
    assert pytest.approx(0.4 * 312e12) == FLOPS
    figures = [f"{scaling.TEXT} tokens", str(scaling.ANSWER), f"{INSIDE / 1e9:g} GB/s", "40 %", "312 TFLOP/s"]
    figures += [f"{1e6 * latency:g} µs" for latency in (CALL, HOP_INSIDE, HOP_OUTSIDE)]
    for name, speed in scaling.LINKS.items():
        figures += [name, f"{speed / 1e9:g} GB/s"]
    assert [figure for figure in figures if figure not in page] == []


def test_tables_are_written_into_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(docs_tables.PAGES, "cost.md", lambda: {"x": docs_tables.markdown(["a", "b"], [["1", "2"]])})
    page = tmp_path / "cost.md"
    page.write_text("before\n<!-- table: x -->\nold\n<!-- end -->\nafter\n")
    docs_tables.main([str(page)])
    written = page.read_text()
    assert written.startswith("before\n<!-- table: x -->\n")
    assert written.endswith("<!-- end -->\nafter\n")
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |\n" in written
    assert "old" not in written
    docs_tables.main([str(page)])
    assert page.read_text() == written, "a second run changes nothing"


def test_an_unknown_page_or_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        docs_tables.main([str(tmp_path / "other.md")])
    with pytest.raises(KeyError):
        docs_tables.fill("<!-- table: y -->\n<!-- end -->", {})
