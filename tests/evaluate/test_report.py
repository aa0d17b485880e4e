"""The report: every experiment, no figure without its interval, and its place in a page."""

import json
import math
import re
from pathlib import Path

import pytest

from mini_dalle2.evaluate import report
from mini_dalle2.evaluate.command import main
from mini_dalle2.evaluate.experiments import EXPERIMENTS
from mini_dalle2.evaluate.report import IN_RESULTS, split_page

SHAPES = [name for name, one in EXPERIMENTS.items() if one.data != "folder"]


def test_the_report_holds_every_experiment(evaluated):
    text = (evaluated / "report.md").read_text()
    for name in SHAPES:
        found = json.loads((evaluated / "evaluate" / f"{name}.json").read_text())["findings"]
        assert f"## {EXPERIMENTS[name].title}\n" in text and f"`{name}`" in text
        assert found["tables"] and found["claims"]
    assert set(re.findall(r"^\| (\w+) \| .* \| (?:yes|no|cannot tell) \|$", text, re.M)) == set(
        SHAPES
    )
    for file in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (evaluated / file).stat().st_size > 1000, file
    assert len(re.findall(r"_plot\d?\.png\)", text)) >= 6
    parts = {re.search("`(\\w+)`", part)[1]: part for part in text.split("\n## ")[1:]}
    assert (
        "n = 4 and 16," in parts["guidance"]
        and "true pictures" in parts["fig8"]
        and "true z_img |" in parts["steps"]
    )
    assert (
        "check of the method" in parts["variations"]
        and "check of the method" not in text.split("\n## ")[0]
    )
    assert re.search(r"\nTogether [\d.]+ minutes", text) and "Fréchet distance ↓" in parts["fig8"]


def test_no_figure_stands_without_its_interval(evaluated):
    lines = (evaluated / "report.md").read_text().splitlines()
    rows = [
        line.strip("| ").split(" | ")
        for line, behind in zip(lines, [*lines[1:], ""])
        if line.startswith("| ") and "| --- |" not in line + behind
    ]  # no heads of tables
    number = r"-?[\d.]+(?:e[-+]\d+)?"
    figures = 0
    for row in rows:
        claim = row[-1] in ("yes", "no", "cannot tell")
        for cell in [row[-2].rsplit(": ", 1)[1]] if claim else row[1:]:
            figures += 1
            found = re.fullmatch(rf"({number})(?: %)? \(({number}) to ({number})\)", cell)
            assert found or cell == "–", cell
            if found:
                value, low, high = map(float, found.groups())
                assert (
                    low <= value <= high
                    or math.isclose(low, value, abs_tol=0.11)
                    or math.isclose(high, value, abs_tol=0.11)
                ), cell
    assert figures > 200


def test_verdicts_in_the_report_follow_from_their_intervals(evaluated):
    for line in (evaluated / "report.md").read_text().splitlines():
        if found := re.search(
            r"\((-?[\d.e+-]+) to (-?[\d.e+-]+)\) \| (yes|no|cannot tell) \|$", line
        ):
            low, high = float(found[1]), float(found[2])
            if found[3] == "yes":
                assert low >= 0
            elif found[3] == "no":
                assert high <= 0
            else:
                assert low <= 0 <= high


def test_the_page_holds_the_table_once(copied, tmp_path):
    page = tmp_path / "results.md"
    page.write_text(
        "# before\n<!-- evaluate emoji: begin -->\n<!-- evaluate emoji: end -->\n\n"
        "<!-- evaluate shapes: begin -->\nSTALE\n<!-- evaluate shapes: end -->\n\n# behind\n"
    )
    command = [f"--run={copied}", "--n=16", "--device=cpu", "--results", str(page)]
    assert main(command) == 0
    first = page.read_text()
    assert main(command) == 0 and page.read_text() == first
    assert first.startswith(
        "# before\n<!-- evaluate emoji: begin -->\n<!-- evaluate emoji: end -->\n\n"
        "<!-- evaluate shapes: begin -->\nBy `python"
    )
    assert (
        first.endswith("\n<!-- evaluate shapes: end -->\n\n# behind\n")
        and "STALE" not in first
        and first.count("begin -->") == 2
    )
    assert (
        f"--run {copied}" in first
        and all(f"| {name} |" in first for name in SHAPES)
        and "decoder 3" in first
    )
    images = re.findall(r"\]\((.*?)\)", first)
    assert len(images) == len(IN_RESULTS) - 1 and all(
        0 < (tmp_path / image).stat().st_size < 150_000 for image in images
    )


@pytest.mark.parametrize("name", ["shapes", "emoji"])
def test_our_own_page_has_the_place_for_it(name):
    before, behind = split_page(report.RESULTS, f"evaluate {name}")
    assert len(before) > 1000 and len(behind) > 1000 and Path(report.RESULTS).name == "results.md"
