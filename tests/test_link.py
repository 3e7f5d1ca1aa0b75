"""A site's end of the link, over real TLS: what it refuses of a coordinator; no work is done."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from deployed import kits_in, training
from flwr.app import Message
from liar import Liar, Site, talking

from fedaccord.client.dial import probe
from fedaccord.client.link import Attendant
from fedaccord.envelope import AHEAD, COORDINATOR, SKEW, seal
from fedaccord.errors import RunError
from fedaccord.keys import SigningKey, load
from fedaccord.objects import put_together, take_apart
from fedaccord.provision import Kits

OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(b"7" * 32))


@pytest.fixture
def kits(tmp_path: Path) -> Kits:
    return kits_in(tmp_path)


@pytest.fixture
def liar(kits: Kits) -> Liar:
    return Liar(kits)


@pytest.fixture
def port(liar: Liar) -> Iterator[int]:
    with talking(liar) as found:
        yield found


@pytest.fixture
def site(kits: Kits, port: int) -> Iterator[Site]:
    with Site(kits, port) as found:
        yield found


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the site's log says of refusals."""
    return [line for line in caplog.messages if line.startswith("link.refused ")]


def test_what_is_asked_is_answered_once_and_named_in_the_reply(liar: Liar, site: Site) -> None:
    request = liar.training(1, 0.5)
    liar.letters.put(request)
    liar.wait(1)
    reply = liar.replies[0]
    assert site.calls == [("train", 1)]
    assert (reply.run, reply.round, reply.kind, reply.direction) == (
        "small-run",
        1,
        "train",
        "reply",
    )
    assert (reply.sender, reply.recipient) == ("cleveland", COORDINATOR)
    assert reply.model == take_apart(training(1, 0.5)).model
    assert reply.body == liar.offered.objects[-1].id.hex()


BAD: dict[str, dict[str, Any]] = {
    "run": {"run": "another-run"},
    "sender": {"sender": "hungary"},
    "recipient": {"recipient": "hungary"},
    "direction": {"direction": "reply"},
    "accord": {"accord": "0" * 64},
    "round": {"round": 2},
    "kind": {"kind": "evaluate"},
    "model": {"model": "0" * 64},
    "shown": {"shown": "0" * 64},
    "body": {"body": "0" * 64},
    "nonce": {"nonce": 0},
    "expired": {"expires": time.time() - SKEW - 60},
    "clock": {"expires": time.time() + AHEAD + SKEW + 86_400},
    "signature": {"key": OTHER},
    "envelope": {"round": -1},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_request_whose_envelope_says_otherwise_is_refused_and_logged(
    liar: Liar, site: Site, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    liar.letters.put(liar.training(1, **BAD[reason]))
    liar.letters.put(liar.training(1))
    liar.wait(1)
    assert site.calls == [("train", 1)]  # the second alone
    [line] = logged(caplog)
    assert f'reason="{reason}"' in line
    assert any("refused a request" in line for line in site.lines)


def changed(liar: Liar, what: str) -> Any:
    """A request that was changed after it was signed."""
    request = liar.training(1)
    first = request.objects[0].id.hex()
    if what == "text":
        request.text = request.text.replace('"round":1', '"round":9')
    elif what == "signature":
        request.signature = f"{int(request.signature[0], 16) ^ 1:x}{request.signature[1:]}"
    elif what == "list":
        del request.objects[-1]
    elif what == "ids":
        request.objects[0].id = b""
    elif what == "size":
        request.objects[0].size = 2**40
    elif what == "shorter":
        request.objects[0].size -= 1
    elif what == "bytes":
        data = bytearray(liar.parts[first].load())
        data[-1] ^= 1
        liar.other_bytes[first] = bytes(data)
    else:
        request.shown.add(text=request.text, signature=request.signature)
    return request


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("text", "signature"),
        ("signature", "signature"),
        ("list", "body"),
        ("ids", "body"),
        ("size", "size"),
        ("shorter", "size"),
        ("bytes", "body"),
        ("shown", "shown"),
    ],
)
def test_a_request_that_was_changed_on_its_way_is_refused_and_logged(
    liar: Liar, site: Site, caplog: pytest.LogCaptureFixture, what: str, reason: str
) -> None:
    liar.letters.put(changed(liar, what))
    liar.letters.put(liar.training(2, 0.5))  # of other objects
    liar.wait(1)
    assert site.calls == [("train", 2)]
    [line] = logged(caplog)
    assert f'reason="{reason}"' in line


def test_a_request_that_comes_again_is_refused_and_one_that_is_asked_again_is_not_worked_on(
    liar: Liar, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    message = training(1, accord=liar.accord.digest)
    first = liar.request(message, message="m1")
    liar.letters.put(first)
    liar.letters.put(first)  # a replay
    liar.letters.put(liar.request(message, message="m1"))  # sealed anew, as after a cut
    liar.wait(2)
    assert site.calls == [("train", 1)]
    assert 'reason="nonce"' in logged(caplog)[0]
    assert liar.replies[0].body == liar.replies[1].body
    assert liar.replies[0].nonce < liar.replies[1].nonce


def test_requests_out_of_order_are_refused(
    liar: Liar, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    early, late = liar.training(1), liar.training(2)
    for request in (late, early, liar.training(1), liar.training(2)):
        liar.letters.put(request)
    liar.wait(2)
    assert site.calls == [("train", 2), ("train", 2)]
    assert [line.split()[1] for line in logged(caplog)] == ['reason="nonce"', 'reason="round"']


def test_a_request_that_is_no_message_is_refused(
    liar: Liar, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    request = liar.training(1)
    content = request.objects[-2].id.hex()
    about = {"direction": "request", "kind": "train", "round": 1, "body": content, "message": "m0"}
    signed = seal(liar.write(**about), liar.key)
    request.text, request.signature = signed.text, signed.signature
    del request.objects[-1]
    liar.letters.put(request)
    liar.letters.put(liar.training(2))
    liar.wait(1)
    assert site.calls == [("train", 2)]
    assert 'reason="message"' in logged(caplog)[0]


def test_a_site_that_saw_two_models_trains_no_more_also_after_a_restart(
    kits: Kits, liar: Liar, port: int
) -> None:
    about = {"run": "small-run", "round": 1, "recipient": COORDINATOR, "direction": "reply"}
    about |= {"kind": "train", "model": take_apart(training(1, 0.75)).model}
    hungary = load(kits.site("hungary") / "hungary" / "ledger.key")
    shown = (seal(liar.write(sender="hungary", **about), hungary),)
    with Site(kits, port) as site:
        liar.letters.put(liar.training(1, 0.5))
        liar.letters.put(liar.training(2, others=shown))
        liar.letters.put(liar.training(3))
        evaluation = Message(training(3, accord=liar.accord.digest).content, 1000, "evaluate")
        liar.letters.put(liar.request(evaluation))
        liar.wait(2)
        assert site.calls == [("train", 1), ("evaluate", 3)]
        site.told("shows different models to different sites")
    liar.letters.put(None)
    with Site(kits, port) as site:
        liar.letters.put(liar.training(4))
        liar.letters.put(liar.request(evaluation))
        liar.wait(3)
        assert site.calls == [("evaluate", 3)]


@pytest.mark.parametrize(
    ("said", "envelope", "reason"),
    [
        ({}, {"accord": "0" * 64}, "another accord"),
        ({}, {"recipient": "hungary"}, "another recipient"),
        ({}, {"sender": "hungary"}, "another sender"),
        ({}, {"direction": "join"}, "another direction"),
        ({}, {"body": "0" * 64}, "another body"),
        ({"run": "another"}, {}, "another join"),
        ({"join": 1}, {}, "another join"),
        ({"time": time.time() - 600}, {}, "clock is"),
        ({"time": float(10**300)}, {}, "clock is"),
        ({"time": 10**400}, {}, "welcome is none"),
        ({"most": "x"}, {}, "welcome is none"),
        ({"handovers": [1]}, {}, "welcome is none"),
        ({"handovers": {"hungary": 3}}, {}, "welcome is none"),
        ({"handovers": {"hungary": [{}]}}, {}, "welcome is none"),
        ({"run": "../../etc"}, {"run": "../../etc"}, "welcome is none"),
        ({"run": "a\x1b[2J"}, {"run": "a\x1b[2J"}, "welcome is none"),
    ],
)
def test_a_welcome_that_says_otherwise_is_refused(
    kits: Kits, liar: Liar, port: int, said: dict, envelope: dict, reason: str
) -> None:
    liar.said, liar.envelope = said, envelope
    with Site(kits, port) as site:
        site.told(reason)
    assert liar.works == 0
    assert site.calls == []


def test_a_coordinator_with_another_key_is_refused_unless_a_handover_leads_to_it(
    kits: Kits, liar: Liar, port: int
) -> None:
    from fedaccord.envelope import handover

    own, liar.key = liar.key, OTHER
    with Site(kits, port) as site:
        site.told("not of this text by the sender's key")
        assert liar.works == 0
    liar.said = {"handovers": {COORDINATOR: [handover(COORDINATOR, OTHER.public, own)]}}
    with Site(kits, port) as site:
        site.told("joined run")
        liar.letters.put(liar.training(1))
        liar.wait(1)


def test_a_welcome_that_was_seen_before_is_refused(kits: Kits, liar: Liar, port: int) -> None:
    with Site(kits, port) as site:
        site.told("joined run")
    liar.replay = True
    works = liar.works
    with Site(kits, port) as site:
        site.told("answers another join")
    assert liar.works == works


def test_an_end_with_another_certificate_gets_no_word(kits: Kits, liar: Liar) -> None:
    kit = kits.site("hungary")
    pair = ((kit / "keys" / "tls.key").read_bytes(), (kit / "site.pem").read_bytes())
    with talking(liar, pair) as port, Site(kits, port) as site:
        site.told("cannot be reached")
    assert liar.joins == 0


def test_an_end_without_tls_gets_no_word(kits: Kits, liar: Liar) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from fedaccord import link_pb2_grpc

    server = grpc.server(ThreadPoolExecutor(2))
    link_pb2_grpc.add_LinkServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Site(kits, port) as site:
        site.told("cannot be reached")
    server.stop(0).wait()
    assert liar.joins == 0


def test_what_the_app_raises_stays_at_the_site(
    kits: Kits, liar: Liar, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Site(kits, port, fails="patient Ada Byron") as site:
        liar.letters.put(liar.training(1))
        liar.wait(1)
        parcel = site.attendant._last[1]
    held = {name: part.load() for name, part in parcel.parts.items()}
    error = put_together(parcel.root, held.__getitem__, 10**6)[0].error
    assert error.reason == "internal error at the site"
    assert not any("Ada" in line for line in [*caplog.messages, *site.lines])
    assert b"Ada" not in b"".join(held.values())


def test_a_second_process_with_the_same_kit_is_refused(kits: Kits, liar: Liar, port: int) -> None:
    with Site(kits, port) as site:
        site.told("joined run")
        with pytest.raises(RunError, match="another process"):
            Attendant(site.kit, site.attendant.app, print)
    Attendant(site.kit, site.attendant.app, print)  # once the first has ended


def test_a_site_stops_at_once_whether_it_is_served_or_not(kits: Kits, liar: Liar) -> None:
    with talking(liar) as port:
        site = Site(kits, port)
        with site:
            site.told("joined run")
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert not probe(site.kit).why
    site = Site(kits, port)
    with site:
        site.told("cannot be reached")
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert "cannot" in probe(site.kit).why or "UNAVAILABLE" in probe(site.kit).why


def test_a_stop_before_the_first_call_is_not_lost(kits: Kits, liar: Liar, port: int) -> None:
    site = Site(kits, port)
    site.attendant.stop()
    with site:
        pass
    site = Site(kits, port)
    begin = site.attendant.vigil.begin

    def stopped_meanwhile(run: str, handovers: Any) -> None:
        site.attendant.stop()  # after the welcome, before there is a call to be cancelled
        begin(run, handovers)

    site.attendant.vigil.begin = stopped_meanwhile  # type: ignore[method-assign]
    with site:
        site._thread.join(5)
        assert not site._thread.is_alive()
