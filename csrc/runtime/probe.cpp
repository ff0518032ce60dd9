#include "runtime/probe.h"

#include <algorithm>
#include <atomic>

#include "runtime/pool.h"

namespace sixfold {
namespace {

constexpr std::size_t kBlock = std::size_t{1} << 17;  // 1 MiB

// Independent sums: the additions must not be what takes the time.
std::uint64_t sum_block(const std::uint64_t* words, std::size_t count) {
    std::uint64_t sums[16] = {};
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; ++lane) sums[lane] += words[i + lane];
    for (; i < count; ++i) sums[0] += words[i];
    std::uint64_t total = 0;
    for (std::uint64_t sum : sums) total += sum;
    return total;
}

}  // namespace

bool sum_words(const std::uint64_t* words, std::size_t count, int passes, int threads,
               std::uint64_t& sum) {
    const std::size_t blocks = (count + kBlock - 1) / kBlock;
    std::atomic<std::uint64_t> total{0};
    const auto items = static_cast<std::int64_t>(blocks) * passes;
    const bool complete = parallel_for(items, threads, [&](std::int64_t item, int) {
        const std::size_t first = static_cast<std::size_t>(item) % blocks * kBlock;
        total.fetch_add(sum_block(words + first, std::min(kBlock, count - first)));
    });
    sum = total.load();
    return complete;
}

}  // namespace sixfold
