"""Arms `trl_packed`, `trl_padded` and `trl_single`: TRL's SFTTrainer, with packing (`bfd`) or without.

Without, a step's chats are one padded batch, or micro-batches of one chat.

Its own default recomputes activations in the backward pass; here nothing is recomputed in any arm.
"""

from __future__ import annotations

import meter
from hf_trainer import Counted, StepClock, chats_per_step, common, dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from workload import TokenRows


class CountedTrainer(Counted, SFTTrainer):
    """TRL's SFTTrainer, counted."""


def main() -> None:
    """Train and report."""
    given = meter.arguments(__doc__, "trl_packed", "trl_padded", "trl_single")
    measured = meter.Meter(given)
    rows = TokenRows.load(given.workload)
    folder = str(given.workload / "model")
    packed = given.arm == "trl_packed"
    chosen = common(given, measured, str(given.workload / given.arm)) | {
        **({"per_device_train_batch_size": 1} if packed else chats_per_step(rows, given.arm == "trl_single")),
        "packing": packed,
        "packing_strategy": "bfd",
        "max_length": rows.max_length,
        "gradient_checkpointing": False,
    }
    trainer = CountedTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=given.dtype),
        args=SFTConfig(**chosen),
        train_dataset=dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[StepClock(measured)],
    )
    trainer.measured = measured
    trainer.train()
    measured.report("trl", "transformers", "accelerate")


if __name__ == "__main__":
    main()
