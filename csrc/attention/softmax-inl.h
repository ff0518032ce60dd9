// Scores of a page become weights of its values: one step of the online softmax.
#pragma once

#include "attention/attention.h"
#include "attention/math-inl.h"
#include "isa/wide.h"

namespace sixfold {
namespace {

constexpr int kBlocks = kPageTokens / kLanes;
// A page with fewer tokens than this in effect gets a second byte of weights, if it has more than
// one part in kMattering of what the row has seen: errors of rounding to one byte would not average
// out. Measured: README.md.
constexpr float kPeakedTokens = Simd::kByteWeight == 255 ? 4.0f : 12.0f;
constexpr float kMattering = Simd::kByteWeight == 255 ? 16.0f : 64.0f;

// One page as all rows see it.
struct PageView {
    std::int64_t start, length;
    const std::uint8_t *keys, *values;  // tiles, or the page itself
    const std::uint8_t *next_keys, *next_values;
    float key_scales[kPageTokens], value_scales[kPageTokens];
};

struct RowView {
    // score * factor * key scale + offset: the logit in units of ln 2, or as it is before softcap.
    float factor, offset;
    float softcap;
    std::int64_t first_token;
    Mask mask_kind;
    const void* mask;  // this row's columns
    float never;
    float* maximum;
    float* totals;  // [16], whose sum is the total
    float* out;
    int out_length;
    float* carry;  // [16]: what rounding weights to 8 bits has left over, see README.md
    // How far above the maximum a logit may lie in a page that needs no second byte: below 0 as long
    // as every page may need one. A bound: it is renewed with the maximum, while the total grows.
    float* slack;
};

// What the values of a page are multiplied with, for up to kRowBlock rows:
// weight = step * operand + fine_step * fine operand.
struct Weights {
    std::int32_t *operands, *fine;  // [rows, 64]
    float step[kRowBlock], fine_step[kRowBlock];
    bool any_fine;
};

// -inf where the page's end, `first_token` or the mask hides a token, else what the mask adds.
inline void fill_bias(const PageView& page, const RowView& row, float* bias) {
    for (int t = 0; t < kPageTokens; ++t) bias[t] = -kInfinity;
    const std::int64_t before = row.first_token - page.start;
    for (std::int64_t t = before > 0 ? before : 0; t < page.length; ++t) {
        float x = 0.0f;
        if (row.mask_kind == Mask::boolean) {
            x = static_cast<const std::uint8_t*>(row.mask)[page.start + t] ? 0.0f : -kInfinity;
        } else if (row.mask_kind == Mask::additive) {
            x = static_cast<const float*>(row.mask)[page.start + t];
            if (x <= row.never) x = -kInfinity;
        }
        bias[t] = x * kLog2E;
    }
}

inline bool hides_tokens(const PageView& page, const RowView& row) {
    return row.mask_kind != Mask::none || page.length < kPageTokens || row.first_token > page.start;
}

// Scores become logits in units of ln 2, in place, -inf where hidden; returns the largest.
template <bool kExact>
inline float page_logits(const PageView& page, const RowView& row, float* scores) {
    alignas(64) float bias[kPageTokens];
    const bool hides = hides_tokens(page, row);
    if (hides) fill_bias(page, row, bias);
    F32x16 top = set1(-kInfinity);
    for (int t = 0; t < kPageTokens; t += kLanes) {
        const F32x16 sums = load(scores + t);
        const F32x16 dots = kExact ? sums : to_floats(as<I32x16>(sums));
        F32x16 x = fma(dots, mul(load(page.key_scales + t), set1(row.factor)), set1(row.offset));
        if (row.softcap != 0.0f) 
            x = mul(set1(row.softcap * kLog2E), tanh(div(x, set1(row.softcap))));
        if (hides) {
            const F32x16 extra = load(bias + t), never = set1(-kInfinity);
            // Not a sum: a hidden NaN must vanish.
            x = select(equal(extra, never), never, add(x, extra));
        }
        store(scores + t, x);
        top = larger(x, top);
    }
    return largest(top);
}

inline void rescale(const RowView& row, float by) {
    store(row.totals, mul(load(row.totals), set1(by)));
    store(row.carry, mul(load(row.carry), set1(by)));
    for (int i = 0; i < row.out_length; i += kLanes)
        store(row.out + i, mul(load(row.out + i), set1(by)));
}

// Raises the rows' maxima to `peaks` and rescales what they have; `highest` becomes the largest
// probability of the page, relative to the new maximum.
inline void raise_maxima(const RowView* rows, int count, const float* peaks, float* highest) {
    // One vector serves all rows: decays in the first half, the highest in the second.
    alignas(64) float x[kLanes] = {};
    static_assert(2 * kRowBlock <= kLanes);
    for (int r = 0; r < count; ++r) {
        const float before = *rows[r].maximum, top = peaks[r] > before ? peaks[r] : before;
        x[r] = peaks[r] > before ? before - top : 0.0f;
        x[kRowBlock + r] = top == -kInfinity ? 0.0f : peaks[r] - top;
        *rows[r].maximum = top;
    }
    store(x, exp2(load(x)));
    for (int r = 0; r < count; ++r) {
        if (x[r] != 1.0f) rescale(rows[r], x[r]);
        highest[r] = x[kRowBlock + r];
    }
}

struct PageMass {
    F32x16 probabilities;
    float weights;  // NaN if a weight is
    float top;      // the largest weight
};

// Logits become weights (probability * value scale), in place.
template <bool kHides>
inline PageMass page_weights(const PageView& page, float maximum, float* x) {
    // A row that has seen nothing has maximum -inf, for which 0 stands in.
    const F32x16 anchor = set1(maximum == -kInfinity ? 0.0f : maximum), zero = set1(0.0f);
    F32x16 probabilities = zero, weights = zero, top = zero;
    for (int t = 0; t < kPageTokens; t += kLanes) {
        const F32x16 logits = load(x + t);
        F32x16 p = exp2(sub(logits, anchor)), w = mul(p, load(page.value_scales + t));
        if constexpr (kHides) {
            // Not a product: the scale of a hidden token may be NaN.
            const I32x16 hidden = equal(logits, set1(-kInfinity));
            p = select(hidden, zero, p);
            w = select(hidden, zero, w);
        }
        probabilities = add(probabilities, p);
        weights = add(weights, w);
        top = larger(w, top);
        store(x + t, w);
    }
    return {probabilities, sum(weights), largest(top)};
}

// Rounds weights to multiples of `step`. What rounding leaves over is given to the token 16 further
// on: sums stay exact. Less than half a unit goes on, so that weights of 0 (hidden tokens) stay 0.
inline void round_weights(const RowView& row, const float* weights, float step, I32x16* rounded) {
    const F32x16 inverse = set1(1.0f / step), half = set1(0.5f);
    F32x16 carry = mul(load(row.carry), inverse);
    // A page of larger units may have left more.
    carry = smaller(half, larger(sub(set1(0.0f), half), carry));
    for (int b = 0; b < kBlocks; ++b) {
        const F32x16 wanted = fma(load(weights + b * kLanes), inverse, carry);
        const F32x16 whole = nearest(wanted);
        carry = sub(wanted, whole);
        rounded[b] = to_ints(whole);
    }
    store(row.carry, mul(carry, set1(step)));
}

// The largest integer n with 2^n <= x; a negative one for all x < 1.
inline float power_below(float x) {
    return static_cast<float>((__builtin_bit_cast(std::int32_t, x) >> 23) - 127);
}

constexpr float kLeastWeight = 1e-33f;  // smaller ones change nothing; their inverse may be infinite

inline void store_coarse(const RowView& row, const float* weights, float top, int r,
                         Weights& stored) {
    stored.step[r] = (top > kLeastWeight ? top : kLeastWeight) / (Simd::kByteWeight - 0.5f);
    stored.fine_step[r] = 0.0f;
    I32x16 rounded[kBlocks];
    round_weights(row, weights, stored.step[r], rounded);
    std::uint8_t* coarse = reinterpret_cast<std::uint8_t*>(stored.operands + r * kPageTokens);
    for (int b = 0; b < kBlocks; ++b) store_bytes(coarse + b * kLanes, rounded[b]);
}

inline void store_fine(const RowView& row, const float* weights, float top, int r,
                       Weights& stored) {
    constexpr int kRange = Simd::kByteWeight + 1, kShift = kRange == 256 ? 8 : 7;
    stored.step[r] = (top > kLeastWeight ? top : kLeastWeight) / (Simd::kByteWeight - 0.5f);
    stored.fine_step[r] = stored.step[r] / kRange;
    stored.any_fine = true;
    I32x16 rounded[kBlocks];
    round_weights(row, weights, stored.fine_step[r], rounded);
    std::uint8_t* coarse = reinterpret_cast<std::uint8_t*>(stored.operands + r * kPageTokens);
    std::uint8_t* fine = reinterpret_cast<std::uint8_t*>(stored.fine + r * kPageTokens);
    for (int b = 0; b < kBlocks; ++b) {
        store_bytes(fine + b * kLanes, keep(rounded[b], kRange - 1));
        store_bytes(coarse + b * kLanes, shift_right<kShift>(rounded[b]));
    }
}

inline void store_wide(const RowView& row, const float* weights, const PageMass& mass, int r,
                        Weights& stored) {
    const float top = mass.top > kLeastWeight ? mass.top : kLeastWeight;
    const float by_top = top / (kWordOperand - 0.5f);
    const float by_sum = mass.weights / (kWordSum[1] - kPageTokens);
    stored.step[r] = by_sum > by_top ? by_sum : by_top;
    std::int32_t* operands = stored.operands + r * kPageTokens;
    I32x16 rounded[kBlocks];
    round_weights(row, weights, stored.step[r], rounded);
    for (int b = 0; b < kBlocks; ++b)
        store_words(reinterpret_cast<std::int16_t*>(operands + b * kLanes / 2),
                    swap_middle(rounded[b]));
}

template <Arithmetic kArithmetic>
inline void store_weights(const RowView& row, const float* weights, const PageMass& mass,
                          float highest, int r, Weights& stored) {
    stored.step[r] = 1.0f;
    if constexpr (kArithmetic == Arithmetic::floats) {
        for (int b = 0; b < kBlocks; ++b)
            store(stored.operands + r * kPageTokens + b * kLanes,
                  as<I32x16>(load(weights + b * kLanes)));
    } else if constexpr (kArithmetic == Arithmetic::words) {
        store_wide(row, weights, mass, r, stored);
    } else {
        const float total = sum(load(row.totals));
        *row.slack = power_below(total / kMattering);
        const bool peaked = total < kMattering * highest &&
                            sum(mass.probabilities) < kPeakedTokens * highest;
        if (peaked) store_fine(row, weights, mass.top, r, stored);
        else store_coarse(row, weights, mass.top, r, stored);
    }
    if (mass.weights != mass.weights) stored.step[r] = __builtin_nanf("");
}

inline bool is_plain(const PageView& page, const RowView* rows, int count) {
    for (int r = 0; r < count; ++r)
        if (*rows[r].slack < 0.0f || rows[r].softcap != 0.0f || hides_tokens(page, rows[r]))
            return false;
    F32x16 scales = set1(0.0f);
    for (int t = 0; t < kPageTokens; t += kLanes) scales = add(scales, load(page.value_scales + t));
    const float total = sum(scales);
    return total == total;  // no NaN
}

// `weigh` for the usual page of bytes: nothing is hidden, and no logit so far above the maximum that
// it would matter. So no maximum of lanes is waited for before the weights, and that of the row stays
// as it is: any anchor will do. False, and nothing done, where it is not.
inline bool weigh_plain(const PageView& page, const RowView* rows, int count, const float* scores,
                        Weights& stored) {
    if (!is_plain(page, rows, count)) return false;
    alignas(64) float weights[kRowBlock * kPageTokens];
    F32x16 totals[kRowBlock], tops[kRowBlock];
    F32x16 excess = set1(0.0f);
    for (int r = 0; r < count; ++r) {
        const F32x16 maximum = set1(*rows[r].maximum), factor = set1(rows[r].factor);
        const F32x16 offset = set1(rows[r].offset);
        totals[r] = load(rows[r].totals);
        tops[r] = set1(0.0f);
        F32x16 above = set1(0.0f);
        for (int t = 0; t < kPageTokens; t += kLanes) {
            const F32x16 dots = to_floats(as<I32x16>(load(scores + r * kPageTokens + t)));
            const F32x16 x = fma(dots, mul(load(page.key_scales + t), factor), offset);
            const F32x16 below = sub(x, maximum), p = exp2(below);
            above = larger(below, above);
            const F32x16 w = mul(p, load(page.value_scales + t));
            totals[r] = add(totals[r], p);
            tops[r] = larger(w, tops[r]);
            store(weights + r * kPageTokens + t, w);
        }
        excess = larger(sub(above, set1(*rows[r].slack)), excess);
    }
    if (largest(excess) > 0.0f) return false;
    for (int r = 0; r < count; ++r) {
        store(rows[r].totals, totals[r]);
        store_coarse(rows[r], weights + r * kPageTokens, largest(tops[r]), r, stored);
    }
    return true;
}

// One step of the online softmax of `count` rows; scores [rows, 64] are overwritten. Row by row
// would be one long chain of dependent operations, so each step does all rows.
template <Arithmetic kArithmetic>
void weigh(const PageView& page, const RowView* rows, int count, float* scores, Weights& stored) {
    stored.any_fine = false;
    if constexpr (kArithmetic == Arithmetic::bytes)
        if (weigh_plain(page, rows, count, scores, stored)) return;
    float peaks[kRowBlock] = {}, highest[kRowBlock];
    PageMass mass[kRowBlock];
    for (int r = 0; r < count; ++r)
        peaks[r] = page_logits<kArithmetic == Arithmetic::floats>(page, rows[r],
                                                                  scores + r * kPageTokens);
    raise_maxima(rows, count, peaks, highest);
    for (int r = 0; r < count; ++r) {
        const auto weights = hides_tokens(page, rows[r]) ? page_weights<true> : page_weights<false>;
        mass[r] = weights(page, *rows[r].maximum, scores + r * kPageTokens);
        store(rows[r].totals, add(load(rows[r].totals), mass[r].probabilities));
    }
    for (int r = 0; r < count; ++r)
        store_weights<kArithmetic>(rows[r], scores + r * kPageTokens, mass[r], highest[r], r,
                                   stored);
}

}  // namespace
}  // namespace sixfold
