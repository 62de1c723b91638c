// One step of SGD-SaI over many tensors in one pass over memory.
//
// The tensors lie in one line, cut into chunks that the threads claim one after the other, so that
// one huge tensor and thousands of small ones are shared out alike. A chunk is worked on in tiles
// that stay in the nearest cache: what is not float32 is converted into a tile and back, what is
// float32 is read and written where it lies. Plain loops, which the compiler turns into vectors.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 128;  // elements that share a scale
// Elements converted at a time: four tiles of float32 are 4096 bytes, no two of them at the same
// place of a page, which loads and stores would take for the same address and wait.
constexpr int64_t TILE = 2 * BLOCK;
constexpr int64_t CHUNK = 128 * TILE;  // elements that a thread claims at a time
constexpr float TOP = 127 * 127;  // the square of the largest code
constexpr uint32_t SMALLEST_SCALE = 27 << 23;  // the bits of 2^-100

enum Kind : uint8_t { NONE, FLOAT32, BFLOAT16, FLOAT16, INT8 };

struct Row {  // one tensor and what goes with it; laid out as `_ROW` in sgd_sai_cpu.py
    void* param;
    void* grad;
    void* momentum;
    float* scales;           // of int8 momentum
    uint16_t* compensation;  // of a bfloat16 parameter, or null
    double step_size;        // -lr * gain
    uint64_t seed, first;    // of the draw
    int64_t numel;
    int64_t begin;  // place in the line of all tensors, filled in here
    uint32_t step, block;
    Kind param_kind, grad_kind, momentum_kind;
    bool stochastic;  // whether bfloat16 is rounded with the draw
};

struct Options {  // as `_OPTIONS` in sgd_sai_cpu.py
    double weight;      // of the gradient in the momentum
    double decay;       // what the parameter is multiplied by
    double grad_scale;  // what the gradient is multiplied by
    int64_t nesterov;
};

static_assert(sizeof(Row) == 96 && sizeof(Options) == 32, "the layout that Python writes");

template <class To, class From>
inline To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ------------------------------------------------------------------------------ storage formats

inline float from_bfloat16(uint16_t stored) { return as<float>(uint32_t(stored) << 16); }

// Adds `half` below the last place kept: 0x7fff or 0x8000 for the nearest, a random one otherwise.
inline uint16_t to_bfloat16(float value, uint32_t half) {
    uint32_t bits = as<uint32_t>(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + half) >> 16);
}

inline uint16_t nearest_bfloat16(float value) {
    return to_bfloat16(value, 0x7fff + (as<uint32_t>(value) >> 16 & 1));
}

inline float from_float16(uint16_t stored) {
    uint32_t magnitude = uint32_t(stored & 0x7fff) << 13;
    float tiny = as<float>(magnitude + (113u << 23)) - as<float>(113u << 23);
    uint32_t bits = magnitude + (magnitude >= 0x7c00u << 13 ? 224u << 23 : 112u << 23);
    bits = magnitude < 1u << 23 ? as<uint32_t>(tiny) : bits;
    return as<float>(bits | uint32_t(stored & 0x8000) << 16);
}

inline uint16_t to_float16(float value) {
    uint32_t bits = as<uint32_t>(value), magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t tiny = as<uint32_t>(as<float>(magnitude) + 0.5f) - as<uint32_t>(0.5f);
    uint32_t half = magnitude < 113u << 23 ? tiny : normal;
    half = magnitude >= 143u << 23 ? 0x7c00 : half;     // 2^16 and above; rounding gives the rest
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return uint16_t(half | (bits >> 16 & 0x8000));
}

// --------------------------------------------------------------------------------- random bits

inline uint32_t mixed(uint32_t h) {
    h = (h ^ h >> 16) * 0x85ebca6b;
    h = (h ^ h >> 13) * 0xc2b2ae35;
    return h ^ h >> 16;
}

inline uint32_t key(uint32_t h, const Row& row) {
    const uint32_t words[] = {uint32_t(row.seed), uint32_t(row.seed >> 32), row.block, row.step};
    for (uint32_t word : words) h = mixed((h ^ word) + 0x9e3779b9);
    return h;
}

void draw(uint32_t k0, uint32_t k1, uint64_t start, int64_t n, uint32_t* __restrict bits) {
    int64_t same = int64_t((start | 0xffffffff) - start) + 1;  // indices with this upper word
    if (same < n) {
        draw(k0, k1, start + uint64_t(same), n - same, bits + same);
        n = same;
    }
    k0 += uint32_t(start);
    k1 += uint32_t(start >> 32) * 0x9e3779b9;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t x = uint32_t(i) + k0;
        x = (x ^ x >> 16) * 0x85ebca6b ^ k1;
        x = (x ^ x >> 13) * 0xc2b2ae35;
        bits[i] = x ^ x >> 16;
    }
}

// -------------------------------------------------------------- blocks of 8 bits on a square law

void decode(const int8_t* __restrict codes, const float* scales, int64_t n, float* __restrict m) {
    for (int64_t start = 0; start < n; start += BLOCK) {
        float unit = scales[start / BLOCK] / TOP;
        int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        for (int64_t i = start; i < stop; ++i) {
            int32_t code = codes[i];
            m[i] = float(code * (code < 0 ? -code : code)) * unit;
        }
    }
}

void encode(const float* __restrict m, const uint32_t* __restrict bits, int64_t n,
            int8_t* __restrict codes, float* scales) {
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        uint32_t largest = 0;  // of the magnitudes' bits, whose order is theirs, with NaN on top
        for (int64_t i = start; i < stop; ++i) {
            uint32_t magnitude = as<uint32_t>(m[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        largest = largest < SMALLEST_SCALE ? 0 : largest;
        float scale = scales[start / BLOCK] = as<float>(largest);
        if (largest == 0 || largest >= 0x7f800000) {
            std::memset(codes + start, 0, stop - start);
            continue;
        }
        float inverse = TOP / scale;
        for (int64_t i = start; i < stop; ++i) {
            float y = std::fabs(m[i]) * inverse;
            float k = float(int32_t(std::sqrt(y)));
            float share = as<float>(0x3f800040 | (bits[i] & 0xffff) << 7) - 1.0f;
            k = y - k * k > share * (2 * k + 1) ? k + 1 : k;
            k = k < 127 ? k : 127;
            codes[i] = int8_t(int32_t(std::copysign(k, m[i])));
        }
    }
}

// ----------------------------------------------------------------------------- tiles and chunks

// The values as float32: where they lie, or converted into the tile.
float* load(const void* data, Kind kind, const float* scales, int64_t start, int64_t n,
            float* __restrict tile) {
    auto floats = static_cast<const float*>(data) + start;
    auto halves = static_cast<const uint16_t*>(data) + start;
    auto codes = static_cast<const int8_t*>(data) + start;
    if (kind == FLOAT32) return const_cast<float*>(floats);
    if (kind == BFLOAT16)
        for (int64_t i = 0; i < n; ++i) tile[i] = from_bfloat16(halves[i]);
    else if (kind == FLOAT16)
        for (int64_t i = 0; i < n; ++i) tile[i] = from_float16(halves[i]);
    else
        decode(codes, scales + start / BLOCK, n, tile);
    return tile;
}

// Puts what `load` converted back in its format; `shift` picks the half of the random bits.
void store(void* data, Kind kind, float* scales, int64_t start, int64_t n,
           const float* __restrict tile, const uint32_t* __restrict bits, bool stochastic,
           int shift) {
    auto halves = static_cast<uint16_t*>(data) + start;
    auto codes = static_cast<int8_t*>(data) + start;
    if (kind == BFLOAT16 && stochastic)
        for (int64_t i = 0; i < n; ++i) halves[i] = to_bfloat16(tile[i], bits[i] >> shift & 0xffff);
    else if (kind == BFLOAT16)
        for (int64_t i = 0; i < n; ++i) halves[i] = nearest_bfloat16(tile[i]);
    else if (kind == FLOAT16)
        for (int64_t i = 0; i < n; ++i) halves[i] = to_float16(tile[i]);
    else if (kind == INT8)
        encode(tile, bits, n, codes, scales + start / BLOCK);
}

// a * b + c, rounded once where the processor does so: then as torch's own kernels round.
inline float product_sum(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Between two values with torch's formula, which is exact at both ends.
inline float lerp(float from, float to, float weight) {
    return weight < 0.5f ? product_sum(weight, to - from, from)
                         : product_sum(weight - 1, to - from, to);
}

void descend(float* __restrict p, const float* __restrict g, float* __restrict m, int64_t n,
             float step_size, const Options& options) {
    float weight = float(options.weight), decay = float(options.decay);
    float scale = float(options.grad_scale), momentum = float(1 - options.weight);
    if (!m)
        for (int64_t i = 0; i < n; ++i) p[i] = product_sum(step_size, scale * g[i], decay * p[i]);
    else if (!options.nesterov)
        for (int64_t i = 0; i < n; ++i) {
            m[i] = lerp(m[i], scale * g[i], weight);
            p[i] = product_sum(step_size, m[i], decay * p[i]);
        }
    else
        for (int64_t i = 0; i < n; ++i) {
            float grad = scale * g[i];
            m[i] = lerp(m[i], grad, weight);
            p[i] = product_sum(step_size, lerp(grad, m[i], momentum), decay * p[i]);
        }
}

void update(const Row& row, int64_t start, int64_t stop, const Options& options) {
    alignas(64) float p_tile[TILE], g_tile[TILE], m_tile[TILE];
    alignas(64) uint32_t bits[TILE];
    bool drawn = row.momentum_kind == INT8 ||
                 (row.stochastic && (row.param_kind == BFLOAT16 || row.momentum_kind == BFLOAT16));
    uint32_t k0 = drawn ? key(0, row) : 0, k1 = drawn ? key(1, row) : 0;
    bool in_place = row.param_kind == FLOAT32 && row.grad_kind == FLOAT32 &&
                    (row.momentum_kind == FLOAT32 || row.momentum_kind == NONE);
    int64_t size = in_place ? CHUNK : TILE;
    for (; start < stop; start += size) {
        int64_t n = stop - start < size ? stop - start : size;
        float* p = load(row.param, row.param_kind, nullptr, start, n, p_tile);
        float* g = load(row.grad, row.grad_kind, nullptr, start, n, g_tile);
        float* m = row.momentum_kind == NONE
                       ? nullptr
                       : load(row.momentum, row.momentum_kind, row.scales, start, n, m_tile);
        uint16_t* lost = row.compensation ? row.compensation + start : nullptr;
        if (lost)
            for (int64_t i = 0; i < n; ++i) p[i] += from_bfloat16(lost[i]);
        descend(p, g, m, n, float(row.step_size), options);
        if (drawn) draw(k0, k1, row.first + uint64_t(start), n, bits);
        store(row.param, row.param_kind, nullptr, start, n, p, bits, row.stochastic, 16);
        store(row.momentum, row.momentum_kind, row.scales, start, n, m, bits, row.stochastic, 0);
        if (lost)
            for (int64_t i = 0; i < n; ++i)
                lost[i] = nearest_bfloat16(p[i] - from_bfloat16(nearest_bfloat16(p[i])));
    }
}

struct Job {
    const Row* rows;
    const Row* end;
    const Options* options;
    int64_t length;  // of the line of all tensors
    std::atomic<int64_t> claimed{0};
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    const Row* row = job.rows;
    int64_t start;
    while ((start = job.claimed.fetch_add(CHUNK, std::memory_order_relaxed)) < job.length) {
        for (; row < job.end && row->begin < start + CHUNK; ++row) {
            int64_t from = start > row->begin ? start - row->begin : 0;
            int64_t to = start + CHUNK - row->begin;
            update(*row, from, to < row->numel ? to : row->numel, *job.options);
            if (to < row->numel) break;
        }
    }
}

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

}  // namespace

extern "C" void sgd_sai_step(Row* rows, int64_t num_rows, const Options* options, Fork fork,
                             int64_t num_threads) {
    Job job{rows, rows + num_rows, options, 0};
    for (Row* row = rows; row < job.end; ++row) {
        row->begin = job.length;
        job.length += (row->numel + BLOCK - 1) / BLOCK * BLOCK;
    }
    int64_t num_chunks = (job.length + CHUNK - 1) / CHUNK;
    num_threads = num_chunks < num_threads ? num_chunks : num_threads;
    if (fork && num_threads > 1)
        fork(work, &job, unsigned(num_threads), 0);
    else
        work(&job);
}
