// Scores of a page become weights of its values: one step of the online softmax. Included once by
// every kernels_<isa>.cpp.
#pragma once

#include "attention.h"
#include "attention_math-inl.h"

namespace sixfold {
namespace {

constexpr int kBlocks = kPageTokens / kLanes;
// A page with fewer tokens than this in effect gets a second byte of weights, if it has more than
// one part in kMattering of what the row has seen: errors of rounding to one byte would not average
// out. Measured: README.md.
constexpr float kPeakedTokens = kByteWeight == 255 ? 4.0f : 12.0f;
constexpr float kMattering = kByteWeight == 255 ? 16.0f : 64.0f;

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
    float *maximum, *total;
    float* out;
    int out_length;
    float* carry;  // [16]: what rounding weights to 8 bits has left over, see README.md
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
        const F32x16 dots = kExact ? sums : to_floats(as_ints(sums));
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
    *row.total *= by;
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
    store(x, exp2_negative(load(x)));
    for (int r = 0; r < count; ++r) {
        if (x[r] != 1.0f) rescale(rows[r], x[r]);
        highest[r] = x[kRowBlock + r];
    }
}

struct PageMass {
    float probabilities;
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
        F32x16 p = exp2_negative(sub(logits, anchor)), w = mul(p, load(page.value_scales + t));
        if constexpr (kHides) {
            // Not a product: the scale of a hidden token may be NaN.
            const Lanes hidden = equal(logits, set1(-kInfinity));
            p = select(hidden, zero, p);
            w = select(hidden, zero, w);
        }
        probabilities = add(probabilities, p);
        weights = add(weights, w);
        top = larger(w, top);
        store(x + t, w);
    }
    return {sum(probabilities), sum(weights), largest(top)};
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

template <Arithmetic kArithmetic>
inline void store_weights(const RowView& row, const float* weights, const PageMass& mass,
                          float highest, int r, Weights& stored) {
    std::int32_t* operands = stored.operands + r * kPageTokens;
    stored.step[r] = 1.0f;
    stored.fine_step[r] = 0.0f;
    // Weights this small change nothing, and their inverse could be infinite.
    const float top = mass.top > 1e-30f ? mass.top : 1e-30f;
    I32x16 rounded[kBlocks];
    if constexpr (kArithmetic == Arithmetic::floats) {
        for (int b = 0; b < kBlocks; ++b)
            store(operands + b * kLanes, as_ints(load(weights + b * kLanes)));
    } else if constexpr (kArithmetic == Arithmetic::words) {
        const float by_top = top / (kWordOperand - 0.5f);
        const float by_sum = mass.weights / (kWordSum[1] - kPageTokens);
        stored.step[r] = by_sum > by_top ? by_sum : by_top;
        round_weights(row, weights, stored.step[r], rounded);
        for (int b = 0; b < kBlocks; ++b)
            store_words(reinterpret_cast<std::int16_t*>(operands + b * kLanes / 2),
                        swap_middle(rounded[b]));
    } else {
        constexpr int kRange = kByteWeight + 1, kShift = kRange == 256 ? 8 : 7;
        const bool peaked = mass.probabilities < kPeakedTokens * highest &&
                            *row.total < kMattering * highest;
        stored.step[r] = top / (kByteWeight - 0.5f);
        if (peaked) stored.fine_step[r] = stored.step[r] / kRange;
        stored.any_fine = stored.any_fine || peaked;
        round_weights(row, weights, peaked ? stored.fine_step[r] : stored.step[r], rounded);
        std::uint8_t* coarse = reinterpret_cast<std::uint8_t*>(operands);
        std::uint8_t* fine = reinterpret_cast<std::uint8_t*>(stored.fine + r * kPageTokens);
        for (int b = 0; b < kBlocks; ++b) {
            store_bytes(fine + b * kLanes, peaked ? keep(rounded[b], kRange - 1) : set1(0));
            store_bytes(coarse + b * kLanes, peaked ? shift_right<kShift>(rounded[b]) : rounded[b]);
        }
    }
    if (mass.weights != mass.weights) stored.step[r] = __builtin_nanf("");
}

// One step of the online softmax of `count` rows; scores [rows, 64] are overwritten. Row by row
// would be one long chain of dependent operations, so each step does all rows.
template <Arithmetic kArithmetic>
void weigh(const PageView& page, const RowView* rows, int count, float* scores, Weights& stored) {
    float peaks[kRowBlock], highest[kRowBlock];
    PageMass mass[kRowBlock];
    for (int r = 0; r < count; ++r)
        peaks[r] = page_logits<kArithmetic == Arithmetic::floats>(page, rows[r],
                                                                  scores + r * kPageTokens);
    raise_maxima(rows, count, peaks, highest);
    for (int r = 0; r < count; ++r) {
        const auto weights = hides_tokens(page, rows[r]) ? page_weights<true> : page_weights<false>;
        mass[r] = weights(page, *rows[r].maximum, scores + r * kPageTokens);
        *rows[r].total += mass[r].probabilities;
    }
    stored.any_fine = false;
    for (int r = 0; r < count; ++r)
        store_weights<kArithmetic>(rows[r], scores + r * kPageTokens, mass[r], highest[r], r,
                                   stored);
}

}  // namespace
}  // namespace sixfold
