"""From a batch to an update."""

from lightning_trainer.model.causal_lm import CausalLMModule
from lightning_trainer.model.muon import CompensatedMuon
from lightning_trainer.model.optim import CompensatedAdamW
from lightning_trainer.model.schedule import WarmupConstant, WarmupCosine, WarmupStableDecay

__all__ = [
    "CausalLMModule",
    "CompensatedAdamW",
    "CompensatedMuon",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupStableDecay",
]
