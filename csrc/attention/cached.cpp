#include "attention/cached.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "isa/kernels.h"
#include "runtime/kept.h"
#include "runtime/pool.h"

namespace sixfold {
namespace {

using vectors::Dtype;
using vectors::Rotation;
using vectors::VectorTile;
using vectors::rotate_scratch;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// About what waking a thread costs, in multiplications.
constexpr std::int64_t kProductsPerThread = 1 << 17;
constexpr std::size_t kKeptBytes = std::size_t{8} << 20;

std::int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Float memory that the thread keeps for its next call.
class Floats {
  public:
    float* take(std::int64_t count) {
        float* piece = memory_ ? memory_ + used_ : nullptr;
        used_ += (count + 15) / 16 * 16;
        return piece;
    }
    // Runs `plan` twice: to learn how much it takes, and to hand it out.
    template <class Plan>
    void allocate(const Plan& plan) {
        memory_ = nullptr;
        used_ = 0;
        plan(*this);
        storage_.resize(std::max<std::size_t>(storage_.size(), used_ + 16));
        const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
        memory_ = storage_.data() + (64 - address % 64) % 64 / sizeof(float);
        used_ = 0;
        plan(*this);
    }

    void trim() {
        if (storage_.size() * sizeof(float) > kKeptBytes) storage_ = {};
    }

  private:
    std::vector<float> storage_;
    float* memory_ = nullptr;
    std::int64_t used_ = 0;
};

// The pages of all segments as one list: where they lie is no reason to stop between them.
struct PageList {
    std::vector<PagePool> pools;
    std::vector<std::int32_t> pool;
    std::vector<std::int64_t> slots, starts, lengths;
    bool ragged = false;

    explicit PageList(const CachedTask& task) {
        for (const PageSegment& segment : task.pages) {
            pool.insert(pool.end(), segment.pages, static_cast<std::int32_t>(pools.size()));
            pools.push_back(segment.pool);
            ragged |= segment.page_stride != 0;
        }
        for (std::int64_t b = 0; b < task.batch; ++b)
            for (const PageSegment& segment : task.pages) append(segment, b);
    }
    std::int64_t size() const { return static_cast<std::int64_t>(pool.size()); }

  private:
    void append(const PageSegment& segment, std::int64_t b) {
        const std::int64_t* row = segment.slots + b * segment.pages;
        slots.insert(slots.end(), row, row + segment.pages);
        if (b > 0 && !ragged) return;
        row = segment.lengths + b * segment.page_stride;
        lengths.insert(lengths.end(), row, row + segment.pages);
        row = segment.starts + b * segment.page_stride;
        for (std::int64_t i = 0; i < segment.pages; ++i) {
            // A sum that overflows is as far out of range as a negative one.
            const bool far = row[i] > INT64_MAX - segment.first;
            starts.push_back(far ? -1 : row[i] + segment.first);
        }
    }
};

// What a worker needs for one unit: all rows of one sequence and KV head.
struct Scratch {
    float *query, *out, *maximum, *total, *rest;
    std::int64_t *first, *last;
};

class Call {
  public:
    Call(const Kernels& kernels, const CachedTask& task, int threads, Floats& floats)
        : kernels_(kernels), task_(task), rows_(task.rows()), units_(task.batch * task.kv_heads),
          threads_(threads), width_(padded_dim(task.values.dim)), pages_(task) {
        const std::int64_t key_dim = task.keys.dim, value_dim = task.values.dim;
        std::int64_t tokens = 0;
        for (const TokenSegment& segment : task.tokens) tokens += segment.tokens;
        const std::int64_t products = units_ * rows_ * (tokens + 64) * (key_dim + value_dim);
        workers_ = static_cast<int>(std::clamp<std::int64_t>(products / kProductsPerThread, 1,
                                                             std::max(threads, 1)));
        const std::int64_t count = pages_.size() ? units_ * rows_ : 0;
        floats.allocate([&](Floats& f) {
            rotated_ = f.take(count * key_dim);
            offsets_ = f.take(count);
            out_ = f.take(count * value_dim);
            lse_ = f.take(count);
            scratch_.clear();
            for (int worker = 0; worker < workers_; ++worker) scratch_.push_back(take_scratch(f));
        });
    }

    void operator()() {
        if (pages_.size()) {
            if (!each_unit([this](std::int64_t unit, const Scratch& s) { map_queries(unit, s); }))
                return;
            if (!attend_pages()) return;
        }
        each_unit([this](std::int64_t unit, const Scratch& s) { finish(unit, s); });
    }

  private:
    Scratch take_scratch(Floats& f) const {
        const std::int64_t rotation =
            std::max(rotate_scratch(task_.key_rotation), rotate_scratch(task_.value_rotation));
        const std::int64_t tokens = token_scratch(rows_, task_.keys.dim, task_.values.dim);
        Scratch scratch{};
        scratch.query = f.take(rows_ * task_.keys.dim);
        scratch.out = f.take(rows_ * width_);
        scratch.maximum = f.take(rows_);
        scratch.total = f.take(rows_);
        scratch.rest = f.take(std::max(rotation, tokens));
        scratch.first = reinterpret_cast<std::int64_t*>(f.take(2 * rows_));
        scratch.last = reinterpret_cast<std::int64_t*>(f.take(2 * rows_));
        return scratch;
    }

    template <class Body>
    bool each_unit(const Body& body) {
        return parallel_for(units_, workers_,
                     [&](std::int64_t unit, int worker) { body(unit, scratch_[worker]); });
    }

    std::int64_t head_of(std::int64_t unit, std::int64_t row) const {
        return unit % task_.kv_heads * (task_.heads / task_.kv_heads) + row / task_.queries;
    }

    // Scaled queries of a unit in float32 [rows, key_dim]: they are contiguous in `query`.
    void load_queries(std::int64_t unit, float* out) const {
        const std::int64_t count = rows_ * task_.keys.dim;
        const char* from = task_.query + unit * count * size_of(task_.dtype);
        kernels_.tokens.widen(from, task_.dtype, count, task_.scaling, out);
    }

    void map_queries(std::int64_t unit, const Scratch& scratch) const {
        const std::int64_t dim = task_.keys.dim, b = unit / task_.kv_heads;
        const std::int64_t map = task_.map_index ? task_.map_index[b] : b;
        const std::int64_t channel = (map * task_.kv_heads + unit % task_.kv_heads) * dim;
        const float *mean = task_.mean + channel, *scale = task_.channel_scale + channel;
        float *query = rotated_ + unit * rows_ * dim, *offset = offsets_ + unit * rows_;
        load_queries(unit, query);
        for (std::int64_t r = 0; r < rows_; ++r) {
            float* row = query + r * dim;
            double sum = 0;
            for (std::int64_t d = 0; d < dim; ++d) {
                sum += double{row[d]} * mean[d];
                row[d] /= scale[d];
            }
            offset[r] = static_cast<float>(sum);
        }
        rotate(task_.key_rotation, false, query, dim, dim, scratch.rest);
    }

    // In place, rows `stride` floats apart.
    void rotate(const Rotation& rotation, bool inverse, float* x, std::int64_t dim,
                std::int64_t stride, float* scratch) const {
        const float shrink = static_cast<float>(std::pow(dim, -rotation.rounds / 2.0));
        for (std::int64_t r = 0; r < rows_; r += kLanes) {
            const int count = static_cast<int>(std::min<std::int64_t>(kLanes, rows_ - r));
            const VectorTile tile{reinterpret_cast<char*>(x + r * stride), stride * 4, count,
                                  Dtype::f32};
            kernels_.vectors.rotate(rotation, inverse, shrink, tile, tile, scratch);
        }
    }

    bool attend_pages() const {
        const std::vector<std::int64_t> first = first_tokens();
        const AttentionTask attention{
            task_.batch, task_.kv_heads, rows_, task_.queries, pages_.size(), rotated_,
            {task_.keys, nullptr}, {task_.values, nullptr}, pages_.pools.data(), pages_.pool.data(),
            pages_.slots.data(), pages_.starts.data(), pages_.lengths.data(), first.data(),
            pages_.ragged ? pages_.size() : 0, offsets_, task_.mask_kind, task_.mask,
            {task_.mask_strides[0], task_.mask_strides[1], task_.mask_strides[2]},
            task_.mask_columns, task_.never, task_.softcap, out_, lse_};
        check_bounds(attention);
        return sixfold::attend(kernels_.attention, attention, threads_);
    }

    // [batch, queries]
    std::vector<std::int64_t> first_tokens() const {
        std::vector<std::int64_t> first;
        for (std::int64_t b = 0; b < task_.batch; ++b)
            for (std::int64_t q = 0; q < task_.queries; ++q)
                first.push_back(std::max(task_.start[b], window_start(b, q)));
        return first;
    }

    // First position that query `q` of a sequence sees because of the sliding window.
    std::int64_t window_start(std::int64_t b, std::int64_t q) const {
        if (task_.sliding_window == 0 || task_.mask_kind != Mask::none) return 0;
        return task_.position[b] + q - task_.sliding_window + 1;
    }

    // Turns the pages' output back and goes on with the tokens in full precision.
    void finish(std::int64_t unit, const Scratch& scratch) const {
        std::fill(scratch.out, scratch.out + rows_ * width_, 0.0f);
        for (std::int64_t r = 0; r < rows_; ++r) load_pages(unit * rows_ + r, r, scratch);
        if (pages_.size())
            rotate(task_.value_rotation, true, scratch.out, task_.values.dim, width_, scratch.rest);
        load_queries(unit, scratch.query);
        for (const TokenSegment& segment : task_.tokens) attend_segment(unit, segment, scratch);
        for (std::int64_t r = 0; r < rows_; ++r) store_row(unit, r, scratch);
    }

    void load_pages(std::int64_t index, std::int64_t row, const Scratch& scratch) const {
        const std::int64_t dim = task_.values.dim;
        const float lse = pages_.size() ? lse_[index] : -kInfinity;
        scratch.maximum[row] = lse;
        scratch.total[row] = lse == -kInfinity ? 0.0f : 1.0f;
        if (pages_.size()) std::copy_n(out_ + index * dim, dim, scratch.out + row * width_);
    }

    void attend_segment(std::int64_t unit, const TokenSegment& segment,
                        const Scratch& scratch) const {
        const std::int64_t b = unit / task_.kv_heads, origin = segment.first[b];
        const std::int64_t low = segment.start[b] - origin;
        const std::int64_t high = std::min(segment.stop_of(b) - origin, segment.tokens);
        std::vector<const void*> mask;
        for (std::int64_t r = 0; r < rows_; ++r) {
            const std::int64_t q = r % task_.queries;
            scratch.first[r] = std::max({low, window_start(b, q) - origin, std::int64_t{0}});
            // Without a mask a query sees nothing that comes after it.
            const std::int64_t own = task_.position[b] + q - origin + 1;
            scratch.last[r] = task_.mask_kind == Mask::none ? std::min(high, own) : high;
            if (task_.mask_kind != Mask::none)
                mask.push_back(mask_row(b, head_of(unit, r), q, origin));
        }
        const std::int64_t from = segment.row_of(b), head = unit % task_.kv_heads;
        const auto vectors = [&](const TokenSegment::Vectors& x) {
            return x.base + from * x.row_stride + head * x.head_stride;
        };
        kernels_.tokens.attend({scratch.query, vectors(segment.keys), vectors(segment.values),
                                segment.keys.token_stride, segment.values.token_stride,
                                task_.dtype, static_cast<int>(rows_), task_.keys.dim,
                                task_.values.dim, segment.tokens, scratch.first, scratch.last, task_.mask_kind,
                                mask.data(), task_.never, task_.softcap, scratch.maximum,
                                scratch.total, scratch.out, scratch.rest});
    }

    // Where the mask says what a query thinks of position `origin`.
    const void* mask_row(std::int64_t b, std::int64_t head, std::int64_t q,
                         std::int64_t origin) const {
        const std::int64_t element = b * task_.mask_strides[0] + head * task_.mask_strides[1] +
                                     q * task_.mask_strides[2] + origin;
        if (task_.mask_kind == Mask::boolean) return static_cast<const bool*>(task_.mask) + element;
        return static_cast<const float*>(task_.mask) + element;
    }

    void store_row(std::int64_t unit, std::int64_t row, const Scratch& scratch) const {
        const std::int64_t dim = task_.values.dim;
        float maximum = scratch.maximum[row], total = scratch.total[row];
        float scale = 1;
        if (task_.sink_logits) {
            const float sink = task_.sink_logits[head_of(unit, row)];
            const float top = std::max(maximum, sink);
            scale = total == 0 ? 0 : std::exp(maximum - top);
            total = total * scale + std::exp(sink - top);
        }
        scale = total == 0 ? 0 : scale / total;
        char* out = task_.out + (unit * rows_ + row) * dim * size_of(task_.dtype);
        kernels_.tokens.narrow(scratch.out + row * width_, dim, scale, task_.dtype, out);
    }

    const Kernels& kernels_;
    const CachedTask& task_;
    const std::int64_t rows_, units_;
    const int threads_;
    const std::int64_t width_;
    int workers_;
    const PageList pages_;
    float *rotated_, *offsets_, *out_, *lse_;
    std::vector<Scratch> scratch_;
};

void check_slot(const char* name, std::int64_t slot, std::int64_t count) {
    if (slot >= 0 && slot < count) return;
    throw std::invalid_argument(std::string(name) + ": expected 0 to " + std::to_string(count - 1) +
                                ", got " + std::to_string(slot) +
                                "; pass the memory that it was made for");
}

}  // namespace

void check_bounds(const CachedTask& task) {
    for (std::int64_t b = 0; b < task.batch; ++b) {
        check_slot("key_map.map_index", task.map_index ? task.map_index[b] : b, task.maps);
        // Sums with a number of queries must not overflow.
        if (task.position[b] < 0 || task.position[b] > INT64_MAX / 2)
            throw std::invalid_argument("position: expected positions from 0, got " +
                                        std::to_string(task.position[b]));
    }
    for (const TokenSegment& segment : task.tokens)
        for (std::int64_t b = 0; b < task.batch; ++b) {
            const std::int64_t first = segment.first[b], stop = segment.stop_of(b);
            check_slot("tokens.slots", segment.row_of(b), segment.rows);
            // Of numbers from 0 differences do not overflow; sums might.
            if (first < 0 || segment.start[b] < 0 || stop < 0)
                throw std::invalid_argument("tokens: expected positions from 0, got first " +
                                            std::to_string(first) + ", start " +
                                            std::to_string(segment.start[b]) + " and stop " +
                                            std::to_string(stop));
            if (task.mask_kind == Mask::none) continue;
            const std::int64_t read =
                std::min(std::max<std::int64_t>(stop - first, 0), segment.tokens);
            if (first > task.mask_columns || read > task.mask_columns - first)
                throw std::invalid_argument(
                    "mask: expected a column for every one of " + std::to_string(read) +
                    " tokens from position " + std::to_string(first) + ", got " +
                    std::to_string(task.mask_columns) +
                    " columns; pass a mask that covers all tokens held");
        }
}

void attend(const Kernels& kernels, const CachedTask& task, int threads) {
    if (task.batch == 0 || task.kv_heads == 0 || task.rows() == 0) return;
    Kept<Floats> floats;
    Call(kernels, task, threads, *floats)();
    floats->trim();
}

}  // namespace sixfold
