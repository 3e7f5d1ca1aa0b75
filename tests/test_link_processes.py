"""The link between real processes: who is kept out, what listens, and how each end stops."""

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from deployed import Caller, answer, kits_in
from flwr.clientapp import ClientApp

from fedaccord import accord as accords
from fedaccord import authority, keys, link_pb2, link_pb2_grpc, membership
from fedaccord.client.dial import OPTIONS
from fedaccord.envelope import REPLY, Signed, seal
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.objects import take_apart
from fedaccord.server.audit_log import entries, verify_audit
from fedaccord.simulations.engine import InProcessGrid

ROOT = Path(__file__).resolve().parents[1]
PAIR = ("site.pem", "keys/tls.key")


class Ends:
    """Real processes: a coordinator that waits for its sites, and a site with the wrong pair.

    Attributes:
        kits: of three sites; the site's kit holds another site's certificate and TLS key.
        port: where the coordinator listens.
    """

    def __init__(self, folder: Path) -> None:
        self.kits = kits_in(folder)
        self.site = self.kits.site("cleveland")
        toml = self.kits.coordinator / "coordinator.toml"
        text = re.sub('listen = "[^"]*"', 'listen = "127.0.0.1:0"', toml.read_text())
        toml.write_text(re.sub("join_wait = [0-9.]+", "join_wait = 600.0", text))
        assert "join_wait = 600.0" in toml.read_text()
        self.right = {name: (self.site / name).read_bytes() for name in PAIR}
        for name in PAIR:
            shutil.copy(self.kits.site("va") / name, self.site / name)
        self.log = folder / "coordinator.log"
        self.coordinator = self._start(self.log, "coordinator", "up", self.kits.coordinator)
        wait_for(lambda: bool(self.events("up")), self.log)
        self.port = int(self.events("up")[0]["port"])
        toml = self.site / "site.toml"
        toml.write_text(re.sub("127.0.0.1:[0-9]+", f"127.0.0.1:{self.port}", toml.read_text()))
        self.site_log = folder / "site.log"
        self.joining = self._start(self.site_log, "site", "join", self.site)

    def _start(self, log: Path, *words: str | Path) -> subprocess.Popen[bytes]:
        call = [sys.executable, "-c", "from fedaccord.cli import main; main()", *map(str, words)]
        with open(log, "wb") as out:
            return subprocess.Popen(call, stdout=out, stderr=out, cwd=ROOT)

    def events(self, name: str) -> list[dict]:
        """Fields of the lines of one kind in the coordinator's journal."""
        return events(self.kits.coordinator / "logs" / "coordinator.jsonl", name)

    def close(self) -> None:
        for process in (self.joining, self.coordinator):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    found = Ends(tmp_path_factory.mktemp("processes"))
    yield found
    found.close()


def events(log: Path, name: str) -> list[dict]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [line["fields"] for line in map(json.loads, lines) if line["event"] == name]


def wait_for(holds: Callable[[], bool], log: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process listens for TCP, as the system tells it."""
    mine = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            mine.add(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                hexed, port = words[1].split(":")  # 32 bits at a time, in the machine's order
                parts = [hexed[n : n + 8] for n in range(0, len(hexed), 8)]
                raw = b"".join(bytes.fromhex(part)[::-1] for part in parts)
                address = ipaddress.ip_address(raw)
                found.add((str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)))
    return found


def stopped(process: subprocess.Popen[bytes]) -> float:
    """Ask a process to end, hold it to exit code 0; the seconds that it took."""
    began = time.monotonic()
    process.terminate()
    assert process.wait(30) == 0
    return time.monotonic() - began


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_coordinator_listens_where_its_kit_says_and_nowhere_else(ends: Ends) -> None:
    assert listening(ends.coordinator.pid) == {("127.0.0.1", ends.port)}


def unavailable(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as found:
        link_pb2_grpc.LinkStub(channel).Join(link_pb2.Sealed(), timeout=10)
    assert found.value.code() == grpc.StatusCode.UNAVAILABLE


def test_who_cannot_show_a_good_certificate_is_kept_out_and_on_record(ends: Ends) -> None:
    key, now = authority.new_key(), datetime.now(UTC)
    other = (authority.found("other", key, 1, now), key)
    public, gone = key.public_key(), now - timedelta(days=3)
    own = ends.kits.issuer()
    made = {
        "another authority": authority.issue(other, public, "va", [], "client", 1, now),
        "expired certificate": authority.issue(own, public, "va", [], "client", 1, gone),
    }
    pem = authority.key_pem(key)
    pairs = [(pem, authority.certificate_pem(one)) for one in made.values()]
    target, root = f"127.0.0.1:{ends.port}", (ends.site / "ca.pem").read_bytes()
    for private, chain in [*pairs, (None, None)]:
        credentials = grpc.ssl_channel_credentials(root, private, chain)
        with grpc.secure_channel(target, credentials, OPTIONS) as channel:
            unavailable(channel)
    with grpc.insecure_channel(target, OPTIONS) as channel:
        unavailable(channel)
    expected = {"no certificate", "plain text", *made}

    def told() -> set[str]:
        return {fields["reason"] for fields in ends.events("link.handshake-refused")}

    wait_for(lambda: told() >= expected, ends.log)
    wait_for(lambda: expected <= reasons(ends), ends.log)


def reasons(ends: Ends) -> set[str]:
    """Why something was refused, as the coordinator's audit log has it."""
    found = entries(ends.kits.coordinator / "audit.jsonl")
    return {entry["reason"] for entry in found if entry["kind"] == "refused"}


def test_a_site_is_kept_out_with_anothers_certificate_and_let_in_with_its_own(ends: Ends) -> None:
    log = ends.site / "cleveland" / "logs" / "site.jsonl"
    wait_for(lambda: bool(events(log, "link.refused-by-coordinator")), ends.site_log)
    assert "signature" in events(log, "link.refused-by-coordinator")[0]["words"]
    assert [fields["site"] for fields in ends.events("link.refused")][:1] == ["va"]
    assert "signature" in reasons(ends)
    assert events(log, "link.joined") == ends.events("link.joined") == []
    for name in PAIR:
        (ends.site / name).write_bytes(ends.right[name])
    wait_for(lambda: bool(events(log, "link.joined")), ends.site_log)
    assert [fields["site"] for fields in ends.events("link.joined")] == ["cleveland"]
    if sys.platform == "linux":
        assert listening(ends.joining.pid) == set()  # a site only dials out


def test_what_was_changed_repeated_or_meant_for_another_run_is_refused(ends: Ends) -> None:
    accord = accords.load(ends.kits.coordinator / "accord.toml")
    here = SimpleNamespace(
        port=ends.port,
        site_kit=lambda name: SiteKit.read(ends.kits.site(name)),
        desks=SimpleNamespace(accord=accord),
    )
    run = str(ends.events("up")[0]["run"])
    InProcessGrid(ClientApp(), 1, {})  # Flower's messages need a run to belong to
    parcel = take_apart(answer())
    with Caller(here, "hungary") as site:  # its own certificate and key

        def offered(text: str, signature: str) -> str:
            """The words with which the coordinator's process refuses a reply."""
            with pytest.raises(grpc.RpcError) as found:
                site.stub.Offer(site.offering(Signed(text, signature), parcel), timeout=10)
            assert found.value.code() == grpc.StatusCode.PERMISSION_DENIED
            return str(found.value.details())

        joining = site.joining()
        site.session = json.loads(site.stub.Join(joining, timeout=10).hello)["session"]
        about = {"direction": REPLY, "round": 1, "kind": "train", "body": parcel.root, "run": run}
        reply = seal(site.envelope(**about), site.key)
        assert "signature" in offered(reply.text.replace('"round":1', '"round":2'), reply.signature)
        other = seal(site.envelope(**about | {"run": "another-run"}), site.key)
        assert "another run" in offered(other.text, other.signature)
        late = seal(site.envelope(**about), site.key)
        assert "nothing that was asked" in offered(late.text, late.signature)
        assert "seen before" in offered(late.text, late.signature)  # replayed
        with pytest.raises(grpc.RpcError, match="seen before"):
            site.stub.Join(joining, timeout=10)
        kit = CoordinatorKit.read(ends.kits.coordinator)
        assert membership.revoke(kit, "hungary", "its laptop was stolen", datetime.now(UTC))
        with pytest.raises(grpc.RpcError, match="was revoked"):
            site.stub.Beat(link_pb2.Session(id=site.session), timeout=10)
    found = {"signature", "run", "message", "nonce", "revoked"}
    wait_for(lambda: found <= reasons(ends), ends.log)


def test_both_ends_stop_when_they_are_asked_to(ends: Ends) -> None:
    assert stopped(ends.joining) < 5
    assert stopped(ends.coordinator) < 5
    kit = CoordinatorKit.read(ends.kits.coordinator)
    audit = kit.folder / "audit.jsonl"
    assert verify_audit(audit, keys.load(kit.signing_key).public) == []
    kinds = [entry["kind"] for entry in entries(audit)]
    assert kinds[0] == "up"
    assert [kind for kind in kinds if kind != "refused"][-1] == "down"  # counts may come after it
    assert {"join", "left", "refused"} <= set(kinds)
