"""The kernel of `adamw_kernel`, in Triton's language; imported where there is Triton."""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def adamw(
    high_bits, low_bits, grads, exp_avgs, exp_avg_sqs, corrections, skip, numbers,
    beta1, one_less_beta1, beta2, one_less_beta2, eps, decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of numbers of one parameter; weights as the 16 + 16 bits that `optim` shows."""
    if tl.load(skip) == 0.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < numbers
        high = tl.load(high_bits + places, mask=inside, other=0).to(tl.int32)
        low = tl.load(low_bits + places, mask=inside, other=0).to(tl.int32)
        weight = ((high << 16) + low).to(tl.float32, bitcast=True)
        grad = tl.load(grads + places, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(exp_avgs + places, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(exp_avg_sqs + places, mask=inside, other=0.0).to(tl.float32)
        first = beta1 * first + one_less_beta1 * grad
        second = beta2 * second + one_less_beta2 * grad * grad
        rate, root = tl.load(corrections), tl.load(corrections + 1)
        weight = weight * decay - rate * first / (tl.sqrt(second) / root + eps)
        bits = weight.to(tl.int32, bitcast=True)
        high = (bits + 32768) >> 16
        tl.store(high_bits + places, high.to(tl.int16), mask=inside)
        tl.store(low_bits + places, (bits - (high << 16)).to(tl.int16), mask=inside)
        tl.store(exp_avgs + places, first.to(tl.bfloat16), mask=inside)
        tl.store(exp_avg_sqs + places, second.to(tl.bfloat16), mask=inside)
