"""The page and the DOT text of a plan: complete, self-contained, and nothing in them is taken for code."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from seqpar.passes.draw_dot import quoted, to_dot
from seqpar.passes.draw_html import HEIGHT, WIDTH, picture, to_html, to_svg
from seqpar.passes.drawing import Box, Drawing, Op, RankUse, Stage

EVIL = "</script><script>alert(1)</script>"


def op(call, received=0, source="package/x.py:12 in forward"):
    return Op(call, call, "blocks.0.attn", "[1, 16, 8]", "1 64/4 8", source, received, 100)


BOXES = (
    Box("compute", False, "norm", (op("silu"), op("linear"))),
    Box("compute", True, "attn", (op("linear"), op("linear"), op(EVIL, source=EVIL))),
    Box("collective", True, "attn", (op("seq_to_heads over ulysses", 5000),)),
    Box("attention", True, "attn", (op("scaled_dot_product_attention"),)),
)
STAGE = Stage(("blocks.0", "blocks.1"), BOXES, ((0, 1), (0, 3), (1, 2), (2, 3)))
USES = tuple(RankUse(rank, 100, 5000, 1000, 10, 500) for rank in range(2))
DRAWING = Drawing(2, 1, (STAGE, Stage(("outputs",), (Box("output", False, "", (op("output"),)),), ())), (2, 1), USES, RankUse(0, 200, 0, 1000, 10, 900))


class Page(HTMLParser):
    VOID = {"meta", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.scripts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def page():
    return Page(to_html(DRAWING, f"a plan {EVIL}"))


def test_well_formed_and_nothing_from_outside(page):
    assert not page.open and len(page.scripts) == 2
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert not any(key in attrs for tag, attrs in page.tags for key in ("src", "href", "onclick", "action"))
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.tags if tag == "meta")
    assert "url(" not in to_html(DRAWING, "a plan") and "http" not in re.sub("http-equiv", "", to_html(DRAWING, "a plan"))


def test_text_of_the_model_is_no_code(page):
    assert not any("alert(1)" in script for script in page.scripts[1:]) and EVIL not in to_html(DRAWING, EVIL)
    data = json.loads(page.scripts[0])
    assert data["0-1"][2]["source"] == EVIL


def test_every_box_has_its_details(page):
    data = json.loads(page.scripts[0])
    boxes = [attrs for tag, attrs in page.tags if tag == "g" and attrs.get("class") == "box"]
    assert {attrs["id"].removeprefix("b") for attrs in boxes} == data.keys() and len(boxes) == 5
    assert all(attrs["tabindex"] == "0" and attrs["role"] == "button" for attrs in boxes)
    assert [item["call"] for item in data["0-0"]] == ["silu", "linear"] and data["0-2"][0]["received"] == 5000
    colours = [attrs["class"] for tag, attrs in page.tags if tag == "rect"]
    assert colours == ["whole", "sharded", "collective", "attention", "output"]
    assert sum(tag == "details" for tag, _ in page.tags) == 2 and sum(attrs.get("class") == "bar" for _, attrs in page.tags) == 3 + 2 + 3


def test_boxes_do_not_overlap_and_edges_go_down():
    placed = picture(0, STAGE, 2)
    corners = [(p.x, p.y) for p in placed.placed]
    for i, (x, y) in enumerate(corners):
        assert x >= 0 and x + WIDTH <= placed.width and y + HEIGHT <= placed.height
        assert all(abs(x - u) >= WIDTH or abs(y - v) >= HEIGHT for u, v in corners[:i])
    # That from the first to the last box follows from the others. What goes through an exchange is marked, with its bytes.
    assert [(line.moved, line.label) for line in placed.lines] == [(False, ""), (True, ""), (True, "5 kB")]
    for a, b in ((0, 1), (1, 2), (2, 3)):
        assert corners[a][1] < corners[b][1]


def test_edges_past_other_boxes_go_beside_them():
    edges = ((0, 1), (1, 2), (2, 3), (4, 3), (5, 3))  # the last two pass two boxes
    placed = picture(0, Stage(("a",), (*BOXES, BOXES[0], BOXES[0]), edges), 1)
    ways = [re.search(r" ([-\d.]+),[-\d.]+ V", line.path) for line in placed.lines]
    assert [way is not None for way in ways] == [False, False, False, True, True]
    beside = [float(way[1]) for way in ways if way]
    assert len(set(beside)) == 2 and all(0 < x < placed.width for x in beside)
    for x in beside:
        assert not any(p.x <= x <= p.x + WIDTH for p in placed.placed[1:3])


def test_wide_layers_do_not_overlap():
    wide = Stage(("a",), (BOXES[0],) * 7, tuple((0, i) for i in range(1, 6)))
    corners = [(p.x, p.y) for p in picture(0, wide, 1).placed]
    assert all(abs(x - u) >= WIDTH or abs(y - v) >= HEIGHT for i, (x, y) in enumerate(corners) for u, v in corners[:i])


def test_dot():
    text = to_dot(DRAWING)
    assert text.count("{") == text.count("}") == 3 and text.count(" -> ") == 5 and 'label="blocks.0 … blocks.1  x 2"' in text
    assert "5 kB" in text and quoted('a"b\\c\nd') == '"a\\"b\\\\c\\nd"'


def test_svg():
    whole, part = (ElementTree.fromstring(to_svg(DRAWING, f"a {EVIL}", only=only)) for only in ("", "blocks"))
    assert [sum(element.get("class") in ("sharded", "whole", "attention", "collective", "output") for element in svg.iter()) for svg in (whole, part)] == [5, 4]
    assert any("5 kB" in (element.text or "") for element in part.iter()) and EVIL not in to_svg(DRAWING, EVIL)
