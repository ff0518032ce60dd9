// One function per file of bindings, which module.cpp calls, and the groups of arguments they share:
// kernels/*/cpu.py have checked what they make of tensors.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <cmath>
#include <cstdint>
#include <tuple>

#include "attention/attention.h"
#include "vectors/vectors.h"

namespace sixfold {

void bind_vectors(nanobind::module_& m);
void bind_trellis(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_nearest(nanobind::module_& m);

using Address = std::uintptr_t;  // 0: no such tensor
using Count = std::int64_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// (dim, order, rounds, turns, factor)
using RotationGroup = std::tuple<int, int, int, Address, Address>;
// (dim, symbol bits, paired, layout, codebook)
using CodeGroup = std::tuple<int, int, bool, int, Address>;
// Twice the bits a coordinate of a trellis, 0 of a codebook.
using PageCode = std::tuple<CodeGroup, int>;
// (address, strides of slots and heads in elements)
using PoolGroup = std::tuple<Address, Count, Count>;
// (address, dtype, strides of batch, heads and tokens)
using PagedGroup = std::tuple<Address, int, Count, Count, Count>;
// (codes, scales, how many slots, slots, batch, pages, heads)
using PageGroup = std::tuple<PoolGroup, PoolGroup, Count, Address, Count, Count, Count>;
// (mean, channel scale)
using AffineGroup = std::tuple<Address, Address>;

// Reads the environment: the GIL is held.
CodecKey codec_of(const PageCode& code);

inline vectors::Rotation rotation_of(const RotationGroup& group) {
    const auto [dim, order, rounds, turns, factor] = group;
    return {dim, order, rounds, at<const float>(turns), at<const float>(factor)};
}

template <class T>
PoolTensor<T> tensor_of(const PoolGroup& group) {
    const auto [address, slot_stride, head_stride] = group;
    return {at<T>(address), slot_stride, head_stride};
}

inline vectors::PagedVectors paged_of(const PagedGroup& group) {
    const auto [address, dtype, batch, head, token] = group;
    return {at<char>(address), batch, head, token, static_cast<vectors::Dtype>(dtype)};
}

inline vectors::Pages pages_of(const PageGroup& group) {
    const auto [codes, scales, count, slots, batch, pages, heads] = group;
    const vectors::Pages found{tensor_of<std::uint8_t>(codes), tensor_of<std::uint16_t>(scales),
                               at<const Count>(slots), batch, pages, heads};
    vectors::check_slots(found, count);
    return found;
}

inline vectors::Affine affine_of(const AffineGroup& group) {
    return {at<const float>(std::get<0>(group)), at<const float>(std::get<1>(group))};
}

inline float shrink_of(const vectors::Rotation& r) {
    return static_cast<float>(std::pow(r.dim, -r.rounds / 2.0));
}

inline vectors::VectorArray array_of(Address address, Count n, int dim, int dtype) {
    const Count size = dtype == static_cast<int>(vectors::Dtype::f32) ? 4 : 2;
    return {at<char>(address), n, dim * size, static_cast<vectors::Dtype>(dtype)};
}

}  // namespace sixfold
