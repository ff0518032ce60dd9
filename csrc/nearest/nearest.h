// The vectors of a set of pages that score highest with each query.
//
// | tensor     | type              | shape                                                      |
// | ---------- | ----------------- | ---------------------------------------------------------- |
// | query      | float             | [queries, dim], the parts' one after another, each rotated |
// |            |                   | as its codes are                                           |
// | weight     | float             | [queries]: what a query multiplies offsets with            |
// | constant   | float             | [queries]: added to all scores of a query                  |
// | codes      | uint8             | of a part: [pages, page_bytes], the key layout             |
// |            |                   | (docs/format.md, 3)                                        |
// | scales     | float16           | of a part: [pages, 64] (docs/format.md, 4)                 |
// | offsets    | float16 or float  | [pages, 64], or null                                       |
// | allowed    | uint64            | [pages]: bit i says whether vector i of the page counts    |
// | scores     | float             | [queries, best], descending                                |
// | slots      | int64             | [queries, best]: 64 * page + place in it                   |
//
// score = sum of the parts' scale * <query, codeword> + weight * offset + constant. Of equal scores the
// lower slot comes first; where fewer vectors count than are wanted, scores are -inf and slots -1.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/attention.h"
#include "nearest/many.h"

namespace sixfold {

enum class OffsetKind { none, half, single };

// Coordinates that are coded together: all of them, or a group.
struct NearestPart {
    CodecKey key;
    const Codec* codec;  // of `key`; `nearest` finds it
    const std::uint8_t* codes;
    const std::uint16_t* scales;
};

struct NearestTask {
    std::int64_t queries, pages, best;
    const float *query, *weight, *constant;
    std::vector<NearestPart> parts;  // at least one
    std::int64_t query_stride;       // the parts' coordinates
    OffsetKind offset_kind;
    const void* offsets;
    const std::uint64_t* allowed;
    float* scores;
    std::int64_t* slots;
    const ManyKernel* many;  // or null; for kernels whose levels have no sign
};

// The best of some pages for one query: a heap with the worst on top.
struct Best {
    float* scores;  // [best]
    std::int64_t* slots;
    std::int64_t count;
    // What as many vectors as are wanted reach somewhere, for all that look at other pages of the query
    // to know: lower ones are not among the best. Null where nobody else does.
    std::atomic<float>* floor;
};

// Groups of coordinates have 1, 2, 3, 4 or 8 bits.
constexpr int kMostParts = 8;
// So many queries share what reading a page takes.
constexpr int kMostQueries = 128;

// Some queries, at most kMostQueries, on a range of pages.
struct NearestWork {
    const NearestTask* task;
    std::int64_t first_query, first_page, last_page;
    int queries;
    Best* best;          // [queries], empty
    std::byte* scratch;  // of scratch_bytes, aligned to 64
};

struct NearestKernels {
    void (*nearest)(const NearestWork& work);
    std::int64_t (*scratch_bytes)(const NearestTask& task);
};

// Runs on at most `threads` threads, on which the result does not depend. Returns false where
// the interrupt check stopped it (pool.h).
bool nearest(const NearestKernels& kernels, NearestTask task, int threads);

}  // namespace sixfold
