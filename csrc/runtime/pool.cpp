// Our own threads. A worker is one 32-bit word, `state`, on which it sleeps and its caller waits:
//
//   kIdle -> kClaimed    a caller reserves the worker
//         -> id          and offers it the job of that (even) number,
//         -> id | 1      which the worker takes and runs
//         -> kIdle       and leaves; or the caller takes the offer back, id -> kIdle
//
// The caller returns once no worker of its team has its number, so a job can live on its stack;
// a worker that wakes too late finds no offer and never touches it. No call waits for a sleeper.
#include "runtime/pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace sixfold {
namespace {

using Clock = std::chrono::steady_clock;
using Body = std::function<void(std::int64_t, int)>;

constexpr int kMaxWorkers = 511;
constexpr std::uint32_t kIdle = 0, kClaimed = 1, kRunning = 1;
constexpr auto kInterruptPeriod = std::chrono::milliseconds(50);
// Longer than between the calls of a burst; sleeping and waking costs about as much.
constexpr auto kWorkerSpin = std::chrono::microseconds(5);
// The caller has nothing better to do, and its result is what everybody waits for.
constexpr auto kCallerSpin = std::chrono::microseconds(30);

struct Job;

// One cache line (two where lines are fetched in pairs), so that spinning disturbs nobody.
struct alignas(128) Worker {
    std::atomic<std::uint32_t> state{kIdle};
    // Written between claiming and offering, read while running.
    Job* job = nullptr;
    int index = 0;
};

struct Job {
    Job(const Body& body, std::int64_t items, std::uint32_t id) : body(body), items(items), id(id) {}

    const Body& body;
    const std::int64_t items;
    const std::uint32_t id;
    int team_size = 0;
    std::atomic<std::int64_t> next{0};
    std::atomic<int> rung{0};
    Worker* team[kMaxWorkers];
};

struct Pool {
    std::mutex growing;
    std::atomic<int> size{0};
    std::atomic<std::uint32_t> last_id{0};
    std::atomic<std::uint32_t> forks{0};
    std::atomic<bool (*)()> interrupt_check{nullptr};
    std::atomic<Team> team{nullptr};
    Worker* workers[kMaxWorkers];
};

// Never destroyed: workers may outlive static destructors.
Pool& pool() {
    static Pool* const instance = [] {
        pthread_atfork(
            [] { pool().growing.lock(); }, [] { pool().growing.unlock(); },
            [] {
                // Threads are not forked; what the parent's workers were is left behind.
                pool().size.store(0);
                pool().forks.fetch_add(1);
                pool().growing.unlock();
            });
        return new Pool;
    }();
    return *instance;
}

// Of somebody's team, for as long as it runs a body; ours are born so.
thread_local bool is_worker = false;
thread_local bool is_inside_team = false;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
}

template <typename Condition>
bool spin_until(Condition met, Clock::duration limit) {
    if (met()) return true;
    for (const auto end = Clock::now() + limit; Clock::now() < end;) {
        for (int i = 0; i < 8; ++i) {
            pause();
            if (met()) return true;
        }
    }
    return false;
}

inline bool is_offer(std::uint32_t state) { return state > kClaimed && !(state & kRunning); }

// Waking costs the waker a system call: everybody who is awake wakes a few more, so that neither
// the caller nor one slow worker holds the others up.
void ring(Job& job, int count) {
    while (count-- > 0 && job.rung.load(std::memory_order_relaxed) < job.team_size) {
        const int rank = job.rung.fetch_add(1, std::memory_order_relaxed);
        if (rank >= job.team_size) return;
        Worker& worker = *job.team[rank];
        if (worker.state.load() == job.id) worker.state.notify_one();
    }
}

void run(Worker& self) {
    Job& job = *self.job;
    ring(job, 2);
    for (std::int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < job.items;) {
        job.body(item, self.index);
        ring(job, 1);
    }
    // The job may be gone as soon as this is seen.
    self.state.store(kIdle);
    self.state.notify_one();
}

void worker_main(Worker& self) {
    is_worker = true;
    for (;;) {
        std::uint32_t state = kIdle;
        const auto offered = [&] { return is_offer(state = self.state.load()); };
        while (!spin_until(offered, kWorkerSpin)) self.state.wait(state);
        if (self.state.compare_exchange_strong(state, state | kRunning)) run(self);
    }
}

// Signals are for the threads the program knows of.
class AllSignalsBlocked {
  public:
    AllSignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~AllSignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

// Returns false where the system gives no more threads: calls make do with those there are.
bool start_worker(Pool& p, int index) {
    Worker* worker = new (std::nothrow) Worker;
    if (!worker) return false;
    try {
        AllSignalsBlocked blocked;
        std::thread thread([worker] { worker_main(*worker); });
#if defined(__linux__)
        pthread_setname_np(thread.native_handle(), "sixfold");
#endif
        thread.detach();
    } catch (const std::exception&) {
        delete worker;
        return false;
    }
    p.workers[index] = worker;
    p.size.store(index + 1, std::memory_order_release);
    return true;
}

void grow(Pool& p, int count) {
    if (p.size.load(std::memory_order_acquire) >= count) return;
    std::lock_guard<std::mutex> lock(p.growing);
    int size = p.size.load();
    while (size < count && start_worker(p, size)) ++size;
}

void offer(Pool& p, Job& job, int helpers) {
    const int size = p.size.load(std::memory_order_acquire);
    for (int i = 0; i < size && job.team_size < helpers; ++i) {
        std::uint32_t idle = kIdle;
        if (!p.workers[i]->state.compare_exchange_strong(idle, kClaimed)) continue;
        job.team[job.team_size++] = p.workers[i];
    }
    // Offered only when the team is complete: whoever begins reads it.
    for (int rank = 0; rank < job.team_size; ++rank) {
        Worker& worker = *job.team[rank];
        worker.job = &job;
        worker.index = rank + 1;
        worker.state.store(job.id);
    }
}

void dismiss(Job& job) {
    for (int rank = 0; rank < job.team_size; ++rank) {
        std::uint32_t offered = job.id;
        if (job.team[rank]->state.compare_exchange_strong(offered, kIdle)) continue;
        std::atomic<std::uint32_t>& state = job.team[rank]->state;
        const std::uint32_t running = job.id | kRunning;
        if (!spin_until([&] { return state.load() != running; }, kCallerSpin)) state.wait(running);
    }
}

// Asks at most every kInterruptPeriod; short calls never do.
class InterruptPoll {
  public:
    explicit InterruptPoll(Pool& p)
        : check_(is_worker ? nullptr : p.interrupt_check.load()),
          due_(Clock::now() + kInterruptPeriod) {}

    bool stop() {
        if (!check_ || Clock::now() < due_) return false;
        const bool wanted = check_();
        due_ = Clock::now() + kInterruptPeriod;
        return wanted;
    }

  private:
    bool (*const check_)();
    Clock::time_point due_;
};

bool run_alone(Pool& p, std::int64_t items, const Body& body) {
    InterruptPoll interrupt(p);
    for (std::int64_t item = 0; item < items; ++item) {
        if (interrupt.stop()) return false;
        body(item, 0);
    }
    return true;
}

// What the members of a borrowed team share.
struct TeamJob {
    Pool& pool;
    const Body& body;
    const std::int64_t items;
    const pthread_t caller = pthread_self();
    std::atomic<std::int64_t> next{0};
    std::atomic<int> members{1};
    bool interrupted = false;
};

void run_as_member(void* data) {
    TeamJob& job = *static_cast<TeamJob*>(data);
    const bool called = pthread_equal(pthread_self(), job.caller);
    const int worker = called ? 0 : job.members.fetch_add(1, std::memory_order_relaxed);
    const bool was_worker = is_worker;
    is_worker = was_worker || !called;
    is_inside_team = true;
    InterruptPoll interrupt(job.pool);
    for (std::int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < job.items;) {
        job.body(item, worker);
        if (called && (job.interrupted = interrupt.stop())) job.next.store(job.items);
    }
    is_inside_team = false;
    is_worker = was_worker;
}

}  // namespace

bool parallel_for(std::int64_t items, int threads, const Body& body) {
    Pool& p = pool();
    const int wanted = static_cast<int>(std::min<std::int64_t>(items, threads)) - 1;
    const int helpers = std::min(wanted, kMaxWorkers);
    if (helpers <= 0) return run_alone(p, items, body);
    // OpenMP does not survive a fork.
    const Team team = p.forks.load() ? nullptr : p.team.load();
    if (team && !is_inside_team && !is_worker) {
        TeamJob job{p, body, items};
        // All that are asked for, whatever the items: a team that changes its size starts threads.
        team(run_as_member, &job, static_cast<unsigned>(threads), 0);
        return !job.interrupted;
    }
    grow(p, helpers);
    // Even, and neither kIdle nor kClaimed; numbers return long after their job has.
    std::uint32_t id;
    while ((id = p.last_id.fetch_add(2, std::memory_order_relaxed)) <= kClaimed) {
    }
    const std::uint32_t forks = p.forks.load();
    Job job(body, items, id);
    InterruptPoll interrupt(p);
    offer(p, job, helpers);
    ring(job, 2);
    bool interrupted = false;
    for (std::int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
        body(item, 0);
        ring(job, 1);
        if ((interrupted = interrupt.stop())) job.next.store(items);
    }
    // A signal handler may have forked: in the child the team, and what it was doing, is gone.
    if (p.forks.load() != forks) return false;
    dismiss(job);
    return !interrupted;
}

void set_team(Team team) { pool().team.store(team); }

void set_interrupt_check(bool (*check)()) { pool().interrupt_check.store(check); }

int pool_workers() { return pool().size.load(); }

}  // namespace sixfold
