"""Arms `litgpt_padded` and `litgpt_single`: LitGPT's own loop and model, as `litgpt finetune_full` calls them.

It has no packing and no clipping, and keeps its output layer apart from the embedding. A step's chats are one batch
padded to the longest, or, by its default, micro-batches of one chat: then it weighs chats, and the others tokens.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from shutil import copy
from typing import Any

import meter
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import full
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import copy_weights_qwen_3
from litgpt.utils import save_config
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from workload import TokenRows


class Done(Exception):
    """The last counted step is made."""


class CountedAdamW(torch.optim.AdamW):
    """torch's, which tells a meter of each step and ends the run after the last.

    Attributes:
        measured: The meter.
    """

    measured: meter.Meter
    made = 0

    def step(self, closure: Any = None) -> Any:
        """One step."""
        loss = super().step(closure)
        self.made += 1
        self.measured.passed(self.made)
        if self.made == self.measured.last:
            raise Done
        return loss


class Rows(DataModule):
    """The workload's rows, padded by LitGPT's own collator.

    Args:
        rows: Of the workload.
    """

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        self.rows, self.batch_size, self.prompt_style = rows, 1, Default()

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        """Take over the size of a micro-batch."""
        self.batch_size = batch_size

    def setup(self, stage: str = "") -> None:
        """Samples as LitGPT's own data sets make them."""
        self.samples = [
            {
                "input_ids": torch.from_numpy(ids),
                "labels": torch.from_numpy(labels),
                "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)},
            }
            for ids, labels in self.rows
        ]

    def train_dataloader(self) -> DataLoader[Any]:
        """All rows, shuffled."""
        return DataLoader(self.samples, self.batch_size, shuffle=True, collate_fn=get_sft_collate_fn())  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """One batch, for the check before the first step."""
        return DataLoader(self.samples[:1], collate_fn=get_sft_collate_fn())  # type: ignore[arg-type]


def convert(source: Path, target: Path) -> None:
    """The workload's model as a checkpoint of LitGPT."""
    shape = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = Config(
        name="bench",
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        head_size=shape["head_dim"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        rope_base=int(shape["rope_parameters"]["rope_theta"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        norm_qk=True,
        mlp_class_name="LLaMAMLP",
    )
    weights: dict[str, Tensor] = {}
    copy_weights_qwen_3(config, {}, weights, load_file(source / "model.safetensors"))
    torch.save({"model": weights}, target / "lit_model.pth")
    save_config(config, target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(source / name, target / name)


def count_losses(measured: meter.Meter) -> None:
    """Let the loop's loss function tell a meter what it is given."""
    stock = full.chunked_cross_entropy

    def counted(logits: Any, targets: Tensor, **how: Any) -> Tensor:
        loss = stock(logits, targets, **how)
        if torch.is_grad_enabled():
            tokens = int((targets != -100).sum())
            measured.saw(tokens, loss.detach() * tokens)
        return loss

    full.chunked_cross_entropy = counted


def train(rows: TokenRows, folder: Path, steps: int, single: bool) -> None:
    """Call `finetune_full` with the settings that all arms have."""
    full.setup(
        folder,
        out_dir=folder / "out",
        precision="32-true",
        data=Rows(rows),
        train=TrainArgs(
            global_batch_size=rows.per_step,
            micro_batch_size=1 if single else rows.per_step,
            lr_warmup_steps=1,  # it cannot be 0; a cosine over 10 epochs is as good as constant here
            epochs=10,
            log_interval=10 * rows.per_step if single else 10,  # in micro-batches
            save_interval=None,
        ),
        eval=EvalArgs(interval=steps + 1, max_new_tokens=1, max_iters=1),
        optimizer={
            "class_path": f"{__name__}.{CountedAdamW.__name__}",
            "init_args": {"lr": meter.LEARNING_RATE, "betas": meter.BETAS, "weight_decay": 0.0, "fused": True},
        },
    )


def main() -> None:
    """Train and report."""
    given = meter.arguments(__doc__, "litgpt_padded", "litgpt_single")
    CountedAdamW.measured = measured = meter.Meter(given)
    count_losses(measured)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(given.workload / "model", folder)
        try:
            train(TokenRows.load(given.workload), folder, measured.last, given.arm == "litgpt_single")
        except Done:
            measured.report("litgpt", "lightning")


if __name__ == "__main__":
    main()
