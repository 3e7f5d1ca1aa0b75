"""What is wrong with a TOML file, one line a fault: parameter, value, bound, remedy."""

from __future__ import annotations

import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedaccord import registry

_BOUNDS = {
    "greater_than": ("must be greater than", "gt", "Raise it."),
    "greater_than_equal": ("must be at least", "ge", "Raise it."),
    "less_than": ("must be less than", "lt", "Lower it."),
    "less_than_equal": ("must be at most", "le", "Lower it."),
}
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string in quotes",
    "list_type": "a list in [ ]",
    "dict_type": "a table",
    "model_type": "a table",
    "date_type": "a date without quotes, like 2030-12-31",
}


class Fault(ValueError):
    """A fault with its own full sentence, which pydantic collects with the others."""


def lines(
    faults: ValidationError,
    data: dict[str, Any],
    model: type[BaseModel],
    file: str,
    example: str,
) -> list[str]:
    """Say each fault that pydantic found in one line; a misspelt key is not missing as well.

    Args:
        faults: what pydantic found.
        data: what was validated.
        model: what it was validated as, for the hint on a misspelt key.
        file: what to change: "the accord".
        example: where a missing key is explained, as a clause.
    """
    found = faults.errors()
    meant = {_meant(fault, model, data) for fault in found} - {()}
    return [
        _sentence(fault, data, model, file, example)
        for fault in found
        if tuple(fault["loc"]) not in meant
    ]


def toml(value: Any) -> str:
    """Write a value about as TOML has it, on one line and not too long."""
    text = json.dumps(value, ensure_ascii=False, default=str).replace("NaN", "nan")
    text = text.replace("Infinity", "inf")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields(path: list[str], model: Any, data: Any) -> list[str]:
    """Names that stand in the table at a path, for the hint on a misspelt key."""
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        inner = [
            found
            for found in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(found, type) and issubclass(found, BaseModel)
        ]
        model = _of_kind(inner, data) if inner else model
    return list(model.model_fields)


def _of_kind(models: list[type[BaseModel]], data: Any) -> type[BaseModel]:
    """Choose, of the tables that may stand at a place, the one that the key `kind` says."""
    kind = data.get("kind") if isinstance(data, dict) else None
    for model in models:
        field = model.model_fields.get("kind")
        if kind in (get_args(field.annotation) if field else (None,)):
            return model
    return models[0]


def _meant(fault: Any, model: Any, data: Any) -> tuple[str | int, ...]:
    """Where a misspelt key probably belongs; () for any other fault."""
    if fault["type"] != "extra_forbidden":
        return ()
    *table, key = fault["loc"]
    known = _fields([part for part in table if isinstance(part, str)], model, data)
    return (*table, *difflib.get_close_matches(str(key), known, n=1, cutoff=0.5))


def _where(loc: tuple[str | int, ...], data: dict[str, Any]) -> str:
    """Write the place of a fault: "rounds.timeout", "sites[va].subjects"."""
    words, here = "", data
    for part in loc:
        here = here[part] if isinstance(part, int) or part in here else {}  # type: ignore[index]
        if isinstance(part, int):
            name = here.get("name") if isinstance(here, dict) and loc[-1] != "name" else None
            words += f"[{name}]" if isinstance(name, str) else f"[number {part + 1}]"
        else:
            words += ("." if words else "") + json.dumps(part, ensure_ascii=False)[1:-1]
    return words


def _sentence(fault: Any, data: dict[str, Any], model: Any, file: str, example: str) -> str:
    """Say one fault of pydantic's in one line: parameter, value, bound, remedy."""
    where, kind, context = _where(fault["loc"], data), fault["type"], fault.get("ctx", {})
    given = f"{where} = {toml(fault['input'])}"
    if kind == "extra_forbidden":
        *table, key = fault["loc"]
        known = _fields([part for part in table if isinstance(part, str)], model, data)
        hint = registry.nearest(str(key), known)
        return f'key "{where}" is not known.{hint} Known here: {", ".join(known)}.'
    if kind == "missing":
        return f'key "{where}" is missing. Add it; {example}.'
    if kind == "value_error":
        fault_itself = context["error"]
        return str(fault_itself) if isinstance(fault_itself, Fault) else f"{where}: {fault_itself}"
    if kind in _BOUNDS:
        words, key, remedy = _BOUNDS[kind]
        return f"{given} {words} {context[key]:.15g}. {remedy}"
    if kind in _TYPES:
        return f"{given} must be {_TYPES[kind]}. Change it in {file}."
    if kind == "string_pattern_mismatch" and "a-f" in context["pattern"]:
        return f"{given} must be a SHA-256: 64 characters of 0-9 and a-f. Copy it whole."
    if kind == "string_pattern_mismatch":
        return (
            f"{given} must be lower-case letters, digits and hyphens, at most 32, and start with "
            "a letter. Rename it."
        )
    if kind in ("string_too_short", "too_short"):
        return f"{given} must not be empty. Fill it in."
    if kind == "string_too_long":
        length, bound = len(fault["input"]), context["max_length"]
        return f"{given} has {length} characters, at most {bound} fit. Shorten it."
    message = fault["msg"].removeprefix("Input should be ").replace("'", '"')
    return f"{given} must be {message}. Change it in {file}."
