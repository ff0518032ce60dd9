// Memory that a thread keeps for its next call.
#pragma once

#include <utility>

namespace sixfold {

// The thread's spare T for as long as this lives. A call within the call (a Python signal handler
// that attends runs between two items) finds none, and makes one of its own.
template <class T>
class Kept {
  public:
    Kept() : mine_(std::exchange(spare(), T())) {}
    ~Kept() { spare() = std::move(mine_); }
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;

    T& operator*() { return mine_; }
    T* operator->() { return &mine_; }

  private:
    static T& spare() {
        static thread_local T kept;
        return kept;
    }

    T mine_;
};

}  // namespace sixfold
