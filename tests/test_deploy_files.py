"""Containers and Kubernetes: what the files let a process do, and that they belong to this code."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from typer.main import get_command

from fedaccord import accord as accords
from fedaccord.cli import app

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
RENDERED = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def objects(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def pod(path: Path) -> dict[str, Any]:
    """The one pod that a rendering makes."""
    (made,) = [o for o in objects(path) if "template" in o["spec"]]
    assert made["kind"] == "StatefulSet" and made["spec"]["replicas"] == 1
    return made["spec"]["template"]["spec"]


def policy(path: Path) -> dict[str, Any]:
    (made,) = [o for o in objects(path) if o["kind"] == "NetworkPolicy"]
    return made["spec"]


def commands() -> list[list[str]]:
    """What every container runs, as arguments of `fedaccord`."""
    compose = [service["command"] for service in COMPOSE["services"].values()]
    pods = [pod(path)["containers"][0] for path in RENDERED]
    return compose + [made["args"] for made in pods if "args" in made]


@pytest.mark.parametrize("command", sorted({tuple(c[:-1]) for c in commands()}), ids=" ".join)
def test_what_a_container_runs_is_a_command_of_this_version(command: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(get_command(app), [*command, "--help"])
    assert shown.exit_code == 0, shown.output


def test_the_containers_are_those_of_the_accords_sites_and_its_coordinator() -> None:
    assert set(COMPOSE["services"]) == {"coordinator", *accords.load("heart").roster}
    for name, service in COMPOSE["services"].items():
        role = ["coordinator", "up"] if name == "coordinator" else ["site", "join"]
        assert service["command"][:2] == role
        assert service["volumes"] == [f"${{KITS:-../kits}}/{name}:/kit"]


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_a_service_of_compose_has_no_root_no_right_and_no_way_out(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["user"] == "${KIT_UID:?the user id that owns the kits}:${KIT_GID:?its group id}"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"ports", "privileged", "network_mode", "pid", "ipc"} & set(service)
    assert service["networks"] == ["link"] and COMPOSE["networks"]["link"]["internal"] is True


def test_the_image_runs_as_a_number_that_is_not_root_and_takes_the_torch_of_pyproject() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "\nUSER 10001:10001\n" in last
    assert last.index("USER 10001") < last.index("ENTRYPOINT")
    wanted = [d for d in PYPROJECT["project"]["dependencies"] if re.match(r"torch(vision)?\W", d)]
    assert len(wanted) == 2
    for requirement in wanted:
        assert f'"{requirement}"' in DOCKERFILE
    python = re.search(r"ARG PYTHON=(\S+)", DOCKERFILE)
    assert python and f">={python[1]}" == PYPROJECT["project"]["requires-python"]


def test_the_build_sees_what_the_wheel_is_made_of_and_nothing_else() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    rooms = set(PYPROJECT["tool"]["setuptools"]["package-dir"].values())
    assert allowed == {"fedaccord", *rooms, "pyproject.toml", "README.md", "LICENSE"}


def test_every_instruction_of_the_dockerfile_that_copies_names_what_is_there() -> None:
    copied = re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
    assert [shlex.split(line) for line in copied] == [
        [".", "/src"],
        ["--from=build", "/opt/fedaccord", "/opt/fedaccord"],
    ]


# --- Kubernetes ---------------------------------------------------------------------------------


def test_the_manifests_were_rendered_from_the_chart_as_it_is_now() -> None:
    spec = importlib.util.spec_from_file_location("render", DEPLOY / "render.py")
    assert spec and spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    assert {path.stem for path in RENDERED} == set(render.CASES)
    for path in RENDERED:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# Made by `python deploy/render.py` from the chart {render.digest()}."


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_a_pod_has_no_root_no_right_and_nothing_to_write_to_but_the_kit(path: Path) -> None:
    spec = pod(path)
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(spec)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # Otherwise each start would give the group a right to the keys, which are then refused.
    assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
    assert writable == {"/kit", "/tmp"}
    assert [v for v in spec["volumes"] if "hostPath" in v or "secret" in v] == []
    assert "memory" in container["resources"]["limits"]


def test_records_are_mounted_for_reading_alone() -> None:
    spec = pod(DEPLOY / "kubernetes" / "site.yaml")
    mounts = {m["mountPath"]: m for m in spec["containers"][0]["volumeMounts"]}
    assert mounts["/data"]["readOnly"] is True
    claims = [v for v in spec["volumes"] if v["name"] == "data"]
    assert claims[0]["persistentVolumeClaim"]["readOnly"] is True


def test_a_site_takes_no_connection_and_reaches_the_coordinator_and_the_name_server_alone() -> None:
    rules = policy(DEPLOY / "kubernetes" / "site.yaml")
    assert rules["policyTypes"] == ["Ingress", "Egress"] and rules["ingress"] == []
    link, names = rules["egress"]
    assert link == {
        "ports": [{"port": 8443, "protocol": "TCP"}],
        "to": [{"ipBlock": {"cidr": "203.0.113.7/32"}}],
    }
    assert {(p["port"], p["protocol"]) for p in names["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert all(to for to in names["to"])  # an empty one would be everybody


def test_the_coordinator_dials_nobody_and_is_dialled_on_one_port() -> None:
    rules = policy(DEPLOY / "kubernetes" / "coordinator.yaml")
    assert rules["egress"] == []
    assert [rule["ports"] for rule in rules["ingress"]] == [[{"port": 8443, "protocol": "TCP"}]]


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_the_kit_outlives_the_release_and_selectors_find_the_pod(path: Path) -> None:
    made = objects(path)
    (claim,) = [o for o in made if o["kind"] == "PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (volume,) = [v for v in pod(path)["volumes"] if v["name"] == "kit"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (owner,) = [o for o in made if o["kind"] == "StatefulSet"]
    labels = owner["spec"]["template"]["metadata"]["labels"]
    selectors = [policy(path)["podSelector"]["matchLabels"]]
    selectors += [o["spec"]["selector"] for o in made if o["kind"] == "Service"]
    assert all(selector.items() <= labels.items() for selector in selectors)


LISTENS = "   0: 00000000:20FB 00000000:0000 0A 00000000:00000000 00:00000000 00000000"
LISTENS6 = f"   0: {'0' * 32}:20FB {'0' * 32}:0000 0A 00000000:00000000 00:00000000 00000000"
JOINED = "   1: 0500000A:C350 077100CB:20FB 01 00000000:00000000 00:00000000 00000000"
SERVES = "   1: 0500000A:20FB 077100CB:C350 01 00000000:00000000 00:00000000 00000000"
WAITS = "   1: 0500000A:C350 077100CB:20FB 06 00000000:00000000 00:00000000 00000000"
OTHER = "   0: 00000000:20FC 00000000:0000 0A 00000000:00000000 00:00000000 00000000"


@pytest.mark.parametrize(
    ("role", "table", "good"),
    [
        ("coordinator", LISTENS, True),
        ("coordinator", LISTENS6, True),
        ("coordinator", JOINED + "\n" + SERVES + "\n" + OTHER, False),
        ("site", JOINED, True),
        ("site", WAITS + "\n" + LISTENS, False),
        ("site", "", False),
    ],
)
def test_a_probe_reads_the_kernels_table_of_connections(role: str, table: str, good: bool) -> None:
    container = pod(DEPLOY / "kubernetes" / f"{role}.yaml")["containers"][0]
    probes = [container[kind]["exec"]["command"] for kind in container if kind.endswith("Probe")]
    check = COMPOSE["services"]["coordinator"]["healthcheck"]["test"]
    probes += [["sh", "-c", check[1]]] if role == "coordinator" else []
    assert probes
    for shell, option, line in probes:
        assert (shell, option) == ("sh", "-c")
        reads, _, pattern = line.partition(" | ")
        assert reads == "cat /proc/net/tcp /proc/net/tcp6"
        done = subprocess.run(["sh", "-c", pattern], input=table, text=True)
        assert (done.returncode == 0) is good
