"""The file policy.toml: what is written and read, what an approval changes and what it keeps."""

from __future__ import annotations

import copy
import math
import re
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.client import policy, policy_file, policy_rules
from fedaccord.client.policy import SitePolicy
from fedaccord.errors import PolicyError

ROOT = Path(__file__).resolve().parent.parent
CAP = "max_epsilon = 3.0\ndelta = 1e-5\n"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
ACCORD: dict[str, Any] = {
    "name": "small",
    "purpose": "to be tested",
    "task": {"name": "heart"},
    "sites": [{"name": "cleveland", "subjects": 200, "records": 300}],
    "model": {"name": "cnn1d"},
    "rounds": {"rounds": 3},
    "training": {"steps": 2, "learning_rate": 0.5},
    "privacy": {
        "noise_multiplier": 3.0,
        "sampling_prob": 0.1,
        "delta": 1e-5,
        "max_epsilon": 2.0,
    },
    "fairness": {"attributes": ["sex"]},
}


def agreed(name: str = "small", **privacy: Any) -> accords.Accord:
    """A small accord with its name or some keys of [privacy] changed."""
    data = copy.deepcopy(ACCORD) | {"name": name}
    data["privacy"] = {k: v for k, v in (data["privacy"] | privacy).items() if v is not None}
    return accords.parse(data)


CLIENT = {"unit": "client", "clipping_norm": 1.0}
PLAIN = {"enabled": False, "noise_multiplier": None}
KINDS = ("join", "reserve", "train", "evaluate")


def broken(own: SitePolicy, accord: accords.Accord, kind: str = "train") -> list[str]:
    now = datetime.now(UTC)
    return list(own.broken(accord, "cleveland", kind=kind, parameters=122, now=now))


# --- a simulated site ---------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [{}, PLAIN, CLIENT], ids=["subject", "plain", "client"])
def test_a_simulated_site_takes_part_in_its_first_accord_and_in_no_other(
    privacy: dict[str, Any], tmp_path: Path
) -> None:
    first, folder = agreed(**privacy), tmp_path / "cleveland"
    own = policy.of_site(folder, first)
    assert own.approved == [first.digest]
    assert [broken(own, first, kind) for kind in KINDS] == [[]] * 4
    assert broken(
        policy.of_site(folder, agreed("other", **privacy)), agreed("other", **privacy)
    ) == ["approved"]
    assert policy.of_site(folder, agreed("other")) == own  # written once


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 2.0]))
def test_no_accord_with_another_digest_passes_the_file_of_a_simulated_site(
    seed: int, clip: float
) -> None:
    own = SitePolicy.model_validate(policy_file.simulated(Path("cleveland"), agreed()))
    data = copy.deepcopy(ACCORD) | {"seed": seed}
    data["privacy"]["max_grad_norm"] = clip
    other = accords.parse(data)
    assert ("approved" in broken(own, other)) == (other.digest != agreed().digest)


def test_a_simulated_site_allows_what_its_accord_needs_and_no_more(tmp_path: Path) -> None:
    own = policy.of_site(tmp_path / "cleveland", agreed())
    assert (own.min_noise_multiplier, own.max_grad_norm, own.min_cell) == (3.0, 1.0, 10)
    assert (own.min_subjects, own.min_records) == (200, 300)
    assert (own.models, own.releases) == (["cnn1d", "mlp"], ["weights", "group counts"])
    assert (own.units, own.second_head) == (["subject"], "../heads/cleveland.json")
    assert policy.of_site(tmp_path / "b", agreed(**CLIENT)).units == ["client"]


def test_the_sites_own_cap_wins_over_every_later_accords(tmp_path: Path) -> None:
    assert policy.of_site(tmp_path / "a", agreed()).cap.epsilon == 2.0
    assert policy.of_site(tmp_path / "a", agreed(max_epsilon=50.0)).cap.epsilon == 2.0
    assert policy.of_site(tmp_path / "b", agreed(**PLAIN)).cap.epsilon == math.inf
    (tmp_path / "a" / "policy.toml").write_text("max_epsilon = 0.5\ndelta = 1e-6\n")
    own = policy.of_site(tmp_path / "a", agreed(max_epsilon=50.0))
    assert (own.cap.epsilon, own.cap.delta) == (0.5, 1e-6)
    assert broken(own, agreed()) == ["approved", "delta", "models", "releases"]


# --- the file -----------------------------------------------------------------------------------


def read(folder: Path, text: str | bytes) -> SitePolicy:
    path = folder / policy.FILE
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return SitePolicy.read(path)


def test_a_policy_of_only_a_cap_takes_part_in_nothing(tmp_path: Path) -> None:
    own = read(tmp_path, CAP)
    assert (own.approved, own.models, own.releases, own.disjoint) == ([], [], [], [])
    assert {"approved", "models", "releases"} <= set(broken(own, agreed()))
    assert own.second_head == f"../heads/{tmp_path.name}.json"
    assert own.cap_for(agreed()) is None


def test_a_policy_may_cap_one_accord_and_keep_data_sets_apart(tmp_path: Path) -> None:
    digest = agreed().digest
    extra = f'disjoint = [["heart"], ["scans", "x-rays"]]\n[accords.{digest}]\nmax_epsilon = 0.5\n'
    own = read(tmp_path, CAP + extra)
    found = own.cap_for(agreed())
    assert found is not None
    assert (found.epsilon, found.delta) == (0.5, 1e-5)
    assert own.cap_for(agreed("other")) is None
    assert own.disjoint == [["heart"], ["scans", "x-rays"]]


@pytest.mark.parametrize("accord", [None, agreed(), agreed(**PLAIN), agreed(**CLIENT)])
def test_a_written_policy_explains_every_key_and_reads_back_as_it_was_meant(
    accord: accords.Accord | None, tmp_path: Path
) -> None:
    folder = tmp_path / "cleveland"
    folder.mkdir()
    values = policy_file.simulated(folder, accord) if accord else policy_file.strict(folder)
    text = policy_file.text(values)
    assert read(folder, text) == SitePolicy.model_validate(values)
    keys, caps = text.split("\n# caps of single accords")
    for key in set(SitePolicy.model_fields) - {"accords"}:
        (before,) = re.findall(rf"(?m)^(.*)\n(?:# )?{key} = ", keys)
        assert before.startswith("# ")
    assert "[accords.DIGEST]" in caps
    assert max(map(len, text.splitlines())) <= 100


def test_a_written_policy_with_a_cap_for_one_accord_and_a_last_day_reads_back(
    tmp_path: Path,
) -> None:
    values = policy_file.strict(tmp_path) | {
        "accords": {A: {"max_epsilon": 0.25}},
        "expires": date(2030, 2, 3),
        "disjoint": [["heart"], ["scans"]],
    }
    assert read(tmp_path, policy_file.text(values)) == SitePolicy.model_validate(values)


def test_the_docs_have_every_key_with_the_value_that_holds_where_it_is_left_out() -> None:
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| `([a-z_]+)` \| ([^|]*) \|", page))
    assert list(rows) == list(SitePolicy.model_fields)
    for key, field in SitePolicy.model_fields.items():
        said = rows[key].strip()
        if key == "second_head":
            assert said.startswith("`../heads/")
        elif field.is_required():
            assert said == "must be written"
        elif field.default in (None, [], {}):
            assert said == "none"
        else:
            assert tomllib.loads(f"value = {said.strip('`')}")["value"] == field.default


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_epsilon = -1\ndelta = 1e-5", ["max_epsilon = -1 must be greater than 0. Raise it."]),
        ("max_epsilon = nan\ndelta = 1e-5", ["max_epsilon = nan must be greater than 0."]),
        ("max_epsilon = 3\ndelta = 0.5", ["delta = 0.5 must be less than 0.1. Lower it."]),
        ("max_epsilon = 3", ['key "delta" is missing. Add it; docs/policy.md explains it.']),
        (CAP + "aproved = []", ['key "aproved" is not known. Did you mean "approved"?']),
        ("max_epsilon = 3\ndelt = 1e-5", ['key "delt" is not known. Did you mean "delta"?']),
        (
            CAP + "min_noise_multiplier = inf",
            ["min_noise_multiplier = inf must be a finite number"],
        ),
        (
            CAP + 'min_cell = "ten"',
            ['min_cell = "ten" must be a whole number. Change it in policy'],
        ),
        (CAP + "approved = 3", ["approved = 3 must be a list in [ ]."]),
        (CAP + 'approved = ["b67a"]', ['"b67a" is no digest of an accord']),
        (CAP + 'releases = ["losses"]', ['releases[number 1] = "losses" must be "weights"']),
        (CAP + 'models = [" "]', ['models[number 1]: " " is empty. Fill it in']),
        (CAP + 'hours = "8-17"', ['hours = "8-17" must be two different times of day']),
        (CAP + 'hours = "08:00-08:00"', ['hours = "08:00-08:00" must be two different']),
        (CAP + 'hours = "08:00-24:01"', ["must be two different times of day"]),
        (CAP + 'timezone = "Bonn"', ['timezone = "Bonn" is no time zone of this machine']),
        (CAP + 'timezone = "../x"', ['timezone = "../x" is no time zone of this machine']),
        (CAP + 'expires = "2030-01-01"', ["must be a date without quotes, like 2030-12-31"]),
        (CAP + "[accords.x]\nmax_epsilon = 1", ['"x" is no digest of an accord']),
        (CAP + f"[accords.{A}]\nmax_eps = 1", ["is not known. Did you mean", "max_epsilon"]),
        (
            "max_epsilon = 0\ndelta = 1\nwhen = 2",  # all at once
            ["max_epsilon = 0 must be", "delta = 1 must be", 'key "when" is not known.'],
        ),
        ("max_epsilon: 3", ["is not TOML: ", "line 1", "Mend that line; nothing was released."]),
        (b"\xff\xfe", ["is not UTF-8 text. Save it as UTF-8; nothing was released."]),
    ],
)
def test_every_fault_of_a_policy_is_one_line_that_names_the_file_and_the_remedy(
    text: str | bytes, says: list[str], tmp_path: Path
) -> None:
    with pytest.raises(PolicyError) as fault:
        read(tmp_path, text)
    lines = str(fault.value).splitlines()
    assert fault.value.rule == "policy.toml"
    assert [words for words in says if words not in str(fault.value)] == []
    assert len(lines) == (3 if "when" in str(text) else 1)
    assert all(line.startswith(str(tmp_path / "policy.toml")) for line in lines)
    assert "pydantic" not in str(fault.value)


def test_a_deployed_site_without_a_policy_is_told_how_to_make_one_and_gets_none(
    tmp_path: Path,
) -> None:
    with pytest.raises(PolicyError, match=r"takes part in nothing\. Make one with `fedaccord site"):
        SitePolicy.read(tmp_path / "policy.toml")
    assert list(tmp_path.iterdir()) == []


# --- approvals ----------------------------------------------------------------------------------

WRITTEN = f"""\
# The ward's own policy. Signed off by the data protection officer.

delta = 1e-5        # as the board decided
max_epsilon = 3.0   # not more
approved = [
  "{A}",  # the first study
  # a comment between

  "{B}",
]  # the end of the list
models = ["cnn1d"]

# one accord gets less
[accords.{B}]
max_epsilon = 0.5   # half
"""


def test_an_approval_keeps_comments_order_and_every_other_value(tmp_path: Path) -> None:
    path = tmp_path / policy.FILE
    path.write_text(WRITTEN)
    assert policy_file.approve(path, C, "third, approved 2026-11-22")
    text = path.read_text()
    kept = [line for line in text.splitlines() if C not in line]
    assert kept == WRITTEN.splitlines()
    assert f'"{C}", # third, approved 2026-11-22' in text
    before, after = tomllib.loads(WRITTEN), tomllib.loads(text)
    assert after == before | {"approved": [A, B, C]}
    assert not policy_file.approve(path, C, "again")
    assert path.read_text() == text
    assert policy_file.revoke(path, C)
    assert path.read_text() == WRITTEN
    assert not policy_file.revoke(path, C)


LISTS = [
    "",
    "approved = []\n",
    "approved = [ ]  # none yet\n",
    f'approved = ["{A}"]\n',
    f'approved = ["{A}", "{B}"] # two\n',
    f'approved = ["{A}",\n\n"{B}",  # b\n# end\n]\n',
    f'"approved" = [\n\t"{A}"\n]\n',
]


@given(
    listed=st.sampled_from(LISTS),
    table=st.sampled_from(["", f"\n[accords.{A}]\nmax_epsilon = 1.0  # less\n"]),
    end=st.sampled_from(["\n", "\r\n"]),
    edits=st.lists(st.tuples(st.booleans(), st.sampled_from([A, B, C])), max_size=6),
)
def test_after_any_edits_the_file_says_what_was_asked_and_keeps_its_other_comments(
    tmp_path_factory: pytest.TempPathFactory,
    listed: str,
    table: str,
    end: str,
    edits: list[tuple[bool, str]],
) -> None:
    path = tmp_path_factory.mktemp("site") / policy.FILE
    text = f"# head\n{CAP}{listed}min_cell = 12  # dozen\n{table}".replace("\n", end)
    path.write_bytes(text.encode())
    before = tomllib.loads(text)
    want = list(before.get("approved", []))
    for add, digest in edits:
        changed = (
            policy_file.approve(path, digest, "said so")
            if add
            else policy_file.revoke(path, digest)
        )
        assert changed == ((digest in want) != add)
        want = [d for d in want if d != digest] + ([digest] if add else [])
        if add and not changed:
            want = SitePolicy.read(path).approved
        assert SitePolicy.read(path).approved == want
    after = tomllib.loads(path.read_bytes().decode())
    assert {**after, "approved": []} == {**before, "approved": []}
    for comment in ("# head", "# dozen", *(["# less"] if table else [])):
        assert comment in path.read_text()


def test_the_first_approval_writes_a_policy_that_takes_part_in_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ward" / policy.FILE
    assert policy_file.approve(path, agreed().digest, "small, approved 2026-11-22")
    own = SitePolicy.read(path)
    assert own.model_copy(update={"approved": []}) == policy_file.strict_policy(tmp_path / "ward")
    assert own.approved == [agreed().digest]
    assert broken(own, agreed()) == ["delta", "models", "releases"]


def test_a_policy_that_is_not_valid_is_not_edited(tmp_path: Path) -> None:
    path = tmp_path / policy.FILE
    path.write_text("approved = []\n")
    for edit in (lambda: policy_file.approve(path, A, ""), lambda: policy_file.revoke(path, A)):
        with pytest.raises(PolicyError, match='key "max_epsilon" is missing'):
            edit()
    assert path.read_text() == "approved = []\n"


def test_an_accord_that_weighs_sites_by_their_loss_needs_a_policy_that_names_it() -> None:
    by_loss = accords.parse(
        agreed().model_dump(mode="json")
        | {"strategy": {"name": "qfedavg"}, "privacy": {"enabled": False, "sampling_prob": 0.1}}
    )
    assert policy_rules.needed(by_loss) == ["weights", "group counts", "training loss"]
    assert policy_rules.needed(agreed()) == ["weights", "group counts"]
