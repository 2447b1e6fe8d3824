"""What is wrong with a value of a TrainerConfig, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lightning_trainer.engine.config.suggest import did_you_mean, nearest
from lightning_trainer.types import InputError

WAYS_OUT = {
    "environment.optimizer_type": {
        "paged_adamw_8bit": "; take adamw_8bit",
        "paged_adamw_32bit": "; take adamw_8bit, or adamw",
        "paged_adamw": "; take adamw_8bit, or adamw",
    },
}
"""What to take instead of values of earlier versions."""


def in_words(error: ValidationError, model: type[BaseModel]) -> InputError:
    """One line per fault, with the dotted key, what was expected, what was found and the nearest valid name."""
    faults = [_fault(model, fault) for fault in error.errors()]
    return InputError("\n".join(text for _, text in faults), key=faults[0][0])


def unknown_name(model: type[BaseModel], name: str) -> InputError:
    """A name that is no field of the section, or one that cannot be assigned."""
    dotted = _dotted(model, [name])
    if name in model.model_computed_fields:
        return InputError(f"{dotted}: is derived from the other fields and cannot be set", key=dotted)
    return InputError(f"{dotted}: no such field{_near(model, name)}", key=dotted)


def _fault(model: type[BaseModel], fault: Any) -> tuple[str, str]:
    """Dotted key, and the line that names it."""
    place = [str(part) for part in fault["loc"]]
    dotted = _dotted(model, place)
    inner = (fault.get("ctx") or {}).get("error")
    if isinstance(inner, InputError) and inner.key is not None:  # a section's own, with its keys
        return inner.key, str(inner)
    return dotted, f"{dotted}: {_problem(model, place, fault)}"


def _problem(model: type[BaseModel], place: list[str], fault: Any) -> str:
    if fault["type"] in ("extra_forbidden", "no_such_attribute"):
        return f"no such field{_near(_section(model, place[:-1]), place[-1])}"
    if fault["type"] == "missing":
        return "is required and missing"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if fault["type"] in ("string_too_short", "too_short"):
        return "must not be empty"
    return f"{_expected(fault)}, not {fault['input']!r}{_way_out(_dotted(model, place), fault)}"


def _dotted(model: type[BaseModel], place: Iterable[str]) -> str:
    return ".".join(part for part in [getattr(model, "key", ""), *place] if part)


def _expected(fault: Any) -> str:
    context = fault.get("ctx") or {}
    limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, words in limits.items():
        if name in context:
            return f"must be {words} {context[name]:g}"
    if "expected" in context:
        return f"must be {context['expected']}"
    return str(fault["msg"]).replace("Input should be", "must be")


def _way_out(dotted: str, fault: Any) -> str:
    value, choices = fault["input"], str((fault.get("ctx") or {}).get("expected", ""))
    known = WAYS_OUT.get(dotted, {}).get(str(value))
    return known or did_you_mean(nearest(str(value), choices.replace("'", "").replace(" or ", ", ").split(", ")))


def _section(model: type[BaseModel], place: Iterable[str]) -> type[BaseModel]:
    for name in place:
        field = model.model_fields.get(name)
        inner = field.annotation if field is not None else None
        candidates = [inner, *get_args(inner)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


def _near(model: type[BaseModel], name: str) -> str:
    near = [_dotted(model, [found]) for found in nearest(name, model.model_fields)]
    return did_you_mean(near or _elsewhere(model, name)) or f"; valid here: {', '.join(model.model_fields)}"


def _elsewhere(model: type[BaseModel], name: str) -> list[str]:
    """The field most like this name in another section."""
    base: Any = model.__base__
    homes: dict[str, str] = {
        field: _dotted(cls, [field]) for cls in base.__subclasses__() for field in cls.model_fields
    }
    return [homes[found] for found in nearest(name, homes)]
