// Registers as GCC and Clang know them without intrinsics, and what is done with any of them.
//
// All of it has internal linkage and calls no library, as everything that kernels include.
#pragma once

#include <cstdint>

namespace sixfold {
namespace {

#define SIXFOLD_INLINE inline __attribute__((always_inline))

// The types of a register of so many bytes.
template <int kBytes>
struct Registers;

#define SIXFOLD_REGISTERS(bytes)                                                       \
    template <>                                                                        \
    struct Registers<bytes> {                                                          \
        typedef float f32 __attribute__((vector_size(bytes)));                         \
        typedef double f64 __attribute__((vector_size(bytes)));                        \
        typedef std::int32_t i32 __attribute__((vector_size(bytes)));                  \
        typedef std::uint32_t u32 __attribute__((vector_size(bytes)));                 \
        typedef std::int16_t i16 __attribute__((vector_size(bytes)));                  \
        typedef std::uint16_t u16 __attribute__((vector_size(bytes)));                 \
        typedef std::uint8_t u8 __attribute__((vector_size(bytes)));                   \
        typedef std::uint16_t half_u16 __attribute__((vector_size(bytes / 2)));        \
        typedef std::uint8_t half_u8 __attribute__((vector_size(bytes / 2)));          \
        typedef std::uint8_t quarter_u8 __attribute__((vector_size(bytes / 4)));       \
    }
SIXFOLD_REGISTERS(16);
SIXFOLD_REGISTERS(32);
SIXFOLD_REGISTERS(64);
#undef SIXFOLD_REGISTERS

using f32x4 = Registers<16>::f32;
using u32x4 = Registers<16>::u32;
using u16x4 = Registers<16>::half_u16;
using u8x16 = Registers<16>::u8;

template <class T>
SIXFOLD_INLINE T load_unaligned(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
SIXFOLD_INLINE void store_unaligned(void* p, T value) {
    __builtin_memcpy(p, &value, sizeof value);
}

template <class T>
SIXFOLD_INLINE T load_aligned(const void* p) {
    return load_unaligned<T>(__builtin_assume_aligned(p, sizeof(T)));
}

template <class T>
SIXFOLD_INLINE void store_aligned(void* p, T value) {
    store_unaligned(__builtin_assume_aligned(p, sizeof(T)), value);
}

template <class To, class From>
SIXFOLD_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// IEEE halves by integer operations; U is a vector of uint32, F its float32 twin.

template <class F, class U>
SIXFOLD_INLINE F half_to_float(U half) {
    const U magnitude = (half & 0x7fff) << 13;
    const U value = bits<U>(bits<F>(magnitude) * 0x1p112f);
    const U special = (U)(magnitude >= 0x0f800000) & 0x7f800000;
    return bits<F>(value | special | (half & 0x8000) << 16);
}

template <class F, class U>
SIXFOLD_INLINE U float_to_half(F x) {
    const U all = bits<U>(x), magnitude = all & 0x7fffffff;
    const U normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    // Adding 1/2 aligns the last bit with that of the smallest half, and rounds to even there.
    const U small = bits<U>(bits<F>(magnitude) + 0.5f) - 0x3f000000;
    const U large = magnitude > 0x7f800000 ? magnitude * 0 + 0x7e00 : magnitude * 0 + 0x7c00;
    const U finite = magnitude < 0x38800000 ? small : normal;
    return (magnitude < 0x47800000 ? finite : large) | (all >> 16 & 0x8000);
}

template <class F, class U>
SIXFOLD_INLINE U float_to_bfloat(F x) {
    const U all = bits<U>(x);
    const U rounded = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    return (all & 0x7fffffff) > 0x7f800000 ? all * 0 + 0x7fc0 : rounded;
}

// What is finite stays so: decoding may carry a number past the largest half it came from.
template <class F, class U>
SIXFOLD_INLINE F within_half(F x) {
    const U all = bits<U>(x), magnitude = all & 0x7fffffff;
    const U beyond = (U)(magnitude > 0x477fe000) & (U)(magnitude < 0x7f800000);
    return bits<F>((beyond & (0x477fe000 | (all & 0x80000000))) | (~beyond & all));
}

}  // namespace
}  // namespace sixfold
