"""What a user says of adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_trainer.adapters.files import as_yaml, read_config
from lightning_trainer.types import InputError

KEY = "model.lora"

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """Small matrices trained beside the layers of a model that itself stays as it is.

    Args:
        rank: Inner size: an adapted layer gets rank x (inputs + outputs) trained weights.
        alpha: What the adapters add is multiplied by alpha / rank.
        dropout: Share of the adapters' inputs that is zeroed while training.
        target_modules: Layers that are adapted: all-linear (all but the output layer), a list of names such as
            [q_proj, v_proj], or one regular expression for whole dotted names.
        use_dora: DoRA: the length of each output's weights is trained too; slower.
        use_rslora: Multiply by alpha / sqrt(rank) instead.
        dtype: fp32 keeps adapters, their gradients and moments in fp32 beside a base of 16 bits, the one mix of dtypes
            there is; null: the dtype of the run.
        modules_to_save: Layers trained whole, as copies that are saved with the adapters: [embed_tokens] for new
            tokens. A tied output layer is trained with them and stays tied.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    use_dora: bool = False
    use_rslora: bool = False
    dtype: Literal["fp32"] | None = None
    modules_to_save: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse what no adapters can be made of.

        Not in `__post_init__`, whose errors jsonargparse takes for a wrong type.

        Raises:
            InputError: A value lies outside its range.
        """
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value < 1:
                raise InputError(f"must be at least 1, not {value}", key=f"{KEY}.{name}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"must lie in [0, 1), not {self.dropout}", key=f"{KEY}.dropout")
        if not self.target_modules:
            raise InputError("names no layer; all-linear takes all", key=f"{KEY}.target_modules")

    def __str__(self) -> str:
        kind = "DoRA" if self.use_dora else "LoRA"
        return f"{kind} of rank {self.rank}, alpha {self.alpha}" + (", in fp32" if self.dtype else "")


def refuse_contradictions(
    lora: LoraSettings | None, pretrained: str, base: str | None, from_scratch: bool, quantized: bool
) -> None:
    """Refuse what is out of range or cannot go together.

    Args:
        base: The model that the adapters at `pretrained` belong to, where they are adapters.

    Raises:
        InputError: See above.
    """
    if lora is not None:
        lora.check()
    if lora is None and base is not None:
        was = as_yaml(read_config(Path(pretrained).expanduser()) or {})
        raise InputError(
            f"{pretrained!r} holds adapters for {base!r}, no model: go on with them by model.lora: {was}",
            key="model.pretrained",
        )
    if lora is None and quantized:
        raise InputError(
            "a quantised model cannot be trained itself, only adapters on it: add model.lora: {rank: 16}",
            key="model.quantization",
        )
    if lora is not None and from_scratch:
        raise InputError(
            "random weights under model.lora would be frozen, and saved nowhere: leave one of the two out",
            key="model.from_scratch",
        )
