"""The vigil: what a site holds requests to, and what it still knows after a restart."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from deployed import training
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from wards import small_accord

from fedaccord import accord as accords
from fedaccord.accord import Accord
from fedaccord.client.vigil import RUNS, Vigil
from fedaccord.envelope import COORDINATOR, REPLY, REQUEST, Envelope, Refused, handover, seal
from fedaccord.evidence import digest
from fedaccord.keys import SigningKey
from fedaccord.objects import take_apart

SITES = ["north", "south", "west"]
KEYS = {
    name: SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32))
    for n, name in enumerate([*SITES, "new", COORDINATOR])
}
RUN = "small-run"


@pytest.fixture(autouse=True)
def _somebody() -> None:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def accord_of() -> Accord:
    sites = [{"name": n, "subjects": 9, "key": KEYS[n].public} for n in SITES]
    return accords.parse(small_accord() | {"sites": sites})


class Ward:
    """Site north, and a coordinator that can sign what it likes."""

    def __init__(self, folder: Path) -> None:
        self.accord, self.file = accord_of(), folder / "link.json"
        self.nonce, self.shown = 0, list[tuple[str, str]]()
        self.start()

    def start(self, run: str = RUN) -> None:
        """Begin as a process does."""
        self.vigil = Vigil(self.file, self.accord, "north")
        self.vigil.begin(run, {})

    def asks(self, message: Message, **change: Any) -> Envelope:
        """A request for a message, rightly written but for a change."""
        self.nonce += 1
        config = message.content["config"]
        right = Envelope(
            run=RUN,
            round=int(config["server-round"]),
            sender=COORDINATOR,
            recipient="north",
            direction=REQUEST,
            kind=message.metadata.message_type,
            message=f"m{self.nonce}",
            nonce=self.nonce,
            expires=time.time() + 60,
            body=take_apart(message).root,
            accord=self.accord.digest,
            model=take_apart(message).model,
            shown=digest([{"text": text, "signature": mark} for text, mark in self.shown]),
        )
        return replace(right, **change)

    def takes(self, message: Message, **change: Any) -> str:
        """Let the site hear a request: why it is refused, or ""."""
        request = self.asks(message, **change)
        try:
            self.vigil.check(request)
            self.vigil.hold(request, message, take_apart(message).model, self.shown)
        except Refused as refusal:
            return refusal.reason
        return ""

    def trains(self, number: int, weight: float = 0.0, **change: Any) -> str:
        message = training(number, weight, accord=self.accord.digest)
        return self.takes(message, **change)

    def shows(self, number: int, weight: float, *sites: str, **change: Any) -> None:
        """Let the next request show that sites were given a model."""
        model = take_apart(training(number, weight)).model
        for name in sites:
            about = {"sender": name, "recipient": COORDINATOR, "direction": REPLY, "shown": ""}
            key = KEYS[change.pop("key", name)]
            reply = self.asks(training(number, weight), **about | {"model": model} | change)
            signed = seal(reply, key)
            self.shown.append((signed.text, signed.signature))


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


def test_rounds_that_follow_each_other_are_taken(ward: Ward) -> None:
    assert ward.trains(1) == ""
    ward.shows(1, 0.0, *SITES)
    assert ward.trains(2, 0.5) == ""
    assert ward.trains(2, 0.5) == ""  # again, as after a restart of either end
    ward.start()
    ward.shown.clear()
    ward.shows(2, 0.5, "north", "south")
    assert ward.trains(3, 0.7) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "another"}, "run"),
        ({"sender": "south"}, "sender"),
        ({"recipient": "south"}, "recipient"),
        ({"direction": REPLY}, "direction"),
        ({"accord": "0" * 64}, "accord"),
        ({"round": 2}, "round"),
        ({"kind": "evaluate"}, "kind"),
        ({"model": "0" * 64}, "model"),
        ({"shown": "0" * 64}, "shown"),
        ({"expires": 1000.0}, "expired"),
        ({"expires": 2.0**40}, "clock"),
        ({"nonce": 0}, "nonce"),
    ],
)
def test_a_request_other_than_its_envelope_is_refused(
    ward: Ward, change: dict, reason: str
) -> None:
    assert ward.trains(1, **change) == reason
    assert ward.trains(1) == ""


@pytest.mark.parametrize(
    ("said", "reason"),
    [({"run": "another"}, "run"), ({"accord": "0" * 64}, "accord"), ({"server-round": 2}, "round")],
)
def test_a_message_that_says_otherwise_than_its_envelope_is_refused(
    ward: Ward, said: dict, reason: str
) -> None:
    right = training(1, accord=ward.accord.digest)
    wrong = training(1, **{"accord": ward.accord.digest} | said)
    request = ward.asks(right)
    ward.vigil.check(request)
    with pytest.raises(Refused) as found:
        ward.vigil.hold(request, wrong, take_apart(wrong).model, [])
    assert found.value.reason == reason


def test_what_was_seen_is_refused_also_after_a_restart(ward: Ward) -> None:
    message = training(1, accord=ward.accord.digest)
    request = ward.asks(message)
    ward.vigil.check(request)
    for _ in range(2):
        with pytest.raises(Refused) as found:
            ward.vigil.check(request)
        assert found.value.reason == "nonce"
        ward.start()


def test_no_round_is_trained_after_a_later_one_also_after_a_restart(ward: Ward) -> None:
    assert ward.trains(5) == ""
    assert ward.trains(4) == "round"
    ward.start()
    assert ward.trains(4) == "round"
    assert ward.trains(5) == ""
    evaluation = Message(training(4, accord=ward.accord.digest).content, 1, "evaluate")
    ward.shown.clear()
    assert ward.takes(evaluation) == ""  # what is asked besides training has no order


def test_a_coordinator_that_shows_others_another_model_gets_no_more_training(ward: Ward) -> None:
    assert ward.trains(1, 0.0) == ""
    ward.shows(1, 0.25, "south")
    assert ward.trains(2, 0.5) == "model"
    ward.shown.clear()
    assert ward.trains(2, 0.5) == "model"
    ward.start()
    assert ward.trains(3, 0.5) == "model"
    assert "different models" in ward.vigil.mine.split
    evaluation = Message(training(3, accord=ward.accord.digest).content, 1, "evaluate")
    assert ward.takes(evaluation) == ""


def test_two_other_sites_with_different_models_are_noticed_by_a_third(ward: Ward) -> None:
    ward.shows(1, 0.0, "south")
    ward.shows(1, 0.25, "west")
    assert ward.trains(2) == "model"  # though it was not asked in round 1


def test_a_split_run_and_its_rounds_are_known_after_another_run(ward: Ward) -> None:
    assert ward.trains(3) == ""
    ward.vigil.begin("another", {})
    message = training(1, run="another", accord=ward.accord.digest)
    assert ward.takes(message, run="another") == ""
    ward.vigil.begin(RUN, {})
    assert ward.trains(2) == "round"
    ward.shows(3, 0.25, "south")
    assert ward.trains(4) == "model"
    ward.shown.clear()
    for run in ("another", RUN):
        ward.start(run)
    assert ward.trains(5) == "model"


def test_runs_in_which_nothing_was_trained_push_no_other_out(ward: Ward) -> None:
    assert ward.trains(3) == ""
    for number in range(2 * RUNS):
        ward.vigil.begin(f"run-{number}", {})
    ward.start()
    assert ward.trains(2) == "round"


@pytest.mark.parametrize(
    "shows",
    [
        lambda w: w.shows(1, 0.0, "south", key="west"),  # signed by another
        lambda w: w.shows(1, 0.0, "south", key="new"),  # by nobody of the accord
        lambda w: w.shows(1, 0.0, "south", key=COORDINATOR),
        lambda w: w.shows(1, 0.0, "south", run="another"),
        lambda w: w.shows(1, 0.0, "south", accord="0" * 64),
        lambda w: w.shows(1, 0.0, "south", direction=REQUEST),
        lambda w: w.shows(1, 0.0, "south", kind="evaluate"),
        lambda w: w.shows(2, 0.0, "south"),  # of this round
        lambda w: w.shows(3, 0.0, "south"),
        lambda w: w.shows(1, 0.0, "south", "south"),
        lambda w: (w.shows(1, 0.0, "south"), w.shows(0, 0.0, "west")),
        lambda w: w.shows(1, 0.0, *SITES, "south"),
        lambda w: w.shown.append(("{}", "0" * 128)),
    ],
)
def test_a_shown_reply_that_is_none_is_refused(ward: Ward, shows: Any) -> None:
    shows(ward)
    assert ward.trains(2) in ("shown", "sender", "run", "accord", "direction", "kind")
    ward.shown.clear()
    ward.shows(1, 0.0, "south", "west")
    assert ward.trains(2) == ""


def test_a_site_that_rotated_its_key_is_shown_with_its_handover(ward: Ward) -> None:
    ward.shows(1, 0.0, "south", key="new")
    assert ward.trains(2) == "shown"
    steps = {"south": [handover("south", KEYS["new"].public, KEYS["south"])]}
    ward.vigil.begin(RUN, steps)
    assert ward.trains(2) == ""
    forged = {"south": [handover("south", KEYS["new"].public, KEYS["west"])]}
    ward.vigil.begin(RUN, forged)
    assert ward.trains(2) == "shown"


def test_who_is_not_shown_is_in_the_log(ward: Ward, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedaccord.link")

    def absent() -> list[str]:
        found = [r.getMessage() for r in caplog.records if "not-shown" in r.getMessage()]
        caplog.clear()
        return found

    assert ward.trains(1) == ""
    assert absent() == []  # nobody has trained before
    ward.shows(1, 0.0, "north", "west")
    assert ward.trains(2) == ""
    assert "south" in absent()[0]
    ward.shown.clear()
    assert ward.trains(3) == ""
    assert all(name in absent()[0] for name in SITES[:1])  # nobody is shown at all
    ward.shows(3, 0.0, *SITES)
    assert ward.trains(4) == ""
    assert absent() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[" * 5000,
        "null",
        '{"nonce": 1}',
        '{"nonce": null, "runs": {}}',
        '{"nonce": 1, "runs": []}',
        '{"nonce": 1, "runs": {"a": null}}',
        '{"nonce": 1, "runs": {"a": {"round": "1"}}}',
        '{"nonce": 1, "runs": {"a": {"other": 1}}}',
    ],
)
def test_a_memory_that_cannot_be_read_stops_the_site(ward: Ward, text: str) -> None:
    ward.file.write_text(text)
    with pytest.raises(Refused) as found:
        ward.start()
    assert found.value.reason == "state"
    assert "link.json" in str(found.value)


def test_what_is_remembered_is_bounded(ward: Ward) -> None:
    for number in range(RUNS + 5):
        ward.vigil.begin(f"run-{number}", {})
        message = training(1, run=f"run-{number}", accord=ward.accord.digest)
        assert ward.takes(message, run=f"run-{number}") == ""
    assert len(json.loads(ward.file.read_text())["runs"]) == RUNS


def test_nonces_count_up_though_the_clock_goes_back(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ward.vigil.next_nonce()
    monkeypatch.setattr(time, "time_ns", lambda: first - 10**12)
    assert [ward.vigil.next_nonce() for _ in range(3)] == [first + 1, first + 2, first + 3]
