import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from tenfold.core.claims import Claim, above, below, figures, render, within
from tenfold.core.claims.report import strip
from tenfold.core.reproduce import ReproduceError, reproduce

HOSTILE = "<script>alert('&')</script>"
VOID = {"meta", "br", "hr", "img", "input", "link"}
SEEN = []


def measure(seed):
    SEEN.append(seed)
    return {"loss": 1.0 + 0.01 * seed}


def losses(run):
    results = [run.measure(f"seed{s}", measure, seed=s)["loss"] for s in run.seeds]
    curves = [[r, r / 2, r / 3] for r in results]
    return [
        Claim(
            name="loss-1",
            statement=f"The loss is low. {HOSTILE}",
            paper=f"0.5 {HOSTILE}",
            criterion=below(2),
            values=results,
            unit=f"bits {HOSTILE}",
            baseline=f"softmax {HOSTILE}",
            notes=f"First.\n\n{HOSTILE}",
            table=[{"arm <b>": HOSTILE, "count": 123456, "loss": 0.123456}],
            figure=figures.lines([1, 2, 4], {HOSTILE: curves}, xlabel="x", ylabel="y", log="xy"),
            caption=f"Caption {HOSTILE}",
        ),
        Claim(
            name="loss-2",
            statement="The loss is high.",
            paper="none",
            criterion=above(2),
            values=results,
            unit="bits",
            baseline="none",
            figure=figures.intervals({"a": results}, xlabel="loss", threshold=2),
        ),
    ]


def near(run):
    values = [float((-1) ** s) for s in run.seeds]
    return [
        Claim(
            name="near",
            statement="It is near.",
            paper="",
            criterion=within(-0.5, 0.5),
            values=values,
            unit="m",
            baseline="",
        )
    ]


def broken(run):
    raise RuntimeError(f"no luck {HOSTILE}")


def untyped(run):
    return [3]


def twice(run):
    return near(run) + near(run)


def interrupted(run):
    run.measure("before", measure, seed=99)
    raise KeyboardInterrupt


def method(*claims, name="toy"):
    return SimpleNamespace(
        name=name, title="Toy", paper="Toys, arXiv 0", package="tenfold.cog_attention", claims=claims
    )


class Page(HTMLParser):
    """Text, ids and attributes of a page; checks that tags are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.stack, self.ids, self.attributes, self.text, self.tags = [], [], [], [], []
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of one run with two good methods and a bad claims function."""
    output = tmp_path_factory.mktemp("report") / "a" / "b"
    with pytest.raises(ReproduceError, match="toy: broken: RuntimeError"):
        reproduce([method(losses, broken, near), method(near, name="other")], seeds=4, output=output)
    return output


@pytest.fixture
def page(report):
    return (report / "index.html").read_text(encoding="utf-8")


def test_every_claim_and_failure_is_on_the_page(report, page):
    parsed = Page(page)
    text = " ".join(" ".join(parsed.text).split())
    assert {"toy", "other", "toy-loss-1", "toy-loss-2", "toy-near", "other-near"} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "Of 4 claims, 1 holds, 1 does not hold, and 2 are undecided" in text
    assert "broken failed. RuntimeError: no luck" in text
    assert "The loss is high." in text
    assert "1.015 [0.994, 1.036]" in text  # 1.015 ± 3.1824 · 0.01291 / 2
    assert "0: 1.000 1: 1.010 2: 1.020 3: 1.030" in text
    assert "123,456" in text
    assert "0.1235" in text
    for verdict in ("holds", "does not hold", "undecided"):
        assert verdict in text


def test_links_and_references_lead_somewhere(page):
    parsed = Page(page)
    targets = [v[1:] for _, name, v in parsed.attributes if name == "href"]
    targets += [v for _, name, v in parsed.attributes if name == "aria-labelledby"]
    targets += re.findall(r"url\(#([^)]+)\)", page)
    assert len(targets) > 8
    assert set(targets) <= set(parsed.ids)


def test_nothing_is_loaded_from_elsewhere(page):
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert not re.findall(r"https?:|//[a-z]|@import|\bon\w+=", page)
    for _, name, value in parsed.attributes:
        assert name not in ("src", "xlink:href", "srcset")
        assert name != "href" or value.startswith("#")


def test_text_is_escaped_everywhere(page):
    assert "<script" not in page
    assert "arm <b>" not in page
    assert page.count("&lt;script&gt;") >= 9


def test_figures_are_described_and_their_text_is_text(page):
    parsed = Page(page)
    assert page.count("<figure") == 2
    assert all("aria-label" in tag for tag in re.findall(r"<figure[^>]*>", page))
    plots = re.findall(r'<svg class="strip"[^>]*role="img" aria-label="([^"]+)"', page)
    assert plots[0].startswith("1.015 [0.994, 1.036]")
    assert len(plots) == 4
    assert "text" in parsed.tags
    assert "var(--blue, #0067a5)" in page


def test_the_page_stays_small(report):
    assert (report / "index.html").stat().st_size < 80_000


def test_render_needs_only_the_json(report, page, tmp_path):
    (tmp_path / "claims.json").write_bytes((report / "claims.json").read_bytes())
    assert render(tmp_path).read_text(encoding="utf-8") == page


def test_json_holds_what_ran(report):
    data = json.loads((report / "claims.json").read_text(), parse_constant=pytest.fail)
    assert data["seeds"] == [0, 1, 2, 3]
    assert data["budget"] == "default"
    assert {"torch", "lightning", "tenfold-core", "tenfold-cog-attention"} <= set(data["environment"]["versions"])
    toy, other = data["methods"]
    assert [c["name"] for c in toy["claims"]] == ["loss-1", "loss-2", "near"]
    assert [c["verdict"] for c in toy["claims"]] == ["holds", "does not hold", "undecided"]
    assert toy["failures"][0]["function"] == "broken"
    assert [m["key"] for m in toy["measurements"]] == ["seed0", "seed1", "seed2", "seed3"]
    for c in toy["claims"] + other["claims"]:
        assert Claim.from_json(c).to_json() == c


def test_no_file_is_left_half_written(report):
    assert not [p for p in report.rglob("*") if p.suffix == ".tmp"]


def test_a_second_reproduce_measures_nothing_and_more_seeds_only_the_new(tmp_path):
    page = reproduce([method(losses)], seeds=2, output=tmp_path)
    assert page == tmp_path / "index.html"
    reproduce([method(losses)], seeds=2, output=tmp_path)
    reproduce([method(losses)], seeds=3, output=tmp_path)
    assert SEEN == [0, 1, 2]
    assert "2 of 3 measurements kept from an earlier run" in page.read_text()


@pytest.mark.parametrize(("bad", "why"), [(untyped, "untyped"), (twice, "the name is taken")])
def test_a_bad_claims_function_does_not_stop_the_next(tmp_path, bad, why):
    with pytest.raises(ReproduceError, match=why):
        reproduce([method(bad, losses)], seeds=2, output=tmp_path)
    assert "The loss is high." in (tmp_path / "index.html").read_text()


def test_an_interrupted_run_keeps_its_measurements_and_the_old_report(tmp_path, capsys):
    reproduce([method(losses)], seeds=2, output=tmp_path)
    before = (tmp_path / "index.html").read_bytes()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reproduce([method(interrupted, losses)], seeds=2, output=tmp_path)
    assert SEEN == [0, 1, 99]
    assert (tmp_path / "index.html").read_bytes() == before
    assert "measurements kept in" in capsys.readouterr().err.replace("\n", " ")


def test_one_seed_is_said_and_decides_nothing(tmp_path):
    page = reproduce([method(losses)], seeds=1, output=tmp_path).read_text()
    assert "one seed" in page
    assert "2 are undecided" in page
    assert not re.search(r"\b(inf|nan)\b", " ".join(Page(page).text))


@pytest.mark.parametrize("seeds", [0, -1])
def test_bad_seeds(tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds"):
        reproduce([method(losses)], seeds=seeds, output=tmp_path)


def test_bad_budget(tmp_path):
    with pytest.raises(ValueError, match="quick, default, full"):
        reproduce([method(losses)], budget="huge", output=tmp_path)


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_output_that_is_a_file_is_refused_before_any_work(tmp_path, inside):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match=r"output: .*file"):
        reproduce([method(losses)], output=tmp_path / "file" / inside)
    assert SEEN == []
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="output: cannot write"):
        reproduce([method(losses)], output=tmp_path)
    assert SEEN == []


def test_a_full_disk_is_found_before_any_work(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match=r"output: cannot write to .*No space left"):
        reproduce([method(losses)], output=tmp_path)
    assert SEEN == []


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}'])
def test_a_damaged_json_is_refused(tmp_path, content):
    (tmp_path / "claims.json").write_text(content)
    with pytest.raises(ValueError, match=r"claims\.json"):
        render(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_nothing_to_render(tmp_path):
    with pytest.raises(FileNotFoundError, match="reproduce"):
        render(tmp_path)


def test_small_plot_places_things_in_order():
    fields = {"name": "x", "statement": "", "paper": "", "unit": "", "baseline": ""}
    at = strip(Claim(**fields, criterion=above(0), values=[1.0, 2.0, 3.0]))  # 2 ± 2.484
    assert at["low"] < at["bounds"][0][0] < at["seeds"][0] < at["mean"] < at["seeds"][2] < at["high"]
    assert at["region"] == (at["bounds"][0][0], 100)
    # One seed: from 0 to 4, with 12 % of that at each side.
    at = strip(Claim(**fields, criterion=below(4), values=[0.0]))
    assert (at["mean"], at["low"], at["region"]) == (9.68, None, (0, 90.32))


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_svg_is_well_formed_repeatable_and_keeps_its_ids_apart():
    def draw(prefix):
        return figures.svg(figures.heatmap(np.eye(3), xlabel="k", ylabel="q", label="w"), prefix=prefix)

    assert draw("a") == draw("a")
    ids = [{n.get("id") for n in ElementTree.fromstring(draw(p)).iter() if n.get("id")} for p in "ab"]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert {"k", "q", "w"} <= set(texts(draw("a")))


def test_lines_shows_means_and_bands():
    values = np.array([[1.0, 4.0], [3.0, 4.0]])  # mean 2 ± 12.706 · √2/√2, and 4 without spread
    axes = figures.lines([0, 1], {"arm": values}, xlabel="x", ylabel="y").axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([2, 4])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(2 - 12.7062, abs=1e-3)
    assert band[:, 1].max() == pytest.approx(2 + 12.7062, abs=1e-3)
    assert [t.get_text() for t in axes.texts] == ["arm"]


def test_labels_of_lines_do_not_overlap():
    series = {f"arm {i}": np.full((2, 3), 1 + 1e-6 * i) for i in range(5)}
    axes = figures.lines([1, 2, 3], series, xlabel="x", ylabel="y").axes[0]
    heights = sorted(t.get_position()[1] for t in axes.texts)
    points = np.diff(heights) * axes.get_window_extent().height * 72 / axes.figure.dpi
    assert (points > 9).all()


def test_intervals_bars_and_heatmap_draw_their_numbers():
    axes = figures.intervals({"a": [1.0, 2.0, 3.0], "b": [5.0]}, xlabel="x", threshold=(0, 4)).axes[0]
    assert [t.get_text() for t in axes.texts] == ["2.0 [−0.5, 4.5]", "5 (one seed)"]
    axes = figures.bars(["p", "q"], {"a": [[1, 2]], "b": [[3, 4]]}, ylabel="y").axes[0]
    assert [p.get_height() for p in axes.patches] == [1, 2, 3, 4]
    axes = figures.heatmap([[-1, 0.5]], xlabel="x", ylabel="y", label="l").axes[0]
    assert axes.collections[0].get_clim() == (-1, 1)


def test_uneven_series_are_named():
    with pytest.raises(ValueError, match=r"'arm'.*\(seeds, 2\).*\(3,\)"):
        figures.lines([1, 2], {"arm": [1, 2, 3]}, xlabel="x", ylabel="y")


def test_a_gallery_puts_the_images_of_a_row_side_by_side():
    first, second = [[0, 255], [10, 20]], [[1, 2], [3, 4]]
    figure = figures.gallery({"a": [first, second], "b": [second, first]})
    strip = figure.axes[0].images[0].get_array()
    assert strip.tolist() == [[0, 255, 1, 2], [10, 20, 3, 4]]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
