"""What Prometheus scrapes: figures of the system, labels from closed lists, a server that stops."""

from __future__ import annotations

import ast
import re
import socket
import urllib.request
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fedaccord import __version__
from fedaccord.envelope import Envelope
from fedaccord.errors import RunError
from fedaccord.server import handshakes, metrics
from fedaccord.server.metrics import Metrics


def scraped(one: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample over HTTP, by name and label values."""
    stop, port = one._serve("127.0.0.1:0")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    finally:
        stop()
    with pytest.raises(OSError):  # it no longer listens
        socket.create_connection(("127.0.0.1", port), 1).close()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_was_counted_is_what_is_scraped() -> None:
    one = Metrics()
    one.joined(3)
    one.joined(2)
    one.round(17)
    one.request("train", 1000)
    one.request("train", 24)
    one.request("query.join", 5)
    one.reply("evaluate", 77)
    one.refused("nonce")
    one.handshake_refused("no certificate")
    one.handshake_refused("no certificate")
    found = scraped(one)
    assert found["fedaccord_sites_joined",] == 2
    assert found["fedaccord_round",] == 17
    assert found["fedaccord_requests_total", "train"] == 2
    assert found["fedaccord_request_bytes_total", "train"] == 1024
    assert found["fedaccord_requests_total", "query.join"] == 1
    assert found["fedaccord_replies_total", "evaluate"] == 1
    assert found["fedaccord_reply_bytes_total", "evaluate"] == 77
    assert found["fedaccord_refused_total", "nonce"] == 1
    assert found["fedaccord_handshakes_refused_total", "no certificate"] == 2
    assert found["fedaccord_build_info", __version__] == 1
    assert 1.7e9 < found["fedaccord_start_time_seconds",] < 1e11
    assert all(re.fullmatch("fedaccord_[a-z_]+", name[0]) for name in found)


@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.text() | st.sampled_from(metrics.KINDS), max_size=20))
def test_no_word_from_outside_becomes_a_label(words: list[str]) -> None:
    one = Metrics()
    for word in words:
        one.request(word, 1)
        one.reply(word, 1)
        one.refused(word)
        one.handshake_refused(word)
    labels = {
        value
        for family in one.registry.collect()
        for sample in family.samples
        for value in sample.labels.values()
    }
    known = {*metrics.KINDS, *metrics.REFUSALS, *metrics.HANDSHAKES, metrics.OTHER, __version__}
    assert labels <= known
    total = sum(one.registry.get_sample_value("fedaccord_requests_total", {"kind": kind}) or 0
                for kind in (*metrics.KINDS, metrics.OTHER))  # fmt: skip
    assert total == len(words)  # and none is left out


def test_every_reason_of_a_handshake_has_a_label_of_its_own() -> None:
    reasons = {reason for _, reason in handshakes.REASONS}
    assert reasons == set(metrics.HANDSHAKES)


@pytest.mark.parametrize("address", ["9464", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":1"])
def test_an_address_that_is_none_is_refused_with_a_remedy(address: str) -> None:
    with pytest.raises(RunError, match=r"is no address with a port. Write one like"):
        Metrics().serve(address)


def test_an_address_that_is_taken_is_refused_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=r"cannot be listened on: .* Choose another port"):
            Metrics().serve(f"127.0.0.1:{port}")


def test_every_reason_that_a_coordinator_refuses_for_has_a_label_of_its_own() -> None:
    # What only a site raises is in its own log; see client/.
    sources = [
        path
        for folder in ("fedaccord", "server")
        for path in (Path(__file__).parent.parent / folder).glob("*.py")
        if "Refused(" in path.read_text(encoding="utf-8")
    ]
    given = {
        call.args[0].value
        for path in sources
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "Refused"
        and isinstance(call.args[0], ast.Constant)
    }
    held = {"sender", "recipient", "direction", "run", "accord", "body", "round", "kind", "model"}
    assert {"nonce", "revoked"} <= given
    assert given | held | {"message", "shown"} <= set(metrics.REFUSALS)
    assert held <= {field.name for field in fields(Envelope)}
