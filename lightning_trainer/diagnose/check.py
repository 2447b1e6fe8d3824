"""The configuration looked at before it runs: what would be trained, in how many steps, in how much memory.

Nothing is written and no weights are loaded: the model is built on the meta device, rows are counted and a sample of
them is tokenised.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_trainer.data import ChatDataModule
from lightning_trainer.diagnose import memory
from lightning_trainer.diagnose.check_data import Rows, look_at
from lightning_trainer.diagnose.check_findings import Facts, Finding, Settings, findings
from lightning_trainer.diagnose.check_model import empty_model, model_facts, run_dtype
from lightning_trainer.diagnose.check_run import RunFacts, run_facts
from lightning_trainer.diagnose.check_screen import screen
from lightning_trainer.model import CausalLMModule
from lightning_trainer.model.muon import outer_matrices
from lightning_trainer.model.optimizer_check import loses_nothing
from lightning_trainer.model.schedule import set_rate
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Finding", "Report", "examine"]


@dataclass(frozen=True)
class Report:
    """What a run would do, and what is doubtful about it."""

    facts: Facts
    findings: tuple[Finding, ...]
    previews: str = ""

    def as_text(self) -> str:
        """One screen."""
        return screen(self.facts, self.findings, self.previews)

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types."""
        parts = {
            **asdict(self.facts),
            "previews": self.previews,
            "findings": [asdict(finding) for finding in self.findings],
        }
        plain: dict[str, Any] = json.loads(json.dumps(parts))  # tuples become lists
        return plain


def examine(module: CausalLMModule, data: ChatDataModule, trainer: Trainer) -> Report:
    """Look at a run that has been configured and not begun.

    Raises:
        InputError: Something cannot be examined at all: no model configuration, no file, no usable row.
    """
    dtype = run_dtype(trainer)
    model = empty_model(module, dtype, data.packing)
    trained_dtype = module.adapter_dtype or dtype
    optimizer, scheduler = _optimizer(module, trained_dtype)
    settings = _settings(data, optimizer, trained_dtype)
    if data.tokenizer is None:
        data.tokenizer = module.tokenizer
    train = look_at(data, "train")
    if not train.facts.examples:
        why = "\n".join(train.facts.reasons)
        raise InputError(f"no row can be trained on, of {train.facts.read}\n{why}".strip(), key="data.train_path")
    val = look_at(data, "val").facts if "val" in data.needed_splits() else None
    about = model_facts(module, model, trainer)
    run = run_facts(data, trainer, train, 0 if val is None else val.examples, scheduler)
    held = memory.estimate(
        model,
        memory.optimizer_bytes(optimizer, about.trainable, trained_dtype, _between_hidden_states(model)),
        about.loss,
        dtype,
        tokens=run.most_tokens,
        trained=_trained(train, run),
        packed=data.packing,
        checkpointing=module.gradient_checkpointing,
        packed_weight=None if module.quantization is None else module.quantization.bytes_a_weight(),
        device=trainer.strategy.root_device,
    )
    facts = Facts(settings, about, train.facts, val, run, held)
    return Report(facts, findings(facts))


def _between_hidden_states(model: PreTrainedModel) -> list[int]:
    """Weights of each matrix between hidden states that is trained."""
    outer = set(outer_matrices(model))
    return [p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2 and p not in outer]


def _trained(train: Rows, run: RunFacts) -> int:
    """Trained tokens of a full micro-batch."""
    return round(run.most_tokens * train.facts.trained_tokens / train.facts.tokens)


def _optimizer(module: CausalLMModule, dtype: torch.dtype) -> tuple[Optimizer, LRScheduler]:
    """Optimizer and schedule as the run will make them, for one small weight."""
    try:
        optimizer = module.make_optimizer([memory.asked_weight(dtype)])
    except (ValueError, TypeError) as error:
        raise InputError(str(error), key="model.optimizer") from error
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    try:
        scheduler = module.make_scheduler(optimizer)
    except (ValueError, TypeError) as error:
        raise InputError(str(error), key="model.lr_scheduler") from error
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)  # the schedule has set that of its first step
    return optimizer, scheduler


def _settings(data: ChatDataModule, optimizer: Optimizer, trained: torch.dtype) -> Settings:
    return Settings(
        max_length=data.max_length,
        min_length=data.min_length,
        max_bad_fraction=data.max_bad_fraction,
        on_bad_row=data.on_bad_row,
        on_long_row=data.on_long_row,
        packing=data.packing,
        optimizer=type(optimizer).__name__,
        loses_nothing=loses_nothing(optimizer, trained),
        lr=float(optimizer.param_groups[0]["lr"]),
    )
