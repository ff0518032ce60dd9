// How pages of given bits, dimension and codebook are read: made once, then found in a cache.
#pragma once

#include <memory>

#include "attention/attention.h"

namespace sixfold {

// The codec of `key`, whose centroids are compared by what they are: an address may be reused for
// another codebook. Throws std::invalid_argument if a trellis has no codewords of docs/format.md, 12:
// complementing a state negates its codeword.
std::shared_ptr<const Codec> find_codec(const CodecKey& key);

}  // namespace sixfold
