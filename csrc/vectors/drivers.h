// What the drivers share: scratch, and work cut into items. Compiled for any processor, unlike what
// kernels include.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "runtime/pool.h"
#include "vectors/vectors.h"

namespace sixfold::vectors {

// Vectors that one thread takes at a time; a page of a head.
inline constexpr int kGroupTiles = kPageTokens / kLanes;
// Rows of scores that one thread takes at a time. They are four bytes each: threads should not share
// lines of them.
inline constexpr std::int64_t kScoredTokens = 512;
// Below some 20 us of work a thread costs more than it saves.
inline constexpr std::int64_t kCoordinatesAThread = 1 << 15;

struct Free {
    void operator()(float* p) const { std::free(p); }
};

// One piece of scratch a worker.
class Scratch {
  public:
    Scratch(std::int64_t floats, int workers) : floats_(floats) {
        void* memory = std::aligned_alloc(64, floats * workers * sizeof(float));
        memory_.reset(static_cast<float*>(memory));
        if (!memory_) throw std::bad_alloc();
    }
    float* of(int worker) const { return memory_.get() + worker * floats_; }

  private:
    std::int64_t floats_;
    std::unique_ptr<float[], Free> memory_;
};

// A tile and room to rotate it. A dense rotation has the tile and four rows of factors as doubles.
inline std::int64_t rotation_scratch(const Rotation& r) {
    return r.rounds ? tile_floats(r.order) : 2 * tile_floats(r.dim) + tile_floats(r.dim / 2 + 1);
}

// body(item, scratch) for all items of `coordinates` each.
template <class Body>
void run(std::int64_t items, std::int64_t coordinates, std::int64_t scratch_floats, int threads,
         const Body& body) {
    if (items == 0) return;
    const std::int64_t useful = items * coordinates / kCoordinatesAThread + 1;
    const int workers = static_cast<int>(std::min<std::int64_t>({items, useful, threads}));
    const Scratch scratch(scratch_floats, workers);
    parallel_for(items, workers,
                 [&](std::int64_t item, int worker) { body(item, scratch.of(worker)); });
}

// body(first, count, scratch) for all tiles of up to 16 of n vectors.
template <class Body>
void run_tiles(std::int64_t n, int dim, std::int64_t scratch_floats, int threads,
               const Body& body) {
    constexpr int kGroup = kGroupTiles * kLanes;
    run((n + kGroup - 1) / kGroup, std::int64_t{kGroup} * dim, scratch_floats, threads,
        [&](std::int64_t item, float* scratch) {
            const std::int64_t end = std::min(n, (item + 1) * kGroup);
            for (std::int64_t first = item * kGroup; first < end; first += kLanes)
                body(first, static_cast<int>(std::min<std::int64_t>(kLanes, end - first)), scratch);
        });
}

// body(batch row, first, count, scratch) for all tiles of up to 16 of n rows of codes.
template <class Body>
void run_scores(std::int64_t batch, std::int64_t n, std::int64_t n_queries, int dim,
                std::int64_t scratch_floats, int threads, const Body& body) {
    const std::int64_t groups = (n + kScoredTokens - 1) / kScoredTokens;
    run(batch * groups, kScoredTokens * (n_queries + 4) * dim, scratch_floats, threads,
        [&](std::int64_t item, float* scratch) {
            const std::int64_t end = std::min(n, (item % groups + 1) * kScoredTokens);
            for (std::int64_t first = item % groups * kScoredTokens; first < end; first += kLanes)
                body(item / groups, first,
                     static_cast<int>(std::min<std::int64_t>(kLanes, end - first)), scratch);
        });
}

// body(map, codes, vectors, scratch) for all pages; `coordinates` as for `run`.
template <class Body>
void run_pages(int dim, const Affine& maps, const Pages& pages, const PagedVectors& vectors,
               std::int64_t coordinates, std::int64_t scratch_floats, int threads,
               const Body& body) {
    run(pages.batch * pages.pages * pages.heads, coordinates, scratch_floats, threads,
        [&](std::int64_t item, float* scratch) {
            const std::int64_t head = item % pages.heads, position = item / pages.heads;
            const std::int64_t row = position / pages.pages, page = position % pages.pages;
            const std::int64_t slot = pages.slots[position];
            const std::int64_t channel = (row * pages.heads + head) * dim;
            const Affine map{maps.mean ? maps.mean + channel : nullptr,
                             maps.scale ? maps.scale + channel : nullptr};
            char* first = vectors.base + row * vectors.batch_stride + head * vectors.head_stride +
                          page * kPageTokens * vectors.token_stride;
            body(map,
                 CodeTile{page_of(pages.codes, slot, head), 0, kPageTokens, 0,
                          page_of(pages.scales, slot, head)},
                 VectorTile{first, vectors.token_stride, kPageTokens, vectors.dtype}, scratch);
        });
}

// The same for all quarters of pages.
template <class Body>
void run_page_tiles(int dim, const Affine& maps, const Pages& pages, const PagedVectors& vectors,
                    std::int64_t scratch_floats, int threads, const Body& body) {
    run_pages(dim, maps, pages, vectors, std::int64_t{kPageTokens} * dim, scratch_floats, threads,
              [&](const Affine& map, const CodeTile& codes, const VectorTile& tiles,
                  float* scratch) {
                  for (int group = 0; group < kGroupTiles; ++group)
                      body(map, slice_of(codes, group), slice_of(tiles, group), scratch);
              });
}

inline VectorTile tile_of(const VectorArray& x, std::int64_t first, int count) {
    return {x.base + first * x.stride, x.stride, count, x.dtype};
}

}  // namespace sixfold::vectors
