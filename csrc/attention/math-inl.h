// exp and tanh of 16 floats.
#pragma once

#include "isa/wide.h"

namespace sixfold {
namespace {

constexpr float kInfinity = __builtin_inff();

constexpr float kLog2E = 1.44269504088896341f;

// 2^x, within 1.2e-7 of it; 2^-125 stands in for what is less; NaN stays. Minimax on [0, 1].
inline F32x16 exp2(F32x16 x) {
    x = larger(set1(-125.0f), x);
    const F32x16 r = fraction(x);
    F32x16 y = set1(1.877576684683e-3f);
    constexpr float series[] = {8.989340155275e-3f, 5.582631790476e-2f, 2.401536171418e-1f,
                                6.931530731780e-1f, 9.999999250648e-1f};
    for (float c : series) y = fma(y, r, set1(c));
    return times_power(y, x);
}

// Rational minimax approximation (Eigen's), within 4e-7 relative.
inline F32x16 tanh(F32x16 x) {
    x = smaller(set1(7.90531110763549805f), larger(set1(-7.90531110763549805f), x));
    const F32x16 square = mul(x, x);
    F32x16 p = set1(-2.76076847742355e-16f);
    constexpr float over[] = {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                              1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f};
    for (float c : over) p = fma(p, square, set1(c));
    F32x16 q = set1(1.19825839466702e-06f);
    constexpr float under[] = {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};
    for (float c : under) q = fma(q, square, set1(c));
    return div(mul(x, p), q);
}

}  // namespace
}  // namespace sixfold
