"""What every table of an accord shares: strict keys, names, and options that are free."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from fedaccord import registry
from fedaccord.errors import AccordError
from fedaccord.faults import toml


class Section(BaseModel):
    """A table of the accord: no unknown key, no silent conversion, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def known(kind: str) -> AfterValidator:
    """Make a check that a name is in the registry."""

    def check(name: str) -> str:
        try:
            return registry.check(kind, name)
        except AccordError as fault:
            raise ValueError(str(fault)) from None

    return AfterValidator(check)


def _option(value: Any) -> Any:
    """Let through what an option may be; a union of types would give one fault for each."""
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(
        f"{toml(value)} must be a finite number, true, false or a string in quotes. "
        "Change it in the accord."
    )


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Options = dict[str, Annotated[int | float | bool | str, PlainValidator(_option)]]
