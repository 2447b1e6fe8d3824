"""Adapters (LoRA, DoRA) of a frozen model, made, saved and loaded with peft.

peft costs seconds to import, so only a run with `model.lora` does. The model stays what it is: its linear layers are
replaced in place, and the code that trains it, generates with it and probes it need not know.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_trainer.adapters import files
from lightning_trainer.adapters.settings import KEY, LoraSettings
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel

NAME = "default"
"""What peft calls the one adapter in the names of parameters; files do not hold it."""

MARK = "lora_"
"""In the names of all parameters that peft's LoRA adds."""


PATTERN = "(a string is a regular expression for whole dotted names; for layers of one name write a list: [q_proj])"


def put_in(model: PreTrainedModel, settings: LoraSettings, base: str) -> Adapter:
    """Put fresh adapters into `model`, in place, and freeze everything else.

    Their first weights come from torch's global generator; they add nothing until they are trained.

    Args:
        model: Of any device, the meta device included.
        base: Where the model came from: a directory or Hub id, for whoever loads the adapters.

    Raises:
        InputError: A name fits no layer, or layers that share weights would be adapted apart.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    _refuse_unknown_names(model, settings)
    tied = _tied_copies(model, settings)
    try:
        with _hushed():
            peft_model = get_peft_model(model, _config(settings, tied), autocast_adapter_dtype=settings.dtype == "fp32")
    except ValueError as error:  # a pattern without a match, a layer of a kind that peft does not know
        hint = "" if isinstance(settings.target_modules, list) else f" {PATTERN}"
        raise InputError(f"{error}{hint}", key=f"{KEY}.target_modules") from error
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if _is_tied(model) and any(isinstance(end, LoraLayer) for end in ends):
        raise InputError(
            "embeddings and output layer of this model share their weights; adapters on one of them would part them: "
            "leave both out, or train them whole with model.lora.modules_to_save: [embed_tokens]",
            key=f"{KEY}.target_modules",
        )
    peft_model.peft_config[NAME].base_model_name_or_path = base
    if settings.dtype is None:
        _cast_meta(model)
    return Adapter(peft_model, settings)


def _cast_meta(model: PreTrainedModel) -> None:
    """peft makes adapters in fp32 and gives them the dtype of their layer, but not on the meta device."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.requires_grad and MARK in name:
            parameter.data = parameter.data.to(model.dtype)


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _tied_copies(model: PreTrainedModel, settings: LoraSettings) -> bool:
    """Whether copies of embeddings and output layer must stay one."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    copied = (module for name, module in model.named_modules() if _named(name, settings.modules_to_save))
    return _is_tied(model) and any(module is end for module in copied for end in ends)


def _named(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _refuse_unknown_names(model: PreTrainedModel, settings: LoraSettings) -> None:
    """peft raises only where no name at all fits."""
    modules = [name for name, _ in model.named_modules() if name]
    lists = {"modules_to_save": settings.modules_to_save}
    if not isinstance(settings.target_modules, str):
        lists["target_modules"] = settings.target_modules
    for key, names in lists.items():
        unknown = [name for name in names if not any(_named(module, [name]) for module in modules)]
        if unknown:
            known = ", ".join(dict.fromkeys(name.split(".")[-2] for name, _ in model.named_parameters()))
            raise InputError(f"{type(model).__name__} has no layer {unknown[0]!r}; it has {known}", key=f"{KEY}.{key}")


@contextmanager
def _hushed() -> Iterator[None]:
    """peft 0.21 asks transformers 5 by a name that is deprecated there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _config(settings: LoraSettings, tied: bool) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=copy.copy(settings.target_modules),
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        modules_to_save=list(settings.modules_to_save) or None,
        ensure_weight_tying=tied,
    )


class Adapter:
    """The adapters in a model. No module itself: the model holds their parameters.

    Args:
        peft_model: peft's view of the model.
        settings: What it was made from.

    Attributes:
        base: Directory or Hub id of the model they belong to.
    """

    def __init__(self, peft_model: Any, settings: LoraSettings) -> None:
        self._peft, self.settings = peft_model, settings
        self._base_digest: str | None = None

    @property
    def base(self) -> str:
        """Directory or Hub id of the model they belong to."""
        return str(self._peft.peft_config[NAME].base_model_name_or_path)

    @property
    def layers(self) -> int:
        """Layers that have one."""
        return sum(1 for _ in adapted_layers(self._peft))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is trained, by the names it has in files."""
        from peft import get_peft_model_state_dict

        # Asked to look for itself, peft would ask the Hub at every checkpoint whether the vocabulary has changed.
        found = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        return {_file_name(name): tensor for name, tensor in found.items()}

    def save(self, directory: Path) -> None:
        """Write what peft and transformers load: the trained weights and what they belong to."""
        files.write(directory, self.tensors(), self._about())

    def _about(self) -> dict[str, Any]:
        return {**self._peft.peft_config[NAME].to_dict(), "inference_mode": True}

    def load(self, directory: Path, key: str, cast: bool = False) -> None:
        """Take the weights saved in `directory`.

        Args:
            key: Of the configuration, that named the directory.
            cast: Whether weights of another dtype are rounded to this one.

        Raises:
            InputError: They are of adapters of another kind, or some are missing, left over or of another shape.
        """
        self._set(self._read(directory, key, cast))

    def _read(self, directory: Path, key: str, cast: bool) -> dict[str, Tensor]:
        self._refuse_other_kind(directory, key)
        saved = files.read_weights(directory, key)
        wrong = files.differences(saved, self.tensors(), cast)
        if wrong:
            rest = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
            lines = [f"the adapters in {str(directory)!r} do not fit model.lora:", *wrong[:10], *rest]
            raise InputError("\n  ".join(lines), key=key)
        return saved

    def _set(self, saved: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._peft, saved)

    def resume(self, directory: Path, base_digest: str | None) -> None:
        """The same, to train on: nothing is rounded, and the base must be the one they were trained on.

        Raises:
            InputError: Something differs.
        """
        saved = self._read(directory, "ckpt_path", cast=False)
        if base_digest != self.base_digest():
            raise InputError(
                f"the weights of {self.base!r} are not those the adapters were trained on: put back model.pretrained, "
                "trainer.precision and model.quantization",
                key="model.pretrained",
            )
        self._set(saved)

    def _refuse_other_kind(self, directory: Path, key: str) -> None:
        was, now = files.read_config(directory) or {}, self._about()
        names = {"r": "rank", "lora_alpha": "alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}
        wrong = [
            f"{ours}: was {was[name]}, is {now[name]}"
            for name, ours in names.items()
            if name in was and was[name] != now[name]
        ]
        if wrong:
            lines = [f"the adapters in {str(directory)!r} were made with other settings:", *wrong, "put them back"]
            raise InputError("\n  ".join(lines), key=key)

    def base_digest(self) -> str:
        """`bits_digest` of the frozen weights, by the names they have here. Made once: they are frozen."""
        if self._base_digest is None:
            named = self._peft.get_base_model().named_parameters()
            self._base_digest = bits_digest((name, tensor) for name, tensor in named if not tensor.requires_grad)
        return self._base_digest

    def merged(self) -> dict[str, Tensor]:
        """The model's weights with what the adapters add, by the names of a model without adapters.

        Sums are made in fp32 and rounded once to the dtype of the weight.
        """
        model: nn.Module = self._peft.get_base_model()
        layers = dict(adapted_layers(model))
        added = {name for name, p in model.named_parameters() if p.requires_grad and MARK in name}
        weights: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if name in added or ".original_module." in name:
                continue
            layer, _, leaf = name.rpartition(".base_layer.")
            if layer in layers and leaf == "weight":
                tensor = _merged_weight(layers[layer])
            weights[name.replace(".base_layer.", ".").replace(f".modules_to_save.{NAME}.", ".")] = tensor
        return weights


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that has an adapter, as peft's layers."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _file_name(name: str) -> str:
    # transformers 5.23 loads the magnitudes of DoRA under this name alone, and only logs that it missed them under
    # peft's own; peft takes both.
    return f"{name}.weight" if name.endswith("lora_magnitude_vector") else name


def bits_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Tells the weights of two models apart: sha256 over names, shapes and integer sums of the weights' bits.

    An integer sum is made where the weights lie, and is the same on every device and in every order.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {_sum_of_bits(tensor)}\n".encode())
    return digest.hexdigest()


def _sum_of_bits(parameter: Tensor) -> int:
    import torch

    integers: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(parameter.detach().contiguous().view(integers[parameter.element_size()]).sum(dtype=torch.int64))


def _merged_weight(layer: Any) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight
    apart = copy.deepcopy(layer).float()
    apart.merge()
    merged: Tensor = apart.get_base_layer().weight.detach().to(weight.dtype)
    return merged
