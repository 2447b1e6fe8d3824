"""The kernel of `adamw_gpu`, in Triton's language."""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def adamw(
    tensors, corrections, parts, skip,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay_factor,
    PART: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One part of one parameter, its weights as the 16 + 16 bits that `optim` shows.

    Of N parameters and P programs, on the device:
        tensors: (N, 6) int64: addresses of high bits, low bits, gradient, first and second moment; elements.
        corrections: (N, 2) fp32: lr / (1 - beta1^n) and sqrt(1 - beta2^n) after n steps.
        parts: (P, 2) int64: the parameter's number, and its first element here, a multiple of BLOCK.
        skip: fp32 scalar; where it is not 0 nothing changes.
    """
    if tl.load(skip) == 0.0:
        number = tl.load(parts + 2 * tl.program_id(0))
        start = tl.load(parts + 2 * tl.program_id(0) + 1)
        row = tensors + 6 * number
        numel = tl.load(row + 5)
        high_bits = tl.load(row).to(tl.pointer_type(tl.int16))
        low_bits = tl.load(row + 1).to(tl.pointer_type(tl.int16))
        grads = tl.load(row + 2).to(tl.pointer_type(tl.bfloat16))
        exp_avgs = tl.load(row + 3).to(tl.pointer_type(tl.bfloat16))
        exp_avg_sqs = tl.load(row + 4).to(tl.pointer_type(tl.bfloat16))
        start = tl.multiple_of(start, BLOCK)
        if ALIGNED:  # eight numbers are then read at once
            high_bits, low_bits = tl.multiple_of(high_bits, 16), tl.multiple_of(low_bits, 16)
            grads = tl.multiple_of(grads, 16)
            exp_avgs, exp_avg_sqs = tl.multiple_of(exp_avgs, 16), tl.multiple_of(exp_avg_sqs, 16)
            numel = tl.multiple_of(numel, 16)
        step_size = tl.load(corrections + 2 * number)
        bias_correction2_sqrt = tl.load(corrections + 2 * number + 1)
        for block in range(0, PART, BLOCK):
            at = start + block + tl.arange(0, BLOCK)
            inside = at < numel
            high = tl.load(high_bits + at, mask=inside, other=0).to(tl.int32)
            low = tl.load(low_bits + at, mask=inside, other=0).to(tl.int32)
            weight = ((high << 16) + low).to(tl.float32, bitcast=True)
            grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
            exp_avg = tl.load(exp_avgs + at, mask=inside, other=0.0).to(tl.float32)
            exp_avg_sq = tl.load(exp_avg_sqs + at, mask=inside, other=0.0).to(tl.float32)
            exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
            exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
            weight = weight * decay_factor - step_size * exp_avg / (tl.sqrt(exp_avg_sq) / bias_correction2_sqrt + eps)
            # Every NaN becomes 0x7FC00000: rounding 0x7FFFFFFF would carry into the sign and give -0.0.
            bits = tl.where(weight == weight, weight.to(tl.int32, bitcast=True), 0x7FC00000)
            high = (bits + 32768) >> 16
            tl.store(high_bits + at, high.to(tl.int16), mask=inside)
            tl.store(low_bits + at, (bits - (high << 16)).to(tl.int16), mask=inside)
            tl.store(exp_avgs + at, exp_avg.to(tl.bfloat16), mask=inside)
            tl.store(exp_avg_sqs + at, exp_avg_sq.to(tl.bfloat16), mask=inside)
