"""CausalLMModule: batch -> loss -> update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_trainer import adapters
from lightning_trainer import pretrained as hub
from lightning_trainer.adapters import LoraSettings
from lightning_trainer.lock import Lock, check_model, facts_of_model
from lightning_trainer.model import attention, compilation, probe
from lightning_trainer.model.muon import CompensatedMuon, outer_matrices
from lightning_trainer.model.objective import LossName, Objective
from lightning_trainer.model.optim import CompensatedAdamW
from lightning_trainer.model.optimizer_check import check_optimizer
from lightning_trainer.model.schedule import StepSchedule, WarmupCosine
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.pretrained import QuantizationSettings
from lightning_trainer.types import Batch, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalLMModule(lightning.LightningModule):
    """A causal language model of transformers, trained on the sum of nats over the trained tokens of an optimizer step.

    Args:
        pretrained: Directory or Hub id of the model.
        from_scratch: Random weights from the configuration found at `pretrained`, instead of its weights.
        tokenizer: Directory or Hub id; null: the one at `pretrained`.
        attn_implementation: auto: for packed rows attention within each example, where the architecture takes it;
            else transformers' choice, sdpa or eager. Any name that transformers knows is taken as it is.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        loss: chunked never holds all logits; full does. The number is the same.
        compile: Compile the layers with torch.compile before the first step, which takes a minute or so and a C++
            compiler. Only `fit` does. The last bits then depend on the machine's compiler, and what dropout drops is
            drawn otherwise.
        lora: Train adapters on the model, which itself stays as it is; null trains all of it. `pretrained` may be
            the directory of such adapters, to go on with them.
        quantization: Keep the frozen model in 4 bits a weight, under `lora`.
        optimizer: CompensatedAdamW, CompensatedMuon, any of torch's by its name, or a class by its path
            (torchao.optim.AdamW8bit).
        lr_scheduler: WarmupCosine, WarmupStableDecay, WarmupConstant or one of torch's; stepped every optimizer step.
        locked: What must be so of the model, and stay so on resume.

    Attributes:
        adapter: What is trained where `lora` is set, once the model is built.
        step_nats: Sum of nats of the optimizer step in progress; fp32, on the device.
    """

    def __init__(
        self,
        pretrained: str,
        from_scratch: bool = False,
        tokenizer: str | None = None,
        attn_implementation: str = "auto",
        gradient_checkpointing: bool = False,
        loss: LossName = "chunked",
        compile: bool = False,
        lora: LoraSettings | None = None,
        quantization: QuantizationSettings | None = None,
        optimizer: OptimizerCallable = CompensatedAdamW,
        lr_scheduler: LRSchedulerCallable = WarmupCosine,
        locked: Lock | None = None,
    ) -> None:
        super().__init__()
        self.pretrained, self.from_scratch, self.tokenizer_name = pretrained, from_scratch, tokenizer
        self.attn_implementation, self.gradient_checkpointing = attn_implementation, gradient_checkpointing
        self.objective, self.compiles = Objective(loss), compile
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.locked = locked
        self.lora, self.quantization = lora, quantization
        adapters.refuse_contradictions(
            lora, pretrained, hub.adapter_base(pretrained), from_scratch, quantization is not None
        )
        self.model: PreTrainedModel | None = None
        self.adapter: adapters.Adapter | None = None
        self.step_nats = torch.zeros(())
        self._evaluated: list[tuple[Tensor, Tensor, int]] = []

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        if self.tokenizer_name is None:
            return hub.load_tokenizer(self.pretrained, "model.pretrained")
        return hub.load_tokenizer(self.tokenizer_name)

    def configure_model(self) -> None:
        """Build the model in the run's dtype; once."""
        if self.model is not None:
            return
        # Lightning would have it made on the device, whose random weights and rotary frequencies are not the host's.
        with nullcontext() if self.quantization is not None else torch.device("cpu"):
            self._build()

    def _build(self) -> None:
        attention.register()
        self.model = hub.load_model(
            self.pretrained,
            self._run_dtype(),
            from_scratch=self.from_scratch,
            attn_implementation=self.attention(self._packs()),
            quantization=self.quantization,
            device=self.trainer.strategy.root_device,
        )
        hub.check_tokenizer_fits(self.tokenizer, hub.embedding_rows(self.model))
        if self.locked is not None:
            check_model(self.locked, facts_of_model(self.model))
        if self.lora is not None:
            self._put_in_adapters(self.model, self.lora)
        self.model.train()
        if self.gradient_checkpointing:
            self.model.activation_checkpointing_enable()

    def _put_in_adapters(self, model: PreTrainedModel, lora: LoraSettings) -> None:
        self.strict_loading = False  # `on_load_checkpoint` compares the names itself
        base = hub.adapter_base(self.pretrained)
        self.adapter = adapters.put_in(model, lora, base or hub.resolve_pretrained(self.pretrained, "model.pretrained"))
        if base is not None:
            self.adapter.load(Path(self.pretrained).expanduser(), "model.pretrained", cast=True)

    @property
    def adapter_dtype(self) -> torch.dtype | None:
        """The adapters' dtype, where it was chosen; None: the run's."""
        return torch.float32 if self.lora is not None and self.lora.dtype == "fp32" else None

    @property
    def packed_base(self) -> bool:
        """Whether the frozen weights are stored packed."""
        return self.quantization is not None

    def _run_dtype(self) -> torch.dtype:
        plugin = self.trainer.precision_plugin
        if not isinstance(plugin, SingleDtypePrecision):
            raise InputError(
                f"the Trainer's precision plugin is {type(plugin).__name__}; from Python, give "
                "Trainer(plugins=[SingleDtypePrecision('bf16-true')]) and no `precision`",
                key="trainer.precision",
            )
        return plugin.dtype

    def attention(self, packed: bool) -> str | None:
        """Name of the attention the model is built with; None is transformers' own choice."""
        if self.attn_implementation != "auto":
            return self.attn_implementation
        return attention.choose(hub.load_config(self.pretrained), packed)

    def _packs(self) -> bool:
        return bool(getattr(getattr(self.trainer, "datamodule", None), "packing", False))

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model, once it is built."""
        if self.model is None:
            raise RuntimeError("the model is built by configure_model(), when the trainer starts")
        return self.model

    def on_fit_start(self) -> None:
        """Ask the model what it can do, before the first step; say what is trained; compile it, if it is to be.

        Raises:
            InputError: Packed rows leak, the plan of batches would not fit what the trainer does, torch.compile fails.
        """
        self._refuse_moving_windows()
        if self._packs():
            probe.refuse_leaks(self.causal_lm)
        self.objective.settle(self.causal_lm)
        trained, total = hub.count_parameters(self.causal_lm)
        rank_zero_info(
            f"{type(self.causal_lm).__name__}: {trained:,} of {total:,} parameters trained, "
            + (f"{self.lora} on {self.adapter.layers} layers, " if self.adapter is not None else "")
            + f"attention {self.causal_lm.config._attn_implementation}, loss {self.objective.name}"
        )
        if self.compiles:
            self._compile()

    def _compile(self) -> None:
        parameters = [p for p in self.parameters() if p.requires_grad]
        compilation.start(
            self.causal_lm, self.nats, parameters, self._first_batch(), validates=self.trainer.enable_validation
        )

    def _first_batch(self) -> Batch | None:
        """The first of the run, wherever that stands; None where the model is spread out or the data are not ours."""
        make: Callable[[], Batch] | None = getattr(getattr(self.trainer, "datamodule", None), "first_batch", None)
        whole = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        return make().to(self.device) if whole and make is not None else None

    def on_validation_start(self) -> None:
        """Settle the loss, where no training has."""
        self.objective.settle(self.causal_lm)

    def on_test_start(self) -> None:
        """Settle the loss, where no training has."""
        self.objective.settle(self.causal_lm)

    def _refuse_moving_windows(self) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            raise InputError(
                "GradientAccumulationScheduler changes how many micro-batches make a step while training; the loss of "
                "a step is divided by its tokens, which are planned for one number: set "
                "trainer.accumulate_grad_batches instead",
                key="trainer.callbacks",
            )

    def forward(self, batch: Batch) -> Tensor:
        """Logits of every token.

        Returns:
            (B, T, V).
        """
        logits: Tensor = self.causal_lm(**self._inputs(batch)).logits
        return logits

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        if self.causal_lm.config._attn_implementation == attention.PACKED:
            inputs |= attention.packed_arguments(batch.example_lengths, batch.input_ids.device)
        return inputs

    def nats(self, batch: Batch, expected: float = 1.0) -> Tensor:
        """Sum of nats over the trained tokens of a batch; fp32 scalar.

        Args:
            expected: What its gradient will be, about.
        """
        return self.objective.nats(self.causal_lm, self._inputs(batch), batch, expected)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Nats over the trained tokens of the whole optimizer step.

        Lightning divides by the micro-batches of a step and averages over ranks; what it divides by is put on here,
        so gradients add up to the gradient of (all nats) / (all trained tokens), whatever the split.
        """
        share = self.trainer.world_size / batch.step_tokens
        nats = self.nats(batch, expected=share * getattr(self.trainer.precision_plugin, "scale", 1.0))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_nats = torch.zeros_like(nats, requires_grad=False)
        self.step_nats = self.step_nats + nats.detach()
        return nats * (self.trainer.accumulate_grad_batches * share)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up nats and right guesses of one batch."""
        found = self.objective.evaluate(self.causal_lm, self._inputs(batch), batch)
        self._evaluated.append((*found, len(batch.targets)))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same on the test split."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/perplexity and val/token_accuracy over all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """The same as test/*."""
        self._log_evaluation("test")

    def _log_evaluation(self, name: str) -> None:
        evaluated, self._evaluated = self._evaluated, []
        if not evaluated:
            return
        nats, right, tokens = zip(*evaluated, strict=True)
        sums = torch.stack([torch.stack(nats).double().sum(), torch.stack(right).sum().double()])
        sums = torch.cat([sums, sums.new_tensor([float(sum(tokens))])])
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        mean = (sums[0] / sums[2]).float()
        metrics = {
            f"{name}/loss": mean,
            f"{name}/perplexity": mean.exp(),
            f"{name}/token_accuracy": (sums[1] / sums[2]).float(),
        }
        fitting = self.trainer.state.fn == "fit"
        for key, value in metrics.items():
            # The largest of equals: a mean over three ranks could round. Without `sync_dist` Lightning warns.
            quiet, shown = False if fitting else None, key == "val/loss"
            self.log(key, value, logger=quiet, prog_bar=shown, sync_dist=True, reduce_fx="max")
        if fitting:  # where Lightning's own step is one short of ours
            found = {key: float(value) for key, value in metrics.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(found, step=self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        """The optimizer and a schedule stepped once per optimizer step.

        Raises:
            InputError: An optimizer or scheduler that refuses its arguments, or that 16-true would break.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        try:
            optimizer = self.make_optimizer(trained)
        except (ValueError, TypeError) as error:
            raise InputError(str(error), key="model.optimizer") from error
        check_optimizer(optimizer, self.adapter_dtype or self._run_dtype())
        if isinstance(optimizer, CompensatedMuon):
            optimizer.leave_to_adamw(outer_matrices(self.causal_lm))
        try:
            scheduler = self.make_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise InputError(str(error), key="model.lr_scheduler") from error
        if isinstance(scheduler, StepSchedule):
            self._fit_schedule(scheduler)
        self._fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _fit_schedule(self, scheduler: StepSchedule) -> None:
        steps = self.trainer.estimated_stepping_batches
        if scheduler.total_steps is None and steps == float("inf"):
            raise InputError(
                "this run has no end (max_epochs -1 and no max_steps), so the schedule has no length; set "
                "trainer.max_steps, or total_steps of the lr_scheduler",
                key="trainer.max_steps",
            )
        scheduler.fit_to(1 if steps == float("inf") else int(steps))

    def on_train_start(self) -> None:
        """Let what the user writes win over what a checkpoint remembers: rates, betas, decay."""
        if self._run_dtype() == torch.float16:
            rank_zero_warn("16-true skips steps that overflow and counts them; bf16-true needs no such care")
        optimizer = self.trainer.optimizers[0]
        if isinstance(optimizer, CompensatedAdamW):
            self._agree_on_kernel(optimizer)
        for group, fresh in zip(optimizer.param_groups, self._fresh, strict=True):
            scheduled = {"lr": group["lr"]}
            group.update({**fresh, **scheduled})
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, StepSchedule):
                config.scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in self._fresh]
                config.scheduler.apply()

    def _agree_on_kernel(self, optimizer: CompensatedAdamW) -> None:
        works = optimizer.kernel_works()
        # All ranks or none: the last bits differ.
        optimizer.kernel = self.trainer.strategy.reduce_boolean_decision(works, all=True)
        if works and not optimizer.kernel:
            rank_zero_warn(
                "CompensatedAdamW steps without its kernel, several times slower: another rank cannot use it"
            )

    def save_pretrained(self, directory: Path) -> None:
        """Write what transformers loads: the model, or the adapters alone (which peft loads too); and the tokenizer."""
        if self.adapter is None:
            hub.save_pretrained(self.causal_lm, self.tokenizer, directory)
        else:
            self.adapter.save(directory)
            self.tokenizer.save_pretrained(str(directory))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the weights to `save_pretrained`: a checkpoint is a directory that transformers loads.

        The CheckpointIO writes what stands under `pretrained` before the rest.
        """
        checkpoint.pop("state_dict")
        checkpoint["pretrained"] = self.save_pretrained
        if self.adapter is not None:
            checkpoint["frozen_weights"] = self.adapter.base_digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights from the checkpoint's directory.

        Raises:
            InputError: They are adapters and this run has none, or the other way round; or they are of another base.
        """
        directory: Path = checkpoint["directory"]
        saved = adapters.read_config(directory)
        if self.adapter is None and saved is None:
            weights = hub.load_state_dict(directory, self.causal_lm)
            checkpoint["state_dict"] = {f"model.{name}": value for name, value in weights.items()}
            return
        if self.adapter is None or saved is None:
            raise InputError(adapters.other_contents(directory, saved), key="model.lora")
        if self.trainer.state.fn == "fit":
            self.adapter.resume(directory, checkpoint.get("frozen_weights"))
        else:
            self.adapter.load(directory, "ckpt_path", cast=True)
        checkpoint["state_dict"] = {}

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[dict[str, Any]]:
        """Left to the callback that writes predictions: it knows the sampling and the prompts."""
        return batch
