#include "nearest/nearest.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "attention/codec.h"
#include "runtime/pool.h"

namespace sixfold {
namespace {

// About what waking a thread costs, and fewer than pay for preparing the queries.
constexpr std::int64_t kPagesPerThread = 32, kSplitPages = 16;

constexpr std::int64_t ceil_divide(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
};

class Run {
public:
    Run(const NearestKernels& kernels, const NearestTask& task, int threads)
        : kernels_(kernels), task_(task), threads_(threads) {
        chunks_ = ceil_divide(task.queries, kMostQueries);
        chunk_ = ceil_divide(ceil_divide(task.queries, chunks_), 8) * 8;
        chunk_ = std::min<std::int64_t>(chunk_, std::min<std::int64_t>(kMostQueries, task.queries));
        chunks_ = ceil_divide(task.queries, chunk_);
        const std::int64_t most = std::max<std::int64_t>(ceil_divide(task.pages, kSplitPages), 1);
        // Each has heaps of its own to fill: no more of them than there are threads.
        splits_ = std::clamp<std::int64_t>(ceil_divide(threads, chunks_), 1, most);
        // No more than there are vectors.
        room_ = std::min(task.best, std::max<std::int64_t>(task.pages, 1) * kPageTokens);
        const auto heaps = static_cast<std::size_t>(splits_ * task.queries);
        scores_.resize(heaps * static_cast<std::size_t>(room_));
        slots_.resize(scores_.size());
        const auto queries = static_cast<std::size_t>(task.queries);
        floors_ = std::vector<std::atomic<float>>(splits_ > 1 ? queries : 0);
        for (auto& floor : floors_) floor = -std::numeric_limits<float>::infinity();
        for (std::size_t i = 0; i < heaps; ++i)
            best_.push_back({scores_.data() + i * static_cast<std::size_t>(room_),
                             slots_.data() + i * static_cast<std::size_t>(room_), 0,
                             splits_ > 1 ? &floors_[i % queries] : nullptr});
        scratch_bytes_ = ceil_divide(kernels.scratch_bytes(task), 64) * 64;
        scratch_.reset(static_cast<std::byte*>(::operator new(
            static_cast<std::size_t>(threads * scratch_bytes_), std::align_val_t{64})));
    }

    bool operator()() {
        const bool done = parallel_for(chunks_ * splits_, threads_,
                                       [this](std::int64_t item, int worker) { run(item, worker); });
        // By this thread: it allocates, and bodies must not throw.
        for (std::int64_t query = 0; done && query < task_.queries; ++query) finish(query);
        return done;
    }

private:
    // Neighbouring items are chunks of queries on the same pages, which are then in a shared cache.
    void run(std::int64_t item, int worker) {
        const std::int64_t first = item % chunks_ * chunk_, split = item / chunks_;
        NearestTask task = task_;
        task.best = room_;
        kernels_.nearest({&task, first, split * task_.pages / splits_,
                         (split + 1) * task_.pages / splits_,
                         static_cast<int>(std::min(chunk_, task_.queries - first)),
                         best_.data() + split * task_.queries + first,
                         scratch_.get() + worker * scratch_bytes_});
    }

    void finish(std::int64_t query) {
        std::vector<std::pair<float, std::int64_t>> found;
        for (std::int64_t s = 0; s < splits_; ++s) {
            const Best& best = best_[static_cast<std::size_t>(s * task_.queries + query)];
            for (std::int64_t i = 0; i < best.count; ++i)
                found.emplace_back(-best.scores[i], best.slots[i]);
        }
        std::sort(found.begin(), found.end());
        float* scores = task_.scores + query * task_.best;
        std::int64_t* slots = task_.slots + query * task_.best;
        const auto count = std::min<std::int64_t>(std::ssize(found), task_.best);
        for (std::int64_t i = 0; i < count; ++i) {
            scores[i] = -found[static_cast<std::size_t>(i)].first;
            slots[i] = found[static_cast<std::size_t>(i)].second;
        }
        std::fill(scores + count, scores + task_.best, -std::numeric_limits<float>::infinity());
        std::fill(slots + count, slots + task_.best, -1);
    }

    const NearestKernels& kernels_;
    const NearestTask& task_;
    const int threads_;
    std::int64_t chunks_, chunk_, splits_, room_, scratch_bytes_;
    std::vector<float> scores_;
    std::vector<std::int64_t> slots_;
    std::vector<std::atomic<float>> floors_;
    std::vector<Best> best_;
    std::unique_ptr<std::byte, Free> scratch_;
};

}  // namespace

bool nearest(const NearestKernels& kernels, NearestTask task, int threads) {
    if (task.queries == 0 || task.best == 0) return true;
    std::vector<std::shared_ptr<const Codec>> codecs;
    task.query_stride = 0;
    for (NearestPart& part : task.parts) {
        codecs.push_back(find_codec(part.key));
        part.codec = codecs.back().get();
        task.query_stride += part.codec->dim;
    }
    const std::int64_t work = task.pages * ceil_divide(task.queries, 8);
    threads = static_cast<int>(
        std::clamp<std::int64_t>(work / kPagesPerThread, 1, std::max(threads, 1)));
    return Run(kernels, task, threads)();
}

}  // namespace sixfold
