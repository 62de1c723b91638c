// Largest magnitude, mean and squared deviations of many tensors in one read of memory.
//
// Every tensor is cut into chunks that the threads claim one after the other; what was found in a
// chunk is kept apart and merged in the order of the chunks, so that the number of threads changes
// nothing. A chunk is taken in tiles. In float64, where the square of no float32 over- or
// underflows, and in lanes, which the compiler turns into vectors.
#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t TILE = 16 * LANES;
constexpr int64_t CHUNK = 128 * TILE;  // as in moments_cpu.py

enum Kind : int64_t { FLOAT32 = 1, BFLOAT16, FLOAT16 };

struct Found {  // as `_FOUND` in moments_cpu.py
    int64_t count;
    double largest, mean, deviations;  // the sum of the squared deviations from the mean
};

struct Row {  // one tensor; as `_ROW` in moments_cpu.py
    const void* data;
    int64_t numel;
    Kind kind;
    int64_t begin;  // the first of its chunks among all
};

static_assert(sizeof(Found) == 32 && sizeof(Row) == 32, "the layout that Python writes");

template <class To, class From>
inline To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float widened(uint16_t stored, Kind kind) {
    if (kind == BFLOAT16) return as<float>(uint32_t(stored) << 16);
    uint32_t bits = stored & 0x7fff;
    float subnormal = float(int32_t(bits)) / (1 << 24);
    float other = as<float>((bits << 13) + ((bits < 0x7c00 ? 112u : 224u) << 23));
    float magnitude = bits < 0x400 ? subnormal : other;
    return stored & 0x8000 ? -magnitude : magnitude;
}

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances" (1979). NaN as the largest stays.
void merge(Found& all, const Found& part) {
    int64_t count = all.count + part.count;
    double apart = part.mean - all.mean, share = double(part.count) / double(count);
    all.deviations += part.deviations + apart * apart * share * double(all.count);
    all.mean += apart * share;
    all.largest = all.largest >= part.largest || all.largest != all.largest ? all.largest
                                                                            : part.largest;
    all.count = count;
}

// Differences from the first element, whose squares are at most n + 1 times those from the mean:
// so little is lost in the subtraction at the end, however large the mean.
Found of_tile(const float* x, int64_t n) {
    double origin = x[0], sum[LANES] = {}, squares[LANES] = {};
    uint32_t largest[LANES] = {};  // of the magnitudes' bits, whose order is theirs, NaN on top
    auto take = [&](int64_t i, int64_t lane) {
        double difference = double(x[i]) - origin;
        sum[lane] += difference;
        squares[lane] += difference * difference;
        uint32_t magnitude = as<uint32_t>(x[i]) & 0x7fffffff;
        largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
    };
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) take(i + lane, lane);
    for (int64_t i = whole; i < n; ++i) take(i, i - whole);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) {
            sum[lane] += sum[lane + half];
            squares[lane] += squares[lane + half];
            uint32_t other = largest[lane + half];
            largest[lane] = other > largest[lane] ? other : largest[lane];
        }
    double shift = sum[0] / double(n), deviations = squares[0] - shift * sum[0];
    return {n, as<float>(largest[0]), origin + shift, deviations < 0 ? 0 : deviations};
}

Found of_chunk(const Row& row, int64_t start) {
    float tile[TILE];
    Found all{};
    int64_t stop = start + CHUNK < row.numel ? start + CHUNK : row.numel;
    for (; start < stop; start += TILE) {
        int64_t n = stop - start < TILE ? stop - start : TILE;
        const float* x = tile;
        auto stored = static_cast<const uint16_t*>(row.data) + start;
        if (row.kind == FLOAT32)
            x = static_cast<const float*>(row.data) + start;
        else if (row.kind == BFLOAT16)
            for (int64_t i = 0; i < n; ++i) tile[i] = widened(stored[i], BFLOAT16);
        else
            for (int64_t i = 0; i < n; ++i) tile[i] = widened(stored[i], FLOAT16);
        merge(all, of_tile(x, n));
    }
    return all;
}

struct Job {
    const Row* rows;
    Found* chunks;
    int64_t num_chunks;
    std::atomic<int64_t> claimed{0};
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    const Row* row = job.rows;
    int64_t i;
    while ((i = job.claimed.fetch_add(1, std::memory_order_relaxed)) < job.num_chunks) {
        while (i >= row->begin + (row->numel + CHUNK - 1) / CHUNK) ++row;
        job.chunks[i] = of_chunk(*row, (i - row->begin) * CHUNK);
    }
}

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

}  // namespace

// `found` has room for every row; `chunks` for every chunk of all rows.
extern "C" void measure(const Row* rows, int64_t num_rows, Found* found, Found* chunks,
                        int64_t num_chunks, Fork fork, int64_t num_threads) {
    Job job{rows, chunks, num_chunks};
    num_threads = num_chunks < num_threads ? num_chunks : num_threads;
    if (fork && num_threads > 1)
        fork(work, &job, unsigned(num_threads), 0);
    else
        work(&job);
    for (int64_t i = 0; i < num_rows; ++i) {
        found[i] = Found{};
        for (int64_t start = 0; start < rows[i].numel; start += CHUNK) merge(found[i], *chunks++);
    }
}
