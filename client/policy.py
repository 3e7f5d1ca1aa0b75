"""A site's policy: its own file of what it will take part in; it refuses before data is touched."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedaccord.accord import Accord
from fedaccord.errors import AccordError, BudgetError
from fedaccord.evidence import write_atomic
from fedaccord.privacy.ledger import Cap


class SitePolicy(BaseModel):
    """What a site accepts.

    Attributes:
        max_epsilon: cap on epsilon per subject over all accords that the site joins; `inf` lets
            plain training pass as well.
        delta: at which the cap is stated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=0.1)

    @property
    def cap(self) -> Cap:
        """The cap as the ledger takes it."""
        return Cap(self.max_epsilon, self.delta)

    def check(self, accord: Accord, site: str) -> None:
        """Refuse an accord that the policy rules out, by its text alone.

        Raises:
            BudgetError: privacy is off although the site has a cap, or another delta is used.
        """
        if not accord.privacy.enabled and not math.isinf(self.max_epsilon):
            raise BudgetError(
                f"This plan needs epsilon infinite (privacy.enabled = false); site {site} has a "
                f"cap of {self.max_epsilon:.2f}. Switch privacy on, or use sites without a cap."
            )
        if accord.privacy.enabled and accord.privacy.delta > self.delta:
            raise BudgetError(
                f"privacy.delta = {accord.privacy.delta:g} is above {self.delta:g}, the delta of "
                f"site {site}'s cap. Lower privacy.delta or ask the site."
            )


def of_site(folder: Path, accord: Accord) -> SitePolicy:
    """Read a site's policy; a simulated site without one takes the accord's cap as its own.

    The file is written once and kept: a later accord cannot raise the cap, only the site can.

    Raises:
        AccordError: a policy.toml that is not valid.
    """
    path = folder / "policy.toml"
    if not path.exists():
        cap = accord.privacy.max_epsilon if accord.privacy.enabled else math.inf
        write_atomic(
            path,
            "# What this site takes part in; the site's own, no accord can change it.\n"
            f"max_epsilon = {cap}  # cap on epsilon per subject, over all accords\n"
            f"delta = {accord.privacy.delta}  # at which the cap is stated\n",
        )
    try:
        return SitePolicy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as faults:
        first = faults.errors()[0]
        where, what = ".".join(map(str, first["loc"])), f"{first['input']!r}: {first['msg']}"
        raise AccordError(f"{path}: {where} = {what}. Mend it; nothing was released.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise AccordError(f"{path}: {fault}. Mend it; nothing was released.") from None
