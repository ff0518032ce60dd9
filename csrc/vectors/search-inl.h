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
// of its interval modulo kIntervals. The state of opposite bits has the opposite codeword, so it costs
// what a state does for the opposite number: one table serves both.
template <class V>
struct TableCosts {
    using Sum = std::uint8_t;
    using Lanes = typename V::u8;
    const std::uint8_t* table;  // [states / 2, 2, kIntervals / 2]: numbers from 0 up, from -1 down
    typename V::Mirrored interval;

    SIXFOLD_INLINE void set(const std::int16_t* numbers) {
        typename V::i16 low, high;
        V::load_words(numbers, low, high);
        interval = V::mirror(V::narrow_words(low, high));
    }
    SIXFOLD_INLINE void pair(int state, Lanes& cost, Lanes& opposite) const {
        const std::uint8_t* positive = table + state * kIntervals;
        V::look_up_mirrored(positive, positive + kIntervals / 2, interval, cost, opposite);
    }
};

template <class V>
void fill_table(const SearchGrid& grid, int states, std::uint8_t* table) {
    alignas(64) std::int16_t places[kIntervals];
    for (int i = 0; i < kIntervals / 2; ++i) {
        places[i] = static_cast<std::int16_t>((2 * i + 1) * grid.half);
        places[i + kIntervals / 2] = static_cast<std::int16_t>(-places[i]);
    }
    SquaredCosts<V, std::uint8_t> costs{grid.words, {}, {}};
    for (int i = 0; i < kIntervals; i += V::kWidth * 4) {
        costs.set(places + i);
        for (int state = 0; state < states / 2; ++state)
            store_aligned(table + state * kIntervals + i, costs(state));
    }
}

// The search of as many vectors as a register has sums.
template <class V, class Costs>
class Search {
  public:
    using Sum = typename Costs::Sum;
    using Lanes = typename Costs::Lanes;
    static constexpr int kCount = V::kWidth * 4 / static_cast<int>(sizeof(Sum)), kMostBits = 10;

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
        start_at_seam();
        for (int t = 0; t < shape_.dim; ++t) step<true>(t, t);
        for (int t = shape_.dim - 1; t >= 0; --t)
            V::store_bytes(left + t * kSearched, step_back(t, t));
    }

  private:
    // Leaves in bit_ what the windows of the last coordinate shall share with those of the first.
    void choose_seam() {
        for (int group = 0; group < states_of(shape_) >> shape_.half_bits / 2; ++group)
            store_aligned(kept_ + group * kCount, Lanes{});
        int t = (shape_.dim - margin_ % shape_.dim) % shape_.dim;
        for (int i = 0; i < 2 * margin_; ++i, t = t + 1 == shape_.dim ? 0 : t + 1)
            // Nothing is traced back beyond the seam.
            i < margin_ ? step<false>(i, t) : step<true>(i, t);
        find_least(window_after(t));
        for (int i = 2 * margin_ - 1; i >= margin_; --i) {
            t = t == 0 ? shape_.dim - 1 : t - 1;
            step_back(i, t);
        }
    }

    // kept = 0 for the group that bit_ names, all ones elsewhere.
    void start_at_seam() {
        const int window = window_after(0);
        for (int group = 0; group < 1 << window; ++group) {
            Lanes other = {};
            for (int i = 0; i < window; ++i) other |= bit_[i] ^ ones_if(group >> i & 1);
            store_aligned(kept_ + group * kCount, other);
        }
    }

    static SIXFOLD_INLINE Lanes every(int x) {
        // Named: with sanitizers GCC 12 takes a cast inside of the expression for an int.
        const auto number = static_cast<Sum>(x);
        return Lanes{} + number;
    }
    static SIXFOLD_INLINE Lanes ones_if(int bit) { return -every(bit); }
    // All ones in the lanes whose bit i is set.
    static SIXFOLD_INLINE Lanes ones_where(Lanes x, int i) { return -(x >> i & every(1)); }
    int left_before(int t) const { return advance_of(shape_, t == 0 ? shape_.dim - 1 : t - 1); }
    // Bits of a window that are left before coordinate t.
    int window_after(int t) const { return shape_.window - left_before(t); }
    Sum* decisions_of(int step) const {
        return decisions_ +
               static_cast<std::int64_t>(step) * decision_rows(shape_) * kCount;
    }

    // Bits of a decision, and decisions in a lane.
    static constexpr int field_of(int advance) { return advance <= 2 ? 2 : 4; }
    static constexpr int fields_of(int advance) {
        return 8 * static_cast<int>(sizeof(Sum)) / field_of(advance);
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

    // The least sum of every group of states that differ in the bits that leave. Groups of opposite
    // bits are extended together, where their costs are found together.
    template <int kAdvance, bool kDecide>
    void extend(int step, int t) {
        Costs costs = costs_;
        costs.set(places_ + t * kSearched);
        constexpr int kField = field_of(kAdvance), kFields = fields_of(kAdvance);
        const int mask = (states_of(shape_) >> left_before(t)) - 1;
        const int groups = states_of(shape_) >> kAdvance, rows = groups / kFields;
        Sum* decisions = decisions_of(step);
        constexpr bool kPairs = requires(Lanes x) { costs.pair(0, x, x); };
        for (int row = 0; row < (kPairs ? rows / 2 : rows); ++row) {
            Lanes decided = {}, opposite_decided = {};
#pragma GCC unroll 4
            for (int field = 0; field < kFields; ++field) {
                const int group = row * kFields + field;
                Lanes cost[1 << kAdvance], opposite[1 << kAdvance];
#pragma GCC unroll 16
                for (int j = 0; j < 1 << kAdvance; ++j) {
                    const int state = (group << kAdvance) + j;
                    if constexpr (kPairs) costs.pair(state, cost[j], opposite[(1 << kAdvance) - 1 - j]);
                    else cost[j] = costs(state);
                }
                decided |= take_least<kAdvance, kDecide>(group, mask, cost, field * kField);
                if constexpr (kPairs)
                    opposite_decided |= take_least<kAdvance, kDecide>(
                        groups - 1 - group, mask, opposite, (kFields - 1 - field) * kField);
            }
            if constexpr (kDecide) {
                store_aligned(decisions + row * kCount, decided);
                if constexpr (kPairs)
                    store_aligned(decisions + (rows - 1 - row) * kCount, opposite_decided);
            }
        }
    }

    // Leaves the least sum of a group's states in spare_; returns which state has it, `shift` bits up.
    template <int kAdvance, bool kDecide>
    SIXFOLD_INLINE Lanes take_least(int group, int mask, const Lanes (&cost)[1 << kAdvance],
                                    int shift) {
        const Sum* origins = kept_ + ((group << kAdvance) & mask) * kCount;
        Lanes least, which = {};
#pragma GCC unroll 16
        for (int j = 0; j < 1 << kAdvance; ++j) {
            // Only groups of 16 can be wider than the mask.
            const int origin = (kAdvance < 4 ? j : j & mask) * kCount;
            const Lanes sum = V::add_saturating(load_aligned<Lanes>(origins + origin), cost[j]);
            if (j == 0) least = sum;
            else if constexpr (kDecide) V::take_less(sum, every(j << shift), least, which);
            else least = V::min(sum, least);
        }
        store_aligned(spare_ + group * kCount, least);
        return which;
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

    // Leaves in bit_ the group of `window` bits that has the least sum, the lowest of equals.
    void find_least(int window) {
        Lanes least = load_aligned<Lanes>(kept_);
        for (int i = 0; i < window; ++i) bit_[i] = Lanes{};
        for (int group = 1; group < 1 << window; ++group) {
            const Lanes before = least;
            least = V::min(load_aligned<Lanes>(kept_ + group * kCount), before);
            const Lanes same = bits<Lanes>(least == before);
            for (int i = 0; i < window; ++i)
                bit_[i] = V::select(same, bit_[i], ones_if(group >> i & 1));
        }
    }

    // From the groups after a step, in bit_, to those before it. Returns the bits that left in between.
    Lanes step_back(int step, int t) {
        const int advance = advance_of(shape_, t);
        const Lanes which = decision(decisions_of(step), advance);
        for (int i = window_after(t) - 1; i >= advance; --i) bit_[i] = bit_[i - advance];
        for (int i = 0; i < advance; ++i) bit_[i] = ones_where(which, i);
        return which;
    }

    // What was decided of the group that the bits in bit_ name: the upper ones its row, the lower ones
    // its field.
    Lanes decision(const Sum* rows, int advance) const {
        const int field = field_of(advance), low = fields_of(advance) == 4 ? 2 : 1;
        auto found = row_of(rows, shape_.window - advance - low, bit_ + low);
        for (int i = 0; i < low; ++i) found = V::select(bit_[i], found >> (field << i), found);
        return found & every((1 << field) - 1);
    }
    static Lanes row_of(const Sum* rows, int bits, const Lanes* bit) {
        switch (bits) {
            case 0: return choose<0>(rows, bit);
            case 1: return choose<1>(rows, bit);
            case 2: return choose<2>(rows, bit);
            case 3: return choose<3>(rows, bit);
            case 4: return choose<4>(rows, bit);
        }
        const auto low = row_of(rows, bits - 1, bit);
        return V::select(bit[bits - 1], row_of(rows + (kCount << (bits - 1)), bits - 1, bit), low);
    }
    template <int kBits>
    static SIXFOLD_INLINE Lanes choose(const Sum* rows, const Lanes* bit) {
        if constexpr (kBits == 0) return load_aligned<Lanes>(rows);
        else
            return V::select(bit[kBits - 1], choose<kBits - 1>(rows + (kCount << (kBits - 1)), bit),
                             choose<kBits - 1>(rows, bit));
    }

    PathShape shape_;
    int margin_;
    Costs costs_;
    const std::int16_t* places_ = nullptr;
    Sum *kept_, *spare_, *decisions_;
    Lanes bit_[kMostBits];
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
