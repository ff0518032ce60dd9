#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cached.h"
#include "dispatch.h"
#include "released.h"

namespace nb = nanobind;

namespace sixfold {
namespace {

// Addresses and sizes were checked by kernels/cached_attention/cpu.py; optional ones are 0.
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// batch, heads, kv_heads, queries, dtype, position, sliding window.
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, std::int64_t,
                         std::int64_t>;
// dim, order and rounds of the rotation, turns, factor, bits and axes of a symbol, centroids.
using Side = std::tuple<int, int, int, Address, Address, int, int, Address>;
// keys, values, count, first, start, stop.
using Tokens = std::tuple<Address, Address, std::int64_t, Address, Address, Address>;
// Key pages and scales, value pages and scales, slots, table, starts, lengths, pages, first.
using Pages = std::tuple<Address, Address, Address, Address, std::int64_t, Address, Address, Address,
                         std::int64_t, std::int64_t>;
// kind, address, strides of batch, head and query, columns, never.
using MaskArguments = std::tuple<int, Address, std::int64_t, std::int64_t, std::int64_t,
                                 std::int64_t, float>;

vectors::Rotation rotation_of(const Side& side) {
    const auto [dim, order, rounds, turns, factor, bits, axes, centroids] = side;
    return {dim, order, rounds, at<const float>(turns), at<const float>(factor)};
}

CodecKey codec_of(const Side& side, bool values) {
    const auto [dim, order, rounds, turns, factor, bits, axes, centroids] = side;
    return {dim, bits, axes, values, exact_wanted(), at<const float>(centroids)};
}

TokenSegment segment_of(const Tokens& tokens) {
    const auto [keys, values, count, first, start, stop] = tokens;
    return {at<const char>(keys), at<const char>(values), count, at<const std::int64_t>(first),
            at<const std::int64_t>(start), at<const std::int64_t>(stop)};
}

PageSegment segment_of(const Pages& pages) {
    const auto [key_pages, key_scales, value_pages, value_scales, slots, table, starts, lengths,
                count, first] = pages;
    return {{at<const std::uint8_t>(key_pages), at<const std::uint16_t>(key_scales),
             at<const std::uint8_t>(value_pages), at<const std::uint16_t>(value_scales), slots},
            at<const std::int64_t>(table), at<const std::int64_t>(starts),
            at<const std::int64_t>(lengths), count, first};
}

void cached_attention(const Shape& shape, Address query, Address out, const Side& keys,
                      const Side& values, const std::vector<Tokens>& tokens,
                      const std::vector<Pages>& pages, Address mean, Address channel_scale,
                      Address start, float scaling, const MaskArguments& mask, float softcap,
                      Address sink_logits, int threads) {
    CachedTask task{};
    int dtype;
    std::tie(task.batch, task.heads, task.kv_heads, task.queries, dtype, task.position,
             task.sliding_window) = shape;
    task.dtype = static_cast<vectors::Dtype>(dtype);
    task.query = at<const char>(query);
    task.out = at<char>(out);
    for (const Tokens& part : tokens) task.tokens.push_back(segment_of(part));
    for (const Pages& part : pages) task.pages.push_back(segment_of(part));
    task.keys = codec_of(keys, false);
    task.values = codec_of(values, true);
    task.key_rotation = rotation_of(keys);
    task.value_rotation = rotation_of(values);
    task.mean = at<const float>(mean);
    task.channel_scale = at<const float>(channel_scale);
    task.start = at<const std::int64_t>(start);
    task.scaling = scaling;
    Address mask_address;
    int kind;
    std::tie(kind, mask_address, task.mask_strides[0], task.mask_strides[1], task.mask_strides[2],
             task.mask_columns, task.never) = mask;
    task.mask_kind = static_cast<Mask>(kind);
    task.mask = at<const void>(mask_address);
    task.softcap = softcap;
    task.sink_logits = at<const float>(sink_logits);
    const Kernels& isa = kernels();
    released([&] {
        check_bounds(task);
        attend(isa, task, threads);
    });
}

}  // namespace

void bind_cached(nb::module_& m) {
    m.def("cached_attention", cached_attention,
          "Attention on a layer; see sixfold.kernels.cached_attention.cpu, which checks arguments.");
}

}  // namespace sixfold
