"""The precision plugin inside a real Trainer, on a model of a few weights."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from lightning_trainer import pretrained
from lightning_trainer.model.optim import CompensatedAdamW
from lightning_trainer.precision import DtypeError, SingleDtypePrecision
from lightning_trainer.precision.single_dtype import FP16_LOSS_SCALE
from lightning_trainer.types import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class Toy(lightning.LightningModule):
    """loss = sum of x * w over a vector of weights; faults are put in by step number."""

    def __init__(self, dtype: torch.dtype, optimizer: Any, bad_loss: tuple[int, ...] = (), bad_grad: Any = ()) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.linspace(0.1, 1, n).to(dtype)) for n in (5, 3))
        self.make, self.bad_loss, self.bad_grad = optimizer, bad_loss, bad_grad
        self.seen: list[list[Tensor]] = []
        self.grads: list[list[Tensor]] = []

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        loss = torch.stack([(w.float() * (i + 1)).sum() for i, w in enumerate(self.weights)]).sum() * x
        if batch_idx in self.bad_loss:
            loss = loss + math.nan  # the gradient stays finite
        if batch_idx in self.bad_grad:
            loss = loss + (self.weights[0].float().sum() * 0).sqrt()  # 0, with a gradient of 0 * inf
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.grads.append([p.grad.detach().clone() for p in self.parameters() if p.grad is not None])

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append([p.detach().clone() for p in self.parameters()])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Loader:
    """An iterable of scalars; Lightning reads a list as a list of loaders."""

    def __init__(self, batches: list[float]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter([torch.tensor(b) for b in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def fit(tmp_path: Path, module: Toy, plugin: SingleDtypePrecision, batches: list[float], **kwargs: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        plugins=[plugin],
        default_root_dir=tmp_path,
        **kwargs,
    )
    trainer.fit(module, Loader(batches))
    return trainer


OPTIMIZERS = {
    "compensated": lambda p: CompensatedAdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "plain": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("fault", ["bad_loss", "bad_grad"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_that_is_not_finite_is_not_made(tmp_path: Path, optimizer: str, precision: Any, fault: str) -> None:
    plugin = SingleDtypePrecision(precision)
    module = Toy(DTYPES[precision], OPTIMIZERS[optimizer], **{fault: (2, 3)})
    fit(tmp_path, module, plugin, [1.0, -0.5, 1.0, 1.0, 1.0])
    second, third, fourth, fifth = module.seen[1:]
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, fourth, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(fourth, fifth, strict=True))
    assert all(torch.isfinite(w).all() for w in fifth)
    assert int(plugin.nonfinite_steps) == 2
    assert int(plugin.first_nonfinite) == 3
    # The skipped steps left no mark on the moments either: the run without them ends in the same place.
    clean = Toy(DTYPES[precision], OPTIMIZERS[optimizer])
    fit(tmp_path, clean, SingleDtypePrecision(precision), [1.0, -0.5, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(clean.seen[-1], fifth, strict=True))


def test_counters_survive_a_checkpoint() -> None:
    plugin, other = SingleDtypePrecision("32-true"), SingleDtypePrecision("32-true")
    for step, skip in enumerate([False, True, False, True], 1):
        plugin._count(torch.tensor(skip), step)
    assert plugin.state_dict() == {"nonfinite_steps": 2, "first_nonfinite": 2}
    other.load_state_dict(plugin.state_dict())
    other._count(torch.tensor(True), 9)
    assert other.state_dict() == {"nonfinite_steps": 3, "first_nonfinite": 2}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_the_norm_is_taken_in_fp32_before_clipping(tmp_path: Path, precision: Any) -> None:
    plugin = SingleDtypePrecision(precision)
    module = Toy(DTYPES[precision], OPTIMIZERS["compensated"])
    fit(tmp_path, module, plugin, [0.3], gradient_clip_val=0.1)
    grads = torch.tensor([0.3] * 5 + [0.6] * 3).to(DTYPES[precision]).double()
    assert plugin.grad_norm is not None
    assert plugin.grad_norm.dtype == torch.float32
    assert plugin.grad_norm.item() == pytest.approx(grads.norm().item(), rel=1e-6)


def test_a_norm_that_fp16_and_bf16_could_not_hold() -> None:
    """100,000 gradients of 1: their norm is 316.23, which bf16 holds as 316, and their squares add up past fp16."""
    for dtype in (torch.bfloat16, torch.float16):
        param = nn.Parameter(torch.zeros(100_000, dtype=dtype))
        param.grad = torch.ones_like(param)
        plugin = SingleDtypePrecision("bf16-true")
        plugin.clip_gradients(torch.optim.SGD([param], lr=1.0))
        assert plugin.grad_norm is not None
        assert plugin.grad_norm.item() == pytest.approx(math.sqrt(100_000), rel=1e-6)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_by_norm_is_torchs(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mine = [nn.Parameter(torch.zeros(n)) for n in (7, 4)]
    theirs = [nn.Parameter(torch.zeros(n)) for n in (7, 4)]
    for a, b in zip(mine, theirs, strict=True):
        a.grad = torch.randn(a.shape, generator=generator)
        b.grad = a.grad.clone()
    plugin = SingleDtypePrecision("32-true")
    plugin.clip_gradients(torch.optim.SGD(mine, lr=1.0), limit)
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
    torch.testing.assert_close(plugin.grad_norm, norm)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
def test_the_factor_of_clipping_is_not_rounded_to_the_gradients_dtype(device: str) -> None:
    param = nn.Parameter(torch.zeros(1000, 3, device=device, dtype=torch.bfloat16))
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0)).to(param)
    grad, limit = param.grad.float(), 0.7
    factor = limit / (torch.linalg.vector_norm(grad) + 1e-6)
    SingleDtypePrecision("bf16-true").clip_gradients(torch.optim.SGD([param], lr=1.0), limit)
    assert torch.equal(param.grad, (grad * factor).bfloat16())


def test_clipping_by_value() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([-2.0, 0.5, 9.0])
    SingleDtypePrecision("32-true").clip_gradients(torch.optim.SGD([param], lr=1.0), 1.0, "value")
    assert param.grad.tolist() == [-1.0, 0.5, 1.0]


def test_a_clipped_bf16_gradient_is_not_over_the_limit(tmp_path: Path) -> None:
    module = Toy(torch.bfloat16, OPTIMIZERS["compensated"])
    fit(tmp_path, module, SingleDtypePrecision("bf16-true"), [1.0], gradient_clip_val=0.9)
    norm = torch.cat([g.double() for g in module.grads[0]]).norm().item()
    assert norm == pytest.approx(0.9, rel=0.005)


def test_the_fp16_loss_scale_goes_in_and_comes_out(tmp_path: Path) -> None:
    """A gradient of 1e-6 is subnormal in fp16; scaled it is not, and the update is Adam's for 1e-6."""
    plugin = SingleDtypePrecision("16-true")
    module = Toy(torch.float16, OPTIMIZERS["compensated"])
    start = [w.detach().clone() for w in module.weights]
    fit(tmp_path, module, plugin, [1e-6])
    assert module.grads[0][0].dtype == torch.float16
    assert module.grads[0][0].float().tolist() == pytest.approx([1e-6 * FP16_LOSS_SCALE] * 5, rel=1e-3)
    assert plugin.grad_norm is not None
    assert plugin.grad_norm.item() == pytest.approx(1e-6 * math.sqrt(5 + 3 * 4), rel=1e-3)
    for before, after, share in zip(start, module.seen[0], (1e-6, 2e-6), strict=True):
        want = before.float() - 1e-2 * share / (share + 1e-8)
        torch.testing.assert_close(after, want.half(), rtol=2e-3, atol=0)


def test_an_fp16_step_that_overflows_is_skipped_and_counted(tmp_path: Path) -> None:
    plugin = SingleDtypePrecision("16-true")
    module = Toy(torch.float16, OPTIMIZERS["compensated"])
    fit(tmp_path, module, plugin, [1.0, 100.0, 1.0])  # 100 * 1024 is past fp16's 65,504
    assert all(torch.equal(a, b) for a, b in zip(module.seen[0], module.seen[1], strict=True))
    assert not torch.equal(module.seen[1][0], module.seen[2][0])
    assert int(plugin.nonfinite_steps) == 1


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "16", "bf16", "transformer-engine", "64-true", 32])
def test_other_precisions_are_refused_with_the_reason(name: Any) -> None:
    with pytest.raises(InputError, match="choose one of 32-true, bf16-true, 16-true") as caught:
        SingleDtypePrecision(name)
    assert caught.value.key == "trainer.precision"
    mixed = name in ("bf16-mixed", "16-mixed", "16", "bf16")
    assert ("mixed precision computes in one dtype and keeps weights in another" in str(caught.value)) == mixed


def test_weights_of_another_dtype_are_refused_before_training(tmp_path: Path) -> None:
    module = Toy(torch.float32, OPTIMIZERS["compensated"])
    with pytest.raises(
        DtypeError, match=r"2 tensors are not torch.bfloat16 before training:\n  param weights.0: torch"
    ):
        fit(tmp_path, module, SingleDtypePrecision("bf16-true"), [1.0])
    assert module.seen == []


def test_moments_of_another_dtype_are_refused_after_the_first_step(tmp_path: Path) -> None:
    class Fp32Moments(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["average"] = torch.zeros_like(p, dtype=torch.float32)

    module = Toy(torch.bfloat16, lambda p: Fp32Moments(p, lr=0.1))
    with pytest.raises(DtypeError, match=r"after the first optimizer step:\n  average of weights.0: torch.float32"):
        fit(tmp_path, module, SingleDtypePrecision("bf16-true"), [1.0])


def test_autocast_is_refused(tmp_path: Path) -> None:
    module = Toy(torch.float32, OPTIMIZERS["compensated"])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DtypeError, match="autocast is active"):
        fit(tmp_path, module, SingleDtypePrecision("32-true"), [1.0])


def test_a_bf16_model_stays_bf16_with_fp32_frequencies(tiny_model_dir: Path) -> None:
    model = pretrained.load_model(str(tiny_model_dir), torch.bfloat16)
    exact = pretrained.load_model(str(tiny_model_dir), torch.float32)
    converted = SingleDtypePrecision("bf16-true").convert_module(model)
    assert converted is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frequencies = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
    assert frequencies
    for name, buffer in exact.named_buffers():
        if name in frequencies:
            assert torch.equal(frequencies[name], buffer)


def test_accumulated_micro_batches_make_one_step(tmp_path: Path) -> None:
    plugin = SingleDtypePrecision("32-true")
    module = Toy(torch.float32, OPTIMIZERS["sgd"])
    fit(tmp_path, module, plugin, [1.0, 3.0], accumulate_grad_batches=2)
    # Lightning divides each micro-batch by 2: the gradient is the mean of 1 and 3, times 1 or 2.
    assert len(module.grads) == 1
    assert module.grads[0][0].tolist() == pytest.approx([2.0] * 5)
    assert plugin.grad_norm is not None
    assert plugin.grad_norm.item() == pytest.approx(2 * math.sqrt(5 + 3 * 4))
