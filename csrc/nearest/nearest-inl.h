// Products of some queries with a range of pages, and the best of them.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "attention/attention-inl.h"
#include "nearest/nearest.h"

namespace sixfold {
namespace {

// What a part takes. Queries are operands [kMostQueries, query_stride].
struct PartScratch {
    std::uint8_t* tile;
    std::int32_t* queries;
    std::int64_t query_stride;
    float* factor;
    std::int32_t* start;
};

struct NearestScratch {
    std::int64_t bytes = 0;
    float* padded;
    std::int32_t* products;  // [kManyRows, 64]
    float* sums;             // [kMostQueries, 64]; of one part there are none

    NearestScratch(const NearestTask& task, std::byte* memory) : memory_(memory) {
        std::int64_t padded_floats = 0;
        for (const NearestPart& part : task.parts)
            padded_floats = std::max(padded_floats, padded_length(*part.codec));
        take(padded, padded_floats);
        take(products, kManyRows * kPageTokens);
        take(sums, task.parts.size() > 1 ? kMostQueries * kPageTokens : 0);
    }
    // The next part's: asked for in order.
    PartScratch part(const Codec& codec) {
        PartScratch made{};
        made.query_stride = rounded_up(codec.steps, kLanes);
        take(made.tile, codec.tile_bytes);
        take(made.queries, kMostQueries * made.query_stride);
        take(made.factor, kMostQueries);
        take(made.start, kMostQueries);
        return made;
    }

private:
    template <class T>
    void take(T*& pointer, std::int64_t count) {
        pointer = reinterpret_cast<T*>(memory_ + bytes);
        bytes += rounded_up(count * static_cast<std::int64_t>(sizeof(T)), kUnitBytes);
    }

    std::byte* memory_;
};

std::int64_t nearest_scratch_bytes(const NearestTask& task) {
    NearestScratch scratch(task, nullptr);
    for (const NearestPart& part : task.parts) scratch.part(*part.codec);
    return scratch.bytes;
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

inline float floor_of(const Best& best) {
    return best.floor ? best.floor->load(std::memory_order_relaxed) : -kInfinity;
}

// Lets others know what `wanted` vectors of these reach.
inline void raise_floor(const Best& best, std::int64_t wanted) {
    if (!best.floor || best.count < wanted) return;
    float known = best.floor->load(std::memory_order_relaxed);
    while (known < best.scores[0] &&
           !best.floor->compare_exchange_weak(known, best.scores[0], std::memory_order_relaxed)) {
    }
}

inline void offer(Best& best, std::int64_t wanted, float score, std::int64_t slot) {
    if (best.count < wanted)
        rise(best, score, slot);
    else if (score > best.scores[0])
        sink(best, 0, score, slot);
}

// One page: what is added to the sums of the parts.
struct NearestPage {
    std::uint64_t allowed;
    std::int64_t first_slot;
    alignas(64) float offsets[kPageTokens];
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
F32x16 scaled(const std::int32_t* products, float factor) {
    const I32x16 sum = load(products);
    return mul(kFloats ? as<F32x16>(sum) : to_floats(sum), set1(factor));
}

// Adds what a part has of a query's scores to `sums`, or sets those.
template <bool kFloats>
void add_part(const std::int32_t* products, float factor, const float* scales, bool sets,
              float* sums) {
    for (int t = 0; t < kPageTokens; t += kLanes) {
        const F32x16 before = sets ? set1(0.0f) : load(sums + t);
        store(sums + t, fma(scaled<kFloats>(products + t, factor), load(scales + t), before));
    }
}

// With what the last part, or the only one, adds to `sums`, which may be null.
template <bool kFloats>
void keep_best(const NearestPage& page, const std::int32_t* products, const float* scales,
               const float* sums, const Scoring& scoring, std::int64_t wanted, Best& best) {
    alignas(64) float scores[kPageTokens];
    F32x16 most = set1(-kInfinity);
    for (int t = 0; t < kPageTokens; t += kLanes) {
        F32x16 exact = fma(load(page.offsets + t), set1(scoring.weight), set1(scoring.constant));
        if (sums) exact = add(exact, load(sums + t));
        const F32x16 score =
            fma(scaled<kFloats>(products + t, scoring.factor), load(scales + t), exact);
        store(scores + t, score);
        most = larger(score, most);
    }
    const float floor = floor_of(best);
    if (!(largest(most) > bar(best, wanted)) || largest(most) < floor) return;
    for (std::uint64_t left = page.allowed; left; left &= left - 1) {
        const int t = __builtin_ctzll(left);
        // Equal ones may come first: slots decide.
        if (!(scores[t] < floor)) offer(best, wanted, scores[t], page.first_slot + t);
    }
    raise_floor(best, wanted);
}

static_assert(kManyRows >= kRowBlock && kMostQueries % kManyRows == 0);

// One part of the vectors, and the queries' coordinates of it.
class PartProducts {
public:
    PartProducts(const NearestWork& work, const NearestPart& part, const float* query,
                 NearestScratch& scratch)
        : codec_(*part.codec), part_(part), scratch_(scratch.part(codec_)),
          method_(codec_, work.queries),
          many_(codec_.arithmetic == Arithmetic::bytes && work.queries > kRowBlock ? work.task->many
                                                                                   : nullptr) {
        clear_padded(codec_, scratch.padded);
        for (int q = 0; q < work.queries; ++q)
            scratch_.factor[q] = prepare_query(
                codec_, query + q * work.task->query_stride, scratch.padded,
                scratch_.queries + q * scratch_.query_stride, scratch_.start + q);
    }

    bool many() const { return many_ != nullptr; }
    // Before pages are multiplied, and wherever another part has been since.
    void begin() const {
        if (many_) many_->begin(codec_.steps);
    }
    // Levels and scales of a page, and where the next one's codes are.
    void read(std::int64_t page, bool last) {
        decode_scales(part_.scales + page * kPageTokens, scales_);
        const std::uint8_t* codes = part_.codes + page * codec_.page_bytes;
        levels_ = method_.levels(codes, scratch_.tile);
        next_ = last ? codes : codes + codec_.page_bytes;
    }
    // Products of `rows` queries with the page, from the query `first` on: [rows, 64].
    void multiply(int first, int rows, std::int32_t* products) const {
        if (many_)
            multiply_many(first, products);
        else
            multiply_rows(first, rows, products);
    }
    void add(int first, int rows, bool sets, const std::int32_t* products, float* sums) const {
        const auto add = floats() ? add_part<true> : add_part<false>;
        for (int r = 0; r < rows; ++r)
            add(products + r * kPageTokens, scratch_.factor[first + r], scales_, sets,
                sums + r * kPageTokens);
    }
    void keep(const NearestWork& work, const NearestPage& page, int first, int rows,
              const std::int32_t* products, const float* sums) const {
        const auto keep = floats() ? keep_best<true> : keep_best<false>;
        for (int r = 0; r < rows; ++r) {
            const std::int64_t query = work.first_query + first + r;
            keep(page, products + r * kPageTokens, scales_, sums ? sums + r * kPageTokens : nullptr,
                 {scratch_.factor[first + r], work.task->weight[query], work.task->constant[query]},
                 work.task->best, work.best[first + r]);
        }
    }

private:
    bool floats() const { return codec_.arithmetic == Arithmetic::floats; }
    void multiply_rows(int first, int rows, std::int32_t* out) const {
        // Kernels take as many rows as they are made for.
        for (int done = 0, at_once; done < rows; done += at_once) {
            at_once = rows_at_once(rows - done);
            const int q = first + done;
            const Products products{levels_,
                                    scratch_.queries + q * scratch_.query_stride,
                                    scratch_.query_stride,
                                    scratch_.start + q,
                                    out + done * kPageTokens,
                                    nullptr,
                                    0,
                                    nullptr,
                                    next_,
                                    q == 0 ? codec_.page_bytes : 0};
            method_.multiply<false>(at_once)(codec_, products);
        }
    }
    void multiply_many(int first, std::int32_t* products) const {
        for (int r = 0; r < kManyRows; ++r)
            for (int t = 0; t < kPageTokens; t += kLanes)
                store(products + r * kPageTokens + t, set1(scratch_.start[first + r]));
        many_->multiply({scratch_.tile, codec_.strip_stride, codec_.steps,
                         scratch_.queries + first * scratch_.query_stride, scratch_.query_stride,
                         products});
    }

    const Codec& codec_;
    const NearestPart& part_;
    const PartScratch scratch_;
    const Method method_;
    const ManyKernel* many_;
    const std::uint8_t *levels_ = nullptr, *next_ = nullptr;
    alignas(64) float scales_[kPageTokens];
};

void nearest_in_pages(const NearestWork& work) {
    const NearestTask& task = *work.task;
    NearestScratch scratch(task, work.scratch);
    std::array<std::optional<PartProducts>, kMostParts> parts;
    const std::size_t last = task.parts.size() - 1;
    const float* query = task.query + work.first_query * task.query_stride;
    bool many = false;
    for (std::size_t i = 0; i <= last; ++i) {
        many |= parts[i].emplace(work, task.parts[i], query, scratch).many();
        query += task.parts[i].codec->dim;
    }
    if (last == 0) parts[0]->begin();
    const int most = many ? kManyRows : kRowBlock;
    const auto each = [&](const auto& body) {
        for (int rows, q = 0; q < work.queries; q += rows) {
            rows = std::min(work.queries - q, most);
            body(q, rows, scratch.sums + q * kPageTokens);
        }
    };
    NearestPage page;
    for (std::int64_t p = work.first_page; p < work.last_page; ++p) {
        page.allowed = task.allowed[p];
        if (!page.allowed) continue;
        page.first_slot = p * kPageTokens;
        load_offsets(task, p, page.offsets);
        for (std::size_t i = 0; i <= last; ++i) {
            PartProducts& part = *parts[i];
            if (last > 0) part.begin();
            part.read(p, p + 1 == work.last_page);
            each([&](int q, int rows, float* sums) {
                part.multiply(q, rows, scratch.products);
                if (i < last)
                    part.add(q, rows, i == 0, scratch.products, sums);
                else
                    part.keep(work, page, q, rows, scratch.products, last > 0 ? sums : nullptr);
            });
        }
    }
    if (many) task.many->end();
}

constexpr NearestKernels kNearestKernels{nearest_in_pages, nearest_scratch_bytes};

}  // namespace
}  // namespace sixfold
