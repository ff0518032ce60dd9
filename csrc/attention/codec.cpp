#include "attention/codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace sixfold {
namespace {

struct OwnedCodec : Codec {
    std::vector<Unit> units_storage;
    std::vector<float> centroids;  // [symbols, axes]
};

// Where the words of `unit`, of all `words`, lie in plane `plane`.
Unit make_unit(const Codec& codec, int unit, int words, int plane) {
    Unit made{};
    const Planes& planes = codec.planes;
    const int plane_words = planes.bytes[plane] / 4;
    const int piece = codec.values ? kLanes : kUnitBytes;  // bytes of one word
    for (int i = 0; i < 4; ++i) {
        // Words beyond the last repeat it: they are read, and what they give is dropped.
        const int word = codec.values ? std::min(4 * unit + i, words - 1) : unit;
        made.offset[i] = word % plane_words * piece;
        for (int lane = 4 * i; lane < 4 * i + 4; ++lane)
            made.rotation[lane] =
                (word / plane_words * planes.width[plane] - planes.before[plane]) & 31;
    }
    made.contiguous = !codec.values;
    if (codec.values)
        made.contiguous = made.offset[1] == made.offset[0] + piece &&
                          made.offset[2] == made.offset[1] + piece &&
                          made.offset[3] == made.offset[2] + piece;
    return made;
}

// A path is one plane of bytes.
Planes planes_of_path(int dim, int half_bits) { return planes_of(dim * half_bits / 16, 8); }

void lay_out_page(OwnedCodec& codec) {
    const int symbols = symbols_of(codec.dim, codec.axes), words = (symbols + 3) / 4;
    const Planes& planes = codec.planes = codec.half_bits
                                              ? planes_of_path(codec.dim, codec.half_bits)
                                              : planes_of(symbols, codec.symbol_bits);
    codec.blocks = codec.values ? 16 : 4;
    codec.units = codec.values ? (words + 3) / 4 : words;
    for (int unit = 0; unit < codec.units && !codec.half_bits; ++unit)
        for (int p = 0; p < planes.count; ++p)
            codec.units_storage.push_back(make_unit(codec, unit, words, p));
    codec.page_bytes = 0;
    for (int p = 0; p < planes.count; ++p) {
        codec.plane_offset[p] = codec.page_bytes;
        codec.plane_stride[p] = std::int64_t{planes.bytes[p]} * (kPageTokens / codec.blocks);
        codec.page_bytes += std::int64_t{planes.bytes[p]} * kPageTokens;
    }
    codec.table = codec.units_storage.data();
}

void lay_out_tile(Codec& codec) {
    const std::int64_t units = static_cast<std::int64_t>(codec.units) * codec.axes;
    codec.strips = static_cast<int>(codec.values ? units : 4);
    codec.steps = static_cast<int>((codec.values ? 16 : units) * codec.parts);
    const std::int64_t length = kUnitBytes * (codec.values ? codec.strips : codec.steps);
    codec.strip_stride = codec.values ? kUnitBytes : length;
    codec.step_stride = codec.values ? length : kUnitBytes;
    codec.block_stride = codec.values ? codec.parts * length : length;
    codec.unit_stride = codec.values ? kUnitBytes : codec.parts * kUnitBytes;
    codec.part_stride = codec.values ? length : kUnitBytes;
    codec.tile_bytes = length * (codec.values ? codec.steps : codec.strips);
}

// Where the kernels look a symbol up: its planes, which hold its upper bits first, in rising order. So
// the first, widest plane is shifted to the right only, which costs less than a rotation. States are
// their own index.
std::vector<int> lookup_order(int symbol_bits, bool trellis) {
    std::vector<int> index(std::size_t{1} << symbol_bits);
    if (trellis) {
        std::iota(index.begin(), index.end(), 0);
        return index;
    }
    const Planes planes = planes_of(1, symbol_bits);
    for (int p = 0; p < planes.count; ++p) {
        const int width = planes.width[p], before = planes.before[p];
        for (std::size_t s = 0; s < index.size(); ++s)
            index[s] |= (static_cast<int>(s) >> (symbol_bits - before - width) & ((1 << width) - 1))
                        << before;
    }
    return index;
}

// Repeats a table of 2^bits entries, so that what is above an index does not matter.
template <class T>
void repeat_table(T (&table)[256], int bits) {
    for (int i = 1 << bits; i < 256; ++i) table[i] = table[i - (1 << bits)];
}

// How often a centroid occurs, up to a factor: cells of the optimal quantizer of a Gaussian have
// density^(2/3) (pairs: density^(1/2)) of the mass. Codewords of a trellis are quantiles, all as
// likely.
std::vector<double> centroid_mass(const OwnedCodec& codec) {
    std::vector<double> mass(codec.centroids.size(), 1);
    if (codec.half_bits) return mass;
    for (std::size_t i = 0; i < mass.size(); i += codec.axes) {
        double square = 0;
        for (int axis = 0; axis < codec.axes; ++axis)
            square += std::pow(codec.centroids[i + axis], 2);
        for (int axis = 0; axis < codec.axes; ++axis)
            mass[i + axis] = std::exp(-square / (codec.axes == 2 ? 4 : 3));
    }
    return mass;
}

struct Fit {
    double scale;  // least-squares factor of the levels
    double error;  // what they leave
};

// Levels at multiples of `step`. An error that all tokens share does not average out in a sum over
// many: the mean error of an axis counts as if that were a thousand.
Fit fit_levels(const OwnedCodec& codec, const std::vector<double>& mass, double step) {
    double square = 0, product = 0, whole = 0, total = 0, mean[2] = {}, whole_mean[2] = {};
    for (std::size_t i = 0; i < mass.size(); ++i) {
        const double c = codec.centroids[i], level = std::nearbyint(c / step);
        square += mass[i] * c * c;
        product += mass[i] * c * level;
        whole += mass[i] * level * level;
        total += mass[i];
        mean[i % codec.axes] += mass[i] * c;
        whole_mean[i % codec.axes] += mass[i] * level;
    }
    if (whole == 0) return {0.0, square};
    Fit fit{product / whole, square - product * product / whole};
    for (int axis = 0; axis < codec.axes; ++axis)
        fit.error += 1000 / total * std::pow(mean[axis] - fit.scale * whole_mean[axis], 2);
    return fit;
}

// Integer levels: bytes cannot hold levels at unequal steps exactly, so of the steps that use at
// least half of the range the one that fits best is taken.
void quantize_codebook(OwnedCodec& codec) {
    double top = 0;
    for (float c : codec.centroids) top = std::max(top, std::abs(static_cast<double>(c)));
    if (!(top > 0 && std::isfinite(top))) top = 1;
    const bool words = codec.arithmetic == Arithmetic::words;
    const int range = words ? codec.values ? kWordValue : kWordKey : 127;
    const std::vector<double> mass = centroid_mass(codec);
    double best = top / range;
    Fit fit = fit_levels(codec, mass, best);
    constexpr int kSteps = 1024;
    for (int i = 1; i < kSteps && !words; ++i) {
        const double step = top / (range * (1 - 0.5 * i / kSteps));
        const Fit other = fit_levels(codec, mass, step);
        if (other.error < fit.error) best = step, fit = other;
    }
    codec.scale = static_cast<float>(fit.scale);
    const std::vector<int> order = lookup_order(codec.symbol_bits, codec.half_bits);
    for (std::size_t i = 0; i < codec.centroids.size(); ++i) {
        const int level = static_cast<int>(std::nearbyint(codec.centroids[i] / best));
        const int index = order[i / codec.axes];
        codec.low[i % codec.axes][index] = static_cast<std::uint8_t>(level & 0xFF);
        codec.high[i % codec.axes][index] = static_cast<std::uint8_t>(level >> 8 & 0xFF);
    }
    for (int axis = 0; axis < codec.axes; ++axis) {
        repeat_table(codec.low[axis], codec.symbol_bits);
        repeat_table(codec.high[axis], codec.symbol_bits);
    }
}

// Kernels look half of a trellis' codewords up (isa/simd_avx2.h).
void check_opposite(const CodecKey& key) {
    const int last = (1 << key.symbol_bits) - 1;
    for (int s = 0; key.half_bits && s <= last / 2; ++s)
        if (key.centroids[s] != -key.centroids[last - s])
            throw std::invalid_argument(
                "centroids: expected codewords of a trellis, of which those of s and " +
                std::to_string(last) + " - s are opposite, got others for s = " +
                std::to_string(s));
}

std::shared_ptr<const OwnedCodec> make_codec(const CodecKey& key) {
    check_opposite(key);
    auto codec = std::make_shared<OwnedCodec>();
    codec->dim = key.dim;
    codec->symbol_bits = key.symbol_bits;
    codec->axes = key.axes;
    codec->half_bits = key.half_bits;
    codec->values = key.values;
    // Up to 4 bits a coordinate rounding to 8 bits is small beside what the codes have lost.
    const bool narrow = key.axes == 2 || key.symbol_bits <= 4 || key.half_bits;
    codec->arithmetic = key.exact ? Arithmetic::floats
                        : narrow  ? Arithmetic::bytes
                                  : Arithmetic::words;
    codec->parts = key.exact ? 4 : narrow ? 1 : 2;
    codec->centroids.assign(key.centroids,
                            key.centroids + (std::size_t{1} << key.symbol_bits) * key.axes);
    const std::vector<int> order = lookup_order(key.symbol_bits, key.half_bits);
    for (std::size_t i = 0; i < codec->centroids.size(); ++i)
        codec->exact[i % key.axes][order[i / key.axes]] = codec->centroids[i];
    for (int axis = 0; axis < key.axes; ++axis) repeat_table(codec->exact[axis], key.symbol_bits);
    lay_out_page(*codec);
    lay_out_tile(*codec);
    if (!key.exact) quantize_codebook(*codec);
    return codec;
}

bool matches(const OwnedCodec& codec, const CodecKey& key) {
    return codec.dim == key.dim && codec.symbol_bits == key.symbol_bits &&
           codec.axes == key.axes && codec.half_bits == key.half_bits &&
           codec.values == key.values &&
           (codec.arithmetic == Arithmetic::floats) == key.exact &&
           std::memcmp(codec.centroids.data(), key.centroids,
                       codec.centroids.size() * sizeof(float)) == 0;
}

}  // namespace

std::shared_ptr<const Codec> find_codec(const CodecKey& key) {
    static std::mutex mutex;
    static std::vector<std::shared_ptr<const OwnedCodec>> known;
    static std::size_t oldest = 0;
    constexpr std::size_t kKept = 64;
    const std::lock_guard lock(mutex);
    for (const auto& codec : known)
        if (matches(*codec, key)) return codec;
    auto made = make_codec(key);
    if (known.size() < kKept) known.push_back(made);
    else known[oldest++ % kKept] = made;
    return made;
}

}  // namespace sixfold
