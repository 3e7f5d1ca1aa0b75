"""The accord: one digest for one meaning, one clear sentence for every fault, and its reference."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedaccord import accord as accords
from fedaccord.errors import AccordError

HEART = accords.bundled()["heart"]
TEXT = HEART.read_text(encoding="utf-8")
DATA = tomllib.loads(TEXT)
FULL = accords.parse(DATA).model_dump(mode="json")  # every default written out


def edited(path: str, value: Any, data: dict[str, Any] = DATA) -> dict[str, Any]:
    """The heart accord with one value set, added or (None) removed; a number is a list's place."""
    out = copy.deepcopy(data)
    here: Any = out
    *tables, key = [int(part) if part.isdigit() else part for part in path.split(".")]
    for table in tables:
        here = here.setdefault(table, {}) if isinstance(here, dict) else here[table]
    if value is None:
        del here[key]
    else:
        here[key] = value
    return out


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(AccordError) as caught:
        accords.parse(data, "my.toml")
    return str(caught.value)


def shuffled(draw: st.DrawFn, value: Any) -> Any:
    """The same tables with their keys in another order."""
    if isinstance(value, dict):
        keys = draw(st.permutations(list(value)))
        return {key: shuffled(draw, value[key]) for key in keys}
    return [shuffled(draw, item) for item in value] if isinstance(value, list) else value


def leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        return [p for key in value for p in leaves(value[key], f"{path}.{key}" if path else key)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [p for n, item in enumerate(value) for p in leaves(item, f"{path}.{n}")]
    return [path]


def at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[int(part)] if part.isdigit() else data[part]
    return data


# --- the digest ---------------------------------------------------------------------------------


@given(st.data())
def test_the_digest_does_not_depend_on_the_order_of_keys(data: st.DataObject) -> None:
    other = data.draw(st.composite(shuffled)(FULL))
    assert accords.parse(other).digest == accords.parse(DATA).digest


def test_the_digest_does_not_depend_on_comments_blank_lines_or_a_byte_order_mark(
    tmp_path: Path,
) -> None:
    bare = re.sub(r"(?m)\s+# .*$|^# .*$", "", TEXT)
    assert "#" not in bare
    (tmp_path / "bare.toml").write_text("\n\n" + bare, encoding="utf-8-sig")
    assert accords.load(tmp_path / "bare.toml").digest == accords.load("heart").digest


# A second valid value for what cannot simply be counted up or have a letter added.
OTHERS = {
    "model.name": "mlp",
    "distillation.model": "cnn1d",
    "rounds.sites_per_round": 3,
    "rounds.target_accuracy": 0.9,
    "privacy.enabled": False,
    "privacy.unit": "client",
    "privacy.engine": "ghost",
    "privacy.precision": "float32",
    "privacy.kernels": "fixed",
    "training.optimizer": "adam",
    "training.augmentation": "noise",
    "model.sha256": "1" * 64,
    "model.frozen": ["2."],
    "model.local": ["2."],
    "strategy.name": "fedmedian",
    "strategy.encoding": "int8",
    "strategy.options": {"a": 1},
    "fairness.attributes": ["sex", "age"],
    "task.options": {"a": 1},
    **{f"sites.{n}.key": f"{n}" * 64 for n in range(4)},
    **{f"sites.{n}.subjects": 50 for n in range(4)},  # above its records is refused
}
# With one known name or value there is no second one to change to.
ONLY = {"task.name", "privacy.neighboring_relation", "privacy.noise_multiplier"}
# These go with one another only.
CLIENT = {"unit": "client", "clipping_norm": 1.0, "target_quantile": 0.5, "count_noise": 10.0}


def around(path: str) -> dict[str, Any]:
    """The full accord, with the unit of privacy that a key belongs to."""
    full = copy.deepcopy(FULL)
    if path in ("model.pretrained", "model.sha256"):  # both or none
        full["model"] |= {"pretrained": "minilm", "sha256": "0" * 64}
    if path in {f"privacy.{key}" for key in (*CLIENT, "clipping_learning_rate")}:
        full["privacy"] |= {"enabled": False} if path == "privacy.unit" else CLIENT
    return full


@pytest.mark.parametrize("path", sorted(set(leaves(FULL)) - ONLY))
def test_the_digest_changes_with_every_value(path: str) -> None:
    base = around(path)
    old = at(base, path)
    if path in OTHERS:
        new = OTHERS[path]
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, str):
        new = old + "x"
    else:
        new = old + 1 if isinstance(old, int) else old * 0.9375 + 0.001
    assert accords.parse(edited(path, new, base)).digest != accords.parse(base).digest


def test_a_site_that_declares_no_records_declares_one_a_subject() -> None:
    left_out = {"name": "ward", "subjects": 40}
    bare, written, more = (
        accords.parse(edited("sites", [left_out | records], FULL | {"rounds": {"rounds": 1}}))
        for records in ({}, {"records": 40}, {"records": 41})
    )
    assert bare.sites[0].records == 40
    assert bare.digest == written.digest != more.digest
    with pytest.raises(AccordError, match=r"records = 39 is below sites\[ward\]\.subjects = 40"):
        accords.parse(edited("sites.0.records", 39, more.model_dump(mode="json")))
    with pytest.raises(AccordError) as fault:  # one fault is one line, and the default none of it
        accords.parse(edited("sites.0", left_out | {"subjects": 0}, FULL))
    assert "\n" not in str(fault.value)


@given(st.data(), st.floats(min_value=1e-3, max_value=50, allow_subnormal=False))
def test_two_learning_rates_have_one_digest_only_if_they_are_equal(
    data: st.DataObject, rate: float
) -> None:
    near = data.draw(st.sampled_from([rate, rate * (1 + 2**-52), rate * 1.5]))
    one, two = (accords.parse(edited("training.learning_rate", r)) for r in (rate, near))
    assert (one.digest == two.digest) == (rate == near)


def test_noise_given_by_its_multiplier_is_another_accord() -> None:
    other = edited("privacy.noise_multiplier", 2.0, edited("privacy.target_epsilon", None))
    again = edited("privacy.noise_multiplier", 2.5, other)
    digests = {accords.parse(d).digest for d in (DATA, other, again)}
    assert len(digests) == 3


def test_the_digest_is_the_hash_of_canonical_json() -> None:
    import hashlib

    text = json.dumps(FULL, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == accords.parse(DATA).digest


# --- one sentence a fault -----------------------------------------------------------------------

FAULTS = [
    # where, what stands there (None: nothing), what the sentence says
    (
        "training.learnig_rate",
        0.1,
        'key "training.learnig_rate" is not known. Did you mean "learning_rate"? Known here: '
        "steps, optimizer, learning_rate, momentum, views, augmentation, personal.",
    ),
    ("privacy.epsilon", 3.0, 'Did you mean "max_epsilon"?'),
    ("seeed", 1, 'key "seeed" is not known. Did you mean "seed"?'),
    ("sites.3.subject", 5, 'key "sites[va].subject" is not known. Did you mean "subjects"?'),
    ("privacy.zzz", 1, 'key "privacy.zzz" is not known. Known here: enabled, target_epsilon'),
    ("odd key\n", 1, 'key "odd key\\n" is not known.'),
    (
        "privacy.target_epsilon",
        -3.0,
        "privacy.target_epsilon = -3.0 must be greater than 0. Raise it.",
    ),
    ("privacy.target_epsilon", 0, "privacy.target_epsilon = 0 must be greater than 0. Raise it."),
    (
        "privacy.target_epsilon",
        float("nan"),
        "privacy.target_epsilon = nan must be a finite number.",
    ),
    ("privacy.max_epsilon", float("inf"), "privacy.max_epsilon = inf must be a finite number."),
    ("training.learning_rate", float("-inf"), "training.learning_rate = -inf must be a finite"),
    (
        "model.options.channels",
        float("nan"),
        "model.options.channels: nan must be a finite number, true, false or a string",
    ),
    ("model.options.channels", [4], "model.options.channels: [4] must be a finite number"),
    ("privacy.delta", 0.5, "privacy.delta = 0.5 must be less than 0.1. Lower it."),
    ("privacy.sampling_prob", 1.5, "privacy.sampling_prob = 1.5 must be at most 1. Lower it."),
    ("fairness.confidence", 0.3, "fairness.confidence = 0.3 must be at least 0.5. Raise it."),
    ("training.momentum", 1.0, "training.momentum = 1.0 must be less than 1. Lower it."),
    ("rounds.timeout", 0.0, "rounds.timeout = 0.0 must be greater than 0. Raise it."),
    ("rounds.rounds", 0, "rounds.rounds = 0 must be at least 1. Raise it."),
    ("rounds.rounds", "20", 'rounds.rounds = "20" must be a whole number. Change it'),
    ("rounds.rounds", 20.0, "rounds.rounds = 20.0 must be a whole number. Change it"),
    ("rounds.rounds", True, "rounds.rounds = true must be a whole number. Change it"),
    ("privacy.delta", "1e-5", 'privacy.delta = "1e-5" must be a number. Change it'),
    ("privacy.enabled", 0, "privacy.enabled = 0 must be true or false. Change it"),
    ("name", "My Accord", 'name = "My Accord" must be lower-case letters, digits and hyphens'),
    ("sites.1.name", "a\nb", 'sites[number 2].name = "a\\nb" must be lower-case letters'),
    ("sites.2.subjects", 0, "sites[switzerland].subjects = 0 must be at least 1. Raise it."),
    ("purpose", "", 'purpose = "" must not be empty. Fill it in.'),
    ("purpose", "p" * 501, "has 501 characters, at most 500 fit. Shorten it."),
    ("sites", [], "sites = [] must not be empty. Fill it in."),
    ("fairness.attributes", "sex", 'fairness.attributes = "sex" must be a list in [ ].'),
    ("fairness.attributes", [], "fairness.attributes = [] must not be empty. Fill it in."),
    ("fairness.attributes", ["sex", 3], "fairness.attributes[number 2] = 3 must be a string"),
    (
        "fairness.attributes",
        ["sex", "sex"],
        'fairness.attributes = ["sex", "sex"] names one twice. Name each once.',
    ),
    ("training", 3, "training = 3 must be a table. Change it in the accord."),
    ("privacy.neighboring_relation", "replace-one", 'must be "add-or-remove-one". Change it'),
    (
        "model.name",
        "cnn1",
        'model.name: model "cnn1" is not known. Did you mean "cnn1d"? Known: ',
    ),
    ("distillation.model", "boosting", 'distillation.model: model "boosting" is not known. Known:'),
    ("task.name", "hart", 'task.name: task "hart" is not known. Did you mean "heart"?'),
    ("strategy.name", "fedavgg", 'strategy.name: strategy "fedavgg" is not known. Did you mean'),
    (
        "sites",
        [dict(FULL["sites"][0]) | {"name": n, "key": "a" * 64} for n in ("b", "c")],
        "sites: one key is given to two sites. Each site makes its own key.",
    ),
    ("sites.0.key", "A" * 64, "sites[cleveland].key"),
    ("sites.3.name", "hungary", 'sites: "hungary" is listed twice. List each site once.'),
    ("rounds.min_sites", 9, "rounds.min_sites = 9 is above 4, the number of [[sites]]. Lower it"),
    ("rounds.sites_per_round", 5, "rounds.sites_per_round = 5 is above 4, the number of [[sites]]"),
    (
        "rounds.sites_per_round",
        2,
        "rounds.sites_per_round = 2 is below rounds.min_sites = 3, so no round could",
    ),
    (
        "privacy.noise_multiplier",
        2.0,
        "privacy: exactly one of target_epsilon and noise_multiplier says how much noise there "
        "is. Keep one, remove the other.",
    ),
    ("privacy.target_epsilon", None, "privacy: exactly one of target_epsilon and noise_multiplier"),
    (
        "privacy.max_epsilon",
        1.0,
        "privacy.target_epsilon = 3.0 is above privacy.max_epsilon = 1.0, the cap of every "
        "site. Lower the one or raise the other.",
    ),
    (
        "privacy.sampling_prob",
        None,
        'key "privacy.sampling_prob" is missing. Add it; the bundled accord',
    ),
    ("purpose", None, 'key "purpose" is missing. Add it'),
]


@pytest.mark.parametrize(("path", "value", "sentence"), FAULTS)
def test_a_fault_is_one_line_with_parameter_value_bound_and_remedy(
    path: str, value: Any, sentence: str
) -> None:
    said = refusal(edited(path, value))
    assert said.count("\n") == 0
    assert said.isprintable()
    assert said.startswith("my.toml: ") and said.endswith(".")
    assert sentence in said


def test_each_of_several_faults_has_its_own_line() -> None:
    data = edited("rounds.rounds", -1, edited("model.name", "cnn3d", edited("privacy.delta", 2)))
    assert [line.split(" = ")[0].split(": ")[1] for line in refusal(data).splitlines()] == [
        "model.name",
        "rounds.rounds",
        "privacy.delta",
    ]


def test_a_misspelt_key_is_not_reported_missing_as_well() -> None:
    data = edited("training.steps", None, edited("training.step", 10))
    assert refusal(data).count("\n") == 0
    assert 'Did you mean "steps"?' in refusal(data)


def test_a_misspelt_table_is_not_reported_missing_as_well() -> None:
    data = edited("trainning", DATA["training"], edited("training", None))
    assert refusal(data).count("\n") == 0
    assert 'Did you mean "training"?' in refusal(data)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
@settings(max_examples=200)
def test_whatever_stands_in_place_of_a_value_is_taken_or_refused_in_words(value: Any) -> None:
    for path in ("seed", "rounds.rounds", "privacy.delta", "sites", "model.options.channels"):
        data = copy.deepcopy(DATA)
        *tables, key = path.split(".")
        here = data
        for table in tables:
            here = here[table]
        here[key] = value
        try:
            accords.parse(data)
        except AccordError as fault:
            assert str(fault).startswith(f"accord: {path}") or "rounds" in str(fault)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "+nan"])
def test_toml_that_says_nan_or_infinity_is_refused(value: str, tmp_path: Path) -> None:
    text = TEXT.replace("max_grad_norm = 1.0", f"max_grad_norm = {value}")
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(AccordError, match=r"privacy\.max_grad_norm = -?(nan|inf) must be a finite"):
        accords.load(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"[training\nsteps = 1\n",
            r"is not TOML: .* \(at line 1, column \d+\)\. Mend that line\.",
        ),
        (b"seed = 0\nseed = 1\n", r"is not TOML: .* \(at line 2, column \d+\)\. Mend that line\."),
        (b"name = '\xff\xfe'\n", r"is not UTF-8 text\. Save it as UTF-8\."),
    ],
)
def test_a_file_that_is_not_toml_is_refused_with_its_line(
    content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(AccordError, match=said) as caught:
        accords.load(tmp_path / "a.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["nowhere.toml", "hart", "", "a" * 5000, "."])
def test_a_file_that_is_not_there_is_refused_and_the_bundled_names_are_listed(where: str) -> None:
    with pytest.raises(AccordError) as caught:
        accords.load(where)
    assert str(caught.value).startswith(f'accord "{where}"')
    assert "heart, thyroid)" in str(caught.value) or "cannot be read" in str(caught.value)
