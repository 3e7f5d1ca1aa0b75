"""A site's policy: its own file of what it will take part in; it refuses before data is touched."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedaccord.accord import Accord
from fedaccord.client.policy_rules import KINDS, RULES, Asked, Release
from fedaccord.errors import AccordError, PolicyError
from fedaccord.faults import Fault, lines, toml

if TYPE_CHECKING:
    from fedaccord.privacy.budget import Cap

FILE = "policy.toml"
Unit = Literal["subject", "client"]
_HOURS = re.compile(r"([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)")


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise Fault(
            f"{toml(text)} is no digest of an accord (64 characters of 0-9 and a-f). Copy the one "
            "that `fedaccord check` prints."
        )
    return text


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{toml(text)} is empty. Fill it in, or leave the key out.")
    return text


Digest = Annotated[str, AfterValidator(_digest)]
NonEmpty = Annotated[str, AfterValidator(_name)]


class Table(BaseModel):
    """A table of the policy: no unknown key, no silent conversion, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AccordCap(Table):
    """[accords.<digest>]: what holds for one accord, besides what holds for all."""

    max_epsilon: float = Field(gt=0, description="cap on epsilon per subject over its runs")


class SitePolicy(Table):
    """What a site takes part in, and until when; whatever it does not allow is refused.

    A key that is left out has the value that refuses most (see docs/policy.md); only the cap has
    none and must be written. Each field's description is what the file says of it.
    """

    approved: list[Digest] = Field(
        default=[], description="digests of the accords that this site takes part in; no others"
    )
    max_epsilon: float = Field(
        gt=0,
        allow_inf_nan=True,
        description="cap on epsilon per subject, over all accords; inf allows training without "
        "privacy",
    )
    delta: float = Field(
        gt=0, lt=0.1, description="at which the cap is stated; an accord's may not be higher"
    )
    units: list[Unit] = Field(
        default=["subject"],
        description='whom the noise may protect: "subject" (added here), "client" (added by the '
        "coordinator, which sees this site's un-noised update)",
    )
    min_noise_multiplier: float = Field(
        default=1.0, ge=0, description="least noise: its stddev over what one subject can add"
    )
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        description="highest L2 bound of one subject's gradient, which the accord sets",
    )
    min_subjects: int = Field(
        default=50, ge=1, description="fewest training subjects that the accord declares here"
    )
    min_records: int = Field(
        default=50, ge=1, description="fewest training records that the accord declares here"
    )
    models: list[NonEmpty] = Field(
        default=[], description="names of the models that may be trained or evaluated here"
    )
    max_parameters: int = Field(
        default=1_000_000, ge=1, description="most weights of the model that is trained"
    )
    releases: list[Release] = Field(
        default=[],
        description='what may leave: "weights" (covered by the plan), "group counts" (exact, '
        'not covered); an accord needs both, and "training loss" (not covered) where it says so',
    )
    min_cell: int = Field(
        default=10, ge=1, description="fewest subjects that a group needs for a figure"
    )
    hours: str = Field(
        default="00:00-24:00", description="when it trains and evaluates; may pass midnight"
    )
    timezone: str = Field(default="UTC", description='of hours and expires: "Europe/Berlin"')
    expires: date | None = Field(default=None, description="last day on which it takes part")
    disjoint: list[list[NonEmpty]] = Field(
        default=[],
        description="groups of tasks; tasks of two different groups share no subject, so their "
        "budgets are apart",
    )
    second_head: NonEmpty = Field(
        description="file, as seen from this folder, that keeps the ledger's last head; best on "
        "another disk"
    )
    accords: dict[Digest, AccordCap] = Field(
        default={}, description="caps of single accords, each in a table [accords.<digest>]"
    )

    @field_validator("hours")
    @classmethod
    def _open_at_some_time(cls, hours: str) -> str:
        start, _, end = hours.partition("-")
        if not _HOURS.fullmatch(hours) or start == end:
            raise Fault(
                f'hours = {toml(hours)} must be two different times of day like "20:00-06:00"; '
                'all day is "00:00-24:00". Change it.'
            )
        return hours

    @field_validator("timezone")
    @classmethod
    def _on_the_map(cls, name: str) -> str:
        try:
            zone(name)
        except (KeyError, ValueError, OSError):
            raise Fault(
                f'timezone = {toml(name)} is no time zone of this machine. Write one like "UTC" '
                'or "Europe/Berlin".'
            ) from None
        return name

    @classmethod
    def read(cls, path: Path) -> SitePolicy:
        """Read a site's own file; nothing is written.

        Raises:
            PolicyError: a file that is missing, cannot be read or is not valid, under the rule
                "policy.toml"; one line a fault.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise PolicyError(
                FILE,
                f"{path} is missing, and a site without a policy takes part in nothing. Make one "
                f"with `fedaccord site approve ACCORD --site {path.parent}`.",
            ) from None
        except tomllib.TOMLDecodeError as fault:
            raise _unreadable(path, f"is not TOML: {fault}. Mend that line") from None
        except UnicodeDecodeError:
            raise _unreadable(path, "is not UTF-8 text. Save it as UTF-8") from None
        except OSError as fault:
            raise _unreadable(path, f"cannot be read: {fault.strerror}. Mend it") from None
        try:
            return cls.model_validate({"second_head": second_head(path.parent)} | data)
        except ValidationError as faults:
            found = lines(faults, data, cls, FILE, "docs/policy.md explains it")
            said = "\n".join(f"{path}: {line} Nothing was released." for line in found)
            raise PolicyError(FILE, said) from None

    @property
    def cap(self) -> Cap:
        """The cap over all accords, as the ledger takes it."""
        from fedaccord.privacy.budget import Cap

        return Cap(self.max_epsilon, self.delta)

    def cap_for(self, accord: Accord) -> Cap | None:
        """Return the cap on all runs of one accord, or None if the policy has none."""
        from fedaccord.privacy.budget import Cap

        own = self.accords.get(accord.digest)
        return Cap(own.max_epsilon, self.delta) if own else None

    def broken(
        self,
        accord: Accord,
        site: str,
        *,
        kind: str,
        parameters: int | Callable[[], int],
        now: datetime,
    ) -> dict[str, str]:
        """Return every rule that an accord or the moment breaks, with a sentence that says how.

        What is said depends on accord, policy, clock and declared sizes alone, never on records.
        What the ledger still holds of the caps is the ledger's to say.

        | message | rules |
        |---|---|
        | "join", "reserve" | all but `hours`, so that a site can be asked at any time |
        | "train", "evaluate" | all |

        Args:
            accord: what was agreed.
            site: this site's name in it.
            kind: of the message: "join", "reserve", "train" or "evaluate".
            parameters: how many weights the accord's model has, or what counts them.
            now: the time, with its time zone.

        Raises:
            AccordError: a site that is not in the accord's roster.
            ValueError: a time without a time zone, or another kind of message.
        """
        sentences = self._sentences(accord, site, kind, parameters, now)
        return {rule: words for rule, words in sentences if words}

    def check(
        self,
        accord: Accord,
        site: str,
        *,
        kind: str,
        parameters: int | Callable[[], int],
        now: datetime,
    ) -> None:
        """Refuse what the policy rules out, before any record is read (see `broken`).

        The rules after the first one that is broken are not looked at, so that the model of an
        accord that is not approved need not be built.

        Raises:
            PolicyError: the first rule that is broken; `rule` names it.
            AccordError: as `broken`.
        """
        for rule, words in self._sentences(accord, site, kind, parameters, now):
            if words:
                raise PolicyError(rule, f"Site {site} refuses by its rule {rule}: {words}")

    def _sentences(
        self,
        accord: Accord,
        site: str,
        kind: str,
        parameters: int | Callable[[], int],
        now: datetime,
    ) -> Iterator[tuple[str, str]]:
        """Yield each rule with how it is broken, "" where it is not."""
        if now.tzinfo is None or kind not in KINDS:
            raise ValueError(f"policy: kind {kind!r} at {now!r}: unknown kind, or no time zone.")
        here = [section for section in accord.sites if section.name == site]
        if not here:
            raise AccordError(
                f'site "{site}" is not among the sites of accord "{accord.name}" '
                f"({', '.join(accord.roster)}). Give the site's name in the accord."
            )
        asked = Asked(self, accord, here[0], kind, parameters, now.astimezone(zone(self.timezone)))
        return ((rule, sentence(asked)) for rule, sentence in RULES.items())


def _unreadable(path: Path, words: str) -> PolicyError:
    return PolicyError(FILE, f"{path} {words}; nothing was released.")


def zone(name: str) -> tzinfo:
    """Return a time zone by name; UTC needs no data of the operating system."""
    return UTC if name == "UTC" else ZoneInfo(name)


def second_head(folder: Path) -> str:
    """Say where a ledger's head is kept if the policy does not say it."""
    return f"../heads/{folder.resolve().name}.json"


def of_site(folder: Path, accord: Accord) -> SitePolicy:
    """Read the policy of a simulated site; one without a policy first writes it for this accord.

    The file is written once and kept: a later accord is refused until the site approves it.

    Raises:
        PolicyError: a policy.toml that is not valid.
    """
    path = folder / FILE
    if not path.exists():
        from fedaccord.client import policy_file

        policy_file.write_simulated(path, accord)
    return SitePolicy.read(path)
