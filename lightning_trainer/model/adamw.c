/* The kernel of `adamw_cpu`: a step of AdamW on numbers of one parameter, weights as the 16 + 16 bits that `optim` shows. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bits(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* One pattern for all that is no number: others could be rounded into one. */
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
    uint16_t *restrict exp_avgs, uint16_t *restrict exp_avg_sqs, int64_t numbers,
    float beta1, float one_less_beta1, float beta2, float one_less_beta2, float eps, float decay, float rate, float root)
{
    for (int64_t place = 0; place < numbers; place++) {
        float grad = widened(grads[place]);
        float first = beta1 * widened(exp_avgs[place]) + one_less_beta1 * grad;
        float second = beta2 * widened(exp_avg_sqs[place]) + one_less_beta2 * grad * grad;
        float weight = from_bits(((uint32_t)high_bits[place] << 16) + (uint32_t)(int32_t)low_bits[place]);
        weight = weight * decay - rate * first / (sqrtf(second) / root + eps);
        uint32_t bits = bits_of(weight);
        uint32_t high = (bits + 0x8000u) >> 16;
        high_bits[place] = (uint16_t)high;
        low_bits[place] = (int16_t)(bits - (high << 16));
        exp_avgs[place] = rounded(first);
        exp_avg_sqs[place] = rounded(second);
    }
}
