#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "attention/codec.h"
#include "runtime/kept.h"
#include "runtime/pool.h"

namespace sixfold {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Enough to keep many threads busy; fewer pages than this would not pay for preparing the queries.
constexpr std::int64_t kItems = 128, kFewItems = 32, kSplitPages = 16;
// So many rows of a head and fewer are bound by memory: several heads follow one another.
constexpr std::int64_t kFewRows = 8;
// About what waking a thread costs.
constexpr std::int64_t kPagesPerThread = 32;
constexpr std::int64_t kKeptBytes = std::int64_t{8} << 20;

constexpr std::int64_t ceil_divide(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
constexpr std::int64_t padded(std::int64_t bytes) { return ceil_divide(bytes, 64) * 64; }

// Memory of a call, kept for the calling thread's next one.
class Arena {
public:
    std::byte* reserve(std::int64_t bytes) {
        if (bytes > size_) {
            memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})));
            size_ = bytes;
        }
        return memory_.get();
    }
    void trim() {
        if (size_ <= kKeptBytes) return;
        memory_.reset();
        size_ = 0;
    }

private:
    struct Delete {
        void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<std::byte, Delete> memory_;
    std::int64_t size_ = 0;
};

// How a task is cut: rows into chunks, heads into groups, pages into splits. Not a function of the
// threads.
struct Plan {
    std::int64_t batch, chunks, chunk_rows, splits, groups, group_heads, width;
    std::int64_t state_bytes, scratch_bytes;

    Plan(const AttentionKernels& kernels, const AttentionTask& task) : batch(task.batch) {
        const std::int64_t wanted = ceil_divide(task.rows, kMaxRows);
        chunk_rows = ceil_divide(ceil_divide(task.rows, wanted), 8) * 8;
        chunk_rows = std::min<std::int64_t>(chunk_rows, std::min<std::int64_t>(kMaxRows, task.rows));
        chunks = ceil_divide(task.rows, chunk_rows);
        const std::int64_t most = std::max<std::int64_t>(ceil_divide(task.pages, kSplitPages), 1);
        group_heads = task.rows > kFewRows ? 1 : std::min(task.kv_heads, kMaxRows / task.rows);
        groups = ceil_divide(task.kv_heads, group_heads);
        while (group_heads > 1 && batch * groups * most < kFewItems) {
            group_heads = ceil_divide(group_heads, 2);
            groups = ceil_divide(task.kv_heads, group_heads);
        }
        splits = std::clamp<std::int64_t>(ceil_divide(kItems, row_sets()), 1, most);
        width = static_cast<std::int64_t>(task.values.codec->strips) * kLanes;
        state_bytes = padded(group_heads * chunk_rows * static_cast<std::int64_t>(sizeof(float)) *
                             (width + 2));
        scratch_bytes = padded(kernels.scratch_bytes(task));
    }
    // Rows that one item works on; each of their splits is another item.
    std::int64_t row_sets() const { return batch * groups * chunks; }
};

// Merges a row's states (README.md, "Merge") into `out`, whose coordinates lie in up to two parts.
void finish_row(const AttentionTask& task, const AttentionState* states, std::int64_t splits,
                std::int64_t row, std::int64_t width, std::int64_t target) {
    float top = -kInfinity;
    for (std::int64_t s = 0; s < splits; ++s) top = std::max(top, states[s].maximum[row]);
    const float anchor = top == -kInfinity ? 0.0f : top;
    const Codec& codec = *task.values.codec;
    float* out = task.out + target * codec.dim;
    std::memset(out, 0, sizeof(float) * static_cast<std::size_t>(codec.dim));
    double total = 0;
    for (std::int64_t s = 0; s < splits; ++s)
        total += std::exp2(states[s].maximum[row] - anchor) * states[s].total[row];
    // What no part attended is a row of zeros.
    task.lse[target] =
        total == 0 ? -kInfinity : static_cast<float>(anchor * std::log(2.0) + std::log(total));
    if (total == 0) return;
    const int first = symbols_of(codec.dim, codec.axes);
    for (std::int64_t s = 0; s < splits; ++s) {
        const float weight = static_cast<float>(std::exp2(states[s].maximum[row] - anchor) / total);
        const float factor = codec.arithmetic == Arithmetic::floats ? weight : weight * codec.scale;
        const float* from = states[s].out + row * width;
        for (int d = 0; d < first; ++d) out[d] += factor * from[d];
        const float* second = from + width / 2;
        for (int d = first; d < codec.dim; ++d) out[d] += factor * second[d - first];
    }
}

class Run {
public:
    Run(const AttentionKernels& kernels, const AttentionTask& task, int threads, Arena& arena)
        : kernels_(kernels), task_(task), plan_(kernels, task), threads_(threads) {
        const std::int64_t sets = plan_.row_sets(), states = sets * plan_.splits;
        scratch_ = arena.reserve(threads * plan_.scratch_bytes + states * plan_.state_bytes +
                                 padded(sets * static_cast<std::int64_t>(sizeof(int))));
        states_ = scratch_ + threads * plan_.scratch_bytes;
        pending_ = reinterpret_cast<int*>(states_ + states * plan_.state_bytes);
        std::fill_n(pending_, sets, static_cast<int>(plan_.splits));
    }

    bool operator()() {
        return parallel_for(
            plan_.row_sets() * plan_.splits, threads_,
            [this](std::int64_t item, int worker) { attend_item(item, worker); });
    }

private:
    // Neighbouring items are chunks of rows on the same pages, which are then in a shared cache.
    void attend_item(std::int64_t item, int worker) {
        const std::int64_t chunk = item % plan_.chunks;
        const std::int64_t split = item / plan_.chunks % plan_.splits;
        const std::int64_t group = item / plan_.chunks / plan_.splits;
        const std::int64_t head = group % plan_.groups * plan_.group_heads;
        const std::int64_t heads = std::min(plan_.group_heads, task_.kv_heads - head);
        const std::int64_t first = chunk * plan_.chunk_rows;
        const std::int64_t rows = std::min(plan_.chunk_rows, task_.rows - first);
        const std::int64_t set = group * plan_.chunks + chunk;
        const AttentionWork work{&task_, group / plan_.groups, head, first,
                                 split * task_.pages / plan_.splits,
                                 (split + 1) * task_.pages / plan_.splits,
                                 static_cast<int>(heads), static_cast<int>(rows),
                                 state(set, split, heads * rows),
                                 scratch_ + worker * plan_.scratch_bytes};
        kernels_.attend(work);
        // Whoever comes last merges: no second round of threads.
        if (std::atomic_ref(pending_[set]).fetch_sub(1, std::memory_order_acq_rel) == 1)
            finish(work, set);
    }

    AttentionState state(std::int64_t set, std::int64_t split, std::int64_t rows) const {
        std::byte* memory = states_ + (set * plan_.splits + split) * plan_.state_bytes;
        float* out = reinterpret_cast<float*>(memory);
        return {out + rows * plan_.width, out + rows * (plan_.width + 1), out};
    }

    void finish(const AttentionWork& work, std::int64_t set) const {
        const std::int64_t rows = std::int64_t{work.heads} * work.rows;
        AttentionState states[kItems];
        for (std::int64_t s = 0; s < plan_.splits; ++s) states[s] = state(set, s, rows);
        const std::int64_t head = work.batch * task_.kv_heads + work.first_head;
        for (std::int64_t r = 0; r < rows; ++r)
            finish_row(task_, states, plan_.splits, r, plan_.width,
                       (head + r / work.rows) * task_.rows + work.first_row + r % work.rows);
    }

    const AttentionKernels& kernels_;
    const AttentionTask& task_;
    const Plan plan_;
    const int threads_;
    std::byte *scratch_, *states_;
    int* pending_;
};

}  // namespace

void check_bounds(const AttentionTask& task) {
    auto refuse = [](const std::string& message) { throw std::invalid_argument(message); };
    for (std::int64_t i = 0; i < task.batch * task.pages; ++i) {
        const std::int64_t slots = task.pools[task.page_pool[i % task.pages]].slots;
        if (task.slots[i] < 0 || task.slots[i] >= slots)
            refuse("pages.slots: expected slots 0 to " + std::to_string(slots - 1) + ", got " +
                   std::to_string(task.slots[i]) + "; pass the memory that the table was made for");
    }
    for (std::int64_t i = 0; i < (task.page_stride ? task.batch * task.pages : task.pages); ++i) {
        const std::int64_t start = task.starts[i], length = task.lengths[i];
        if (length < 0 || length > kPageTokens)
            refuse("pages.lengths: expected 0 to 64 tokens a page, got " + std::to_string(length));
        if (start < 0 || start > INT64_MAX - kPageTokens)
            refuse("pages.starts: expected positions from 0, got " + std::to_string(start));
        if (task.mask_kind != Mask::none && start + length > task.mask_columns)
            refuse("mask: expected a column for every position up to " +
                   std::to_string(start + length - 1) + ", got " +
                   std::to_string(task.mask_columns) + " columns; pass a mask that covers the pages");
    }
}

bool attend(const AttentionKernels& kernels, AttentionTask task, int threads) {
    if (task.batch == 0 || task.kv_heads == 0 || task.rows == 0) return true;
    const auto keys = find_codec(task.keys.key), values = find_codec(task.values.key);
    task.keys.codec = keys.get();
    task.values.codec = values.get();
    const std::int64_t work = task.batch * task.kv_heads * task.pages * ((task.rows + 7) / 8);
    threads = static_cast<int>(
        std::clamp<std::int64_t>(work / kPagesPerThread, 1, std::max(threads, 1)));
    Kept<Arena> arena;
    const bool done = Run(kernels, task, threads, *arena)();
    arena->trim();
    return done;
}

}  // namespace sixfold
