// How fast this machine reads: what a kernel that is bound by memory is compared with.
//
//   words [count]   summed modulo 2^64, so that nobody can skip reading them
#pragma once

#include <cstddef>
#include <cstdint>

namespace sixfold {

// Adds up `count` words `passes` times, on `threads` threads. Returns false if interrupted.
bool sum_words(const std::uint64_t* words, std::size_t count, int passes, int threads,
               std::uint64_t& sum);

}  // namespace sixfold
