// Sixteen lanes of 32 bits, or 64 bytes, in as many registers as that takes: what the attention
// kernels are written in. Included once by every kernels_<isa>.cpp, after its simd_<isa>.h.
#pragma once

#include "common/paged.h"

namespace sixfold {
namespace {

constexpr int kRowBlock = Simd::kRowBlock;
constexpr int kRegisters = kLanes / Simd::kWidth;

template <class T>
struct Wide {
    using Register = T;
    T v[kRegisters];
};
using U8x64 = Wide<Simd::u8>;
using I32x16 = Wide<Simd::i32>;  // also: lanes of all ones or none
using F32x16 = Wide<Simd::f32>;

// T of part(0), part(1), ... Not a loop: that would put the registers into memory.
template <class T, class Part>
SIXFOLD_INLINE T each(Part part) {
    if constexpr (kRegisters == 1) return {{part(0)}};
    else if constexpr (kRegisters == 2) return {{part(0), part(1)}};
    else return {{part(0), part(1), part(2), part(3)}};
}

// Bits as another type.
template <class To, class From>
SIXFOLD_INLINE To as(const From& a) {
    return each<To>([&](int i) { return bits<typename To::Register>(a.v[i]); });
}

template <class T, class E>
SIXFOLD_INLINE T load_wide(const E* p) {
    constexpr int kStep = Simd::kWidth * 4 / static_cast<int>(sizeof(E));
    return each<T>([&](int i) { return load_unaligned<typename T::Register>(p + i * kStep); });
}
template <class T, class E>
SIXFOLD_INLINE void store_wide(E* p, const T& a) {
    constexpr int kStep = Simd::kWidth * 4 / static_cast<int>(sizeof(E));
    for (int i = 0; i < kRegisters; ++i) store_unaligned(p + i * kStep, a.v[i]);
}

inline U8x64 load(const std::uint8_t* p) { return load_wide<U8x64>(p); }
inline void store(std::uint8_t* p, U8x64 a) { store_wide(p, a); }
// 32 bytes, twice.
inline U8x64 load_twice(const std::uint8_t* p) {
    return each<U8x64>([&](int i) { return Simd::load_twice(p, i); });
}
// Four pieces of 16 bytes.
inline U8x64 load_pieces(const std::uint8_t* p, const std::int32_t* offset) {
    constexpr int kStep = 4 / kRegisters;
    return each<U8x64>([&](int i) { return Simd::load_pieces(p, offset + i * kStep); });
}
// Every 32-bit lane by its own count, 0 to 31.
inline U8x64 shift_right(U8x64 a, I32x16 count) {
    return each<U8x64>([&](int i) { return Simd::shift_right(a.v[i], count.v[i]); });
}
inline U8x64 rotate_right(U8x64 a, I32x16 count) {
    return each<U8x64>([&](int i) { return Simd::rotate_right(a.v[i], count.v[i]); });
}
inline U8x64 keep(U8x64 a, int byte) {
    return each<U8x64>([&](int i) { return Simd::keep(a.v[i], byte); });
}
inline U8x64 merge(U8x64 a, U8x64 b, int byte) {
    return each<U8x64>([&](int i) { return Simd::merge(a.v[i], b.v[i], byte); });
}
inline U8x64 unite(U8x64 a, U8x64 b) {
    return each<U8x64>([&](int i) { return a.v[i] | b.v[i]; });
}
// 32-bit lanes of `low` with those of `high` above them, shifted by 0 to 31.
inline U8x64 funnel(U8x64 low, U8x64 high, int count) {
    return each<U8x64>([&](int i) { return Simd::funnel(low.v[i], high.v[i], count); });
}
// States of 4 coordinates of 16 tokens, and of 16 coordinates of 4 tokens: see simd.h.
template <int kHalfBits>
inline U8x64 key_windows(U8x64 lanes) {
    return each<U8x64>([&](int i) { return Simd::key_windows<kHalfBits>(lanes.v[i]); });
}
template <int kHalfBits>
inline U8x64 value_windows(const std::uint8_t* p) {
    if constexpr (kRegisters == 1) return {{Simd::value_windows<kHalfBits, 0>(p)}};
    else if constexpr (kRegisters == 2)
        return {{Simd::value_windows<kHalfBits, 0>(p), Simd::value_windows<kHalfBits, 1>(p)}};
    else
        return {{Simd::value_windows<kHalfBits, 0>(p), Simd::value_windows<kHalfBits, 1>(p),
                 Simd::value_windows<kHalfBits, 2>(p), Simd::value_windows<kHalfBits, 3>(p)}};
}
inline U8x64 even_words(U8x64 low, U8x64 high) {
    return each<U8x64>([&](int i) { return Simd::even_words(low.v[i], high.v[i]); });
}
inline U8x64 odd_words(U8x64 low, U8x64 high) {
    return each<U8x64>([&](int i) { return Simd::odd_words(low.v[i], high.v[i]); });
}
template <class Table>
inline U8x64 look_up_bytes(const Table& table, U8x64 index) {
    if constexpr (requires { table.look_up(index.v); }) {
        table.look_up(index.v);
        return index;
    } else {
        return each<U8x64>([&](int i) { return table(index.v[i]); });
    }
}

inline I32x16 set1(std::int32_t x) {
    return each<I32x16>([&](int) { return Simd::i32{} + x; });
}
inline I32x16 load(const std::int32_t* p) { return load_wide<I32x16>(p); }
inline void store(std::int32_t* p, I32x16 a) { store_wide(p, a); }
inline I32x16 add(I32x16 a, I32x16 b) {
    return each<I32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
template <int kCount>
inline I32x16 shift_right(I32x16 a) {
    return each<I32x16>([&](int i) {
        return bits<Simd::i32>(bits<Simd::u32>(a.v[i]) >> kCount);
    });
}
inline I32x16 keep(I32x16 a, std::int32_t mask) {
    return each<I32x16>([&](int i) { return a.v[i] & mask; });
}
inline I32x16 swap_middle(I32x16 a) {
    return each<I32x16>([&](int i) { return Simd::swap_middle(a.v[i]); });
}
inline void store_bytes(std::uint8_t* p, I32x16 a) { Simd::store_bytes(p, a.v); }
inline void store_words(std::int16_t* p, I32x16 a) { Simd::store_words(p, a.v); }

inline I32x16 dot_keys(I32x16 sum, U8x64 levels, I32x16 query) {
    return each<I32x16>([&](int i) { return Simd::dot_keys(sum.v[i], levels.v[i], query.v[i]); });
}
inline I32x16 dot_values(I32x16 sum, U8x64 levels, I32x16 weights) {
    return each<I32x16>([&](int i) {
        return Simd::dot_values(sum.v[i], levels.v[i], weights.v[i]);
    });
}
inline I32x16 dot_words(I32x16 sum, U8x64 levels, I32x16 operand) {
    return each<I32x16>([&](int i) {
        return Simd::dot_words(sum.v[i], levels.v[i], operand.v[i]);
    });
}

inline F32x16 set1(float x) {
    return each<F32x16>([&](int) { return Simd::set(x); });
}
inline F32x16 load(const float* p) { return load_wide<F32x16>(p); }
inline void store(float* p, F32x16 a) { store_wide(p, a); }
inline F32x16 load_half(const std::uint16_t* p) {
    return each<F32x16>([&](int i) { return Simd::load_half(p + i * Simd::kWidth); });
}
inline F32x16 to_floats(I32x16 a) {
    return each<F32x16>([&](int i) { return __builtin_convertvector(a.v[i], Simd::f32); });
}
inline I32x16 to_ints(F32x16 a) {  // to nearest even
    return each<I32x16>([&](int i) { return Simd::to_ints(a.v[i]); });
}
inline F32x16 nearest(F32x16 a) {
    return each<F32x16>([&](int i) { return Simd::nearest(a.v[i]); });
}
inline F32x16 add(F32x16 a, F32x16 b) {
    return each<F32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
    return each<F32x16>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
    return each<F32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
    return each<F32x16>([&](int i) { return a.v[i] / b.v[i]; });
}
// a·b + c, fused where there is an instruction for it.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return each<F32x16>([&](int i) { return Simd::multiply_add(c.v[i], a.v[i], b.v[i]); });
}
inline F32x16 magnitude(F32x16 a) {
    return each<F32x16>([&](int i) { return Simd::abs(a.v[i]); });
}
// `b` where either is NaN, in both.
inline F32x16 larger(F32x16 a, F32x16 b) {
    return each<F32x16>([&](int i) { return Simd::max(a.v[i], b.v[i]); });
}
inline F32x16 smaller(F32x16 a, F32x16 b) {
    return each<F32x16>([&](int i) { return Simd::min(a.v[i], b.v[i]); });
}
// x - floor(x), and a * 2^floor(x).
inline F32x16 fraction(F32x16 x) {
    return each<F32x16>([&](int i) { return Simd::fraction(x.v[i]); });
}
inline F32x16 times_power(F32x16 a, F32x16 x) {
    return each<F32x16>([&](int i) { return Simd::times_power(a.v[i], x.v[i]); });
}
inline I32x16 equal(F32x16 a, F32x16 b) {
    return each<I32x16>([&](int i) { return a.v[i] == b.v[i]; });
}
inline F32x16 select(I32x16 where, F32x16 a, F32x16 b) {
    return each<F32x16>([&](int i) { return where.v[i] ? a.v[i] : b.v[i]; });
}

// All registers joined to one, by halves.
template <class Join>
SIXFOLD_INLINE Simd::f32 joined(F32x16 a, Join join) {
    for (int half = kRegisters / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a.v[i] = join(a.v[2 * i], a.v[2 * i + 1]);
    return a.v[0];
}
inline float largest(F32x16 a) {
    return Simd::largest(joined(a, [](Simd::f32 x, Simd::f32 y) { return Simd::max(x, y); }));
}
inline float sum(F32x16 a) {
    return Simd::sum(joined(a, [](Simd::f32 x, Simd::f32 y) { return x + y; }));
}

}  // namespace
}  // namespace sixfold
