// The kernels of vectors.h and trellis.h, on the Simd and Tiles that were included before.
#pragma once

#include "vectors/codes-inl.h"
#include "vectors/rotate-inl.h"

#include "vectors/decode-inl.h"
#include "vectors/encode-inl.h"
#include "vectors/scores-inl.h"

#include "vectors/paths-inl.h"

namespace sixfold::vectors {
namespace {

constexpr VectorKernels kVectorKernels{rotate_tile<Simd>, encode_tile<Simd>, decode_tile<Simd>,
                                       score_tile<Simd>};

}  // namespace
}  // namespace sixfold::vectors
