"""A site of a deployment is led by its own node config; who submits a run moves nothing there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomlkit
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from wards import small_accord

from fedaccord import accord as accords
from fedaccord.client import policy, policy_file
from fedaccord.client.app import app
from fedaccord.client.site import accord_of, home_of, without_paths
from fedaccord.errors import AccordError
from fedaccord.simulations.engine import InProcessGrid

SITE = "cleveland"


def plain_accord() -> dict[str, Any]:
    agreed = small_accord()
    return agreed | {"privacy": agreed["privacy"] | {"enabled": False}}


def written(folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accord.toml").write_text(tomlkit.dumps(plain_accord() | changed))
    return folder / "accord.toml"


def joined(node: dict[str, str], run: dict[str, str], digest: str) -> dict[str, Any]:
    """What a node with this config answers to somebody who asks it to join."""
    grid = InProcessGrid(app, 1, run)
    (number,) = grid.get_node_ids()
    context = grid._context(number)
    context.node_config = node
    grid._context = lambda _: context  # type: ignore[method-assign]
    asked = ConfigRecord({"run": "a", "accord": digest, "server-round": 1})
    content = RecordDict({"config": asked, "arrays": ArrayRecord()})
    (reply,) = grid.send_and_receive([Message(content, number, "query.join")])
    return dict(reply.content.config_records["config"])


def test_a_site_reads_its_own_accord_and_folder_whatever_the_run_config_names(
    tmp_path: Path,
) -> None:
    own = written(tmp_path / "kit")
    theirs = written(tmp_path / "theirs", purpose="Something that the site never read.")
    agreed, other = accords.load(own), accords.load(theirs)
    (tmp_path / "kit" / SITE).mkdir()
    rules = policy_file.simulated(tmp_path / "kit" / SITE, agreed)
    (tmp_path / "kit" / SITE / policy.FILE).write_text(policy_file.text(rules))
    node = {"site": SITE, "accord": str(own), "folder": str(tmp_path / "kit")}
    run = {"accord": str(theirs), "sites": str(tmp_path / "planted")}
    said = joined(node, run, agreed.digest)
    assert said["site"] == SITE and "refused" not in said
    assert (tmp_path / "kit" / SITE / "ledger.sqlite").is_file()
    assert not (tmp_path / "planted").exists()
    refused = joined(node, run, other.digest)["refused"]
    assert "holds another accord" in refused


@pytest.mark.parametrize("missing", ["accord", "folder"])
def test_a_node_config_that_names_the_site_must_name_its_accord_and_folder_too(
    missing: str, tmp_path: Path
) -> None:
    own = written(tmp_path)
    node = {"site": SITE, "accord": str(own), "folder": str(tmp_path / "sites")}
    run = {"accord": str(own), "sites": str(tmp_path / "planted")}
    del node[missing]
    words = joined(node, run, accords.load(own).digest)["refused"]
    assert words.startswith(f"site {SITE} has no `{missing}` in its node config")
    assert f'Start it with {missing}="' in words and "\n" not in words
    assert not (tmp_path / "planted").exists()


def context(node: dict[str, str | int], run: dict[str, str]) -> Context:
    return Context(7, 1, dict(node), RecordDict(), dict(run))


def test_in_a_simulation_the_run_config_decides_as_before(tmp_path: Path) -> None:
    run = {"accord": "heart", "sites": str(tmp_path)}
    simulated = context({"partition-id": 0, "accord": "digits", "folder": "/elsewhere"}, run)
    assert accord_of(simulated) == "heart"
    assert home_of(simulated) == tmp_path


def test_an_empty_name_is_as_none(tmp_path: Path) -> None:
    with pytest.raises(AccordError, match="has no `accord`"):
        accord_of(context({"site": SITE, "accord": ""}, {"accord": "heart"}))
    with pytest.raises(AccordError, match="has no `folder`"):
        home_of(context({"site": SITE, "folder": ""}, {"sites": str(tmp_path)}))


def test_a_refusal_that_travels_names_no_folder_of_the_site() -> None:
    node = {"site": SITE, "accord": "/srv/kit/accord.toml", "folder": "/srv/kit", "data": "/mnt"}
    told = context(node, {})
    words = 'accord "/srv/kit/accord.toml": none; /srv/kit/cleveland/policy.toml, /mnt/a.csv'
    assert without_paths(words, told) == (
        'accord "accord.toml": none; cleveland/policy.toml, a.csv'
    )
    assert without_paths("./a or b", context({"site": SITE, "accord": "accord.toml"}, {})) == (
        "./a or b"
    )
    run = {"accord": "heart", "sites": "/tmp/sites"}
    assert without_paths("/tmp/sites/va/x", context({"partition-id": 0}, run)) == "va/x"


def test_a_missing_accord_is_refused_without_saying_where_it_was_looked_for(tmp_path: Path) -> None:
    gone = tmp_path / "kit" / "accord.toml"
    node = {"site": SITE, "accord": str(gone), "folder": str(tmp_path / "kit")}
    words = joined(node, {"accord": "heart", "sites": ""}, "0" * 64)["refused"]
    assert words.startswith('accord "accord.toml": no such file.')
    assert str(tmp_path) not in words
