"""What a kit says: its two TOML files, who the members are, and the files that it is sent with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kitted import ADDRESSES, HEART, NOW, granted, laid, made

from fedaccord import accord as accords
from fedaccord import authority, provision
from fedaccord.accord import Accord
from fedaccord.errors import KitError
from fedaccord.kit import CoordinatorKit, SiteKit
from fedaccord.provision import Kits

PIN = "0" * 64
LEAST = f'name = "va"\ncoordinator = "fed.example.org:8443"\ncoordinator_key = "{PIN}"\n'


def site(folder: Path, text: str) -> SiteKit:
    (folder / "site.toml").write_text(text)
    return SiteKit.read(folder)


def test_a_site_s_kit_says_where_everything_of_it_is(tmp_path: Path) -> None:
    kit = site(tmp_path, LEAST)
    assert (kit.name, kit.coordinator, kit.coordinator_key) == (
        "va",
        ["fed.example.org:8443"],
        PIN,
    )
    assert (kit.data, kit.accord, kit.max_request_mb) == ("", "accord.toml", 2048)
    places = [kit.folder, kit.site, kit.accord_file, kit.ca, kit.tls_cert, kit.identity_key]
    said = ["", "va", "accord.toml", "ca.pem", "site.pem", "va/ledger.key"]
    assert places == [tmp_path / name for name in said]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST.replace("va", "Va"), 'name = "Va" must be lower-case letters'),
        (LEAST.replace(":8443", ""), "is no address"),
        (LEAST.replace('"fed.example.org:8443"', "[]"), "coordinator = [] must not be empty"),
        (LEAST.replace(PIN, PIN[1:]), "coordinator_key = "),
        (f'{LEAST}accord = "../accord.toml"\n', "must name a file inside the kit"),
        (f'{LEAST}accord = "/etc/accord.toml"\n', "must name a file inside the kit"),
        (f"{LEAST}max_request_mb = 0\n", "max_request_mb = 0 must be at least 1"),
        (f'{LEAST}dta = "records"\n', 'key "dta" is not known. Did you mean "data"?'),
        (LEAST.split("\n")[1], 'key "name" is missing'),
        ("name = ", "is not TOML"),
        (f"{LEAST}# \udcff", "is not UTF-8 text"),
    ],
)
def test_a_mistake_in_a_site_s_kit_is_said_in_one_line_each(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "site.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KitError) as refused:
        SiteKit.read(tmp_path)
    assert said in str(refused.value)
    assert all(line.startswith(str(tmp_path)) for line in str(refused.value).splitlines())


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    for read in (SiteKit.read, CoordinatorKit.read):
        with pytest.raises(KitError, match="fedaccord provision"):
            read(tmp_path)


def test_the_coordinator_s_kit_is_found_from_every_place_that_a_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid(tmp_path / "kits")
    folder = tmp_path / "kits" / "coordinator"
    (folder / "accord.toml").write_text("")
    (tmp_path / "ours.toml").write_text("")
    for where in (folder, folder / "accord.toml", tmp_path / "kits", tmp_path / "ours.toml"):
        kit = CoordinatorKit.read(where)
        assert kit.folder == folder
    assert (kit.listen, kit.addresses, kit.demo) == ("0.0.0.0:8443", ADDRESSES, False)
    assert (kit.join_wait, kit.max_reply_mb, kit.metrics) == (60.0, 0, "")
    monkeypatch.chdir(folder)
    assert CoordinatorKit.read(Path()).addresses == ADDRESSES


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("listen", '"0.0.0.0"', "is no address"),
        ("metrics", '"9464"', "is no address"),
        ("join_wait", "-1.0", "join_wait = -1.0 must be at least 0"),
        ("addresses", '["fed.example.org:0"]', "a port from 1 to 65535"),
    ],
)
def test_a_mistake_in_the_coordinator_s_kit_is_said(
    tmp_path: Path, key: str, value: str, said: str
) -> None:
    said_so = {"listen": '"[::]:0"', "addresses": '["a:1"]'}
    lines = [f"{k} = {v}" for k, v in said_so.items()]
    (tmp_path / "coordinator.toml").write_text("\n".join(lines))
    assert CoordinatorKit.read(tmp_path).listen == "[::]:0"
    changed = [f"{k} = {v}" for k, v in (said_so | {key: value}).items()]
    (tmp_path / "coordinator.toml").write_text("\n".join(changed))
    with pytest.raises(KitError) as refused:
        CoordinatorKit.read(tmp_path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "members.json: No such file"),
        ("{", "members.json: is no JSON"),
        ("[]", "members.json: it is no table of sites"),
        ('{"va": []}', "members.json"),
        ('{"va": {"key": "0", "certificate": "1"}}', "members.json: key"),
    ],
)
def test_by_a_list_of_members_that_cannot_be_read_nobody_joins(
    tmp_path: Path, text: str | None, said: str
) -> None:
    kit = laid(tmp_path).own()
    file = kit.folder / "members.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(KitError, match=said) as refused:
        kit.members()
    assert "Restore the file" in str(refused.value) and "\n" not in str(refused.value)


def test_members_are_read_anew_at_every_call(tmp_path: Path) -> None:
    kits = laid(tmp_path)
    kit = kits.own()
    assert kit.members() == {}
    granted(kits, made(kits, "va"))
    (name, member), = kit.members().items()  # fmt: skip
    pem = (kits.site("va") / "site.pem").read_bytes()
    assert (name, member.revoked) == ("va", "")
    assert member.certificate == authority.fingerprint(authority.read_certificate(pem, "va"))


def test_a_certificate_for_another_key_is_refused(tmp_path: Path) -> None:
    kits = laid(tmp_path)
    kit = SiteKit.read(kits.site("va"))
    with pytest.raises(KitError, match=r"site\.pem: no such file"):
        _ = kit.tls_key
    for name in ("va", "hungary"):
        granted(kits, made(kits, name))
    shutil.copy(kits.site("hungary") / "site.pem", kit.tls_cert)
    with pytest.raises(KitError, match="is for another key than"):
        _ = kit.tls_key
    kit.new_tls_key.unlink()
    with pytest.raises(KitError, match=r"tls\.key: no such file"):
        _ = kit.tls_key


# --- the files that a kit is sent with ----------------------------------------------------------


def own_task(folder: Path) -> tuple[Accord, Path]:
    """An accord on texts of one's own, which names a tokenizer and public records beside it."""
    for name in ("public.csv", "words/tokenizer.json", "records-north.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"what is in {name}")
    file = folder / "ours.toml"
    file.write_text(f"""
name = "ours"
purpose = "First line\\nSecond line"
sites = [{{ name = "north", subjects = 40 }}]
model = {{ name = "mlp" }}
rounds = {{ rounds = 2 }}
training = {{ steps = 2, learning_rate = 0.5 }}
privacy = {{ noise_multiplier = 2.0, sampling_prob = 0.2 }}
fairness = {{ attributes = ["sex"] }}
[task]
kind = "text"
dataset = "notes"
file = "records-{{site}}.csv"
length = 16
tokenizer = "words/"
sha256 = "{PIN}"
label = {{ column = "y", classes = ["no", "yes"] }}
attributes = {{ sex = ["f", "m"] }}
public_file = "public.csv"
public_sha256 = "{PIN}"
""")
    return accords.load(file), file


def test_public_files_that_the_accord_names_are_in_every_kit_and_records_in_none(
    tmp_path: Path,
) -> None:
    accord, file = own_task(tmp_path / "ours")
    kits = laid(tmp_path / "kits", accord)
    assert "Second line" in (kits.site("north") / "README.md").read_text()
    granted(kits, made(kits, "north"), accord)
    provision.finish(kits, accord, file)
    for folder in (kits.coordinator, kits.site("north")):
        for name in ("public.csv", "words/tokenizer.json"):
            assert (folder / name).read_text() == f"what is in {name}"
    assert not list(kits.root.rglob("records-*"))
    (file.parent / "public.csv").unlink()
    with pytest.raises(KitError, match=r"public\.csv that the accord names is missing"):
        provision.finish(kits, accord, file)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("addresses", [ADDRESSES, ["203.0.113.7:8443", "[2001:db8::7]:8443"]])
def test_systemd_finds_no_fault_in_a_site_s_unit(tmp_path: Path, addresses: list[str]) -> None:
    kits = Kits(tmp_path)
    provision.lay(kits, HEART, addresses, 397, NOW, demo=False)
    text = (kits.site("va") / "fedaccord-site.service").read_text()
    allowed = [line for line in text.splitlines() if line.startswith("IPAddress")]
    if addresses == ADDRESSES:  # one is a name
        assert allowed == []
    else:
        hosts = ("203.0.113.7", "2001:db8::7")
        assert allowed == ["IPAddressDeny=any", *(f"IPAddressAllow={host}" for host in hosts)]
    unit = tmp_path / "fedaccord-site.service"
    unit.write_text(text.replace("/opt/fedaccord/bin/fedaccord", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_site_s_container_has_no_root_no_port_and_no_way_to_write_its_records(
    tmp_path: Path,
) -> None:
    kits = laid(tmp_path)
    whole = yaml.safe_load((kits.site("va") / "compose.yaml").read_text())
    service = whole["services"]["site"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "SITE_UID:?" in service["user"]
    assert not {"ports", "expose", "privileged", "cap_add", "devices", "network_mode"} & {*service}
    mounts = [mount.rpartition("}")[2] for mount in service["volumes"]]
    assert mounts == [".:/kit", ":/kit/va/data:ro"]
    recipe = (kits.site("va") / "Dockerfile").read_text().splitlines()
    assert [line for line in recipe if line.startswith("USER ")] == ["USER 65534:65534"]
    assert [line for line in recipe if line.startswith(("COPY", "ADD"))] == ["COPY *.whl /wheels/"]
    ignored = (kits.site("va") / ".dockerignore").read_text().split("\n")
    assert [line for line in ignored if line and line[0] != "#"] == ["*", "!*.whl"]


def test_a_kit_for_trying_out_says_so_in_every_readme(tmp_path: Path) -> None:
    kits = Kits(tmp_path)
    provision.lay(kits, HEART, ["127.0.0.1:8443"], 397, NOW, demo=True)
    assert kits.own().listen == "127.0.0.1:8443" and kits.own().demo
    for name in HEART.roster:
        assert "**For trying out only.**" in (kits.site(name) / "README.md").read_text()
    real = laid(tmp_path / "real")
    assert "trying out" not in (real.site("va") / "README.md").read_text()
