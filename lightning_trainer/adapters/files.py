"""The files of adapters, as peft and transformers know them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_trainer.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_config(directory: Path) -> dict[str, Any] | None:
    """What an adapter's directory says of it; None where it holds none."""
    path = directory / CONFIG
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def as_yaml(about: dict[str, Any]) -> str:
    """What `model.lora` was, in a line, from an adapter's configuration."""
    parts = [f"rank: {about.get('r')}", f"alpha: {about.get('lora_alpha')}"]
    return "{" + ", ".join([*parts, *(["use_dora: true"] if about.get("use_dora") else [])]) + "}"


def other_contents(directory: Path, about: dict[str, Any] | None) -> str:
    """What is wrong with a checkpoint that holds adapters for a run without, or the other way round."""
    holds, way_out = (
        ("a whole model", "leave model.lora out, or begin a new run on it (model.pretrained: CHECKPOINT)")
        if about is None
        else ("adapters", f"resume with model.lora: {as_yaml(about)}")
    )
    return f"the checkpoint {str(directory)!r} holds {holds}: {way_out}"


def read_weights(directory: Path, key: str) -> dict[str, Tensor]:
    """Trained weights, by the names they have in files.

    Raises:
        InputError: There are none, or the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"no adapter weights in {str(directory)!r}: {error}", key=key) from error


def write(directory: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write weights and configuration.

    Args:
        about: peft's configuration; its sets are written in order, which differs from process to process.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(_unshared(contiguous), directory / WEIGHTS, metadata={"format": "pt"})
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in about.items()}
    (directory / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses two names for one tensor, which a tied output layer has; peft wants both."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def differences(saved: dict[str, Tensor], mine: dict[str, Tensor], cast: bool) -> list[str]:
    """Names that only one side has, and those whose shapes or, unless `cast`, dtypes differ; a line each."""
    lines = [f"missing: {name}" for name in mine.keys() - saved.keys()]
    lines += [f"left over: {name}" for name in saved.keys() - mine.keys()]
    for name in mine.keys() & saved.keys():
        first, second = saved[name], mine[name]
        if first.shape != second.shape:
            lines.append(f"{name}: was {tuple(first.shape)}, is {tuple(second.shape)}")
        elif first.dtype != second.dtype and not cast:
            lines.append(f"{name}: was {first.dtype}, is {second.dtype}")
    return sorted(lines)
