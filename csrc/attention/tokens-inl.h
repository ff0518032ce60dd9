// The kernels of tokens.h, on the Simd and Tiles that were included before.
#pragma once

#include "attention/tokens.h"

namespace sixfold::vectors {
namespace {

constexpr float kHidden = -__builtin_inff();

// exp(x) for x <= 0, 0 below the smallest normal number; relative error 2e-7.
template <class V>
SIXFOLD_INLINE typename V::f32 exponential(typename V::f32 x) {
    using F = typename V::f32;
    using I = typename V::i32;
    const F shifter = V::set(0x1.8p23f);
    const F clamped = x < -87.0f ? V::set(-87.0f) : x;
    const F rounded = clamped * 1.44269504f + shifter, n = rounded - shifter;
    F r = V::multiply_add(clamped, n, V::set(-0.693359375f));
    r = V::multiply_add(r, n, V::set(2.12194440e-4f));
    constexpr float kCoefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                       1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f};
    F p = V::set(1.9875691500e-4f);
    for (const float c : kCoefficients) p = V::multiply_add(V::set(c), p, r);
    const F power = bits<F>((bits<I>(rounded) + 127) << 23);
    return x < -87.0f ? F{} : p * power;
}

template <class V>
SIXFOLD_INLINE typename V::f32 capped(typename V::f32 logit, float cap) {
    const auto x = logit / cap;
    const auto magnitude = x < 0.0f ? -x : x;
    const auto t = exponential<V>(-2.0f * magnitude);
    const auto tanh = (1.0f - t) / (1.0f + t);
    // 1 - t has no digits left near 0, where the series has all of them.
    const auto square = x * x;
    auto series = V::multiply_add(V::set(-17.0f / 315), square, V::set(62.0f / 2835));
    for (const float c : {2.0f / 15, -1.0f / 3, 1.0f})
        series = V::multiply_add(V::set(c), square, series);
    return cap * (magnitude < 0.25f ? x * series : x < 0.0f ? -tanh : tanh);
}

// logits[row, 16 tokens] of a tile [dim][16].
template <class V>
void score_tokens(const float* tile, const float* query, int dim, float* logits) {
    for (int lane = 0; lane < kLanes; lane += V::kWidth) {
        typename V::f32 sum[4] = {};
        int d = 0;
        for (; d + 4 <= dim; d += 4)
            for (int c = 0; c < 4; ++c)
                sum[c] = V::multiply_add(sum[c], V::set(query[d + c]),
                                         V::load(tile + (d + c) * kLanes + lane));
        for (; d < dim; ++d)
            sum[0] = V::multiply_add(sum[0], V::set(query[d]), V::load(tile + d * kLanes + lane));
        V::store(logits + lane, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
}

template <class V>
void cap_logits(float* logits, float softcap) {
    for (int t = 0; t < kBlockTokens; t += V::kWidth)
        V::store(logits + t, capped<V>(V::load(logits + t), softcap));
}

// Hides what row `row` does not see of the block that begins at token `start`.
void hide_tokens(const TokensWork& work, int row, std::int64_t start, float* logits) {
    const bool inside = work.first[row] <= start && start + kBlockTokens <= work.last[row];
    if (inside && work.mask_kind == Mask::none) return;
    for (int t = 0; t < kBlockTokens; ++t) {
        const std::int64_t token = start + t;
        if (token < work.first[row] || token >= work.last[row]) {
            logits[t] = kHidden;
        } else if (work.mask_kind == Mask::boolean) {
            if (!static_cast<const bool*>(work.mask[row])[token]) logits[t] = kHidden;
        } else if (work.mask_kind == Mask::additive) {
            const float bias = static_cast<const float*>(work.mask[row])[token];
            logits[t] = bias <= work.never ? kHidden : logits[t] + bias;
        }
    }
}

// Logits become weights; the row's state makes room for them.
template <class V>
void weigh(const TokensWork& work, int row, float* logits) {
    auto top = V::load(logits);
    for (int t = V::kWidth; t < kBlockTokens; t += V::kWidth) {
        const auto x = V::load(logits + t);
        top = x > top ? x : top;
    }
    float maximum = work.maximum[row];
    for (int lane = 0; lane < V::kWidth; ++lane) maximum = top[lane] > maximum ? top[lane] : maximum;
    const auto anchor = V::set(maximum == kHidden ? 0.0f : maximum);
    typename V::f32 sum = {};
    for (int t = 0; t < kBlockTokens; t += V::kWidth) {
        const auto weight = exponential<V>(V::load(logits + t) - anchor);
        V::store(logits + t, weight);
        sum += weight;
    }
    float total = 0;
    for (int lane = 0; lane < V::kWidth; ++lane) total += sum[lane];
    float* out = work.out + row * padded_dim(work.value_dim);
    if (maximum > work.maximum[row]) {
        const float decay = exponential<V>(V::set(work.maximum[row]) - anchor)[0];
        work.total[row] *= decay;
        for (int d = 0; d < work.value_dim; d += V::kWidth)
            V::store(out + d, V::load(out + d) * decay);
        work.maximum[row] = maximum;
    }
    work.total[row] += total;
}

// out[row] += sum over 16 tokens of weight · value, values [16, padded dim] in float32.
template <class V>
void add_values(const float* values, const float* weights, std::int64_t dim, float* out) {
    constexpr int kRegisters = 4, kStep = kRegisters * V::kWidth;
    std::int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
        typename V::f32 sum[kRegisters];
        for (int i = 0; i < kRegisters; ++i) sum[i] = V::load(out + d + i * V::kWidth);
        for (int t = 0; t < kLanes; ++t)
            for (int i = 0; i < kRegisters; ++i)
                sum[i] = V::multiply_add(sum[i], V::set(weights[t]),
                                         V::load(values + t * dim + d + i * V::kWidth));
        for (int i = 0; i < kRegisters; ++i) V::store(out + d + i * V::kWidth, sum[i]);
    }
    for (; d < dim; d += V::kWidth) {
        auto sum = V::load(out + d);
        for (int t = 0; t < kLanes; ++t)
            sum = V::multiply_add(sum, V::set(weights[t]), V::load(values + t * dim + d));
        V::store(out + d, sum);
    }
}

// 16 vectors as float32 [16, padded dim].
void widen_rows(const VectorTile& in, float* rows, int dim) {
    const std::int64_t width = padded_dim(dim), size = in.dtype == Dtype::f32 ? 4 : 2;
    for (int i = 0; i < kLanes; ++i) {
        const char* from = lane_of(in, i);
        float* row = rows + i * width;
        int d = 0;
        for (; d + 4 <= dim; d += 4)
            *reinterpret_cast<f32x4*>(row + d) = widen(from + d * size, in.dtype);
        alignas(8) char rest[16] = {};
        __builtin_memcpy(rest, from + d * size, (dim - d) * size);
        if (d < width) *reinterpret_cast<f32x4*>(row + d) = widen(rest, in.dtype);
        for (d += 4; d < width; ++d) row[d] = 0;
    }
}

// A token that has no weight in any row may hold anything: 0 times NaN would be NaN.
void forget_hidden(const TokensWork& work, const float* weights, std::int64_t width, float* tile) {
    for (int i = 0; i < kLanes; ++i) {
        bool seen = false;
        for (int r = 0; r < work.rows; ++r) seen |= weights[r * kBlockTokens + i] != 0.0f;
        if (!seen)
            for (std::int64_t d = 0; d < width; ++d) tile[i * width + d] = 0;
    }
}

template <class V>
void attend_tokens(const TokensWork& work) {
    const std::int64_t width = padded_dim(work.value_dim);
    float *tile = work.scratch, *weights = tile + token_scratch(0, work.key_dim, work.value_dim);
    // What no row sees is not even read: memory that nobody has written may hold anything.
    std::int64_t low = work.tokens, end = 0;
    for (int r = 0; r < work.rows; ++r) {
        low = work.first[r] < low ? work.first[r] : low;
        end = work.last[r] > end ? work.last[r] : end;
    }
    auto tokens = [&](const char* base, std::int64_t stride, std::int64_t first) {
        const std::int64_t left = end - first;
        // Tiles are read only.
        return VectorTile{const_cast<char*>(base) + first * stride, stride,
                          static_cast<int>(left < kLanes ? left : kLanes), work.dtype};
    };
    for (std::int64_t start = low; start < end; start += kBlockTokens) {
        const std::int64_t left = end - start;
        const int count = static_cast<int>(left < kBlockTokens ? left : kBlockTokens);
        for (int t = 0; t < count; t += kLanes) {
            Tiles<V>::load(tokens(work.keys, work.key_stride, start + t), tile, work.key_dim);
            for (int r = 0; r < work.rows; ++r)
                score_tokens<V>(tile, work.query + r * work.key_dim, work.key_dim,
                                weights + r * kBlockTokens + t);
        }
        for (int r = 0; r < work.rows; ++r) {
            float* logits = weights + r * kBlockTokens;
            if (work.softcap > 0) cap_logits<V>(logits, work.softcap);
            hide_tokens(work, r, start, logits);
            weigh<V>(work, r, logits);
        }
        for (int t = 0; t < count; t += kLanes) {
            widen_rows(tokens(work.values, work.value_stride, start + t), tile, work.value_dim);
            forget_hidden(work, weights + t, width, tile);
            for (int r = 0; r < work.rows; ++r)
                add_values<V>(tile, weights + r * kBlockTokens + t, width, work.out + r * width);
        }
    }
}

void widen_numbers(const char* in, Dtype dtype, std::int64_t count, float scale, float* out) {
    const int size = dtype == Dtype::f32 ? 4 : 2;
    std::int64_t i = 0;
    for (; i + 4 <= count; i += 4) store_unaligned(out + i, widen(in + i * size, dtype) * scale);
    alignas(8) char rest[16] = {};
    __builtin_memcpy(rest, in + i * size, (count - i) * size);
    const f32x4 last = widen(rest, dtype) * scale;
    for (int j = 0; i + j < count; ++j) out[i + j] = last[j];
}

void narrow_numbers(const float* in, std::int64_t count, float scale, Dtype dtype, char* out) {
    const int size = dtype == Dtype::f32 ? 4 : 2;
    std::int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        narrow(out + i * size, load_unaligned<f32x4>(in + i) * scale, dtype);
    f32x4 last = {};
    for (int j = 0; i + j < count; ++j) last[j] = in[i + j] * scale;
    char rest[16];
    narrow(rest, last, dtype);
    __builtin_memcpy(out + i * size, rest, (count - i) * size);
}

constexpr TokenKernels kTokenKernels{attend_tokens<Simd>, widen_numbers, narrow_numbers};

}  // namespace
}  // namespace sixfold::vectors
