"""TrainerConfig: a training job as Python and JSON know it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from lightning_trainer.engine.job import retired
from lightning_trainer.engine.job.faults import in_words
from lightning_trainer.engine.job.flat import nested
from lightning_trainer.engine.job.sections import (
    Data,
    Environment,
    Hyperparams,
    Locked,
    Model,
    Monitoring,
    Output,
    Profile,
    Section,
)


class TrainerConfig(Section):
    """One training job. Read and assign fields as attributes: `config.profile.name = "regime3"`.

    Raises:
        InputError: At assignment, of a value that a field does not take.
    """

    config_version: Literal["2.0"] = "2.0"
    description: str = ""
    hyperparams: Hyperparams = Field(default_factory=Hyperparams)
    profile: Profile = Field(default_factory=Profile)
    monitoring: Monitoring = Field(default_factory=Monitoring)
    locked: Locked
    data: Data
    model: Model
    output: Output
    environment: Environment = Field(default_factory=Environment)
    _retired: tuple[str, ...] = PrivateAttr(())

    @property
    def retired_keys(self) -> tuple[str, ...]:
        """Keys of earlier versions that stood in the JSON at their inert value; they have no effect."""
        return self._retired

    def to_dict(self) -> dict[str, Any]:
        """All values, as plain types of its own: JSON takes it, `from_dict` gives the same config back."""
        return self.model_dump()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerConfig:
        """The config that `values` describe, which stay as they are. Sections and fields left out have their defaults.

        Args:
            values: In sections, or in the flat form of the earliest versions.

        Raises:
            InputError: Something is unknown, missing or of the wrong type or range; every fault is named.
        """
        given = nested(copy.deepcopy(dict(values)))
        found = retired.take_out(given)
        derived = _take_derived(given)
        try:
            config = cls.model_validate(given)
        except ValidationError as error:
            raise in_words(error, cls) from error
        config._retired = found
        _compare_derived(derived, config)
        return config

    def checked(self) -> TrainerConfig:
        """A copy, checked as a whole: what was put into a list or mapping after its assignment is checked here.

        Raises:
            InputError: As `from_dict`.
        """
        copied = type(self).from_dict(self.to_dict())
        copied._retired = self._retired
        return copied


def _take_derived(given: dict[str, Any]) -> Any:
    section = given.get("hyperparams")
    return section.pop("effective_batch_size", None) if isinstance(section, dict) else None


def _compare_derived(derived: Any, config: TrainerConfig) -> None:
    actual = config.hyperparams.effective_batch_size
    if derived not in (None, actual):
        warnings.warn(
            f"hyperparams.effective_batch_size is derived: {actual}, not the {derived!r} that was given", stacklevel=3
        )


def create_default_config(
    model_path: str,
    dataset_path: str,
    output_dir: str,
    base_model: str,
    model_architecture: str,
    max_context_length: int,
    vocab_size: int,
) -> TrainerConfig:
    """A job with every other field at its default.

    Args:
        model_path: Directory or Hub id.
        dataset_path: File or Hub id.
        output_dir: The run directory.
        base_model: A name of yours for what the model began as.
        model_architecture: Class of the model, such as Qwen3ForCausalLM.
        max_context_length: Most tokens the model is trained for.
        vocab_size: Rows of its embedding.

    Raises:
        InputError: A value has the wrong type or range.
    """
    locked = {
        "base_model": base_model,
        "model_architecture": model_architecture,
        "max_context_length": max_context_length,
        "vocab_size": vocab_size,
    }
    return TrainerConfig.from_dict(
        {
            "locked": locked,
            "data": {"dataset_path": dataset_path},
            "model": {"model_path": model_path},
            "output": {"output_dir": output_dir},
        }
    )
