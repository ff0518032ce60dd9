// Viterbi's search of the trellis (the rules: kernels/trellis/README.md). A lane is a vector, so that
// nothing crosses lanes.
#pragma once

#include "vectors/trellis.h"

namespace sixfold::vectors {
namespace {

// What the places of one coordinate cost in a state: so many lanes of `Sum`.
template <class V, class Sum>
struct SquaredCosts;

template <class V>
struct SquaredCosts<V, std::uint8_t> {
    using Sum = std::uint8_t;
    using Lanes = typename V::u8;
    const std::int16_t* words;
    typename V::i16 low, high;

    SIXFOLD_INLINE void set(const std::int16_t* places) { V::load_words(places, low, high); }
    SIXFOLD_INLINE Lanes operator()(int state) const {
        const auto word = V::set_pair(words + 2 * state);
        return V::narrow_words(V::square(low, word), V::square(high, word));
    }
};

template <class V>
struct SquaredCosts<V, std::uint16_t> {
    using Sum = std::uint16_t;
    using Lanes = typename V::u16;
    const std::int16_t* words;
    typename V::i16 place;

    SIXFOLD_INLINE void set(const std::int16_t* places) {
        place = load_aligned<typename V::i16>(places);
    }
    SIXFOLD_INLINE Lanes operator()(int state) const {
        return bits<Lanes>(V::square(place, V::set_pair(words + 2 * state)));
    }
};

// The same by lookup, where that is one instruction. Instead of its place a coordinate has the number
// of its interval modulo kIntervals.
template <class V>
struct TableCosts {
    using Sum = std::uint8_t;
    using Lanes = typename V::u8;
    const std::uint8_t* table;  // [states, kIntervals]
    Lanes interval;

    SIXFOLD_INLINE void set(const std::int16_t* numbers) {
        typename V::i16 low, high;
        V::load_words(numbers, low, high);
        interval = V::narrow_words(low, high);
    }
    SIXFOLD_INLINE Lanes operator()(int state) const {
        return ByteTable<7>(table + state * kIntervals, 0)(interval);
    }
};

template <class V>
void fill_table(const SearchGrid& grid, int states, std::uint8_t* table) {
    alignas(64) std::int16_t places[kIntervals];
    for (int i = 0; i < kIntervals; ++i) {
        const int number = i < kIntervals / 2 ? i : i - kIntervals;
        places[i] = static_cast<std::int16_t>((2 * number + 1) * grid.half);
    }
    SquaredCosts<V, std::uint8_t> costs{grid.words, {}, {}};
    for (int i = 0; i < kIntervals; i += V::kWidth * 4) {
        costs.set(places + i);
        for (int state = 0; state < states; ++state)
            store_aligned(table + state * kIntervals + i, costs(state));
    }
}

// The search of as many vectors as a register has sums.
template <class V, class Costs>
class Search {
  public:
    using Sum = typename Costs::Sum;
    using Lanes = typename Costs::Lanes;
    static constexpr int kCount = V::kWidth * 4 / static_cast<int>(sizeof(Sum));

    Search(const PathShape& shape, int margin, const Costs& costs, float* scratch)
        : shape_(shape), margin_(margin), costs_(costs),
          kept_(reinterpret_cast<Sum*>(scratch)),
          spare_(reinterpret_cast<Sum*>(scratch + kept_floats(shape))),
          decisions_(reinterpret_cast<Sum*>(scratch + 2 * kept_floats(shape))) {}

    // Bits that leave the windows of these vectors, for `places` of theirs; rows of both are
    // kSearched apart.
    void run(const std::int16_t* places, std::uint8_t* left) {
        places_ = places;
        choose_seam();
        for (int group = 0; group < states_of(shape_) >> left_before(0); ++group)
            store_aligned(kept_ + group * kCount, ~Lanes{});
        for (int lane = 0; lane < kCount; ++lane) kept_[group_[lane] * kCount + lane] = 0;
        for (int t = 0; t < shape_.dim; ++t) step<true>(t, t);
        for (int t = shape_.dim - 1; t >= 0; --t) step_back(t, t, left + t * kSearched);
    }

  private:
    // Leaves in group_ what the windows of the last coordinate shall share with those of the first.
    void choose_seam() {
        for (int group = 0; group < states_of(shape_); ++group)
            if (group < states_of(shape_) >> shape_.half_bits / 2)
                store_aligned(kept_ + group * kCount, Lanes{});
        int t = (shape_.dim - margin_ % shape_.dim) % shape_.dim;
        for (int i = 0; i < 2 * margin_; ++i, t = t + 1 == shape_.dim ? 0 : t + 1)
            // Nothing is traced back beyond the seam.
            i < margin_ ? step<false>(i, t) : step<true>(i, t);
        find_least(states_of(shape_) >> left_before(t));
        std::uint8_t ignored[kSearched];
        for (int i = 2 * margin_ - 1; i >= margin_; --i) {
            t = t == 0 ? shape_.dim - 1 : t - 1;
            step_back(i, t, ignored);
        }
    }

    int left_before(int t) const { return advance_of(shape_, t == 0 ? shape_.dim - 1 : t - 1); }
    Sum* decisions_of(int step) const {
        return decisions_ +
               static_cast<std::int64_t>(step) * (states_of(shape_) >> shape_.half_bits / 2) * kCount;
    }

    template <bool kDecide>
    void step(int step, int t) {
        switch (advance_of(shape_, t)) {
            case 1: extend<1, kDecide>(step, t); break;
            case 2: extend<2, kDecide>(step, t); break;
            case 3: extend<3, kDecide>(step, t); break;
            default: extend<4, kDecide>(step, t);
        }
        Sum* const extended = spare_;
        spare_ = kept_;
        kept_ = extended;
        if (step % 2) subtract_least(states_of(shape_) >> advance_of(shape_, t));
    }

    // The least sum of every group of states that differ in the bits that leave.
    template <int kAdvance, bool kDecide>
    void extend(int step, int t) {
        Costs costs = costs_;
        costs.set(places_ + t * kSearched);
        const int mask = (states_of(shape_) >> left_before(t)) - 1;
        const int groups = states_of(shape_) >> kAdvance;
        const Sum* kept = kept_;
        Sum *extended = spare_, *decisions = decisions_of(step);
        for (int group = 0; group < groups; ++group) {
            Lanes least, which = {};
#pragma GCC unroll 16
            for (int j = 0; j < 1 << kAdvance; ++j) {
                const int state = (group << kAdvance) + j;
                const Lanes before = load_aligned<Lanes>(kept + (state & mask) * kCount);
                const Lanes sum = V::add_saturating(before, costs(state));
                if (j == 0) least = sum;
                else if constexpr (kDecide) V::take_less(sum, Lanes{} + static_cast<Sum>(j), least, which);
                else least = V::min(sum, least);
            }
            store_aligned(extended + group * kCount, least);
            if constexpr (kDecide) store_aligned(decisions + group * kCount, which);
        }
    }

    void subtract_least(int groups) {
        Lanes least = load_aligned<Lanes>(kept_);
        for (int group = 1; group < groups; ++group)
            least = V::min(load_aligned<Lanes>(kept_ + group * kCount), least);
        for (int group = 0; group < groups; ++group) {
            Sum* kept = kept_ + group * kCount;
            store_aligned(kept, load_aligned<Lanes>(kept) - least);
        }
    }

    void find_least(int groups) {
        for (int lane = 0; lane < kCount; ++lane) {
            int best = 0;
            for (int group = 1; group < groups; ++group)
                if (kept_[group * kCount + lane] < kept_[best * kCount + lane]) best = group;
            group_[lane] = static_cast<std::uint16_t>(best);
        }
    }

    // From the groups after a step to those before it, and the bits that left in between.
    void step_back(int step, int t, std::uint8_t* left) {
        const Sum* decisions = decisions_of(step);
        const int advance = advance_of(shape_, t), mask = (states_of(shape_) >> left_before(t)) - 1;
        for (int lane = 0; lane < kCount; ++lane) {
            const int which = decisions[group_[lane] * kCount + lane];
            left[lane] = static_cast<std::uint8_t>(which);
            group_[lane] = static_cast<std::uint16_t>((group_[lane] << advance | which) & mask);
        }
    }

    PathShape shape_;
    int margin_;
    Costs costs_;
    const std::int16_t* places_ = nullptr;
    Sum *kept_, *spare_, *decisions_;
    std::uint16_t group_[kCount];
};

template <class V, class Costs>
void search_all(const PathEncodeTask& task, const Costs& costs, const std::int16_t* places,
                std::uint8_t* left, float* scratch) {
    Search<V, Costs> search(task.shape, task.grid.margin, costs, scratch);
    for (int lane = 0; lane < kSearched; lane += search.kCount)
        search.run(places + lane, left + lane);
}

// `places`: see TableCosts for what they are where V::kTableCosts and sums are narrow.
template <class V>
void search(const PathEncodeTask& task, const std::int16_t* places, std::uint8_t* left,
            float* scratch) {
    if (!is_narrow(task.shape))
        return search_all<V>(task, SquaredCosts<V, std::uint16_t>{task.grid.words, {}}, places,
                             left, scratch);
    if constexpr (V::kTableCosts) {
        auto* table = reinterpret_cast<std::uint8_t*>(scratch);
        fill_table<V>(task.grid, states_of(task.shape), table);
        search_all<V>(task, TableCosts<V>{table, {}}, places, left,
                      scratch + table_floats(task.shape));
    } else {
        search_all<V>(task, SquaredCosts<V, std::uint8_t>{task.grid.words, {}, {}}, places, left,
                      scratch);
    }
}

}  // namespace
}  // namespace sixfold::vectors
