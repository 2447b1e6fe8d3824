"""Runs of the whole command, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import ForkServer


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path, chat_rows: Any, write_rows: Any) -> Callable[..., Path]:
    """Write a run.yaml of a job that takes seconds; keyword arguments are merged into its sections."""

    def make(name: str = "run.yaml", rows: int = 40, **sections: Any) -> Path:
        config: dict[str, Any] = {
            "model": {
                "pretrained": str(tiny_model_dir),
                "optimizer": {"class_path": "CompensatedAdamW", "init_args": {"lr": 3e-3}},
            },
            "data": {
                "train_path": str(write_rows(chat_rows(rows))),
                "profile": "Plain",
                "max_length": 160,
                "batch_size": 2,
                "val_fraction": 0.2,
            },
            "trainer": {
                "default_root_dir": str(tmp_path / "run"),
                "precision": "32-true",
                "accelerator": "cpu",
                "max_epochs": 2,
                "accumulate_grad_batches": 2,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "callbacks": [],
            },
        }
        for section, values in sections.items():
            if isinstance(values, dict) and isinstance(config.get(section), dict):
                config[section].update(values)
            else:
                config[section] = values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return make


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Add a callback to the next runs."""
    from lightning_trainer.engine.trainer_cli import TrainerCLI

    original = TrainerCLI._callbacks

    def add(callback: Any) -> None:
        monkeypatch.setattr(TrainerCLI, "_callbacks", lambda cli, config: [callback, *original(cli, config)])

    return add


@pytest.fixture
def scalars() -> Callable[[Path], dict[str, list[tuple[int, float]]]]:
    """Every scalar of a run, as TensorBoard would show it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read


@pytest.fixture
def weights() -> Callable[[Path], dict[str, Any]]:
    """Weights and optimizer state of a checkpoint, flat."""
    import torch
    from safetensors.torch import load_file

    def read(checkpoint: Path) -> dict[str, Any]:
        state = torch.load(checkpoint / "trainer.pt", weights_only=True)["optimizer_states"][0]["state"]
        moments = {f"{key}.{name}": value for key, entry in state.items() for name, value in entry.items()}
        return {**load_file(checkpoint / "model.safetensors"), **moments}

    return read


@pytest.fixture
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """Objects of a JSONL file."""
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts runs of the command line in a moment, each a process of its own."""
    cache = tmp_path_factory.mktemp("cache")
    server = ForkServer({"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    yield server
    server.close()


@pytest.fixture(scope="session")
def dropout_model(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any], tokenizer: Any) -> Path:
    """A model directory that draws random numbers in every training step."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("dropout") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(attention_dropout=0.2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
