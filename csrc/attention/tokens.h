// Attention on tokens in full precision: sinks, recent tokens, short histories.
//
// | tensor        | type                | shape                                           |
// | ------------- | ------------------- | ----------------------------------------------- |
// | query         | float               | [rows, key_dim], scaled                         |
// | keys, values  | f32, bf16 or f16    | [tokens, key_dim], [tokens, value_dim], strided |
// | first, last   | int64               | [rows]: a row sees the tokens first <= t < last |
// | maximum, total| float               | [rows]                                          |
// | out           | float               | [rows, padded(value_dim)]                       |
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "vectors/vectors.h"

namespace sixfold {

// Online softmax of `rows` rows over the tokens of one sequence and KV head.
struct TokensWork {
    const float* query;
    const char *keys, *values;
    std::int64_t key_stride, value_stride;  // bytes from token to token
    vectors::Dtype dtype;
    int rows, key_dim, value_dim;
    std::int64_t tokens;
    const std::int64_t *first, *last;
    Mask mask_kind;
    const void* const* mask;  // each row's column of the first token
    float never, softcap;     // as in AttentionTask
    float *maximum, *total, *out;
    float* scratch;  // token_scratch floats, aligned to 64 bytes
};

struct TokenKernels {
    void (*attend)(const TokensWork& work);
    // out = scale · in, `count` numbers.
    void (*widen)(const char* in, vectors::Dtype dtype, std::int64_t count, float scale, float* out);
    void (*narrow)(const float* in, std::int64_t count, float scale, vectors::Dtype dtype, char* out);
};

constexpr int kBlockTokens = 64;

static constexpr std::int64_t padded_dim(std::int64_t dim) { return (dim + 15) / 16 * 16; }

// A tile of keys or values and the weights of a block.
static constexpr std::int64_t token_scratch(std::int64_t rows, std::int64_t key_dim,
                                     std::int64_t value_dim) {
    const std::int64_t dim = padded_dim(key_dim > value_dim ? key_dim : value_dim);
    return 16 * dim + rows * kBlockTokens;
}

}  // namespace sixfold
