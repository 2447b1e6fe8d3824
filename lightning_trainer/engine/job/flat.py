"""The flat form of the earliest versions: fields at the top level, under names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_trainer.engine.job.retired import RETIRED
from lightning_trainer.engine.job.sections import Section
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


def _places() -> dict[str, str]:
    retired = {dotted.partition(".")[2]: dotted for dotted in RETIRED if "." in dotted}
    fields = {
        name: f"{key}.{name}"
        for key, section in reversed(SECTIONS.items())
        for name in (*section.model_fields, *section.model_computed_fields)
    }
    return {**retired, **fields, **FLAT_NAMES}


PLACES = _places()
"""Name at the top level -> its section and field."""


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in their sections, whichever form they came in; names that are in neither stay where they are.

    Args:
        values: Not changed; mappings in it are copied.

    Raises:
        InputError: A field is given twice.
    """
    out: dict[str, Any] = {}
    for name, value in values.items():
        whole = name not in PLACES or (name in SECTIONS and isinstance(value, Mapping))
        section, _, field = (name if whole else PLACES[name]).partition(".")
        if field:
            _put(out, section, {field: value})
        elif isinstance(value, Mapping) and section in SECTIONS:
            _put(out, section, value)
        else:
            out[section] = value
    return out


def _put(out: dict[str, Any], section: str, fields: Mapping[str, Any]) -> None:
    there = out.setdefault(section, {})
    for name in fields:
        if name in there:
            raise InputError(f"{section}.{name}: is given twice, flat and in its section", key=f"{section}.{name}")
    there.update(fields)
