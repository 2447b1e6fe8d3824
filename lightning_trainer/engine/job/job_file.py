"""Jobs as JSON files: the nested form, and the flat one of the earliest versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_trainer.engine.config.suggest import did_you_mean, nearest
from lightning_trainer.engine.job.retired import RETIRED
from lightning_trainer.engine.job.sections import Section
from lightning_trainer.engine.job.trainer_config import TrainerConfig
from lightning_trainer.types import InputError

FLAT_NAMES = {
    "epochs": "hyperparams.num_epochs",
    "gradient_accumulation_steps": "hyperparams.gradient_accumulation",
    "lr": "hyperparams.learning_rate",
    "precision": "hyperparams.fp_precision",
    "current_model_dir": "model.model_path",
    "model": "model.model_path",
    "model_name": "model.model_path",
    "tokenizer": "model.tokenizer_path",
    "dataset": "data.dataset_path",
    "validation_dataset": "data.validation_dataset_path",
    "eval_max_tokens": "monitoring.max_eval_tokens",
    "system_prompt": "profile.system_prompt_template",
    "profile": "profile.name",
    "profile_options": "profile.options",
    "num_workers": "environment.dataloader_num_workers",
    "optimizer": "environment.optimizer_type",
}
"""Names of the flat form that are not the field's own."""

SECTIONS = {cls.key: cls for cls in Section.__subclasses__() if cls.key}


def read_job(path: str | Path) -> dict[str, Any]:
    """The nested values of a job's JSON file.

    Raises:
        InputError: No such file, no JSON, no object, or a name that is none of ours.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise InputError(f"{path}: not a job's JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a job is a JSON object, not {type(values).__name__}")
    try:
        return nested(values)
    except InputError as error:
        raise InputError(f"{path}: {error}", key=error.key) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in sections, whichever form they came in; `values` stays as it is.

    Raises:
        InputError: A name is no section, no field and no name of the flat form, or a field is given twice.
    """
    out: dict[str, Any] = {}
    for name, value in values.items():
        dotted = _place_of(name, value)
        section, _, field = dotted.partition(".")
        if not field:
            inner = {**value, **out.get(section, {})} if isinstance(value, Mapping) and section in SECTIONS else value
            _refuse_twice(section, value, out.get(section))
            out[section] = inner
        else:
            holder = out.setdefault(section, {})
            _refuse_twice(section, {field: value}, holder)
            holder[field] = value
    return out


def _place_of(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and name in SECTIONS:
        return name
    if name in TrainerConfig.model_fields and name not in SECTIONS:
        return name
    if name in RETIRED:
        return name
    if name in FLAT_NAMES:
        return FLAT_NAMES[name]
    places = [
        f"{key}.{name}" for key, cls in SECTIONS.items() if name in {**cls.model_fields, **cls.model_computed_fields}
    ]
    places += [dotted for dotted in RETIRED if dotted.endswith(f".{name}")]
    if places:
        return places[0]
    if name in SECTIONS:
        raise InputError(f"{name}: expected an object of fields, not {value!r}", key=name)
    known = [
        *TrainerConfig.model_fields,
        *FLAT_NAMES,
        *(field for cls in SECTIONS.values() for field in cls.model_fields),
    ]
    near = did_you_mean(nearest(name, known)) or f"; sections are {', '.join(SECTIONS)}"
    raise InputError(f"{name}: no such key{near}", key=name)


def _names(section: type[Section]) -> list[str]:
    return [*section.model_fields, *section.model_computed_fields]


def _refuse_twice(section: str, values: Any, there: Any) -> None:
    both = [name for name in values if name in there] if isinstance(values, Mapping) and isinstance(there, dict) else []
    if both:
        raise InputError(f"{section}.{both[0]}: is given twice, flat and in its section", key=f"{section}.{both[0]}")
