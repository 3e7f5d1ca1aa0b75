"""The same apps on Flower's own deployment engine, started as benchmarks/stock_engine.py does."""

from __future__ import annotations

import io
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import parse_config_args

from benchmarks import stock_engine, stock_keys
from benchmarks.stock_engine import Stock, free_ports
from fedaccord.runs import RunFolder
from fedaccord.simulations import engine

DOORS = [
    "/v1/fleet/activate-node",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/v1/fleet/../runtime/acquire-task",
    "//v1/runtime/acquire-task",
]
NGINX = shutil.which("nginx")
PROXY = Path(__file__).resolve().parent.parent / "deploy" / "nginx.conf"


def written(folder: Path, sites: int, rounds: int) -> Path:
    """A tiny accord without privacy, of the first sites of heart."""
    path = stock_engine.shortened("heart", rounds, False, folder)
    agreed: Any = tomlkit.parse(path.read_text())
    del agreed["sites"][sites:]
    agreed["rounds"] = {"rounds": rounds, "min_sites": 1}
    agreed["training"]["steps"] = 3
    agreed["distillation"]["enabled"] = False
    path.write_text(tomlkit.dumps(agreed))
    return path


# --- what is made before a process starts -------------------------------------------------------


def test_flower_reads_a_sites_node_config_as_it_was_meant(tmp_path: Path) -> None:
    stock = Stock("heart", ["va"], tmp_path / "a folder", node={"data": "/mnt/x y", "n": 3})
    assert parse_config_args([stock._node_config("va")]) == {
        "site": "va",
        "accord": "heart",
        "folder": str(tmp_path / "a folder" / "sites"),
        "data": "/mnt/x y",
        "n": 3,
    }


def test_the_app_that_is_submitted_holds_no_code(tmp_path: Path) -> None:
    stock = Stock("heart", ["va"], tmp_path)
    stock._write_app()
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path / "app")))
    assert [n for n in bundle.namelist() if not n.startswith(".info/")] == ["pyproject.toml"]
    app = tomlkit.parse(bundle.read("pyproject.toml").decode()).unwrap()["tool"]["flwr"]["app"]
    assert app["components"] == {
        "serverapp": "fedaccord.server.app:app",
        "clientapp": "fedaccord.client.app:app",
    }


def test_a_server_with_these_certificates_is_known_by_the_authority_alone(tmp_path: Path) -> None:
    stock_keys.certificates(tmp_path / "one")
    stock_keys.certificates(tmp_path / "two")
    assert (tmp_path / "one" / "tls.key").stat().st_mode & 0o077 == 0
    for authority, known in (("one", True), ("two", False)):
        assert shaken(tmp_path / "one", tmp_path / authority / "ca.pem", "127.0.0.1") is known
    assert not shaken(tmp_path / "one", tmp_path / "one" / "ca.pem", "192.0.2.1")


def shaken(server: Path, authority: Path, name: str) -> bool:
    """Whether a client that trusts an authority takes a server for this name, without a socket."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(server / "tls.pem", server / "tls.key")
    here = ssl.create_default_context(cafile=authority)
    to, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = here.wrap_bio(back, to, server_hostname=name)
    other = there.wrap_bio(to, back, server_side=True)
    for _ in range(4):
        for end in (client, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return client.version() is not None


# --- with its processes -------------------------------------------------------------------------


@pytest.mark.soak
def test_the_stock_engine_and_simulate_give_the_same_model_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    accord = written(tmp_path, sites=2, rounds=2)
    names = stock_engine.approve(accord, tmp_path / "sites")
    with Stock(accord, names, tmp_path) as stock:
        # What the submitter names as accord and folder of the sites reaches no site.
        planted = {"accord": str(accord), "sites": str(tmp_path / "planted")}
        outcome = stock.run(planted | {"run": str(tmp_path / "stock")})
        assert outcome.completed, f"{outcome.status}: {outcome.details}\n{outcome.log}"
        running = " ".join(stock.processes().values())
        assert "flower-superlink" in running and running.count("flower-supernode") >= 2
    assert stock.processes() == {}
    assert not (tmp_path / "planted").exists()
    engine.simulate(accord, tmp_path / "engine", tmp_path / "engine-sites", len(names))
    theirs, ours = (RunFolder.open(tmp_path / name) for name in ("stock", "engine"))
    assert theirs.faults() == []
    ends = [run.records()[-1] for run in (theirs, ours)]
    assert ends[0]["rounds"] == 2
    assert ends[0]["model"] == ends[1]["model"]


@pytest.mark.soak
def test_a_superlink_that_cannot_start_is_reported_and_leaves_no_process(tmp_path: Path) -> None:
    stock = Stock("heart", ["va"], tmp_path)
    stock_keys.certificates(tmp_path / "keys")
    (tmp_path / "keys" / "tls.pem").write_text("no certificate")
    with pytest.raises(stock_engine.StockError, match="does not listen"), stock:
        pass
    assert stock.processes() == {}


def posted(port: int, path: str, authority: Path) -> int:
    """The HTTP status of an empty message that somebody without any secret sends."""
    context = ssl.create_default_context(cafile=authority)
    kind = {"content-type": "application/protobuf"}
    ask = urllib.request.Request(f"https://127.0.0.1:{port}{path}", b"", kind, method="POST")
    try:
        with urllib.request.urlopen(ask, context=context, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as refusal:
        return refusal.code


@pytest.mark.soak
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_behind_the_proxy_a_run_goes_on_and_a_site_reaches_the_fleets_door_alone(
    tmp_path: Path,
) -> None:
    accord = written(tmp_path, sites=1, rounds=1)
    names = stock_engine.approve(accord, tmp_path / "sites")
    stock, proxy = Stock(accord, names, tmp_path), tmp_path / "proxy"
    stock.fleet, stock.control = free_ports(2)
    stock_keys.certificates(tmp_path / "keys")  # one authority for both
    shutil.copytree(tmp_path / "keys", proxy)
    text = PROXY.read_text().replace(":8001;", f":{stock.port};")
    text = text.replace("0.0.0.0:8000 ", f"127.0.0.1:{stock.fleet} ")
    (proxy / "nginx.conf").write_text(text.replace(":8002 ", f":{stock.control} "))
    command = [NGINX, "-p", str(proxy), "-c", str(proxy / "nginx.conf"), "-g", "daemon off;"]
    nginx = subprocess.Popen(command)
    try:
        with stock:
            outcome = stock.run({"accord": str(accord), "run": str(tmp_path / "run")})
            assert outcome.completed, f"{outcome.status}: {outcome.details}\n{outcome.log}"
            authority = tmp_path / "keys" / "ca.pem"
            doors = [
                [posted(port, path, authority) not in (403, 404) for path in DOORS]
                for port in (stock.port, stock.fleet, stock.control)
            ]
    finally:
        nginx.terminate()
        nginx.wait(timeout=20)
    assert doors[0][:3] == [True, True, True]  # these are there to be knocked at
    assert doors[1] == [True, False, False, False, False]
    assert doors[2] == [False, True, False, False, False]
