"""Report pages: one file, nothing from the network, every string escaped."""

import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from normkit.errors import ArgumentError, DependencyError
from normkit.report import (
    Bands,
    Bar,
    Bars,
    Figure,
    Heading,
    Heat,
    Histograms,
    Lines,
    Page,
    Table,
    Text,
    charts,
    drawing,
    format_value,
)

pytest.importorskip("jinja2", reason="report pages need normkit[demo]")
pytest.importorskip("matplotlib", reason="report pages need normkit[demo]")

from every_block import ENEMY, page_of_every_block

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "circle", "use", "rect"}


class Reader(HTMLParser):
    """What a browser would see: tags, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.is_balanced = True
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            self.is_balanced &= self.open[-1:] == [tag]
            del self.open[-1:]

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def html() -> str:
    return page_of_every_block().to_html()


@pytest.fixture(scope="module")
def read(html: str) -> Reader:
    return Reader(html)


def test_no_name_of_a_model_becomes_markup(read: Reader) -> None:
    assert not {"script", "img", "b", "iframe", "object"} & set(read.tags)
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert read.tags.count("style") == 1
    assert read.is_balanced
    assert not read.open


def test_names_are_shown_as_they_are_but_for_what_cannot_be_seen(read: Reader) -> None:
    shown = ENEMY.replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
    # The title, the heading, the table of contents, the lead, …
    assert read.text.count(shown) > 30
    assert "\u202e" not in read.text
    assert "\x07" not in read.text


def test_the_page_asks_nothing_of_the_network(html: str, read: Reader) -> None:
    assert {value for value in read.values("href") if not value.startswith("#")} == {
        "data:,"
    }
    assert not read.values("src")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    policy = dict(
        part.split(None, 1)
        for value in read.values("content")
        if value.startswith("default-src")
        for part in value.split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert "script-src" not in policy


def test_ids_are_unique_and_every_reference_to_one_resolves(
    html: str, read: Reader
) -> None:
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    referred = {v[1:] for v in read.values("href") if v.startswith("#")}
    referred |= {i for v in read.values("aria-labelledby") for i in v.split()}
    body = html[html.index("<body>") :]
    referred |= set(re.findall(r"url\(#([^)]+)\)", body))
    assert referred <= set(ids)


def test_every_picture_has_words_and_every_table_column_a_scope(read: Reader) -> None:
    labels = [v for t, n, v in read.attributes if (t, n) == ("div", "aria-label")]
    assert read.values("role").count("img") == 5
    assert all(labels)
    assert all(
        ("th", "scope") in {(t, n) for t, n, _ in read.attributes}
        for tag in read.tags
        if tag == "th"
    )
    assert read.tags.count("th") == len(read.values("scope"))


def test_colours_of_charts_come_from_the_page(html: str) -> None:
    defined = set(re.findall(r"(--[\w-]+):", html))
    used = set(re.findall(r"var\((--[\w-]+)", html))
    assert used <= defined
    assert {"--hue-0", "--ramp-9"} <= used
    pictures = re.findall(r'<div class="chart".*?</svg>', html, re.DOTALL)
    assert len(pictures) == 5
    for picture in pictures:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", picture)
        assert "font-family" not in picture


def test_light_and_dark_define_the_same_colours(html: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert re.findall(r"--[\w-]+", light) == re.findall(r"--[\w-]+", dark)


def test_a_chart_stays_small(html: str) -> None:
    for picture in re.findall(r'<div class="chart".*?</svg>', html, re.DOTALL):
        assert len(picture) < 30_000


def test_the_same_page_is_the_same_bytes(html: str) -> None:
    assert page_of_every_block().to_html() == html


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    drawing.draw(Lines({"a": ([0, 1], [1, 2])}), "x")
    assert dict(mpl.rcParams) == before


def drawn_points(svg: str) -> list[tuple[float, float]]:
    """The points of the longest path in a picture."""
    paths = [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] ?(\S+) (\S+)", d)]
        for d in re.findall(r' d="([^"]+)"', svg)
    ]
    return max(paths, key=len)


def test_a_spike_between_many_points_is_drawn() -> None:
    steps, values = np.arange(10_000), np.zeros(10_000)
    values[7_777] = 1.0
    points = drawn_points(drawing.draw(Lines({"a": (steps, values)}), "x"))
    heights = [y for _, y in points]
    # Pixels count downwards: the spike spans most of the picture.
    assert max(heights) - min(heights) > drawing.HEIGHT / 2
    assert len(points) < 400


def test_values_that_are_not_finite_leave_a_gap() -> None:
    values = [1.0, 2.0, math.nan, math.inf, 2.0, 1.0]
    svg = drawing.draw(Lines({"a": (range(6), values)}), "x")
    line = max(re.findall(r' d="([^"]+)"', svg), key=lambda d: d.count("L"))
    assert line.count("M") == 2
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()


def test_a_zero_is_left_out_of_a_logarithmic_chart() -> None:
    svg = drawing.draw(Lines({"a": ([0, 1, 2], [1e-3, 0.0, 1e-1])}, log_y=True), "x")
    assert "no finite values" not in svg
    only_zeros = Lines({"a": ([0, 1], [0.0, 0.0])}, log_y=True)
    assert "no finite values" in drawing.draw(only_zeros, "x")


@pytest.mark.parametrize("values", [[0.15, 0.3, 0.6], [0.15, 0.3, 2.0]])
def test_a_logarithmic_axis_has_numbers_also_within_a_decade(values: list) -> None:
    svg = drawing.draw(Lines({"a": ([0, 1, 2], values)}, x_label="", log_y=True), "x")
    shown = re.findall(r"text-anchor: end[^>]*>([^<]+)<", svg)
    assert [text for text in shown if text.strip()]


def test_places_have_names_on_the_axis_and_under_the_pointer() -> None:
    """A `<title>` needs no script; each point has one, and the ends are written."""
    names = [f"stage.{i}.conv<&>\x00" for i in range(12)]
    values = [1.0, math.nan, *range(2, 12)]
    chart = Lines({"rms": (range(12), values)}, x_names=names)
    root = ElementTree.fromstring(drawing.draw(chart, "p"))
    titles = [e.text for e in root.iter("title")]
    assert titles[0] == "stage.0.conv<&>\N{REPLACEMENT CHARACTER}: rms 1"
    assert len(titles) == 11  # one value is no point
    shown = [e.text or "" for e in root.iter("text")]
    ends = [names[0], names[-1]]
    for name in ends:
        written = name.replace("\x00", "\N{REPLACEMENT CHARACTER}")
        assert "…" + written[-13:] in shown
    assert "script" not in {e.tag for e in root.iter()}
    assert 3 <= sum(text.startswith("…") for text in shown) <= 5


def test_powers_of_ten_are_written_as_text() -> None:
    svg = drawing.draw(Lines({"a": ([0, 1], [1e-6, 1e-1])}, log_y=True), "x")
    assert "10⁻⁴" in svg
    assert "mathdefault" not in svg


def test_names_with_dollars_are_not_mathematics() -> None:
    svg = drawing.draw(Lines({"a": ([0], [1])}, y_label="$loss$ of $x_{1"), "x")
    assert "$loss$ of $x_{1" in svg


@pytest.mark.parametrize(
    "chart",
    [
        Lines({"loss": ([0, 1, 2], [1.0])}),
        Bands([0, 1], [0, 0], [1, 1], [2]),
        Histograms({"h": ([0, 1], [1, 2])}),
    ],
    ids=lambda chart: chart.kind,
)
def test_parts_of_different_lengths_are_refused_with_the_lengths(chart) -> None:
    with pytest.raises(ArgumentError, match=r"\d.*\d"):
        drawing.draw(chart, "x")


def test_the_table_behind_lines_tells_the_ends_and_the_extremes() -> None:
    columns, rows = charts.summary(Lines({"a": ([0, 1, 2, 3], [5, math.nan, 9, 7])}))
    assert dict(zip(columns, rows[0], strict=True)) == {
        "": "a",
        "first": 5,
        "least": 5,
        "most": 9,
        "last": 7,
        "points": 4,
    }


def test_beyond_eight_series_colours_follow_an_order() -> None:
    many = Lines({str(i): ([0], [i]) for i in range(12)})
    colours = [entry.colour for entry in charts.legend(many)]
    assert colours[0] == "--ramp-0"
    assert colours[-1] == "--ramp-9"
    assert colours == sorted(colours)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (-0.5, "-0.5"),
        (12345.6, "12,346"),
        (3.14159e-12, "3.14e-12"),
        (-2.5e9, "-2.5e9"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (np.float32(0.25), "0.25"),
        (np.int64(7), "7"),
        ("text", "text"),
    ],
)
def test_values_are_written_for_readers(value: object, shown: str) -> None:
    assert format_value(value) == shown


def test_a_column_of_numbers_is_set_to_the_right_and_words_are_not() -> None:
    table = Table(["a", "b", "c"], [["x", 1.0, None], ["y", None, None]])
    assert table.is_numeric == [False, True, False]


def test_bars_fill_up_to_the_largest_value_or_limit() -> None:
    bars = Bars([Bar("a", 1.0), Bar("b", 4.0), Bar("c", math.nan)], limit=2.0)
    assert [bars.percent(bar.value) for bar in bars.bars] == [25.0, 100.0, 0.0]
    assert bars.percent(bars.limit) == 50.0
    assert Bars([Bar("a", 0.0)]).percent(0.0) == 0.0
    assert bars.percent(math.inf) == 100.0


def test_heat_shades_against_the_largest_value() -> None:
    heat = Heat(["0"], [("a", [2.0]), ("b", [None]), ("c", [8.0])])
    assert [heat.percent(v) for v in (2.0, 8.0, None, math.inf)] == [25, 100, None, 100]


def test_backticks_set_code_and_an_odd_one_stays() -> None:
    html = Page("t", blocks=[Text("call `f(<x>)` or ` alone")]).to_html()
    assert "call <code>f(&lt;x&gt;)</code> or ` alone" in html


def test_headings_of_one_text_get_anchors_of_their_own() -> None:
    html = Page("t", blocks=[Heading("Same"), Heading("Same"), Heading("é")]).to_html()
    assert 'id="same"' in html
    assert 'id="same-2"' in html
    assert 'href="#section"' in html or 'id="section"' in html


def test_a_page_that_cannot_be_made_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    Page("old").write(path)
    broken = Figure("f", Lines({"a": ([0, 1], [1])}), alt="broken")
    with pytest.raises(ArgumentError):
        Page("new", blocks=[broken]).write(path)
    assert "<h1>old</h1>" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    page = Page("t", blocks=[Figure("f", Lines({"a": ([0], [1])}), alt="a")])
    with pytest.raises(DependencyError, match=rf"{package}.*pip install"):
        page.to_html()
