// The pool under stress, for a thread sanitizer: csrc/selftest/CMakeLists.txt.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "runtime/pool.h"

using namespace sixfold;
using namespace std::chrono_literals;

namespace {

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                           \
        }                                                                           \
    } while (0)

// Plain, not atomic: two threads that share a worker index, or an item, are a data race.
struct alignas(64) Scratch {
    std::int64_t calls = 0;
};

void run_and_count(std::int64_t items, int threads) {
    std::vector<int> seen(items, 0);
    std::vector<Scratch> scratch(threads);
    CHECK(parallel_for(items, threads, [&](std::int64_t item, int worker) {
        CHECK(worker >= 0 && worker < threads);
        ++seen[item];
        ++scratch[worker].calls;
    }));
    std::int64_t calls = 0;
    for (int count : seen) CHECK(count == 1);
    for (const Scratch& one : scratch) calls += one.calls;
    CHECK(calls == items);
}

void test_every_item_once() {
    CHECK(parallel_for(0, 4, [](std::int64_t, int) { CHECK(false); }));
    for (int threads : {1, 2, 3, 8, 33})
        for (std::int64_t items : {1, 2, 7, 100, 5000}) run_and_count(items, threads);
    CHECK(pool_workers() == 32);
}

void test_ascending() {
    std::int64_t last = -1;
    parallel_for(100, 1, [&](std::int64_t item, int) { CHECK(item == ++last); });
    CHECK(last == 99);
}

// Long enough apart to fall asleep, or close enough to be met spinning.
void test_bursts() {
    for (int round = 0; round < 300; ++round) {
        run_and_count(1 + round % 17, 4);
        if (round % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(round));
    }
}

void test_workers_take_part() {
    std::atomic<int> met{0};
    CHECK(parallel_for(4, 4, [&](std::int64_t, int) {
        // Ends only if four threads are inside at once.
        met.fetch_add(1);
        while (met.load() < 4) std::this_thread::yield();
    }));
}

void test_callers_at_once() {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller)
        callers.emplace_back([] {
            for (int round = 0; round < 100; ++round) run_and_count(50, 4);
        });
    for (std::thread& caller : callers) caller.join();
}

void test_nested() {
    std::atomic<int> inner{0};
    for (int round = 0; round < 20; ++round)
        CHECK(parallel_for(8, 4, [&](std::int64_t, int) {
            CHECK(parallel_for(8, 4, [&](std::int64_t, int) { inner.fetch_add(1); }));
        }));
    CHECK(inner.load() == 20 * 64);
}

std::atomic<int> asked{0};

void test_interrupt() {
    set_interrupt_check([] { return asked.fetch_add(1) == 1; });
    for (int threads : {1, 4}) {
        asked.store(0);
        std::atomic<int> done{0};
        const bool complete = parallel_for(100000, threads, [&](std::int64_t, int) {
            std::this_thread::sleep_for(1ms);
            done.fetch_add(1);
        });
        const int after = done.load();
        CHECK(!complete && asked.load() == 2 && after < 2000);
        std::this_thread::sleep_for(20ms);
        CHECK(done.load() == after);
    }
    // Nobody asks during a short call.
    asked.store(0);
    run_and_count(100, 4);
    CHECK(asked.load() == 0);
    set_interrupt_check(nullptr);
}

// As GOMP_parallel, with as many threads as asked for.
void fresh_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
    body(data);
    for (std::thread& other : others) other.join();
}

void test_borrowed_team() {
    const int before = pool_workers();
    set_team(fresh_threads);
    test_every_item_once();
    test_workers_take_part();
    test_callers_at_once();
    test_nested();
    test_interrupt();
    CHECK(before == pool_workers());
    set_team(nullptr);
}

#if !defined(SIXFOLD_NO_FORK)
int in_child(void (*test)()) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(60);
        test();
        _exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

// Whoever forks with a team has one that its child must not use.
void child_works() {
    CHECK(pool_workers() == 0);
    run_and_count(1000, 4);
    CHECK(pool_workers() == 3);
    CHECK(in_child([] { run_and_count(1000, 3); }) == 0);
}

void test_fork() {
    run_and_count(1000, 4);
    CHECK(in_child(child_works) == 0);
    run_and_count(1000, 4);
    // While other threads keep the pool busy and growing.
    std::atomic<bool> stop{false};
    std::thread caller([&] {
        for (int round = 0; !stop.load(); ++round) run_and_count(20, 2 + round % 40);
    });
    for (int round = 0; round < 30; ++round) CHECK(in_child(child_works) == 0);
    stop.store(true);
    caller.join();
}
#endif

}  // namespace

int main() {
    test_ascending();
    test_every_item_once();
    test_bursts();
    test_workers_take_part();
    test_callers_at_once();
    test_nested();
    test_interrupt();
    test_borrowed_team();
#if !defined(SIXFOLD_NO_FORK)
    test_fork();
    set_team(fresh_threads);
    test_fork();
    set_team(nullptr);
#endif
    std::puts("pool: ok");
}
