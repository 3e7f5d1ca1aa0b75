"""Admission: which node is which site, who stays out and why, and that a refusal costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp import Grid

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.client.app import app as client_app
from fedaccord.errors import BudgetError
from fedaccord.evidence import canonical_json
from fedaccord.privacy.ledger import Ledger
from fedaccord.privacy.plan import plan_for
from fedaccord.runs import RunFolder
from fedaccord.server import admission, checkpoint
from fedaccord.server.app import initial
from fedaccord.server.heads import Heads
from fedaccord.server.mail import Mail
from fedaccord.simulations import engine, heart
from fedaccord.strategies.updates import to_arrays
from fedaccord.tasks import load_task

SITES = ["cleveland", "hungary", "switzerland", "va"]
Record = dict[str, Any]

SMALL = """
name = "small"
purpose = "Test."
task = {{ name = "heart" }}
sites = [
  {{ name = "cleveland", subjects = 100 }}, {{ name = "hungary", subjects = 110 }},
  {{ name = "switzerland", subjects = 120 }}, {{ name = "va", subjects = 130 }},
]
model = {{ name = "mlp", options = {{ hidden = 4 }} }}
rounds = {{ rounds = 1, spare_rounds = 3, min_sites = {min_sites} }}
training = {{ steps = {steps}, learning_rate = 0.1 }}
privacy = {{ enabled = {private}, noise_multiplier = 2.0, delta = 1e-4, sampling_prob = 0.1 }}
fairness = {{ attributes = ["sex"], min_group = 5 }}
distillation = {{ enabled = false }}
"""


def accord_file(folder: Path, private: bool = True, min_sites: int = 2, steps: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "accord.toml"
    path.write_text(SMALL.format(private=str(private).lower(), min_sites=min_sites, steps=steps))
    return path


def simulate(folder: Path, nodes: int = 4, **how: Any) -> list[Record]:
    """Run the small accord; its records."""
    engine.simulate(accord_file(folder, **how), folder / "run", folder / "sites", nodes)
    return RunFolder.open(folder / "run").records()


def refused(folder: Path, nodes: int = 4, **how: Any) -> tuple[str, list[Record]]:
    """Run it where it cannot start; what the user is told, and its records."""
    with pytest.raises(BudgetError) as caught:
        simulate(folder, nodes, **how)
    run = RunFolder.open(folder / "run")
    assert run.faults() == []
    return str(caught.value), run.records()


def of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def invited(records: list[Record]) -> list[list[str]]:
    return [record["invited"] for record in of_kind(records, "round")]


def ledger(folder: Path, site: str) -> list[Record]:
    """What a site's own ledger holds after its key."""
    book = Ledger(folder / "sites" / site / "ledger.sqlite", site)
    try:
        return book.entries()[1:]
    finally:
        book.close()


@pytest.fixture
def cap(set_policy: Callable[..., None]) -> Callable[..., None]:
    """Write a site's own policy before anybody asks it."""

    def write(folder: Path, site: str, epsilon: float, delta: float = 1e-4, **how: Any) -> None:
        accord = accord_file(folder, **how)
        set_policy(folder / "sites" / site, accord, max_epsilon=epsilon, delta=delta)

    return write


# --- who stays out ------------------------------------------------------------------------------


def test_a_site_that_refuses_stays_out_by_name_and_the_others_go_on(
    tmp_path: Path, cap: Callable[..., None]
) -> None:
    cap(tmp_path, "va", 0.5)
    records = simulate(tmp_path)
    (out,) = of_kind(records, "out")
    plan = plan_for(accords.load(tmp_path / "accord.toml"), "va")
    assert plan is not None and plan.epsilon() > 0.5
    assert out["site"] == "va"
    assert out["reason"].startswith("This plan needs epsilon ")
    assert "site va has 0.50 of 0.50 left at delta 0.0001. Plan fewer rounds" in out["reason"]
    assert [record["site"] for record in of_kind(records, "plan")] == SITES[:3]
    assert invited(records) == [SITES[:3]]
    assert [entry["kind"] for entry in ledger(tmp_path, "va")] == ["REFUSAL"]
    assert records[-1]["reason"] == "rounds done: 1 of 1"


def test_a_site_with_a_stricter_delta_refuses(tmp_path: Path, cap: Callable[..., None]) -> None:
    cap(tmp_path, "va", 10.0, delta=1e-5)
    (out,) = of_kind(simulate(tmp_path), "out")
    assert out["reason"] == (
        "Site va refuses by its rule delta: privacy.delta = 0.0001 is above 1e-05. Lower it or ask "
        "the site to raise its own."
    )


def test_a_site_with_a_cap_takes_no_part_in_plain_training(
    tmp_path: Path, cap: Callable[..., None]
) -> None:
    cap(tmp_path, "va", 10.0, private=False)
    records = simulate(tmp_path, private=False)
    (out,) = of_kind(records, "out")
    assert out["reason"].startswith("Site va refuses by its rule max_epsilon: ")
    assert invited(records) == [SITES[:3]]


class Watch:
    """Files that Python opens, while it is on (an audit hook cannot be taken out again)."""

    def __init__(self) -> None:
        self.on, self.opened = False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event == "open":
            self.opened.append(str(args[0]))


WATCH = Watch()


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """What this test opens; the task's records are read afresh."""
    heart._rows.cache_clear()
    WATCH.opened.clear()
    WATCH.on = True
    yield WATCH.opened
    WATCH.on = False


def test_when_all_sites_refuse_nothing_is_reserved_and_no_record_is_read(
    tmp_path: Path, opened: list[str], cap: Callable[..., None]
) -> None:
    for site in SITES:
        cap(tmp_path, site, 0.5)
    words, records = refused(tmp_path)
    assert str(heart.FILE) not in opened
    assert str(tmp_path / "accord.toml") in opened  # the watch does see
    assert "\n" not in words
    assert words.startswith("This plan needs epsilon ")
    assert words.endswith("Out as well: hungary, switzerland, va.")
    assert [record["kind"] for record in records] == ["start", *["out"] * 4, "end"]
    assert (records[-1]["stop"], records[-1]["reason"]) == ("refused", words)
    assert [out["site"] for out in of_kind(records, "out")] == SITES
    for site in SITES:
        assert [entry["kind"] for entry in ledger(tmp_path, site)] == ["REFUSAL"]


def test_when_sites_agree_records_are_read(tmp_path: Path, opened: list[str]) -> None:
    simulate(tmp_path, private=False)
    assert str(heart.FILE) in opened


def test_too_few_willing_sites_cost_the_willing_ones_nothing(
    tmp_path: Path, cap: Callable[..., None]
) -> None:
    for site in SITES[:2]:
        cap(tmp_path, site, 0.5, min_sites=3)
    words, _ = refused(tmp_path, min_sites=3)
    assert "site cleveland has 0.50 of 0.50 left" in words
    assert [ledger(tmp_path, site) for site in SITES[2:]] == [[], []]


def test_a_site_without_a_node_is_out(tmp_path: Path) -> None:
    (out,) = of_kind(simulate(tmp_path, nodes=3, private=False), "out")
    assert (out["site"], out["reason"]) == ("va", "no answer")


def test_a_node_without_a_site_is_out(tmp_path: Path) -> None:
    (out,) = of_kind(simulate(tmp_path, nodes=5, private=False), "out")
    assert out["site"] == "node 1004"
    assert "(partition-id 4) is not among the 4 sites of accord" in out["reason"]


def test_a_run_that_lacks_a_site_it_needs_says_which(tmp_path: Path) -> None:
    words, _ = refused(tmp_path, nodes=3, private=False, min_sites=4)
    assert words == "Site va is out: no answer."


def test_a_site_whose_ledger_is_damaged_stays_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "sites" / "va").mkdir(parents=True)
    (tmp_path / "sites" / "va" / "ledger.sqlite").write_bytes(b"not a database" * 100)
    (out,) = of_kind(simulate(tmp_path, private=False), "out")
    assert out["site"] == "va"
    assert out["reason"].startswith("ledger ") and "restore the file" in out["reason"]


def test_sites_whose_folders_cannot_be_used_refuse_in_words(tmp_path: Path) -> None:
    (tmp_path / "sites").write_text("a file where the folder should be")
    words, _ = refused(tmp_path, private=False)
    assert words.startswith("site cleveland cannot use its folder ")
    assert "\n" not in words


# --- what sites and coordinator say to each other -----------------------------------------------


def grid(folder: Path, **how: Any) -> tuple[engine.InProcessGrid, Accord]:
    accord = accord_file(folder, **how)
    config: engine.Config = {"accord": str(accord), "sites": str(folder / "sites")}
    return engine.InProcessGrid(client_app, 4, config), accords.load(accord)


def test_two_nodes_that_say_they_are_one_site_are_both_left_out(tmp_path: Path) -> None:
    both, accord = grid(tmp_path, private=False)
    context = both._context

    def twice(node: int) -> Context:
        made = context(node)
        if node == engine.FIRST_NODE + 3:
            here = {"accord": made.run_config["accord"], "folder": made.run_config["sites"]}
            made.node_config |= {"site": "hungary"} | here
        return made

    both._context = twice  # type: ignore[method-assign]
    places, out, closed = admission.admit(Mail(both), accord, "run", Heads(SITES))
    assert [place.site for place in places] == ["cleveland", "switzerland"]
    assert out == {
        "hungary": "more than one node says that it is this site; stop the others",
        "va": "no answer",
    }
    assert closed == {engine.FIRST_NODE + 1, engine.FIRST_NODE + 3}  # not asked again


def test_a_site_that_holds_another_accord_stays_out(tmp_path: Path) -> None:
    carrier, accord = grid(tmp_path, private=False)
    other = accords.load(accord_file(tmp_path / "other", private=False, steps=5))
    places, out, _ = admission.admit(Mail(carrier), other, "run", Heads(SITES))
    assert places == []
    assert out["va"].startswith(f"site va holds another accord: its digest is {accord.digest[:12]}")


@pytest.mark.parametrize("run", ["../escape", "/tmp/escape", "a/b", "", "..\\escape", "x" * 200])
def test_a_site_refuses_a_run_whose_name_leads_out_of_its_folder(run: str, tmp_path: Path) -> None:
    carrier, accord = grid(tmp_path)
    places, out, _ = admission.admit(Mail(carrier), accord, run, Heads(SITES))
    assert places == []
    assert {reason.split("'")[-1] for reason in out.values()} == {
        " is no name of a folder. Give the run another name."
    }


@pytest.fixture(scope="module")
def reserved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Accord, Record]:
    """An accord, and what site va's ledger says that it reserved for it."""
    carrier, accord = grid(tmp_path_factory.mktemp("reserved"))
    places, _, _ = admission.admit(Mail(carrier), accord, "run", Heads(SITES))
    return accord, places[3].entry


def changed(entry: Record, key: str, value: object) -> str:
    return canonical_json({k: v for k, v in (entry | {key: value}).items() if v != "gone"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", 10**9),
        ("rounds", 3),
        ("rounds", "4"),
        ("epsilon", 0.01),
        ("epsilon", "infinite"),
        ("epsilon", "gone"),
        ("kind", "NONPRIVATE"),
        ("run", "other"),
        ("site", "hungary"),
        ("accord", "0" * 64),
        ("plan_digest", None),
        ("event", {"type": "NonPrivate"}),
    ],
)
def test_a_reservation_that_is_not_what_was_agreed_is_refused(
    key: str, value: object, reserved: tuple[Accord, Record]
) -> None:
    accord, entry = reserved
    assert admission.reservation({"entry": canonical_json(entry)}, accord, "va", "run")[1] == ""
    said = {"entry": changed(entry, key, value)}
    _, reason = admission.reservation(said, accord, "va", "run")
    assert reason == f"its reservation differs from the accord's in: {key}"


@pytest.mark.parametrize("said", [{}, {"entry": "no JSON"}, {"entry": "3"}, {"entry": 3}])
def test_a_reservation_that_cannot_be_read_is_refused(
    said: Record, reserved: tuple[Accord, Record]
) -> None:
    _, reason = admission.reservation(said, reserved[0], "va", "run")
    assert reason == "its reply to the reservation holds no entry of a ledger"


def test_an_exception_in_a_handler_travels_as_one_fixed_line(tmp_path: Path) -> None:
    carrier, accord = grid(tmp_path)
    config = ConfigRecord({"run": "run", "accord": accord.digest})  # no round: the handler raises
    admission.admit(Mail(carrier), accord, "run", Heads(SITES))
    answers = Mail(carrier).ask(
        carrier.get_node_ids(), "evaluate", RecordDict({"config": config}), 60.0
    )
    assert {answer.error.reason for answer in answers.values()} == {
        "internal error; see private.log in the site's folder"
    }


@pytest.mark.parametrize("kind", ["evaluate", "train"])
def test_a_site_releases_nothing_for_a_run_that_it_has_not_reserved(
    kind: str, tmp_path: Path
) -> None:
    carrier, accord = grid(tmp_path)
    weights = checkpoint.weights_of(initial(accord, load_task("heart"))[0])
    asked = {"run": "run", "accord": accord.digest, "server-round": 1}
    content = RecordDict({"config": ConfigRecord(asked)})
    content["arrays" if kind == "train" else "model"] = to_arrays(weights)
    answers = Mail(carrier).ask(carrier.get_node_ids(), kind, content, 60.0)
    assert len(answers) == 4
    for answer in answers.values():
        assert list(answer.content) == ["config"]
        assert "reserv" in str(answer.content.config_records["config"]["refused"])
    assert [ledger(tmp_path, site) for site in SITES] == [[]] * 4


def test_the_drawn_grid_shows_only_the_drawn_sites(tmp_path: Path) -> None:
    carrier, _ = grid(tmp_path)
    view: Grid = admission.DrawnGrid(carrier, {1002: "switzerland", 1000: "cleveland"})
    assert list(view.get_node_ids()) == [1002, 1000]
    assert view.run.run_id == carrier.run.run_id
