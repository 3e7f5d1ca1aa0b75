"""`fedaccord task plot`: a picture of how records fall over sites, counted right and readable."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from wards import OWN_TABLE, Call

from fedaccord.simulations import split_plot
from fedaccord.simulations.split_plot import Split
from fedaccord.tasks import load_task


def split(sites: int, classes: int = 3, records: int = 500) -> Split:
    rng = np.random.default_rng(0)
    return Split(
        title="wards",
        about="made up",
        sites=tuple(f"ward-{place}" for place in range(sites)),
        subjects=np.arange(records),
        home=rng.integers(0, sites, records),
        held=rng.random(records) < 0.3,
        classes=tuple(f"class {kind}" for kind in range(classes)),
        labels=rng.integers(0, classes, records),
        attributes={"sex": ("female", "male")},
        groups={"sex": rng.integers(0, 2, records)},
    )


def words(file: Path) -> list[str]:
    """Texts of a picture: as paths they stand in comments, in their order."""
    tree = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(file, tree).getroot()
    return [str(e.text).strip() for e in root.iter() if e.tag is ElementTree.Comment]


def test_the_picture_of_heart_says_the_published_sizes(called: Call, tmp_path: Path) -> None:
    file = tmp_path / "split.svg"
    assert called("task", "plot", "heart", "--out", file) == (0, f"{file}\n", "")
    said = words(file)
    for word in ("cleveland", "303", "hungary", "294", "switzerland", "123", "va", "200"):
        assert word in said
    assert "heart: 920 records at 4 sites" in said
    # Detrano et al. 1989: 45.9 % of Cleveland's patients have the disease (139 of 303).
    assert {"disease: 46%", "healthy", "female", "male"} <= set(said)


def test_the_same_split_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        split_plot.write(split(5), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_sixty_sites_have_a_row_each_and_no_two_texts_on_top_of_each_other() -> None:
    figure = split_plot.picture(split(60, 10, 3000))
    pen = FigureCanvasAgg(figure).get_renderer()
    figure.draw(pen)
    sizes, *others = figure.axes
    assert [label.get_text() for label in sizes.get_yticklabels()] == [
        "all",
        *(f"ward-{place}" for place in range(60)),
    ]
    boxes = [text.get_window_extent(pen) for text in sizes.get_yticklabels()]
    boxes += [text.get_window_extent(pen) for axes in figure.axes for text in axes.texts]
    boxes += [axes.get_legend().get_window_extent(pen) for axes in figure.axes]
    x0, y0, x1, y1 = np.array([[box.x0, box.y0, box.x1, box.y1] for box in boxes]).T
    apart = (x1[:, None] <= x0) | (x0[:, None] >= x1) | (y1[:, None] <= y0) | (y0[:, None] >= y1)
    assert (apart | np.eye(len(boxes), dtype=bool)).all()
    edge = figure.bbox
    assert all(edge.x0 <= b.x0 and b.x1 <= edge.x1 and b.y1 <= edge.y1 for b in boxes)
    assert len(others) == 2


def test_shares_that_are_drawn_are_those_of_the_counts() -> None:
    made = split(4)
    axes = split_plot.picture(made).axes[1]
    bars = [p for p in axes.patches if p.get_width() != 1.0]
    rows = 5  # all sites, then each
    found = np.array([bar.get_width() for bar in bars]).reshape(3, rows)
    for site in range(4):
        own = made.labels[made.home == site]
        assert np.allclose(found[:, 1 + site], np.bincount(own, minlength=3) / len(own))
    assert np.allclose(found[:, 0], np.bincount(made.labels) / len(made.labels))


def test_classes_beyond_ten_are_drawn_as_one_and_none_is_lost() -> None:
    counts = np.arange(26).reshape(2, 13)
    names = [f"c{kind}" for kind in range(13)]
    drawn, said, colours = split_plot.folded(counts, names, split_plot.LABELS)
    assert said == [*(f"c{kind}" for kind in range(4, 13)), "4 others"]
    assert drawn.sum() == counts.sum() and drawn.shape == (2, 10)
    assert colours[-1] == split_plot.REST and len(set(colours)) == 10


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast of two colours."""

    def light(colour: str) -> float:
        parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([light(one), light(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [*split_plot.LABELS, *split_plot.GROUPS, split_plot.REST])
def test_words_on_a_colour_can_be_read(colour: str) -> None:
    ink = {"white": "#FFFFFF", "black": "#000000"}[split_plot._ink(colour)]
    assert contrast(ink, colour) >= 4.5  # WCAG 2.2, 1.4.3


def test_a_new_split_pools_the_records_of_all_sites(called: Call, tmp_path: Path) -> None:
    file = tmp_path / "split.png"
    code, _, err = called(
        "task", "plot", "heart", "--out", file, "--partition", "dirichlet:0.3", "--sites", 7
    )
    assert (code, err) == (0, "") and file.read_bytes().startswith(b"\x89PNG")
    task = load_task("heart")
    whole = split_plot.of_task(task, task.sites)
    made = split_plot.divided(whole, "column:sex", None, 0)
    assert len(made.sites) == 2 and made.held is None
    assert np.array_equal(made.home, whole.groups["sex"])
    same = split_plot.divided(whole, "natural", None, 0)
    assert np.array_equal(same.home, whole.home)


def test_equal_ids_at_two_sites_are_two_subjects(called: Call, tmp_path: Path) -> None:
    (tmp_path / "wards.csv").write_text(
        "patient,ward,age,smoker,sex,again\n"
        + "".join(
            f"p{i},{ward},{20 + i},yes,male,{'yes' if i % 2 else 'no'}\n"
            for ward in ("north", "south")
            for i in range(30)
        )
    )
    (tmp_path / "ours.toml").write_text(OWN_TABLE)
    from fedaccord.accord import load
    from fedaccord.tasks import task_of

    task = task_of(load(tmp_path / "ours.toml"), tmp_path)
    assert len(np.unique(split_plot.of_task(task, task.sites).subjects)) == 60
    file = tmp_path / "wards.svg"
    assert called("task", "plot", tmp_path / "ours.toml", "--out", file)[0] == 0
    assert {"north", "south"} <= set(words(file))


REFUSED = [
    (("hart",), 'no file, no bundled accord and no task. Did you mean "heart"?'),
    (("heart", "--out", "split.gif"), "is not one of .svg, .png, .pdf"),
    (("heart", "--out", "nowhere/split.svg"), "its folder does not exist"),
    (("heart", "--sites", "3"), "--sites 3: needs --partition"),
    (("heart", "--partition", "foo"), '"foo" is not a way to divide records'),
    (("heart", "--partition", "iid", "--sites", "921"), "sites = 921 is more than the 920"),
    (("heart", "--partition", "iid", "--sites", "0"), "sites = 0 must be from 1"),
    (("heart", "--partition", "iid", "--sites", "201"), "a picture shows 200 at most"),
    (("heart", "--partition", "iid", "--seed", "-1"), "--seed"),
]


@pytest.mark.parametrize(("words_", "said"), REFUSED)
def test_what_cannot_be_drawn_is_one_line_and_exit_code_2(
    words_: tuple[str, ...],
    said: str,
    called: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = called("task", "plot", *words_)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err and list(tmp_path.iterdir()) == []
