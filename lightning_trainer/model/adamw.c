/* A step of AdamW on elements of one parameter, its weights as the 16 + 16 bits that `optim` shows; see `adamw_cpu`. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bits(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Every NaN becomes 0x7FC00000: rounding 0x7FFFFFFF would carry into the sign and give -0.0. */
static inline uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return number == number ? bits : 0x7FC00000u;
}

static inline float widened(uint16_t bf16)
{
    return from_bits((uint32_t)bf16 << 16);
}

/* Ties go to even. */
static inline uint16_t rounded(float number)
{
    uint32_t bits = bits_of(number);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

void adamw(
    uint16_t *restrict high_bits, int16_t *restrict low_bits, const uint16_t *restrict grads,
    uint16_t *restrict exp_avgs, uint16_t *restrict exp_avg_sqs, int64_t numel,
    float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, float eps, float decay_factor,
    float step_size, float bias_correction2_sqrt)
{
    for (int64_t i = 0; i < numel; i++) {
        float grad = widened(grads[i]);
        float exp_avg = beta1 * widened(exp_avgs[i]) + one_minus_beta1 * grad;
        float exp_avg_sq = beta2 * widened(exp_avg_sqs[i]) + one_minus_beta2 * grad * grad;
        float weight = from_bits(((uint32_t)high_bits[i] << 16) + (uint32_t)(int32_t)low_bits[i]);
        weight = weight * decay_factor - step_size * exp_avg / (sqrtf(exp_avg_sq) / bias_correction2_sqrt + eps);
        uint32_t bits = bits_of(weight);
        uint32_t high = (bits + 0x8000u) >> 16;
        high_bits[i] = (uint16_t)high;
        low_bits[i] = (int16_t)(bits - (high << 16));
        exp_avgs[i] = rounded(exp_avg);
        exp_avg_sqs[i] = rounded(exp_avg_sq);
    }
}
