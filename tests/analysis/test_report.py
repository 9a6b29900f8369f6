"""The report shows what a model has, says what it lacks, and is a page that needs nothing but itself."""

from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dreamer_jax.analysis.captures import AnalysisError, Captures
from dreamer_jax.analysis.gallery import compared, labels, missing, plates
from dreamer_jax.analysis.report import write
from tests.analysis.planted_captures import L, planted, without

EVIL, TOKEN = "<b>&\"'$x$", "</script><script>alert(1)</script>"
MOST_GROUPS = ("experts/", "attention/", "residual/", "exit/", "removal/entry", "saturation/", "trajectory/")
FIGURES_OF_DR_DA = {
    *("figure_4_da", "figure_5_ea", "figure_6_ea", "figure_7_ea", "coactivation_ea", "heads_da"),
    *("attention_experts", "router_confidence", "residual_stream", "updates", "logit_lens", "help_of_depth"),
    *("settling", "exits", "removals", "removed_entries_da", "trajectories"),
    *("saturation_sa", "saturation_da", "saturation_ea"),
}


class Page(HTMLParser):
    """What is in a page: open tags that are left, and all tags with their attributes and texts."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.open, self.wrong = [], []
        self.tags, self.texts = [], []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text_of(self, *tags):
        return [text for tag, text in self.texts if tag in tags]


def small(variant, run=""):
    """Captures with few figures: the lens and the removals."""
    return without(planted(variant, run=run), *MOST_GROUPS)


@pytest.fixture(scope="module")
def complete():
    return {plate.name: plate for plate in plates(planted("DR+DA"))}


@pytest.fixture(scope="module")
def captures():
    found = small("DR+DA", EVIL)
    config = {"depth": L, "da": {"note": TOKEN}, "mixture": ["da+sa", "ea"]}
    return Captures(found.arrays, replace(found.about, config=config, source=TOKEN))


@pytest.fixture(scope="module")
def page(captures, tmp_path_factory):
    return Page(write([captures], tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Only of settling is there a figure, to be quick."""
    few = ("removal/depth", "lens/loss", "lens/change")
    runs = [without(small(variant, run), *few) for variant, run in (("LA", ""), ("DR", EVIL))]
    return Page(write(runs, tmp_path_factory.mktemp("two")))


def test_a_complete_model_has_all_figures_and_misses_nothing(complete):
    assert set(complete) == FIGURES_OF_DR_DA
    assert missing(planted("DR+DA")) == []


def test_every_figure_is_explained_in_a_few_sentences(complete):
    assert all(2 <= plate.text.count(". ") + 1 <= 5 and plate.text.endswith(".") for plate in complete.values())
    assert len({plate.title for plate in complete.values()}) == len(complete)


def test_layers_with_experts_of_their_own_have_no_depths_of_an_expert():
    lacks = {lack.title: lack.why for lack in missing(planted("LA"))}
    assert set(lacks) == {
        "Depth attention (Figure 4)",
        "Attention experts",
        "Depths of an expert, and experts of a depth (Figures 5 and 7)",
    }
    routing = without(planted("LA"), "residual/", "lens/", "exit/", "removal/", "saturation/", "trajectory/")
    names = [plate.name for plate in plates(routing)]
    assert names == ["figure_6_ea", "coactivation_ea_1", f"coactivation_ea_{L}", "router_confidence"]


@pytest.mark.parametrize(
    ("group", "title", "why"),
    [
        ("attention/", "Depth attention (Figure 4)", "its form has none"),
        ("experts/ea", "Experts (Figures 5 to 7)", "no expert attention"),
        ("exit/", "Exits", "not asked for"),
        ("removal/", "Removals", "not asked for"),
        ("saturation/", "Saturation of the routers", "One checkpoint"),
        ("trajectory/", "Trajectories of tokens", "No tokens"),
    ],
)
def test_what_is_missing_is_named_with_its_reason(group, title, why):
    [lack] = missing(without(planted("DR+DA"), group))
    assert lack.title == title
    assert why in lack.why


def test_a_new_dimension_shows_up_by_itself():
    found = without(
        planted("DR"), "residual/", "lens/", "exit/", "removal/", "saturation/", "trajectory/", "experts/ea"
    )
    weight = np.full((L, 1, 6), 1 / 6)
    router = {of: found[f"experts/sa/{of}"] for of in ("counts", "entropy", "margin")}
    new = {f"experts/latent/{of}": array for of, array in router.items()}
    new |= {f"attention/latent/{of}": weight for of in ("weight", "weighted_norm")}
    new["attention/latent/visible"] = np.ones((L, 6), dtype=bool)
    drawn = {plate.name: plate for plate in plates(Captures(found.arrays | new, found.about))}
    assert set(drawn) == {"attention_experts", "router_confidence", "attention_latent"}
    titles = [ax.get_title() for ax in drawn["attention_experts"].figure.axes]
    assert any("latent" in title for title in titles)


def test_models_are_compared_in_what_at_least_two_of_them_have():
    runs = [without(planted(variant), "lens/") for variant in ("LA", "DR")]
    assert [plate.name for plate in compared(runs)] == ["figure_6_ea", "router_confidence_ea", "residual_stream"]


def test_runs_of_one_name_are_told_apart():
    one = planted("DR", run="dr")
    later = Captures(one.arrays, replace(one.about, step=900))
    assert labels([one, planted("LA")]) == ["dr", "la"]
    assert labels([one, later]) == ["dr, step 300", "dr, step 900"]
    assert labels([one, one]) == ["dr, step 300, depth 4, 1", "dr, step 300, depth 4, 2"]


def test_the_page_is_well_formed(page, pair):
    for one in (page, pair):
        assert (one.open, one.wrong) == ([], [])
        assert one.source.startswith("<!DOCTYPE html>")
        assert one.all("html") == [{"lang": "en"}]
        ids = [attributes["id"] for _, attributes in one.tags if "id" in attributes]
        assert len(set(ids)) == len(ids)
        assert {link["href"] for link in one.all("a") if link["href"].startswith("#")} <= {f"#{i}" for i in ids}


def test_headings_follow_each_other_without_gaps(page, pair):
    for one in (page, pair):
        levels = [int(tag[1]) for tag, _ in one.tags if tag in ("h1", "h2", "h3", "h4", "h5")]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(later <= level + 1 for level, later in pairwise(levels))


def test_the_page_needs_nothing_but_itself(page, pair):
    for one in (page, pair):
        assert not {tag for tag, _ in one.tags} & {"script", "link", "iframe", "object"}
        sources = [attributes["src"] for _, attributes in one.tags if "src" in attributes]
        assert sources
        assert all(source.startswith("data:image/") for source in sources)
        assert not any(mark in one.source for mark in ("http:", "https:", "url(", "@import"))
        assert not any(name.startswith("on") for _, attributes in one.tags for name in attributes)


def test_texts_from_data_are_escaped(page):
    assert "<b>" not in page.source
    assert "script>" not in page.source.replace("script&gt;", "")
    assert page.text_of("h1") == [f"Analysis of {EVIL}"]
    assert page.text_of("td").count(TOKEN) == 2


def test_every_figure_stands_in_the_page_with_its_caption_and_files(page, captures):
    found = plates(captures)
    assert [image["alt"] for image in page.all("img")] == [plate.title for plate in found]
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(found)
    for plate in found:
        assert plate.text in page.text_of("p")
        for kind in ("png", "svg"):
            assert {"href": f"figures/{plate.name}.{kind}"} in page.all("a")
            assert (page.path.parent / "figures" / f"{plate.name}.{kind}").stat().st_size


def test_the_page_says_what_is_missing_and_why(page, captures):
    assert page.text_of("dt") == [lack.title for lack in missing(captures)]
    assert page.text_of("dd") == [lack.why for lack in missing(captures)]


def test_the_tables_have_the_numbers_of_the_captures(page, captures):
    cells = page.text_of("td")
    assert {"1,234,567", "6.000", "20.0", "40.0", "da+sa, ea"} <= set(cells)
    assert {"da.note", "without da", "without depth 4"} <= set(page.text_of("th"))
    without_da = float(captures["removal/dimension/da"])
    at = cells.index(f"{without_da:.3f}")
    assert cells[at + 1] == f"{without_da - 3.1:+.3f}"


def test_several_models_are_shown_side_by_side_and_one_by_one(pair):
    assert pair.text_of("h2") == ["Side by side", "la", EVIL]
    assert pair.text_of("h1") == [f"Analysis of la, {EVIL}"]
    assert pair.text_of("h3")[:3] == ["The runs", "The paper's numbers", "Figures"]
    files = [Path(link["href"]) for link in pair.all("a") if not link["href"].startswith("#")]
    assert {file.parent.as_posix() for file in files} == {"figures", "figures/1_la", "figures/2__b_x_"}
    assert all((pair.path.parent / file).is_file() for file in files)


def test_a_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(AnalysisError, match="at least one model"):
        write([], tmp_path)


def test_figures_of_an_earlier_report_go_and_files_of_others_stay(tmp_path):
    captures = planted("LA")
    write([captures], tmp_path)
    mine = tmp_path / "figures" / "mine.png"
    mine.write_bytes(b"1")
    write([without(captures, "removal")], tmp_path)
    names = {path.stem for path in mine.parent.iterdir()}
    assert "mine" in names
    assert "removals" not in names
