// Threads: those of torch's OpenMP where it is in the process, else our own. The GIL is not held.
//
//   items    one by one, ascending, to whoever is free; the caller takes part as worker 0
//   workers  0 <= worker < threads: the index of a thread's scratch, never shared within a call
#pragma once

#include <cstdint>
#include <functional>

namespace sixfold {

// Calls body(item, worker) for every item in [0, items), on at most `threads` threads of which the
// caller is one. Returns true when all are done, and false if the interrupt check asked to stop:
// then items that had begun were finished, later ones were not begun, and nobody may rely on the
// output. `body` must not throw.
//
// May be called from several threads at once, and from within a body. With threads of our own each
// call takes workers that are idle at the time, in the worst case none, and never waits for another
// call.
bool parallel_for(std::int64_t items, int threads,
                  const std::function<void(std::int64_t, int)>& body);

// Starts body(data) on the calling thread and on up to threads - 1 others, and returns when all have
// returned: GOMP_parallel. `flags` is 0.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Whose threads to use instead of our own; nullptr: nobody's. Calls from within a body, and all
// calls of a forked child, use our own all the same.
void set_team(Team team);

// Asked by the thread that called parallel_for, between two of its items and at most 20 times a
// second, whether to stop. Never asked by a worker. nullptr: do not ask.
void set_interrupt_check(bool (*check)());

// Workers of our own that exist, asleep or not. They are started when first needed, kept until the process
// ends, and not inherited by a forked child.
int pool_workers();

}  // namespace sixfold
