/* Activations of a vector, in the epilogue of every kernel that computes. */
#ifndef ESP_ACTIVATE_H
#define ESP_ACTIVATE_H

#include "../src/program.h"
#include "simd.h"

ESP_INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + vexp(-x)); }

ESP_INLINE vec vtanh(vec x)
{
    vec e = vexp(-2.0f * vabs(x)), square = x * x;
    vec far = (1.0f - e) / (1.0f + e);
    far = (vec)((ivec)far | ((ivec)x & (int32_t)0x80000000));
    /* near zero the difference above would lose digits */
    vec near = x * (1.0f + square * (-0.333333333f + square * (0.133333333f + square * -0.0539682540f)));
    return choose(square < 0.04f, near, far);
}

/* erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7 */
ESP_INLINE vec verf(vec x)
{
    vec a = vabs(x), t = 1.0f / (1.0f + 0.3275911f * a);
    vec p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    vec y = 1.0f - p * vexp(-a * a);
    return (vec)((ivec)y | ((ivec)x & (int32_t)0x80000000));
}

ESP_INLINE vec elu(vec x, float alpha)
{
    vec small = x * (1.0f + x * (0.5f + x * (0.166666667f + x * (0.0416666667f + x * 0.00833333333f))));
    vec below = choose(x > -0.1f, small, vexp(x) - 1.0f) * alpha;
    return choose(x > 0.0f, x, below);
}

ESP_INLINE vec hardsigmoid(vec x) { return vmin(splat(1.0f), vmax(splat(0.0f), (x + 3.0f) * (1.0f / 6.0f))); }

/* the activations that cost more than a call */
ESP_INLINE vec curved(vec x, int kind, float a)
{
    switch (kind) {
    case ESP_ELU: return elu(x, a);
    case ESP_SIGMOID: return sigmoid(x);
    case ESP_TANH: return vtanh(x);
    case ESP_SILU: return x * sigmoid(x);
    case ESP_HARDSWISH: return x * hardsigmoid(x);
    case ESP_HARDSIGMOID: return hardsigmoid(x);
    case ESP_GELU: return 0.5f * x * (1.0f + verf(x * 0.707106781f));
    case ESP_GELU_TANH: return 0.5f * x * (1.0f + vtanh(0.797884561f * (x + 0.044715f * x * x * x)));
    default: return x;
    }
}

static __attribute__((noinline, unused)) vec activate_curved(vec x, int kind, float a) { return curved(x, kind, a); }

ESP_INLINE vec activate(vec x, int kind, float a, float b)
{
    if (kind == ESP_LINEAR_ACT) return x;
    if (kind == ESP_CLAMP) return vmin(splat(b), vmax(splat(a), x));
    if (kind == ESP_LEAKY) return choose(x < 0.0f, x * a, x);
    return activate_curved(x, kind, a);
}

ESP_INLINE float activate_one(float x, int kind, float a, float b) { return activate(splat(x), kind, a, b)[0]; }

#endif
