"""The task `adult`: who earned over 50,000 dollars a year, by kind of employer, USA 1994.

The records are public (`fedaccord data fetch adult`) and are treated as private here: inputs come
from bounds and values declared below, and from no statistic of the records.
"""

from __future__ import annotations

import gzip
from functools import cache

import numpy as np
import numpy.typing as npt

from fedaccord import data
from fedaccord.errors import TaskError
from fedaccord.simulations import declared
from fedaccord.simulations.declared import Choice, Number, Schema
from fedaccord.tasks import Records, SiteData, TaskSpec

HEADER = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
    "income",
)
# A site is a kind of employer. Small kinds are merged: 14 who worked without pay are counted among
# the self-employed, 7 who never worked among those whose employer is not known.
EMPLOYERS = {
    "private": ("Private",),
    "self-employed": ("Self-emp-inc", "Self-emp-not-inc", "Without-pay"),
    "local-gov": ("Local-gov",),
    "state-gov": ("State-gov",),
    "federal-gov": ("Federal-gov",),
    "unknown": ("?", "Never-worked"),
}
SITES = tuple(EMPLOYERS)
SEXES = ("Female", "Male")
RACES = ("White", "Black", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other")

# Inputs: what the form allows. Years of education are the form's own steps; ages and hours are cut
# where working life, part time and overtime begin.
SCHEMA: Schema = {
    "age": Number(17, 90, cuts=(25, 35, 45, 55, 65)),
    "education-num": Number(1, 16, cuts=(9, 10, 13, 14)),
    "hours-per-week": Number(1, 99, cuts=(20, 35, 40, 41, 50, 60)),
    "capital-gain": Number(0, 99_999, "signed-log", unit=100, cuts=(1, 5_000, 10_000)),
    "capital-loss": Number(0, 5_000, "signed-log", unit=100, cuts=(1, 1_500, 2_000)),
    "marital-status": Choice(
        (
            "Married-civ-spouse",
            "Never-married",
            "Divorced",
            "Separated",
            "Widowed",
            "Married-spouse-absent",
            "Married-AF-spouse",
        )
    ),
    "occupation": Choice(
        (
            "Prof-specialty",
            "Craft-repair",
            "Exec-managerial",
            "Adm-clerical",
            "Sales",
            "Other-service",
            "Machine-op-inspct",
            "Transport-moving",
            "Handlers-cleaners",
            "Farming-fishing",
            "Tech-support",
            "Protective-serv",
            "Priv-house-serv",
            "Armed-Forces",
        ),
        missing=True,
    ),
}


def columns_of(raw: dict[str, npt.NDArray[np.str_]]) -> dict[str, declared.Column]:
    """Turn the file's columns of text into the columns of the schema."""
    columns: dict[str, declared.Column] = {}
    for name, kind in SCHEMA.items():
        texts = np.where(raw[name] == "?", "", raw[name])
        columns[name] = declared.numbers(texts) if isinstance(kind, Number) else texts
    return columns


@cache
def _sites() -> dict[str, Records]:
    """Read the fetched file once, and deal its people out to the kinds of employer."""
    raw = declared.read_csv(gzip.decompress(data.read("adult")), HEADER)
    records = Records(
        inputs=declared.encode(SCHEMA, columns_of(raw), "adult"),
        labels=declared.index(raw["income"], ("<=50K", ">50K"), "adult.income"),
        subjects=np.arange(len(raw["income"])),
        groups={
            "sex": declared.index(raw["sex"], SEXES, "adult.sex"),
            "race": declared.index(raw["race"], RACES, "adult.race"),
        },
    )
    return {
        site: declared.rows_of(records, np.isin(raw["workclass"], kinds))
        for site, kinds in EMPLOYERS.items()
    }


class Adult:
    """Six kinds of employer, 32,561 people; the label is an income above 50,000 dollars a year.

    The file names nobody, so each row is taken for a person. Sex, race, country of birth and
    relationship ("husband", "wife") are no inputs; sex and race are audited. The survey's weight of
    a row is not used.
    """

    sites = SITES
    needs = ("adult",)
    spec = TaskSpec(
        name="adult",
        features=declared.names(SCHEMA),
        classes=("up to 50K", "above 50K"),
        attributes={
            "sex": tuple(sex.lower() for sex in SEXES),
            "race": tuple(race.lower() for race in RACES),
        },
        source=(
            "Adult (Barry Becker and Ronny Kohavi, 1996; UCI, doi 10.24432/C5XW20, CC BY 4.0), its "
            "training part, read from the package hypernets 0.3.2 (Apache-2.0)."
        ),
    )

    def site(self, name: str) -> SiteData:
        """Read an employer's people: two in three to train on, one in three to evaluate on.

        The split depends on the SHA-256 of each row's number alone.

        Raises:
            TaskError: an unknown site, data that was not fetched or is not the declared file.
        """
        if name not in SITES:
            raise TaskError(f'adult: site "{name}" is not one of {", ".join(SITES)}. Rename it.')
        records = _sites()[name]
        test = declared.held_out(records.subjects, "adult")
        return SiteData(declared.rows_of(records, ~test), declared.rows_of(records, test))

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy people from the declared bounds, cut-points and values."""
        drawn = declared.draw(SCHEMA, rows, np.random.default_rng([seed, 0xAD1]))
        return declared.encode(SCHEMA, drawn, "adult")
