// Products of some queries with a range of pages, and the best of them.
#pragma once

#include "attention/attention-inl.h"
#include "nearest/nearest.h"

namespace sixfold {
namespace {

struct NearestScratch {
    std::uint8_t* tile;
    std::int32_t* queries;  // [kMostQueries, query_stride]: operands
    std::int64_t query_stride;
    float *padded, *factor;
    std::int32_t *start, *products;
    std::int64_t bytes;

    NearestScratch(const Codec& codec, std::byte* memory) {
        std::int64_t used = 0;
        auto take = [&]<class T>(T*& pointer, std::int64_t count) {
            pointer = reinterpret_cast<T*>(memory + used);
            used += rounded_up(count * static_cast<std::int64_t>(sizeof(T)), kUnitBytes);
        };
        query_stride = rounded_up(codec.steps, kLanes);
        take(tile, codec.tile_bytes);
        take(queries, kMostQueries * query_stride);
        take(padded, padded_length(codec));
        take(factor, kMostQueries);
        take(start, kMostQueries);
        take(products, kManyRows * kPageTokens);
        bytes = used;
    }
};

std::int64_t nearest_scratch_bytes(const NearestTask& task) {
    return NearestScratch(*task.codec, nullptr).bytes;
}

// Whether the first of two is the worse one: the lower score, of equal ones the later vector.
inline bool worse(float score, std::int64_t slot, float other, std::int64_t other_slot) {
    return score < other || (score == other && slot > other_slot);
}

// Puts an entry where the hole at `i` leads down to, below worse ones.
inline void sink(Best& best, std::int64_t i, float score, std::int64_t slot) {
    for (std::int64_t child; (child = 2 * i + 1) < best.count; i = child) {
        if (child + 1 < best.count && worse(best.scores[child + 1], best.slots[child + 1],
                                            best.scores[child], best.slots[child]))
            ++child;
        if (!worse(best.scores[child], best.slots[child], score, slot)) break;
        best.scores[i] = best.scores[child];
        best.slots[i] = best.slots[child];
    }
    best.scores[i] = score;
    best.slots[i] = slot;
}

inline void rise(Best& best, float score, std::int64_t slot) {
    std::int64_t i = best.count++;
    for (std::int64_t parent; i > 0; i = parent) {
        parent = (i - 1) / 2;
        if (!worse(score, slot, best.scores[parent], best.slots[parent])) break;
        best.scores[i] = best.scores[parent];
        best.slots[i] = best.slots[parent];
    }
    best.scores[i] = score;
    best.slots[i] = slot;
}

// What a score must exceed. Later vectors lose against equal ones.
inline float bar(const Best& best, std::int64_t wanted) {
    return best.count < wanted ? -kInfinity : best.scores[0];
}

inline void offer(Best& best, std::int64_t wanted, float score, std::int64_t slot) {
    if (best.count < wanted)
        rise(best, score, slot);
    else if (score > best.scores[0])
        sink(best, 0, score, slot);
}

// One page: what scores are made of but for the products.
struct NearestPage {
    std::uint64_t allowed;
    std::int64_t first_slot;
    alignas(64) float scales[kPageTokens], offsets[kPageTokens];
};

inline void load_offsets(const NearestTask& task, std::int64_t page, float* offsets) {
    for (int t = 0; t < kPageTokens; t += kLanes) {
        const std::int64_t at = page * kPageTokens + t;
        F32x16 x = set1(0.0f);
        if (task.offset_kind == OffsetKind::half)
            x = load_half(static_cast<const std::uint16_t*>(task.offsets) + at);
        else if (task.offset_kind == OffsetKind::single)
            x = load(static_cast<const float*>(task.offsets) + at);
        store(offsets + t, x);
    }
}

// What makes scores of a query's products.
struct Scoring {
    float factor, weight, constant;
};

template <bool kFloats>
void keep_best(const NearestPage& page, const std::int32_t* products, const Scoring& scoring,
               std::int64_t wanted, Best& best) {
    alignas(64) float scores[kPageTokens];
    F32x16 most = set1(-kInfinity);
    for (int t = 0; t < kPageTokens; t += kLanes) {
        const I32x16 sum = load(products + t);
        const F32x16 x = mul(kFloats ? as<F32x16>(sum) : to_floats(sum), set1(scoring.factor));
        const F32x16 exact =
            fma(load(page.offsets + t), set1(scoring.weight), set1(scoring.constant));
        const F32x16 score = fma(x, load(page.scales + t), exact);
        store(scores + t, score);
        most = larger(score, most);
    }
    if (!(largest(most) > bar(best, wanted))) return;
    for (std::uint64_t left = page.allowed; left; left &= left - 1) {
        const int t = __builtin_ctzll(left);
        offer(best, wanted, scores[t], page.first_slot + t);
    }
}

static_assert(kManyRows >= kRowBlock && kMostQueries % kManyRows == 0);

// Products of up to kManyRows queries, from the first of them on.
void multiply_many(const NearestTask& task, const NearestScratch& scratch, int first) {
    for (int r = 0; r < kManyRows; ++r)
        for (int t = 0; t < kPageTokens; t += kLanes)
            store(scratch.products + r * kPageTokens + t, set1(scratch.start[first + r]));
    task.many->multiply({scratch.tile, task.codec->strip_stride, task.codec->steps,
                         scratch.queries + first * scratch.query_stride, scratch.query_stride,
                         scratch.products});
}

void nearest_in_pages(const NearestWork& work) {
    const NearestTask& task = *work.task;
    const Codec& codec = *task.codec;
    const NearestScratch scratch(codec, work.scratch);
    const Method method(codec, work.queries);
    clear_padded(codec, scratch.padded);
    for (int q = 0; q < work.queries; ++q)
        scratch.factor[q] = prepare_query(
            codec, task.query + (work.first_query + q) * codec.dim, scratch.padded,
            scratch.queries + q * scratch.query_stride, scratch.start + q);
    const bool many =
        task.many && codec.arithmetic == Arithmetic::bytes && work.queries > kRowBlock;
    if (many) task.many->begin(codec.steps);
    NearestPage page;
    for (std::int64_t p = work.first_page; p < work.last_page; ++p) {
        page.allowed = task.allowed[p];
        if (!page.allowed) continue;
        page.first_slot = p * kPageTokens;
        decode_scales(task.scales + p * kPageTokens, page.scales);
        load_offsets(task, p, page.offsets);
        const std::uint8_t* codes = task.codes + p * codec.page_bytes;
        const std::uint8_t* levels = method.levels(codes, scratch.tile);
        const std::uint8_t* next = p + 1 < work.last_page ? codes + codec.page_bytes : codes;
        for (int rows, q = 0; q < work.queries; q += rows) {
            rows = work.queries - q;
            if (many) {
                rows = rows < kManyRows ? rows : kManyRows;
                multiply_many(task, scratch, q);
            } else {
                rows = rows_at_once(rows);
                const Products products{levels,
                                        scratch.queries + q * scratch.query_stride,
                                        scratch.query_stride,
                                        scratch.start + q,
                                        scratch.products,
                                        nullptr,
                                        0,
                                        nullptr,
                                        next,
                                        q == 0 ? codec.page_bytes : 0};
                method.multiply<false>(rows)(codec, products);
            }
            for (int r = 0; r < rows; ++r) {
                const auto keep =
                    codec.arithmetic == Arithmetic::floats ? keep_best<true> : keep_best<false>;
                const std::int64_t query = work.first_query + q + r;
                keep(page, scratch.products + r * kPageTokens,
                     {scratch.factor[q + r], task.weight[query], task.constant[query]}, task.best,
                     work.best[q + r]);
            }
        }
    }
    if (many) task.many->end();
}

constexpr NearestKernels kNearestKernels{nearest_in_pages, nearest_scratch_bytes};

}  // namespace
}  // namespace sixfold
