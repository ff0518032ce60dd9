#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#include "python/bindings.h"
#include "attention/cached.h"
#include "isa/dispatch.h"
#include "python/released.h"

namespace nb = nanobind;

namespace sixfold {
namespace {

// Read at every call: tests and users switch it while the process runs.
bool exact_wanted() {
    const char* value = std::getenv("SIXFOLD_CPU_EXACT");
    return value && *value && std::string_view(value) != "0";
}

// Codes and scales of keys, the same of values, and how many slots there are.
using Pool = std::tuple<PoolGroup, PoolGroup, PoolGroup, PoolGroup, Count>;
// Pool, slots, starts, lengths, pages, stride of starts and lengths, first.
using Pages = std::tuple<Pool, Address, Address, Address, Count, Count, Count>;
// Address, strides of rows, heads and tokens in bytes.
using Vectors = std::tuple<Address, Count, Count, Count>;
// keys, values, rows, tokens, first, start, stop, slots.
using Tokens = std::tuple<Vectors, Vectors, Count, Count, Address, Address, Address, Address>;
using Side = std::tuple<RotationGroup, PageCode>;
// mean, channel scale, maps, map index.
using KeyMap = std::tuple<Address, Address, Count, Address>;
// kind, address, strides of batch, head and query, columns, never.
using MaskGroup = std::tuple<int, Address, Count, Count, Count, Count, float>;

PagePool pool_of(const Pool& pool) {
    const auto& [keys, key_scales, values, value_scales, slots] = pool;
    return {tensor_of<const std::uint8_t>(keys), tensor_of<const std::uint16_t>(key_scales),
            tensor_of<const std::uint8_t>(values), tensor_of<const std::uint16_t>(value_scales),
            slots};
}

PageSegment segment_of(const Pages& pages) {
    const auto& [pool, slots, starts, lengths, count, stride, first] = pages;
    return {pool_of(pool), at<const Count>(slots), at<const Count>(starts),
            at<const Count>(lengths), count, stride, first};
}

TokenSegment segment_of(const Tokens& tokens) {
    const auto& [keys, values, rows, count, first, start, stop, slots] = tokens;
    const auto vectors = [](const Vectors& group) -> TokenSegment::Vectors {
        const auto [address, row, head, token] = group;
        return {at<const char>(address), row, head, token};
    };
    return {vectors(keys), vectors(values), rows, count, at<const Count>(first),
            at<const Count>(start), at<const Count>(stop), at<const Count>(slots)};
}

template <class Task>
void set_mask(Task& task, const MaskGroup& mask) {
    const auto [kind, address, batch, head, query, columns, never] = mask;
    task.mask_kind = static_cast<Mask>(kind);
    task.mask = at<const void>(address);
    task.mask_strides[0] = batch;
    task.mask_strides[1] = head;
    task.mask_strides[2] = query;
    task.mask_columns = columns;
    task.never = never;
}

// batch, kv_heads, rows, queries.
using PageShape = std::tuple<Count, Count, Count, Count>;

void page_attention(const PageShape& shape, Address query, const Pages& pages,
                    const PageCode& keys, const PageCode& values, Address first_token,
                    Address offset, const MaskGroup& mask, float softcap, Address out, Address lse,
                    int threads) {
    const PageSegment segment = segment_of(pages);
    const std::vector<std::int32_t> page_pool(segment.pages, 0);
    AttentionTask task{};
    std::tie(task.batch, task.kv_heads, task.rows, task.queries) = shape;
    task.pages = segment.pages;
    task.query = at<const float>(query);
    task.keys.key = codec_of(keys);
    task.values.key = codec_of(values);
    task.pools = &segment.pool;
    task.page_pool = page_pool.data();
    task.slots = segment.slots;
    task.starts = segment.starts;
    task.lengths = segment.lengths;
    task.page_stride = segment.page_stride;
    task.first_token = at<const Count>(first_token);
    task.logit_offset = at<const float>(offset);
    set_mask(task, mask);
    task.softcap = softcap;
    task.out = at<float>(out);
    task.lse = at<float>(lse);
    const Kernels& isa = kernels();
    released([&] {
        check_bounds(task);
        attend(isa.attention, task, threads);
    });
}

// batch, heads, kv_heads, queries, dtype, sliding window.
using LayerShape = std::tuple<Count, Count, Count, Count, int, Count>;

void layer_attention(const LayerShape& shape, Address query, Address out,
                      const std::vector<Tokens>& tokens, const std::vector<Pages>& pages,
                      const Side& keys, const Side& values, const KeyMap& key_map,
                      Address position, Address start, float scaling, const MaskGroup& mask,
                      float softcap, Address sink_logits, int threads) {
    CachedTask task{};
    int dtype;
    std::tie(task.batch, task.heads, task.kv_heads, task.queries, dtype, task.sliding_window) =
        shape;
    task.dtype = static_cast<vectors::Dtype>(dtype);
    task.query = at<const char>(query);
    task.out = at<char>(out);
    for (const Tokens& part : tokens) task.tokens.push_back(segment_of(part));
    for (const Pages& part : pages) task.pages.push_back(segment_of(part));
    task.key_rotation = rotation_of(std::get<0>(keys));
    task.value_rotation = rotation_of(std::get<0>(values));
    task.keys = codec_of(std::get<1>(keys));
    task.values = codec_of(std::get<1>(values));
    const auto [mean, channel_scale, maps, map_index] = key_map;
    task.mean = at<const float>(mean);
    task.channel_scale = at<const float>(channel_scale);
    task.maps = maps;
    task.map_index = at<const Count>(map_index);
    task.position = at<const Count>(position);
    task.start = at<const Count>(start);
    task.scaling = scaling;
    set_mask(task, mask);
    task.softcap = softcap;
    task.sink_logits = at<const float>(sink_logits);
    const Kernels& isa = kernels();
    released([&] {
        check_bounds(task);
        attend(isa, task, threads);
    });
}

}  // namespace

CodecKey codec_of(const PageCode& code) {
    const auto& [group, half_bits] = code;
    const auto [dim, bits, paired, layout, centroids] = group;
    const bool values = static_cast<vectors::Layout>(layout) == vectors::Layout::value;
    return {dim, bits, 1 + paired, half_bits, values, exact_wanted(), at<const float>(centroids)};
}

void bind_attention(nb::module_& m) {
    m.def("page_attention", page_attention);
    m.def("attention", layer_attention);
}

}  // namespace sixfold
