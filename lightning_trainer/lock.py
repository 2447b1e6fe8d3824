"""The lock: what a run says of its model, compared with the model itself and with the run that is resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_trainer.pretrained import embedding_rows
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KEY = "model.locked"


@dataclass(frozen=True)
class Lock:
    """What may not change while a model is trained on and on.

    Args:
        base_model: A name of yours for what the model began as; compared with the run that is resumed.
        model_architecture: Class of the model, such as Qwen3ForCausalLM.
        max_context_length: Most tokens the model is trained for; data.max_length lies within it. May shrink on resume,
            never grow.
        vocab_size: Rows of the embedding.
        model_version: A name of yours; compared with the run that is resumed.
        created_at: For the reader; never compared.
    """

    base_model: str
    model_architecture: str
    max_context_length: int
    vocab_size: int
    model_version: str = "v1"
    created_at: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `manifest.json` keeps them."""
        return asdict(self)


@dataclass(frozen=True)
class ModelIdentity:
    """What a lock says of a model, as the model itself has it.

    Attributes:
        model_architecture: Class of the model; None where its configuration does not name one.
        model_type: The name transformers has for the family, such as qwen3; a lock may name that instead.
        max_context_length: None where the architecture has no limit.
    """

    model_architecture: str | None
    model_type: str
    max_context_length: int | None
    vocab_size: int


def facts_of_config(config: PretrainedConfig) -> ModelIdentity:
    """What a model's configuration says: before any weight is loaded."""
    text: Any = config.get_text_config()
    return ModelIdentity(
        model_architecture=next(iter(config.architectures or ()), None),
        model_type=config.model_type,
        max_context_length=getattr(text, "max_position_embeddings", None),
        vocab_size=int(text.vocab_size),
    )


def facts_of_model(model: PreTrainedModel) -> ModelIdentity:
    """What the loaded model is."""
    said = facts_of_config(model.config)
    return replace(said, model_architecture=type(model).__name__, vocab_size=embedding_rows(model))


def check_model(lock: Lock, facts: ModelIdentity) -> None:
    """Compare a lock with the model.

    Raises:
        InputError: They differ; each field is named with both values.
    """
    wrong = []
    if facts.model_architecture is not None and lock.model_architecture not in (
        facts.model_architecture,
        facts.model_type,
    ):
        wrong.append(_line("model_architecture", lock.model_architecture, facts.model_architecture))
    if facts.vocab_size != lock.vocab_size:
        wrong.append(_line("vocab_size", lock.vocab_size, facts.vocab_size))
    if facts.max_context_length is not None and lock.max_context_length > facts.max_context_length:
        wrong.append(_line("max_context_length", lock.max_context_length, facts.max_context_length))
    if wrong:
        way_out = "this is another model, or the lock is another model's"
        raise InputError("\n".join(["the model is not what the lock says:", *wrong, way_out]), key=KEY)


def check_length(lock: Lock, max_length: int) -> None:
    """Refuse rows longer than the context the lock allows.

    Raises:
        InputError: See above.
    """
    if max_length > lock.max_context_length:
        raise InputError(
            f"max_length is {max_length}, the lock's max_context_length {lock.max_context_length}: lower the one, or "
            "raise the other where the model allows it",
            key="data.max_length",
        )


def check_resumed(recorded: dict[str, Any], lock: Lock) -> None:
    """Compare a lock with that of the run which is resumed.

    Args:
        recorded: Of the run, from its checkpoint.
        lock: Of the configuration.

    Raises:
        InputError: They differ, or the context grows; each field is named with both values.
    """
    now = lock.as_dict()
    names = ("base_model", "model_architecture", "vocab_size", "model_version")
    wrong = [
        _line(name, recorded[name], now[name], "was", "is")
        for name in names
        if name in recorded and recorded[name] != now[name]
    ]
    was = recorded.get("max_context_length", now["max_context_length"])
    if now["max_context_length"] > was:
        wrong.append(_line("max_context_length", was, now["max_context_length"], "was", "is"))
    if wrong:
        raise InputError(
            "\n".join(
                [
                    "the lock is not that of the run which is resumed:",
                    *wrong,
                    "put it back, or resume with --allow-changed lock",
                ]
            ),
            key=KEY,
        )


def _line(name: str, first: Any, second: Any, one: str = "the lock says", other: str = "the model has") -> str:
    return f"  {name}: {one} {first!r}, {other} {second!r}"
