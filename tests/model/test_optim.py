"""CompensatedAdamW against torch's own AdamW in fp32."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_trainer.model import optim
from lightning_trainer.model.optim import CompensatedAdamW
from lightning_trainer.types import InputError

BETAS = (0.9, 0.95)


def params_of(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (11,), (3, 2, 4)]
    return [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.05).to(dtype)) for s in shapes]


def set_grads(params: list[torch.nn.Parameter], step: int, size: float = 1e-2) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.dtype)


def snapshot(optimizer: CompensatedAdamW) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for value in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*params, *states)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def reference_bf16(weight: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """torch's AdamW on an fp32 weight fed bf16 gradients, its moments rounded to bf16 after every step."""
    exact = torch.nn.Parameter(weight.float())
    optimizer = torch.optim.AdamW([exact], lr=lr, betas=BETAS, weight_decay=decay, fused=True)
    for grad in grads:
        exact.grad = grad.float()
        optimizer.step()
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[exact][name].copy_(optimizer.state[exact][name].bfloat16())
    return exact.detach()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("fused", [True, False])
def test_fp32_is_torch_adamw(fused: bool, decay: float) -> None:
    mine, theirs = params_of(torch.float32), params_of(torch.float32)
    ours = CompensatedAdamW(mine, lr=1e-3, weight_decay=decay)
    torchs = torch.optim.AdamW(theirs, lr=1e-3, betas=BETAS, weight_decay=decay, fused=fused)
    for step in range(20):
        for params, optimizer in ((mine, ours), (theirs, torchs)):
            set_grads(params, step)
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        if fused:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bf16_exact_weight_is_that_of_fp32_adamw(decay: float) -> None:
    params = params_of(torch.bfloat16)
    starts, grads = [p.detach().clone() for p in params], []
    optimizer = CompensatedAdamW(params, lr=1e-4, weight_decay=decay)
    optimizer.kernel = False
    for step in range(50):
        set_grads(params, step)
        grads.append([p.grad.clone() for p in params if p.grad is not None])
        optimizer.step()
    for number, (p, start) in enumerate(zip(params, starts, strict=True)):
        want = reference_bf16(start, [g[number] for g in grads], 1e-4, decay)
        assert torch.equal(optimizer.exact_weight(p), want)
        # What the model computes with is that weight, rounded to nearest.
        torch.testing.assert_close(p.detach(), optimizer.exact_weight(p).bfloat16(), rtol=0.004, atol=0)


def test_tiny_updates_add_up() -> None:
    """1000 steps of one sign at lr 1e-6: AdamW moves each weight by 1000 x 1e-6."""
    weight = torch.nn.Parameter(torch.full((64,), 0.05).bfloat16())
    plain = torch.nn.Parameter(weight.detach().clone())
    ours, torchs = CompensatedAdamW([weight], lr=1e-6), torch.optim.AdamW([plain], lr=1e-6, weight_decay=0.0)
    start = weight[0].item()
    for _ in range(1000):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        ours.step()
        torchs.step()
    moved = start - ours.exact_weight(weight)
    torch.testing.assert_close(moved, torch.full((64,), 1e-3), rtol=0.01, atol=0)
    assert plain[0].item() == start, "bf16 AdamW of torch loses every such update"


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(-(2**31), 2**31 - 1))
@example(bits=0x7FFFFFFF)
@example(bits=-1)
@example(bits=0x7F800000)
def test_split_and_join_is_the_identity(bits: int) -> None:
    weight = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    optimizer = CompensatedAdamW([param := torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))])
    state = optimizer._state_of(param)
    with torch.no_grad():
        optim.store(optim.Piece(param, torch.zeros_like(param), state), weight)
    if weight.isnan():
        assert param.isnan()
        assert optimizer.exact_weight(param).isnan()
        return
    assert optimizer.exact_weight(param).view(torch.int32).item() == bits
    # The bf16 half is a nearest one: at most half a step away, and exactly torch's own but for ties.
    if bits & 0xFFFF != 0x8000:
        assert torch.equal(param.detach().view(torch.int16), weight.bfloat16().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_found_inf_leaves_every_bit(dtype: torch.dtype) -> None:
    params = params_of(dtype)
    optimizer = CompensatedAdamW(params, lr=1e-3, weight_decay=0.1)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    before = snapshot(optimizer)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert same(before, snapshot(optimizer))
    del optimizer.found_inf
    set_grads(params, 4)
    optimizer.step()
    assert not same(before, snapshot(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_scale_divides_the_gradient(dtype: torch.dtype) -> None:
    plain, scaled = params_of(dtype), params_of(dtype)
    first, second = CompensatedAdamW(plain, lr=1e-3), CompensatedAdamW(scaled, lr=1e-3)
    first.kernel = False  # which takes no scale
    for step in range(3):
        set_grads(plain, step)
        set_grads(scaled, step)
        for p in scaled:
            p.grad = p.grad * 1024  # exact: a power of two
        second.grad_scale, second.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        first.step()
        second.step()
    assert same(snapshot(first), snapshot(second))


@pytest.mark.parametrize(
    ("dtype", "moments", "keys"),
    [
        (torch.float32, torch.float32, {"step", "exp_avg", "exp_avg_sq"}),
        (torch.float16, torch.float32, {"step", "exp_avg", "exp_avg_sq"}),
        (torch.bfloat16, torch.bfloat16, {"step", "exp_avg", "exp_avg_sq", "low_bits"}),
    ],
)
def test_state_keeps_its_dtypes_and_resumes_bit_identically(
    dtype: torch.dtype, moments: torch.dtype, keys: set[str], tmp_path: Any
) -> None:
    straight = params_of(dtype)
    optimizer = CompensatedAdamW(straight, lr=1e-3)
    for step in range(5):
        set_grads(straight, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    second = CompensatedAdamW(resumed, lr=1e-3)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p in resumed:
        state = second.state[p]
        assert set(state) == keys
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == moments
        assert state["step"].dtype == torch.float32
        assert "low_bits" not in state or state["low_bits"].dtype == torch.int16
    for step in range(5, 10):
        for params, o in ((straight, optimizer), (resumed, second)):
            set_grads(params, step)
            o.step()
    assert same(snapshot(optimizer), snapshot(second))


def test_loading_does_not_share_memory_with_what_was_loaded() -> None:
    params = params_of(torch.bfloat16)
    optimizer = CompensatedAdamW(params)
    set_grads(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    second = CompensatedAdamW(params_of(torch.bfloat16))
    second.load_state_dict(saved)
    set_grads(second.param_groups[0]["params"], 1)
    second.step()
    for number, state in kept["state"].items():
        assert all(torch.equal(value, saved["state"][number][name]) for name, value in state.items())


def test_fp16_keeps_fp32_moments_of_small_gradients() -> None:
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = CompensatedAdamW([param], lr=1e-3)
    param.grad = torch.full_like(param, 1e-5)  # 1e-10 is 0 in fp16
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], torch.full((4,), 0.05 * 1e-10), rtol=0.01, atol=0)
    torch.testing.assert_close(param.detach().float(), torch.full((4,), -1e-3), rtol=0.01, atol=0)


BUCKETS = pytest.mark.parametrize(
    ("bucket", "dtype"), [("CPU_BUCKET", torch.bfloat16), ("CPU_BUCKET", torch.float16), ("BUCKET", torch.float32)]
)


@BUCKETS
def test_buckets_do_not_change_the_update(monkeypatch: pytest.MonkeyPatch, bucket: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(CompensatedAdamW, "kernel", False)
    whole, split = params_of(dtype), params_of(dtype)
    first, second = CompensatedAdamW(whole, lr=1e-3), CompensatedAdamW(split, lr=1e-3)
    for step in range(3):
        set_grads(whole, step)
        set_grads(split, step)
        first.step()
        with monkeypatch.context() as patch:
            patch.setattr(optim, bucket, 16)
            second.step()
    assert same(snapshot(first), snapshot(second))


@BUCKETS
def test_temporaries_are_bounded_by_the_bucket(
    monkeypatch: pytest.MonkeyPatch, bucket: str, dtype: torch.dtype
) -> None:
    """An embedding of 152k x 4096 is 37 buckets; whole, its fp32 temporaries would take 10 GB."""
    sizes: list[int] = []
    update = optim.adamw

    def watched(weights: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        sizes.append(sum(w.numel() for w in weights))
        update(weights, *args, **kwargs)

    monkeypatch.setattr(optim, "adamw", watched)
    monkeypatch.setattr(optim, bucket, 16)
    monkeypatch.setattr(CompensatedAdamW, "kernel", False)
    params = params_of(dtype)  # 35, 11 and 24 weights
    set_grads(params, 0)
    CompensatedAdamW(params).step()
    assert max(sizes) <= 16


def test_mixed_dtypes_and_frozen_parameters_in_one_group() -> None:
    params = [*params_of(torch.bfloat16), *params_of(torch.float32, 1), torch.nn.Parameter(torch.ones(3))]
    optimizer = CompensatedAdamW(params, lr=1e-3)
    set_grads(params[:-1], 0)
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[-1], torch.ones(3))
    assert params[-1] not in optimizer.state
    assert not torch.equal(params[0], before)


def test_group_options_are_each_groups_own() -> None:
    fast, slow = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = CompensatedAdamW([{"params": [fast], "lr": 0.1}, {"params": [slow]}], lr=0.01)
    fast.grad, slow.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    # The first step of Adam is lr x sign of the gradient.
    torch.testing.assert_close(fast.detach(), torch.full((2,), 0.9))
    torch.testing.assert_close(slow.detach(), torch.full((2,), 0.99))


def test_closure_is_called_with_gradients_on() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = CompensatedAdamW([param], lr=0.1)

    def closure() -> float:
        loss = (param * 2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(param.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -0.1}])
def test_bad_arguments_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must not be negative, betas .* lie in \[0, 1\)"):
        CompensatedAdamW([torch.nn.Parameter(torch.ones(1))], **bad)


def test_reading_the_exact_weight_leaves_no_state() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = CompensatedAdamW([param])
    torch.testing.assert_close(optimizer.exact_weight(param), torch.ones(3))
    assert not optimizer.state.get(param), "a reader must not make optimizer state"


def test_state_of_another_optimizer_is_refused_by_name() -> None:
    params = params_of(torch.bfloat16)
    other = torch.optim.AdamW(params)
    set_grads(params, 0)
    other.step()
    mine = params_of(torch.bfloat16)
    optimizer = CompensatedAdamW(mine)
    with pytest.raises(ValueError, match="low_bits"):
        optimizer.load_state_dict(other.state_dict())


def test_bf16_keeps_the_improvement_of_fp32(tiny_config: Any) -> None:
    """60 steps at lr 1e-5: the loss falls as far as in fp32, where torch's AdamW in bf16 stands still."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        start = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1), dtype=torch.bfloat16)
    ids = torch.randint(0, 384, (4, 24), generator=torch.Generator().manual_seed(0))

    def improvement(dtype: torch.dtype, make: Any) -> float:
        model = copy.deepcopy(start).to(dtype)
        optimizer = make(model.parameters())
        first = float(_loss_fp32(model, ids))
        for _ in range(60):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        return first - float(_loss_fp32(model, ids))

    exact = improvement(torch.float32, lambda p: torch.optim.AdamW(p, lr=1e-5, betas=BETAS, weight_decay=0.0))
    ours = improvement(torch.bfloat16, lambda p: CompensatedAdamW(p, lr=1e-5))
    plain = improvement(torch.bfloat16, lambda p: torch.optim.AdamW(p, lr=1e-5, betas=BETAS, weight_decay=0.0))
    assert exact > 0
    assert ours >= 0.95 * exact, f"{ours} of {exact}"
    assert plain < 0.5 * exact, f"{plain} of {exact}"


def _loss_fp32(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the weights, not of the arithmetic: an fp32 copy's."""
    with torch.no_grad():
        return copy.deepcopy(model).float()(input_ids=ids, labels=ids, use_cache=False).loss


def test_the_state_of_a_weight_of_another_shape_is_refused() -> None:
    saved = CompensatedAdamW(params := params_of(torch.bfloat16))
    set_grads(params, 0)
    saved.step()
    for name, value in (("exp_avg", torch.zeros(5, 7).bfloat16()), ("low_bits", torch.zeros((), dtype=torch.int16))):
        state = copy.deepcopy(saved.state_dict())
        state["state"][0][name] = value
        with pytest.raises(InputError, match=f"{name} of the optimizer state has the shape .*, its weight .7, 5."):
            CompensatedAdamW(params_of(torch.bfloat16)).load_state_dict(state)


def test_weights_that_are_spread_out_are_stepped_right(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = params_of(torch.bfloat16)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
        first, second = CompensatedAdamW(plain, lr=1e-3), CompensatedAdamW(spread, lr=1e-3)
        first.kernel = False
        for step in range(3):
            set_grads(plain, step)
            for one, other in zip(plain, spread, strict=True):
                other.grad = distribute_tensor(one.grad.clone(), mesh, [Shard(0)])
            first.step()
            second.step()
        for one, other in zip(plain, spread, strict=True):
            assert torch.equal(second.exact_weight(other).full_tensor(), first.exact_weight(one))
            assert torch.equal(other.detach().full_tensor(), one.detach())
    finally:
        dist.destroy_process_group()
