"""Keys of earlier versions that saved JSON files hold and nothing reads any more.

At their inert value they are accepted and named once; any other value asks for something, and is refused with the way
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_trainer.types import InputError

NOTHING: tuple[Any, ...] = (None, False, {}, [], "")


@dataclass(frozen=True)
class Retired:
    """One key.

    Attributes:
        way_out: What to do instead.
        inert: Values without effect, besides None, False, "" and empty collections.
    """

    way_out: str
    inert: tuple[Any, ...] = ()

    def is_inert(self, value: Any) -> bool:
        """Whether the value asks for nothing."""
        off = isinstance(value, dict) and value.get("enabled") is False
        return off or any(type(value) is type(known) and value == known for known in (*NOTHING, *self.inert))


IN_YAML = "write the job as YAML (convert) and there `model: {lora: {rank: 16, alpha: 32}}` (model.lora)"

RETIRED: dict[str, Retired] = {
    "data.augmentation": Retired(
        "rows are rewritten by profiles: put it into one of your own (profile.name: my.Class)"
    ),
    "model.device_map": Retired("the strategy places the model: trainer.strategy in YAML (convert)", ("auto",)),
    "model.gradient_checkpointing": Retired("set hyperparams.use_gradient_checkpointing"),
    "model.freeze_vision_towers": Retired("text models have no vision towers: set it to false, or remove it"),
    "model.try_vision_model_first": Retired("models are loaded as causal LMs: set it to false, or remove it"),
    "environment.local_rank": Retired(
        "ranks are the launcher's: trainer.devices in YAML (convert), or torchrun", (-1, 0)
    ),
    "environment.world_size": Retired("ranks are the launcher's: trainer.devices in YAML (convert), or torchrun", (1,)),
    "environment.deepspeed_config": Retired("set trainer.strategy in YAML (convert)"),
    "training_mode": Retired(f"a job trains all of the model: set it to full, or for adapters {IN_YAML}", ("full",)),
    "lora": Retired(f"a job trains all of the model: remove it, or for adapters {IN_YAML}"),
    "galore": Retired("remove it: CompensatedAdamW takes 10 bytes a weight under bf16, gradient included"),
    "fortune_teller": Retired("it is gone: remove it"),
}


def take_out(values: dict[str, Any]) -> tuple[str, ...]:
    """Remove retired keys from `values`.

    Returns:
        Those that were there.

    Raises:
        InputError: One of them is not at its inert value; all such are named.
    """
    found: list[tuple[str, Any]] = []
    refused: list[tuple[str, Any]] = []
    for dotted, key in RETIRED.items():
        *sections, name = dotted.split(".")
        holder = values.get(sections[0]) if sections else values
        if not isinstance(holder, dict) or name not in holder:
            continue
        value = holder.pop(name)
        inert = key.is_inert(value) or _says_the_same(dotted, value, values)
        (found if inert else refused).append((dotted, value))
    if refused:
        lines = [f"{dotted}: {value!r} is no longer taken; {RETIRED[dotted].way_out}" for dotted, value in refused]
        raise InputError("\n".join(lines), key=refused[0][0])
    return tuple(dotted for dotted, _ in found)


def _says_the_same(dotted: str, value: Any, values: dict[str, Any]) -> bool:
    """Earlier versions wrote gradient checkpointing into two sections."""
    twin = (values.get("hyperparams") or {}).get("use_gradient_checkpointing", True)
    return dotted == "model.gradient_checkpointing" and value is twin
