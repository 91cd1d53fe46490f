"""Lines by position and maps by depth and length, in the page of a stage and in that of a pipeline."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from llmkit import Evaluate, run
from llmkit.core.console import Console
from llmkit.stages.chart import chart
from llmkit.stages.overview import remember, write_overview
from llmkit.stages.slices import colour, drawings, drawn, heat, scale_of


def line(metric, slice, value, n=4):
    return {"metric": metric, "slice": slice, "value": value, "n": n, "low": value - 0.1, "high": value + 0.1}


CELLS = [
    line("passkey.accuracy", f"length={length},depth={depth:.3g}", value)
    for length, depth, value in ((512, 0, 1.0), (512, 0.5, 0.75), (2048, 0, 0.25), (2048, 0.5, 0.0))
]


def svg(text):
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", text, re.DOTALL)[0])


def test_a_map_has_a_labelled_cell_for_each_depth_and_length():
    drawing = svg(heat("passkey.accuracy", CELLS, scale_of("passkey.accuracy", CELLS)))
    cells = {g.find("title").text.partition(":")[0]: g for g in drawing.findall("g")}
    assert list(cells) == [f"{n} tokens, depth {d}" for n in (512, 2048) for d in ("0", "0.5")]
    assert [g.find("text").text for g in cells.values()] == ["1", "0.75", "0.25", "0"]
    assert "[0.65, 0.85], n 4" in cells["512 tokens, depth 0.5"].find("title").text
    places = [(float(g.find("rect").get("x")), float(g.find("rect").get("y"))) for g in cells.values()]
    assert places[0][0] == places[1][0] < places[2][0] and places[0][1] == places[2][1] < places[1][1]
    assert [text.text for text in drawing.findall("text")][3:7] == ["0", "0.5", "512", "2048"]


def test_letters_stand_out_from_their_cell_and_colours_grow_lighter():
    def light(code):
        red, green, blue = (int(code[at : at + 2], 16) for at in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    shades = [colour(step / 20) for step in range(21)]
    assert all(abs(light(fill) - light(ink)) > 90 for fill, ink in shades)
    assert [light(fill) for fill, _ in shades] == sorted(light(fill) for fill, _ in shades)
    assert colour(-1) == colour(0) and colour(2) == colour(1)


def test_a_steep_line_is_on_a_logarithmic_axis_and_what_is_no_number_is_left_out():
    points = [(1024.0, 10.0), (2048.0, 100.0), (3072.0, 1000.0), (4096.0, float("inf"))]
    steep = chart("perplexity", {"a": points}, "up to position")
    assert "(log scale)" in steep and "up to position 3072" in steep
    _, y = zip(*(p.split(",") for p in re.search(r'points="(.*?)"', steep)[1].split()), strict=True)
    assert float(y[0]) - float(y[1]) == pytest.approx(float(y[1]) - float(y[2]))
    assert "(log scale)" not in chart("lr", {"a": [(1, 1e-5), (2, 1e-2)]})


def test_stages_share_a_chart_and_a_scale():
    by = {
        name: [line("p.perplexity", "positions=0-9", v), line("p.perplexity", "positions=10-19", 2 * v)]
        for name, v in (("plain", 8.0), ("scaled", 4.0))
    }
    text = drawings(by)
    assert text.count("<polyline") == 2 and text.count("<svg") == 1 and "scaled" in text
    two = [[line("p.margin", "length=512,depth=0.5", value)] for value in (1.0, 3.0)]
    text = drawings(dict(zip(("a", "b"), two, strict=True)))
    assert text.count("<svg") == 2
    assert [colour(share)[0] in text for share in (0.0, 1.0)] == [True, True]
    assert drawings({"a": [line("p.margin", "all", 1.0)]}) == ""
    assert not drawn(line("x", "all", 1.0))


def test_an_evaluation_leaves_slices_and_draws_them(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "the quick brown fox " * 20}) + "\n" for _ in range(3)))
    tasks = [
        {"kind": "position_perplexity", "data": [{"kind": "jsonl", "path": str(rows)}], "length": 64, "buckets": 4},
        {"kind": "passkey", "lengths": [256, 384], "depths": 2, "samples": 2, "distractors": 2},
    ]
    out = tmp_path / "pipe" / "plain"
    run(Evaluate(model=str(tiny), tasks=tasks, out=str(out)), console=Console(quiet=True))
    found = [json.loads(text) for text in (out / "evals.jsonl").read_text().splitlines()]
    assert sum(f["slice"].startswith("positions=") for f in found) == 4
    assert sum(f["slice"].startswith("length=") for f in found) == 12
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 1 and page.count("tokens, depth") == 12
    assert "passkey.accuracy</td>" in page and "length=256" not in page.partition("Settings")[0]
    node = Evaluate(model=str(tiny), tasks=tasks, out=str(out))
    remember(tmp_path / "pipe", [("plain", node)])
    assert "passkey.margin, plain" in write_overview(tmp_path / "pipe").read_text()
