// Primitives of the attention kernels for any processor, in the vector extensions of GCC and Clang.
// See simd_avx512.h for the names.
#pragma once

#include <cstdint>

// Vectors wider than a register are passed in memory, between functions of one file.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace sixfold {
namespace {

typedef std::uint8_t U8Vector __attribute__((vector_size(64)));
typedef std::int16_t I16Vector __attribute__((vector_size(64)));
typedef std::int32_t I32Vector __attribute__((vector_size(64)));
typedef std::uint32_t U32Vector __attribute__((vector_size(64)));
typedef float F32Vector __attribute__((vector_size(64)));

struct U8x64 { U8Vector v; };
struct I32x16 { I32Vector v; };
struct F32x16 { F32Vector v; };
struct Lanes { I32Vector v; };

constexpr int kRowBlock = 4;
constexpr int kAccumulators = 4;
constexpr int kKeyFlip = 0;
// Two products are added in 16 bits: 2 * 127 * 127 fits.
constexpr int kByteWeight = 127;
// Half of the size of these kernels and of the time to compile them, for processors that few have.
constexpr bool kDirect = false;

template <class To, class From>
inline To as(From a) {
    return reinterpret_cast<To>(a);
}
template <class T>
inline T load_vector(const void* p) {
    T a;
    __builtin_memcpy(&a, p, sizeof(a));
    return a;
}

inline U8x64 load(const std::uint8_t* p) { return {load_vector<U8Vector>(p)}; }
inline void store(std::uint8_t* p, U8x64 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
inline U8x64 load_twice(const std::uint8_t* p) {
    std::uint8_t bytes[64];
    for (int i = 0; i < 2; ++i) __builtin_memcpy(bytes + 32 * i, p, 32);
    return load(bytes);
}
inline U8x64 load4(const std::uint8_t* p, const std::int32_t* offset) {
    std::uint8_t bytes[64];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(bytes + 16 * i, p + offset[i], 16);
    return load(bytes);
}
inline U8x64 shift_right(U8x64 a, I32x16 count) {
    return {as<U8Vector>(as<U32Vector>(a.v) >> as<U32Vector>(count.v))};
}
inline U8x64 rotate_right(U8x64 a, I32x16 count) {
    const U32Vector bits = as<U32Vector>(a.v), right = as<U32Vector>(count.v);
    return {as<U8Vector>((bits >> right) | (bits << ((32 - right) & 31)))};
}
inline U8x64 keep(U8x64 a, int byte) { return {a.v & static_cast<std::uint8_t>(byte)}; }
inline U8x64 merge(U8x64 a, U8x64 b, int byte) {
    return {keep(a, ~byte).v | keep(b, byte).v};
}
// Little-endian, like the storage format.
inline U8x64 even_words(U8x64 low, U8x64 high) {
    return {as<U8Vector>((as<I16Vector>(low.v) & 0x00FF) | (as<I16Vector>(high.v) << 8))};
}
inline U8x64 odd_words(U8x64 low, U8x64 high) {
    const I16Vector shifted = (as<I16Vector>(low.v) >> 8) & 0x00FF;
    return {as<U8Vector>(shifted | (as<I16Vector>(high.v) & static_cast<std::int16_t>(0xFF00)))};
}

template <int kBits>
struct Lookup {
    const std::uint8_t* table;

    Lookup(const std::uint8_t* entries, int) : table(entries) {}
    U8x64 operator()(U8x64 index) const {
        std::uint8_t bytes[64];
        store(bytes, index);
        for (std::uint8_t& byte : bytes) byte = table[byte];
        return load(bytes);
    }
};
constexpr bool kLookupIgnoresUpperBits = true;

inline I32x16 set1(std::int32_t x) { return {I32Vector{} + x}; }
inline I32x16 load(const std::int32_t* p) { return {load_vector<I32Vector>(p)}; }
inline void store(std::int32_t* p, I32x16 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
inline I32x16 add(I32x16 a, I32x16 b) { return {a.v + b.v}; }
template <int kCount>
inline I32x16 shift_right(I32x16 a) {
    return {as<I32Vector>(as<U32Vector>(a.v) >> kCount)};
}
inline I32x16 keep(I32x16 a, std::int32_t mask) { return {a.v & mask}; }
inline I32x16 swap_middle(I32x16 a) {
    I32x16 swapped = a;
    for (int i = 0; i < 16; i += 4) {
        swapped.v[i + 1] = a.v[i + 2];
        swapped.v[i + 2] = a.v[i + 1];
    }
    return swapped;
}
inline void store_bytes(std::uint8_t* p, I32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(a.v[i]);
}
inline void store_words(std::int16_t* p, I32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int16_t>(a.v[i]);
}

inline I32x16 add_pairs(I32x16 sum, I16Vector words) {
    const I32Vector pairs = as<I32Vector>(words);
    return {sum.v + (as<I32Vector>(as<U32Vector>(pairs) << 16) >> 16) + (pairs >> 16)};
}
inline I32x16 dot_keys(I32x16 sum, U8x64 levels, I32x16 query) {
    const I16Vector x = as<I16Vector>(levels.v), y = as<I16Vector>(query.v);
    return add_pairs(sum, ((x << 8) >> 8) * ((y << 8) >> 8) + (x >> 8) * (y >> 8));
}
inline I32x16 dot_values(I32x16 sum, U8x64 levels, I32x16 weights) {
    return dot_keys(sum, levels, weights);
}
inline I32x16 dot_words(I32x16 sum, U8x64 levels, I32x16 operand) {
    const I32Vector x = as<I32Vector>(levels.v), y = operand.v;
    return {sum.v + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16)};
}

inline F32x16 set1(float x) { return {F32Vector{} + x}; }
inline F32x16 load(const float* p) { return {load_vector<F32Vector>(p)}; }
inline void store(float* p, F32x16 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
inline F32x16 as_floats(U8x64 a) { return {as<F32Vector>(a.v)}; }
inline F32x16 as_floats(I32x16 a) { return {as<F32Vector>(a.v)}; }
inline U8x64 as_bytes(F32x16 a) { return {as<U8Vector>(a.v)}; }
inline I32x16 as_ints(F32x16 a) { return {as<I32Vector>(a.v)}; }
inline F32x16 to_floats(I32x16 a) { return {__builtin_convertvector(a.v, F32Vector)}; }
inline F32x16 load_half(const std::uint16_t* p) {
    I32Vector bits;
    for (int i = 0; i < 16; ++i) bits[i] = p[i];
    const I32Vector size = (bits & 0x7FFF) << 13, sign = (bits & 0x8000) << 16;
    // 2^112 moves the exponent's bias, and makes numbers of subnormal ones.
    const I32Vector finite = as<I32Vector>(as<F32Vector>(size) * 0x1p112f);
    const I32Vector special = size | 0x7F800000;
    return {as<F32Vector>(((bits & 0x7C00) == 0x7C00 ? special : finite) | sign)};
}
// To nearest even; good for |a| < 2^22, which is all that the kernels round.
inline I32x16 to_ints(F32x16 a) {
    const F32Vector shift = set1(0x1.8p23f).v;
    return {as<I32Vector>(a.v + shift) - as<I32Vector>(shift)};
}
inline F32x16 nearest(F32x16 a) { return to_floats(to_ints(a)); }
inline F32x16 add(F32x16 a, F32x16 b) { return {a.v + b.v}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {a.v - b.v}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {a.v * b.v}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {a.v / b.v}; }
// Not fused: without the instruction that would be a call a lane.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {a.v * b.v + c.v}; }
inline F32x16 magnitude(F32x16 a) { return {as<F32Vector>(as<I32Vector>(a.v) & 0x7FFFFFFF)}; }
inline F32x16 larger(F32x16 a, F32x16 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32x16 smaller(F32x16 a, F32x16 b) { return {a.v < b.v ? a.v : b.v}; }
inline float largest(F32x16 a) {
    float top = a.v[0];
    for (int i = 1; i < 16; ++i) top = a.v[i] > top ? a.v[i] : top;
    return top;
}
inline float sum(F32x16 a) {
    float lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = a.v[i] + a.v[i + 8];
    for (int width = 4; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}
// A whole number may also count as the one below, with a fraction of 1.
inline I32x16 whole(F32x16 x) { return to_ints(sub(x, set1(0.5f))); }
inline F32x16 fraction(F32x16 x) { return sub(x, to_floats(whole(x))); }
inline F32x16 times_power(F32x16 a, F32x16 x) {
    return {as<F32Vector>(as<I32Vector>(a.v) + (whole(x).v << 23))};
}
inline Lanes equal(F32x16 a, F32x16 b) { return {a.v == b.v}; }
inline F32x16 select(Lanes where, F32x16 a, F32x16 b) { return {where.v ? a.v : b.v}; }

}  // namespace
}  // namespace sixfold
