// Rows of operands times a tile of levels.
#pragma once

#include "attention/attention.h"
#include "isa/wide.h"

namespace sixfold {
namespace {

// Sums must be registers: loops over them are unrolled whatever the compiler thinks of their size.
#define SIXFOLD_UNROLL _Pragma("GCC unroll 16")

// What to multiply for up to kRowBlock rows; `stride`s count elements.
struct Products {
    const std::uint8_t* tile;      // or the page itself, see direct-inl.h
    const std::int32_t* operands;  // [rows, steps]: 4 bytes, 2 words or a float a step
    std::int64_t operand_stride;
    const std::int32_t* start;  // [rows]: what sums begin with (bytes of keys)
    std::int32_t* scores;       // [rows, 64] of keys, sums as they are
    float* out;                 // [rows, strips * 16] of values, to which step * sum is added
    std::int64_t out_stride;
    const float* step;  // [rows]
    // What to fetch meanwhile: the same side of the next page.
    const std::uint8_t* next;
    std::int64_t next_bytes;
};

template <Arithmetic kArithmetic, bool kValues>
inline I32x16 multiply_add(I32x16 sum, U8x64 levels, const std::int32_t* operand) {
    if constexpr (kArithmetic == Arithmetic::floats) {
        const F32x16 x = as<F32x16>(set1(*operand));
        return as<I32x16>(fma(as<F32x16>(levels), x, as<F32x16>(sum)));
    } else if constexpr (kArithmetic == Arithmetic::words) {
        return dot_words(sum, levels, set1(*operand));
    } else if constexpr (kValues) {
        return dot_values(sum, levels, set1(*operand));
    } else {
        return dot_keys(sum, levels, set1(*operand));
    }
}

// As many strips at once as registers hold sums for, but no more than a page of keys has.
constexpr int strips_at_once(int rows) {
    return Simd::kAccumulators / rows >= 4 ? 4 : Simd::kAccumulators / rows >= 2 ? 2 : 1;
}

// Fetches the next page while the sums of this one are made. Spread evenly: a burst of misses would
// hold up the loads that have their data at hand. Into the second-level cache: the first is full.
class Fetch {
public:
    // For a loop of `steps` that makes `strips` of `all` strips, from `first` on.
    Fetch(const Products& p, int first, int strips, int all, int steps)
        : at_(p.next + p.next_bytes * first / all), bytes_(p.next_bytes * strips / all / steps) {}
    void next() {
        for (std::int64_t line = 0; line < bytes_; line += kUnitBytes)
            __builtin_prefetch(at_ + line, 0, 2);
        at_ += bytes_;
    }

private:
    const std::uint8_t* at_;
    std::int64_t bytes_;
};

template <Arithmetic kArithmetic, bool kValues>
inline void finish_sum(const Products& p, int r, int strip, I32x16 sum) {
    if constexpr (!kValues) {
        store(p.scores + r * kPageTokens + strip * kLanes, sum);
    } else {
        float* out = p.out + r * p.out_stride + strip * kLanes;
        const F32x16 x = kArithmetic == Arithmetic::floats ? as<F32x16>(sum) : to_floats(sum);
        store(out, fma(x, set1(p.step[r]), load(out)));
    }
}

template <Arithmetic kArithmetic, bool kValues, int kRows, int kStrips>
inline void multiply_strips(const Codec& codec, const Products& p, int strip) {
    I32x16 sums[kRows][kStrips];
    for (int r = 0; r < kRows; ++r) {
        const bool offset = kArithmetic == Arithmetic::bytes && !kValues;
        for (int s = 0; s < kStrips; ++s) sums[r][s] = set1(offset ? p.start[r] : 0);
    }
    const std::uint8_t* levels = p.tile + strip * codec.strip_stride;
    Fetch fetch(p, strip, kStrips, codec.strips, codec.steps);
    for (int k = 0; k < codec.steps; ++k, levels += codec.step_stride) {
        fetch.next();
        SIXFOLD_UNROLL
        for (int s = 0; s < kStrips; ++s) {
            const U8x64 level = load(levels + s * codec.strip_stride);
            SIXFOLD_UNROLL
            for (int r = 0; r < kRows; ++r)
                sums[r][s] = multiply_add<kArithmetic, kValues>(
                    sums[r][s], level, p.operands + r * p.operand_stride + k);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int s = 0; s < kStrips; ++s)
            finish_sum<kArithmetic, kValues>(p, r, strip + s, sums[r][s]);
}

template <Arithmetic kArithmetic, bool kValues, int kRows>
void multiply(const Codec& codec, const Products& p) {
    constexpr int kStrips = strips_at_once(kRows);
    int strip = 0;
    for (; strip + kStrips <= codec.strips; strip += kStrips)
        multiply_strips<kArithmetic, kValues, kRows, kStrips>(codec, p, strip);
    for (; strip < codec.strips; ++strip)
        multiply_strips<kArithmetic, kValues, kRows, 1>(codec, p, strip);
}

// So many, and fewer, are multiplied straight from the codes (direct-inl.h).
constexpr int kFewRows = 4;

using Multiply = void (*)(const Codec&, const Products&);

// How many of `left` rows to multiply at once: each number is code of its own, so not every one.
inline int rows_at_once(int left) {
    return left >= kRowBlock ? kRowBlock : left < kFewRows ? left : kFewRows;
}

// `then`, for a number of up to kFewRows, and for any that rows_at_once gives.
template <class Then>
Multiply of_few_rows(int rows, Then then) {
    switch (rows) {
        case 1: return then.template operator()<1>();
        case 2: return then.template operator()<2>();
        case 3: return then.template operator()<3>();
        default: return then.template operator()<kFewRows>();
    }
}
template <class Then>
Multiply of_rows(int rows, Then then) {
    return rows > kFewRows ? then.template operator()<kRowBlock>() : of_few_rows(rows, then);
}

template <Arithmetic kArithmetic, bool kValues>
Multiply multiplier(int rows) {
    return of_rows(rows, []<int kRows>() -> Multiply { return multiply<kArithmetic, kValues, kRows>; });
}

template <bool kValues>
Multiply multiplier(Arithmetic arithmetic, int rows) {
    switch (arithmetic) {
        case Arithmetic::bytes: return multiplier<Arithmetic::bytes, kValues>(rows);
        case Arithmetic::words: return multiplier<Arithmetic::words, kValues>(rows);
        default: return multiplier<Arithmetic::floats, kValues>(rows);
    }
}

}  // namespace
}  // namespace sixfold
