"""The kernel of `adamw_gpu`, in Triton's language."""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def adamw(
    high_bits, low_bits, grads, exp_avgs, exp_avg_sqs, corrections, skip, numel,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay_factor, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one parameter's elements, its weights as the 16 + 16 bits that `optim` shows."""
    if tl.load(skip) == 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        high = tl.load(high_bits + at, mask=inside, other=0).to(tl.int32)
        low = tl.load(low_bits + at, mask=inside, other=0).to(tl.int32)
        weight = ((high << 16) + low).to(tl.float32, bitcast=True)
        grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
        exp_avg = tl.load(exp_avgs + at, mask=inside, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sqs + at, mask=inside, other=0.0).to(tl.float32)
        exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
        step_size, bias_correction2_sqrt = tl.load(corrections), tl.load(corrections + 1)
        weight = weight * decay_factor - step_size * exp_avg / (tl.sqrt(exp_avg_sq) / bias_correction2_sqrt + eps)
        # Every NaN becomes 0x7FC00000: rounding 0x7FFFFFFF would carry into the sign and give -0.0.
        bits = tl.where(weight == weight, weight.to(tl.int32, bitcast=True), 0x7FC00000)
        high = (bits + 32768) >> 16
        tl.store(high_bits + at, high.to(tl.int16), mask=inside)
        tl.store(low_bits + at, (bits - (high << 16)).to(tl.int16), mask=inside)
        tl.store(exp_avgs + at, exp_avg.to(tl.bfloat16), mask=inside)
        tl.store(exp_avg_sqs + at, exp_avg_sq.to(tl.bfloat16), mask=inside)
