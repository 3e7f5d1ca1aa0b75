"""The accord: what all sites agreed on, loaded from TOML, validated, and named by its digest."""

from __future__ import annotations

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedaccord import evidence, units
from fedaccord.accord_section import Name, Options, Section, known
from fedaccord.accord_task import AnyTask
from fedaccord.errors import AccordError
from fedaccord.faults import Fault, lines, toml

ModelName = Annotated[str, known("model")]
StrategyName = Annotated[str, known("strategy")]


class SiteSection(Section):
    """[[sites]]: a hospital or branch, with the size that it declares once and does not update."""

    name: Name
    subjects: int = Field(ge=1, le=10**9)
    records: int | None = Field(default=None, ge=1, le=10**9, validate_default=True)
    key: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @field_validator("records")
    @classmethod
    def _one_a_subject(cls, records: int | None, found: ValidationInfo) -> int | None:
        """Fill the default in, so that an accord without it has the digest of one with it."""
        subjects = found.data.get("subjects")  # missing where it has a fault of its own
        if records is not None and subjects is not None and records < subjects:
            site = found.data.get("name", "?")
            raise Fault(
                f"sites[{site}].records = {records} is below sites[{site}].subjects = {subjects}, "
                "and each subject has a record. Raise it or leave it out."
            )
        return subjects if records is None else records


Starts = list[str]


class ModelSection(Section):
    """[model]: the global model, by name in the registry."""

    name: ModelName
    options: Options = Field(default={})
    pretrained: str | None = Field(default=None, min_length=1, max_length=500)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    frozen: Starts = Field(default=[])
    local: Starts = Field(default=[])

    @model_validator(mode="after")
    def _weights_by_hash(self) -> ModelSection:
        if (self.pretrained is None) != (self.sha256 is None):
            given, other = ("pretrained", "sha256")[:: 1 if self.sha256 is None else -1]
            raise Fault(
                f"model.{given} is given without model.{other}: pretrained weights are named by "
                f"both. Give model.{other}, or leave both out."
            )
        return self


class RoundsSection(Section):
    """[rounds]: how many, and with whom."""

    rounds: int = Field(ge=1, le=100_000)
    spare_rounds: int = Field(default=0, ge=0, le=1_000)
    sites_per_round: int | None = Field(default=None, ge=1)
    min_sites: int = Field(default=1, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    max_misses: int = Field(default=3, ge=1, le=1_000)
    target_accuracy: float | None = Field(default=None, gt=0, le=1)


class TrainingSection(Section):
    """[training]: what a site does in a round."""

    steps: int = Field(ge=1, le=100_000)
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(gt=0, le=1_000)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    views: int = Field(default=1, ge=1, le=64)
    augmentation: Literal["none", "noise", "shift", "shift-flip"] = "none"
    personal: float = Field(default=0.0, ge=0, le=100)

    @model_validator(mode="after")
    def _pull_that_holds(self) -> TrainingSection:
        if self.personal * self.learning_rate > 1:
            raise Fault(
                f"training.personal = {self.personal:g} times training.learning_rate = "
                f"{self.learning_rate:g} is above 1, so a step would throw the personal model past "
                f"the global one. Lower it to {1 / self.learning_rate:g} or less."
            )
        return self


class StrategySection(Section):
    """[strategy]: how updates become a model, by name in the registry."""

    name: StrategyName = "fedavg"
    options: Options = Field(default={})
    max_update_norm: float = Field(default=100.0, gt=0, le=1e9)
    encoding: Literal["float32", "float16", "int8"] = "float32"
    averaging: float = Field(default=0.0, ge=0, lt=1)


class PrivacySection(Section):
    """[privacy]: the protection of each training subject at its site, or of each site."""

    enabled: bool = True
    target_epsilon: float | None = Field(default=None, gt=0, le=20)
    noise_multiplier: float | None = Field(default=None, ge=0.3, le=10_000)
    delta: float = Field(default=1e-5, gt=0, lt=0.1)
    max_epsilon: float = Field(default=10.0, gt=0, le=100)
    sampling_prob: float = Field(gt=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=1e-9, le=1e6)
    engine: Literal["auto", "bookkeeping", "ghost", "hooks"] = "auto"
    precision: Literal["float64", "float32", "bfloat16"] = "float64"
    page_rows: int = Field(default=256, ge=1, le=65_536)
    kernels: Literal["measured", "fixed"] = "measured"
    unit: Literal["subject", "client"] = "subject"
    clipping_norm: float | None = Field(default=None, ge=1e-9, le=1e6)
    target_quantile: float | None = Field(default=None, gt=0, lt=1)
    clipping_learning_rate: float = Field(default=0.2, gt=0, le=10)
    count_noise: float | None = Field(default=None, gt=0, le=1e9)
    neighboring_relation: Literal["add-or-remove-one"] = "add-or-remove-one"

    @model_validator(mode="after")
    def _one_of_two(self) -> PrivacySection:
        if self.enabled and (self.target_epsilon is None) == (self.noise_multiplier is None):
            remedy = "Give one" if self.target_epsilon is None else "Keep one, remove the other"
            raise Fault(
                "privacy: exactly one of target_epsilon and noise_multiplier says how much noise "
                f"there is. {remedy}."
            )
        if self.target_epsilon is not None and self.target_epsilon > self.max_epsilon:
            raise Fault(
                f"privacy.target_epsilon = {self.target_epsilon} is above privacy.max_epsilon = "
                f"{self.max_epsilon}, the cap of every site. Lower the one or raise the other."
            )
        if self.engine == "ghost" and self.precision != "float64":
            raise Fault(
                f'privacy.precision = "{self.precision}" does not go with privacy.engine = '
                '"ghost", whose sum would be too coarse. Choose "float64" or the engine "hooks".'
            )
        return self


class FairnessSection(Section):
    """[fairness]: what is audited after every round, and the rule that the sites agreed on."""

    attributes: list[str] = Field(min_length=1)
    min_group: int = Field(default=10, ge=1)
    confidence: float = Field(default=0.95, ge=0.5, le=0.999)
    max_parity_difference: float | None = Field(default=None, ge=0, le=1)
    stop_on_breach: bool = False

    @field_validator("attributes")
    @classmethod
    def _once_each(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise Fault(f"fairness.attributes = {toml(names)} names one twice. Name each once.")
        return names


class DistillationSection(Section):
    """[distillation]: the compact student that is deployed."""

    enabled: bool = True
    model: ModelName = "mlp"
    options: Options = Field(default={})
    every: int = Field(default=1, ge=1)
    steps: int = Field(default=50, ge=1, le=100_000)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=0.01, gt=0, le=10)
    proxy_rows: int = Field(default=1024, ge=1, le=10**7)


class Accord(Section):
    """What all sites agreed on; equal accords have equal digests."""

    name: Name
    purpose: str = Field(min_length=1, max_length=500)
    seed: int = Field(default=0, ge=0, lt=2**63)
    tuning: str = Field(default="not covered", min_length=1, max_length=500)
    task: AnyTask
    sites: list[SiteSection] = Field(min_length=1)
    model: ModelSection
    rounds: RoundsSection
    training: TrainingSection
    strategy: StrategySection = StrategySection()
    privacy: PrivacySection
    fairness: FairnessSection
    distillation: DistillationSection = DistillationSection()

    @model_validator(mode="after")
    def _holds_together(self) -> Accord:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise Fault(f'sites: "{twice}" is listed twice. List each site once.')
        pins = [site.key for site in self.sites if site.key]
        if len(set(pins)) != len(pins):
            raise Fault("sites: one key is given to two sites. Each site makes its own key.")
        for key in ("min_sites", "sites_per_round"):
            value = getattr(self.rounds, key)
            if value is not None and value > len(names):
                raise Fault(
                    f"rounds.{key} = {value} is above {len(names)}, the number of [[sites]]. "
                    "Lower it or list more sites."
                )
        drawn = self.rounds.sites_per_round
        if drawn is not None and drawn < self.rounds.min_sites:
            raise Fault(
                f"rounds.sites_per_round = {drawn} is below rounds.min_sites = "
                f"{self.rounds.min_sites}, so no round could count. Raise it."
            )
        if words := units.fault(self):
            raise Fault(words)
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, every default written out; it names the accord."""
        return evidence.digest(self.model_dump(mode="json"))

    @property
    def roster(self) -> dict[str, int]:
        """Declared training subjects of each site, in order of name."""
        return {site.name: site.subjects for site in sorted(self.sites, key=lambda s: s.name)}

    @property
    def pins(self) -> dict[str, str]:
        """The public key of each site that has one pinned here, ed25519 in hex."""
        return {site.name: site.key for site in self.sites if site.key}

    @property
    def reserved_rounds(self) -> int:
        """Rounds that a site reserves in its ledger: the planned and the spare ones."""
        return self.rounds.rounds + self.rounds.spare_rounds


def bundled() -> dict[str, Path]:
    """Return the accords that come with FedAccord, by name."""
    here = Path(__file__).resolve().parent
    root = here if (here / "simulations").is_dir() else here.parent
    return {path.stem: path for path in (root / "simulations" / "accords").glob("*.toml")}


def find(where: str | Path) -> Path:
    """Find an accord's file; what the accord names by a path is looked up in the file's folder.

    Raises:
        AccordError: neither a file nor the name of a bundled accord.
    """
    path = Path(where)
    if path.is_file():
        return path
    if str(where) not in bundled():
        raise AccordError(
            f'accord "{where}": no such file. Give a TOML file or the name of a bundled '
            f"accord ({', '.join(sorted(bundled()))})."
        )
    return bundled()[str(where)]


# By where it was asked for: the text as it stands there, and what it says. A site loads its accord
# at every message; it is validated once, and an Accord cannot be changed.
_loaded: dict[str, tuple[str, Accord]] = {}


def load(where: str | Path) -> Accord:
    """Load and validate an accord: a path to a TOML file, or the name of a bundled one.

    Raises:
        AccordError: a missing file, TOML that does not parse, an unknown key or a wrong value;
            one line a fault, each naming parameter, value, bound and remedy.
    """
    try:
        path = find(where)
        text = path.read_text(encoding="utf-8-sig")
        if (held := _loaded.get(str(where))) and held[0] == text:
            return held[1]
        agreed = parse(tomllib.loads(text), str(where))
        _loaded[str(where)] = (text, agreed)
        return agreed
    except tomllib.TOMLDecodeError as fault:
        raise AccordError(f'accord "{where}" is not TOML: {fault}. Mend that line.') from None
    except UnicodeDecodeError:
        raise AccordError(f'accord "{where}" is not UTF-8 text. Save it as UTF-8.') from None
    except OSError as fault:
        raise AccordError(
            f'accord "{where}" cannot be read: {fault.strerror}. Give a file that can.'
        ) from None


def parse(data: dict[str, Any], where: str = "accord") -> Accord:
    """Validate an accord that was already read into a dict.

    Raises:
        AccordError: as `load`.
    """
    try:
        return Accord.model_validate(data)
    except ValidationError as faults:
        found = lines(faults, data, Accord, "the accord", 'the bundled accord "heart" explains it')
        raise AccordError("\n".join(f"{where}: {line}" for line in found)) from None
