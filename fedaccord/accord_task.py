"""The accord's [task]: a task by its name, or how to read the user's own table, images or texts."""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import pairwise
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedaccord.accord_section import Name, Options, Section, known
from fedaccord.faults import Fault, toml

KINDS = ("table", "images", "text")
MISSING = ("", "NA", "NaN", "nan", "null")
FORMATS = (".csv", ".parquet")


class TaskSection(Section):
    """[task]: the records, by name in the registry."""

    name: Annotated[str, known("task")]
    options: Options = Field(default={})


def _inside(text: str) -> str:
    """Hold a path to below the folder that it is looked up in, on any operating system."""
    parts = PurePosixPath(text).parts
    if not parts or "\\" in text or PureWindowsPath(text).drive or parts[0] == "/" or ".." in parts:
        raise Fault(
            f"task: the path {toml(text)} must lead down from the folder of the data, with / "
            "between names, and may not be absolute or hold .. in it. Change it."
        )
    return text


def _records_file(text: str) -> str:
    if PurePosixPath(text).suffix.lower() not in FORMATS:
        raise Fault(f"task: the file {toml(text)} must end in {' or '.join(FORMATS)}. Convert it.")
    return text


def _words(values: Any) -> Any:
    """Write whole numbers among declared values as the text that a file has."""
    if not isinstance(values, list):
        return values
    return [str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]


def _distinct(values: list[str]) -> list[str]:
    if len(set(values)) != len(values):
        raise Fault(f"task: {toml(values)} names one twice. Name each once.")
    if any(value != value.strip() for value in values):
        raise Fault(f"task: {toml(values)} has spaces around a value. Remove them.")
    return values


def _rising(bounds: list[float]) -> list[float]:
    if not all(low < high for low, high in pairwise(bounds)):
        raise Fault(f"task: bands = {toml(bounds)} must rise. Put them in order, each once.")
    return bounds


Column = Annotated[str, Field(min_length=1, max_length=200)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Relative = Annotated[str, Field(max_length=500), AfterValidator(_inside)]
Values = Annotated[
    list[str], Field(min_length=1, max_length=10_000), AfterValidator(_distinct),
    BeforeValidator(_words),
]  # fmt: skip
Bands = Annotated[list[float], Field(min_length=1, max_length=100), AfterValidator(_rising)]


class Grouping(Section):
    """What a cell is counted as: one of the declared values, or a band of a number."""

    column: Column
    values: Values | None = None
    bands: Bands | None = None

    def _named(self, key: str, names: list[str] | None) -> None:
        """Hold the names of classes or groups to the values or bands that they stand for."""
        if self.values is not None and self.bands is not None:
            raise Fault(
                f'task: column "{self.column}" has both values and bands. Keep one of them.'
            )
        stands = len(self.values or []) if self.bands is None else len(self.bands) + 1
        if names is not None and stands and len(names) != stands:
            raise Fault(
                f"task: {key} = {toml(names)} names {len(names)}, and column "
                f'"{self.column}" has {stands} {"values" if self.bands is None else "bands"}. '
                "Name each."
            )


class LabelSection(Grouping):
    """[task.label]: what is predicted; a value of the file is a class's name unless said."""

    classes: Annotated[Values, Field(min_length=2)]

    @model_validator(mode="after")
    def _class_each(self) -> LabelSection:
        self._named("label.classes", self.classes)
        return self


class AttributeSection(Grouping):
    """One of [task.attributes]: who is in which group of a sensitive attribute.

    `missing` names the group of those whose cell is empty; without it they are left out.
    """

    groups: Values | None = None
    missing: str | None = Field(default=None, min_length=1, max_length=100)

    @model_validator(mode="after")
    def _group_each(self) -> AttributeSection:
        if self.values is None and self.bands is None:
            raise Fault(f'task: attribute "{self.column}" needs values or bands. Declare them.')
        self._named("attributes.groups", self.groups)
        if len(set(self.names)) != len(self.names):
            raise Fault(f"task: groups {toml(list(self.names))} names one twice. Rename it.")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, in order; a band by its bounds."""
        names = list(self.groups or self.values or [])
        if self.bands is not None and self.groups is None:
            ends = [f"{bound:g}" for bound in self.bands]
            between = [f"{low} to below {high}" for low, high in pairwise(ends)]
            names = [f"below {ends[0]}", *between, f"{ends[-1]} and above"]
        return (*names, *([self.missing] if self.missing else []))


def _attributes(given: Any) -> Any:
    """Write the short forms out: sex = ["female", "male"], and a column of the attribute's name."""
    if not isinstance(given, dict):
        return given
    tables = {name: {"values": it} if isinstance(it, list) else it for name, it in given.items()}
    return {
        name: {"column": name} | table if isinstance(table, dict) else table
        for name, table in tables.items()
    }


class InputSection(Section):
    """One of [task.inputs]: a number between declared bounds, or one of the declared values."""

    kind: Literal["number", "category"]
    min: float | None = None
    max: float | None = None
    log: bool = False
    values: Values | None = None
    missing: bool = True

    @model_validator(mode="before")
    @classmethod
    def _kind_by_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "kind" in given:
            return given
        return {"kind": "category" if "values" in given else "number"} | given

    @model_validator(mode="after")
    def _bounded(self) -> InputSection:
        if self.kind == "category":
            if self.values is None or self.min is not None or self.max is not None or self.log:
                raise Fault("task.inputs: a category has values, and no min, max or log. Mend it.")
            return self
        if self.values is not None or self.min is None or self.max is None:
            raise Fault("task.inputs: a number has min and max, and no values. Declare them.")
        if not self.min < self.max or not math.isfinite(self.max - self.min):
            raise Fault(
                f"task.inputs: min = {self.min:g} must be below max = {self.max:g}. Change one."
            )
        if self.log and self.min <= 0:
            raise Fault(f"task.inputs: log needs min = {self.min:g} to be above 0. Raise it.")
        return self


class OwnSection(Section):
    """What every kind of own data declares; `dataset` names it in policies and ledgers."""

    dataset: Name
    file: Annotated[Relative, AfterValidator(_records_file)]
    delimiter: Literal[",", ";", "|", "\t"] = ","
    site_column: Column | None = None
    subject: Column | None = None
    label: LabelSection
    attributes: Annotated[dict[Column, AttributeSection], BeforeValidator(_attributes)] = Field(
        min_length=1
    )
    split: Column | None = None
    test_share: float = Field(default=0.25, gt=0, lt=1)
    missing_values: list[str] = Field(default=list(MISSING))
    source: str = Field(default="the sites' own records, not published", max_length=500)
    licence: str = Field(default="not for publication", max_length=200)
    public_file: Annotated[Relative, AfterValidator(_records_file)] | None = None
    public_sha256: Hash | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> OwnSection:
        if "{" in self.file.replace("{site}", ""):
            raise Fault(f"task.file = {toml(self.file)} may hold {{site}} alone. Rename it.")
        if ("{site}" in self.file) == (self.site_column is not None):
            raise Fault(
                "task: either task.file has {site} in it, or task.site_column names the column "
                "that says whose a record is. Give exactly one of them."
            )
        if (self.public_file is None) != (self.public_sha256 is None):
            raise Fault(
                "task: public_file and public_sha256 go together, so that both ends draw from the "
                "same public records. Give both or none."
            )
        if self.split is not None and self.test_share != 0.25:
            raise Fault(
                f"task.test_share = {self.test_share:g} has no meaning beside task.split. "
                "Remove one of them."
            )
        taken = [self.subject, self.site_column, self.split, self.label.column]
        for column in self.input_columns:
            if column in taken:
                raise Fault(
                    f'task: column "{column}" is an input and also the subject, site, split or '
                    "label, which a model may not see. Remove it from the inputs."
                )
        given = [column for column in taken if column is not None]
        if len(set(given)) != len(given):
            raise Fault(f"task: of {toml(given)} two are one column. Give each its own.")
        return self

    @property
    def name(self) -> str:
        """The data set's name, which policies, ledgers and reports call the task by."""
        return self.dataset

    @property
    @abstractmethod
    def input_columns(self) -> tuple[str, ...]:
        """The columns that a record's inputs are made of, in order."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every declared column of a file of records, each once."""
        others = [self.site_column, self.subject, self.split, self.label.column]
        others += [group.column for group in self.attributes.values()]
        return tuple(dict.fromkeys([*self.input_columns, *(name for name in others if name)]))


class TableSection(OwnSection):
    """[task] with kind = "table": rows of numbers and categories."""

    kind: Literal["table"]
    inputs: dict[Column, InputSection] = Field(min_length=1)
    outside: Literal["refuse", "clip"] = "refuse"

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Columns by name: the order of an accord's keys has no part in its digest."""
        return tuple(sorted(self.inputs))


class ImagesSection(OwnSection):
    """[task] with kind = "images": a list of image files, their paths beside it."""

    kind: Literal["images"]
    path: Column = "path"
    size: list[Annotated[int, Field(ge=1, le=4096)]] = Field(min_length=2, max_length=2)
    channels: Literal[1, 3] = 1
    fit: Literal["stretch", "crop"] = "stretch"

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The column of paths."""
        return (self.path,)


class TextSection(OwnSection):
    """[task] with kind = "text": a column of text, cut into tokens."""

    kind: Literal["text"]
    text: Column = "text"
    length: int = Field(ge=2, le=8192)
    tokenizer: Annotated[Relative, Field(min_length=1)] = "words"
    sha256: Hash | None = None
    vocabulary: int = Field(default=8192, ge=16, le=2**20)

    @model_validator(mode="after")
    def _by_hash(self) -> TextSection:
        if (self.tokenizer == "words") != (self.sha256 is None):
            raise Fault(
                f"task.tokenizer = {toml(self.tokenizer)}: task.sha256, of its tokenizer.json, "
                'goes with every tokenizer but "words". Add or remove it.'
            )
        if self.tokenizer != "words" and self.vocabulary != 8192:
            raise Fault(
                f"task.vocabulary = {self.vocabulary} belongs to the tokenizer "
                '"words"; another has its own. Remove it.'
            )
        return self

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The column of text."""
        return (self.text,)


_BY_KIND: dict[str, type[OwnSection]] = {
    "table": TableSection,
    "images": ImagesSection,
    "text": TextSection,
}


def _section(given: Any) -> Any:
    """Take a [task] for what its `kind` says, so that its faults are those of one kind."""
    if not isinstance(given, dict) or "kind" not in given:
        if isinstance(given, dict) and "name" not in given and "dataset" in given:
            raise Fault(
                f"task.kind is missing: one of {', '.join(KINDS)}, for data of your own. Add it."
            )
        return given if isinstance(given, Section) else TaskSection.model_validate(given)
    if "name" in given:
        raise Fault(
            "task: name is a task that FedAccord knows, kind is for data of your own. "
            "Keep one of them."
        )
    kind = given["kind"]
    if not isinstance(kind, str) or kind not in _BY_KIND:
        raise Fault(f"task.kind = {toml(kind)} must be one of {', '.join(KINDS)}. Change it.")
    return _BY_KIND[kind].model_validate(given)


AnyTask = Annotated[
    TaskSection | TableSection | ImagesSection | TextSection, BeforeValidator(_section)
]
