// Inner loops of decoding on a CPU in float32; native.py builds this file at first use and calls it.
// Every function has its plain PyTorch form (decode.py, mamba.py, generate/sampling.py), which is the oracle of its
// tests. Rows never look at each other and sums run in an order that depends on the row alone: results do not depend
// on the batch or on the threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Lanes __attribute__((vector_size(64), aligned(4)));  // 16 numbers; the compiler splits them as it must
constexpr int LANES = 16;

static inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
static inline void store(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }
static inline Lanes all(float x) { return Lanes{} + x; }

// exp to two units in the last place; 0 below the normal range, NaN stays NaN. Cody-Waite reduction and the Taylor
// polynomial of degree 6 on |r| <= ln(2)/2.
static inline float exponential(float x) {
    float clipped = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
    float n = __builtin_floorf(std::fma(clipped, 1.44269504f, 0.5f));
    float r = std::fma(n, -0.693145752f, clipped);
    r = std::fma(n, -1.42860677e-6f, r);
    float p = std::fma(r, 1.f / 720, 1.f / 120);
    p = std::fma(p, r, 1.f / 24);
    p = std::fma(p, r, 1.f / 6);
    p = std::fma(p, r, 0.5f);
    p = std::fma(p, r, 1.f);
    p = std::fma(p, r, 1.f);
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.3f ? 0.f : p * scale;
}

static inline float silu(float x) { return x / (1.f + exponential(-x)); }

static inline float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

static float dot(const float* a, const float* b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

static float inverse_length(const float* x, int64_t size, float eps) {
    return 1.f / std::sqrt(dot(x, x, size) + eps);
}

// One row's new query, key or value head: normalised (weight may be absent) and rotated (cos may be absent).
static void prepare_head(float* x, int64_t size, const float* weight, float eps, const float* cos, const float* sin) {
    if (weight) {
        float scale = inverse_length(x, size, eps * size) * std::sqrt(static_cast<float>(size));
        for (int64_t i = 0; i < size; ++i) x[i] *= scale * weight[i];
    }
    if (cos) {
        int64_t half = size / 2;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            float first = x[i], second = x[i + half];
            x[i] = first * cos[i] - second * sin[i];
            x[i + half] = second * cos[i] + first * sin[i];
        }
    }
}

constexpr int64_t TOKENS = 256;  // of the cache, looked at together

// A loop's rest costs as much as several lanes, so loops run over whole ones.
static inline int64_t whole_lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// scores[q][t] = query_q . key_t for T lanes of tokens at once; keys are (head_dim, tokens). Q queries share each load.
template <int Q, int T>
static void dot_keys(const float* query, const float* keys, int64_t stride, int64_t size, float* scores) {
    Lanes sums[Q][T] = {};
    for (int64_t d = 0; d < size; ++d, keys += stride)
        for (int t = 0; t < T; ++t) {
            Lanes key = load(keys + t * LANES);
            for (int q = 0; q < Q; ++q) sums[q][t] += all(query[q * size + d]) * key;
        }
    for (int q = 0; q < Q; ++q)
        for (int t = 0; t < T; ++t) store(scores + q * TOKENS + t * LANES, sums[q][t]);
}

template <int Q>
static void dot_all_keys(const float* query, const float* keys, int64_t stride, int64_t size, int64_t n, float* scores) {
    int64_t t = 0;
    for (; t + 4 * LANES <= n; t += 4 * LANES) dot_keys<Q, 4>(query, keys + t, stride, size, scores + t);
    for (; t + LANES <= n; t += LANES) dot_keys<Q, 1>(query, keys + t, stride, size, scores + t);
    for (; t < n; ++t)
        for (int q = 0; q < Q; ++q) {
            float& score = scores[q * TOKENS + t] = 0;
            for (int64_t d = 0; d < size; ++d) score += query[q * size + d] * keys[d * stride + t];
        }
}

// sums[q] += weights[q] . values for n tokens and V lanes of channels; values are (tokens, head_dim).
template <int Q, int V>
static void add_values(const float* weights, const float* values, int64_t size, int64_t n, float* sums) {
    Lanes held[Q][V];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) held[q][v] = load(sums + q * size + v * LANES);
    for (int64_t t = 0; t < n; ++t, values += size)
        for (int v = 0; v < V; ++v) {
            Lanes value = load(values + v * LANES);
            for (int q = 0; q < Q; ++q) held[q][v] += all(weights[q * TOKENS + t]) * value;
        }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) store(sums + q * size + v * LANES, held[q][v]);
}

template <int Q>
static void add_all_values(const float* weights, const float* values, int64_t size, int64_t n, float* sums) {
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) add_values<Q, 4>(weights, values + d, size, n, sums + d);
    for (; d + 2 * LANES <= size; d += 2 * LANES) add_values<Q, 2>(weights, values + d, size, n, sums + d);
    for (; d + LANES <= size; d += LANES) add_values<Q, 1>(weights, values + d, size, n, sums + d);
    for (; d < size; ++d)
        for (int q = 0; q < Q; ++q)
            for (int64_t t = 0; t < n; ++t) sums[q * size + d] += weights[q * TOKENS + t] * values[t * size + d];
}

// The softmax of a growing set of scores: the highest, and the sum of exponentials below it.
struct Running {
    float highest, total = 1;

    explicit Running(float score) : highest(score) {}

    // Turns n new scores into weights under the highest so far and rescales `sums`, which hold what came before.
    void take(float* scores, int64_t n, float* sums, int64_t size) {
        float top = highest;
#pragma omp simd reduction(max : top)
        for (int64_t t = 0; t < n; ++t) top = scores[t] > top ? scores[t] : top;
        float keep = exponential(highest - top), added = 0;
        if (highest != top)
            for (int64_t d = 0; d < size; ++d) sums[d] *= keep;
#pragma omp simd reduction(+ : added)
        for (int64_t t = 0; t < n; ++t) {
            scores[t] = exponential(scores[t] - top);
            added += scores[t];
        }
        total = total * keep + added;
        highest = top;
    }
};

// Of Q queries over n tokens of the cache: sums and running go on.
template <int Q>
static void attend_block(const float* query, int64_t size, const float* keys, const float* values, int64_t stride,
                         int64_t n, int64_t readable, Running* running, float* sums) {
    float scores[Q * TOKENS];
    int64_t padded = whole_lanes(n);
    dot_all_keys<Q>(query, keys, stride, size, std::min(padded, readable), scores);
    for (int q = 0; q < Q; ++q) {
        std::fill(scores + q * TOKENS + n, scores + q * TOKENS + padded, -INFINITY);
        running[q].take(scores + q * TOKENS, padded, sums + q * size, size);
    }
    add_all_values<Q>(scores, values, size, n, sums);
}

struct Attention {
    int64_t rows, heads, key_heads, head_dim, tokens, key_row, value_row, angle_row, window;
    float norm_eps, scale;
};

static void attend_row(const Attention& a, int64_t row, int64_t group, float* qkv, const float* cos, const float* sin,
                       const float* norm, float* keys, float* values, int64_t held, float* out) {
    int64_t size = a.head_dim, queries = a.heads / a.key_heads;
    float* line = qkv + row * (a.heads + 2 * a.key_heads) * size;
    float *query = line + group * queries * size, *key = line + (a.heads + group) * size;
    const float *value = key + a.key_heads * size, *key_norm = norm ? norm + (a.heads + group) * size : nullptr;
    if (cos) cos += row * a.angle_row, sin += row * a.angle_row;
    prepare_head(key, size, key_norm, a.norm_eps, cos, sin);
    float* my_keys = keys + row * a.key_row + group * size * a.tokens;
    float* my_values = values + row * a.value_row + group * size * a.tokens;
    float* sums = out + (row * a.heads + group * queries) * size;
    std::vector<Running> running;
    for (int64_t j = 0; j < queries; ++j) {
        float* mine = query + j * size;
        prepare_head(mine, size, norm ? norm + (group * queries + j) * size : nullptr, a.norm_eps, cos, sin);
        for (int64_t d = 0; d < size; ++d) mine[d] *= a.scale;
        running.emplace_back(dot(mine, key, size));
        std::memcpy(sums + j * size, value, size * sizeof(float));
    }
    for (int64_t t = a.window > 0 ? std::max<int64_t>(0, held + 1 - a.window) : 0; t < held; t += TOKENS) {
        int64_t n = std::min(TOKENS, held - t), j = 0;
        const float *k = my_keys + t, *v = my_values + t * size;
        for (; j + 2 <= queries; j += 2)
            attend_block<2>(query + j * size, size, k, v, a.tokens, n, a.tokens - t, &running[j], sums + j * size);
        if (j < queries)
            attend_block<1>(query + j * size, size, k, v, a.tokens, n, a.tokens - t, &running[j], sums + j * size);
    }
    for (int64_t j = 0; j < queries; ++j)
        for (int64_t d = 0; d < size; ++d) sums[j * size + d] /= running[j].total;
    // Written last: reading a vector around a number just written would wait for it.
    for (int64_t d = 0; d < size; ++d) my_keys[d * a.tokens + held] = key[d];
    std::memcpy(my_values + held * size, value, size * sizeof(float));
}

struct Mamba {
    int64_t rows, tokens, heads, head_dim, groups, state, taps, conv_row, ssm_row;
    float eps, low, high;
};

// Weights of one mixer: taps (K, channels), bias (channels) or absent, dt_bias, A (negative) and D (heads).
struct MambaWeights {
    const float *taps, *bias, *dt_bias, *A, *D;
};

constexpr int64_t PIECE = 32;    // tokens whose inputs are prepared together
constexpr int64_t MOST_TAPS = 16;

// SiLU of the causal convolution of n channels at one token; columns[k] is where tap k reads.
static void convolve(const float* const* columns, const float* taps, int64_t stride, const float* bias, int64_t count,
                     int64_t n, float* out) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) out[c] = bias ? bias[c] : 0.f;
    for (int64_t k = 0; k < count; ++k) {
        const float *tap = taps + k * stride, *column = columns[k];
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) out[c] += tap[c] * column[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) out[c] = silu(out[c]);
}

// The recurrence over `tokens` for V * LANES channels: state (N, channels) in place, y += what C reads.
template <int V>
static void recur(float* state, int64_t stride, const float* decay, const float* update, const float* BC, float* y,
                  int64_t tokens, int64_t width, int64_t N, int64_t shared) {
    for (int64_t t = 0; t < tokens; ++t, decay += width, update += width, BC += shared, y += width) {
        Lanes kept[V], added[V], read[V];
        for (int v = 0; v < V; ++v) kept[v] = load(decay + v * LANES);
        for (int v = 0; v < V; ++v) added[v] = load(update + v * LANES);
        for (int v = 0; v < V; ++v) read[v] = load(y + v * LANES);
        float* s = state;
        for (int64_t n = 0; n < N; ++n, s += stride) {
            Lanes b = all(BC[n]), c = all(BC[N + n]);
            for (int v = 0; v < V; ++v) {
                Lanes now = load(s + v * LANES) * kept[v] + b * added[v];
                store(s + v * LANES, now);
                read[v] += c * now;
            }
        }
        for (int v = 0; v < V; ++v) store(y + v * LANES, read[v]);
    }
}

static void recur_few(float* state, int64_t stride, const float* decay, const float* update, const float* BC, float* y,
                      int64_t tokens, int64_t width, int64_t N, int64_t shared, int64_t channels) {
    for (int64_t t = 0; t < tokens; ++t, decay += width, update += width, BC += shared, y += width)
        for (int64_t n = 0; n < N; ++n)
            for (int64_t c = 0; c < channels; ++c) {
                float& s = state[n * stride + c];
                s = s * decay[c] + BC[n] * update[c];
                y[c] += BC[N + n] * s;
            }
}

static void recur_all(float* state, int64_t width, const float* decay, const float* update, const float* BC, float* y,
                      int64_t tokens, int64_t N, int64_t shared) {
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES)
        recur<4>(state + c, width, decay + c, update + c, BC, y + c, tokens, width, N, shared);
    for (; c + LANES <= width; c += LANES)
        recur<1>(state + c, width, decay + c, update + c, BC, y + c, tokens, width, N, shared);
    if (c < width) recur_few(state + c, width, decay + c, update + c, BC, y + c, tokens, width, N, shared, width - c);
}

// Scratch of one piece of one group.
struct Piece {
    std::vector<float> x, shared, decay, update;
    Piece(int64_t tokens, int64_t width, int64_t N)
        : x(tokens * width), shared(tokens * 2 * N), decay(tokens * width), update(tokens * width) {}
};

// One group of one row: `in` (tokens, z | x | B | C | dt), `out` (tokens, inner), of which `valid` tokens count.
static void mamba_group(const Mamba& m, const MambaWeights& w, int64_t group, const float* in, const float* conv,
                        float* ssm, int64_t valid, float* out) {
    int64_t inner = m.heads * m.head_dim, width = inner / m.groups, N = m.state, per = m.heads / m.groups;
    int64_t channels = inner + 2 * m.groups * N, wide = inner + channels + m.heads;
    int64_t starts[3] = {group * width, inner + group * N, inner + (m.groups + group) * N};
    Piece piece(std::min(valid, PIECE), width, N);
    float* state = ssm + group * N * width;
    for (int64_t first = 0; first < valid; first += PIECE) {
        int64_t tokens = std::min(PIECE, valid - first);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* line = in + (first + t) * wide;
            float* sections[3] = {piece.x.data() + t * width, piece.shared.data() + t * 2 * N,
                                  piece.shared.data() + (t * 2 + 1) * N};
            for (int s = 0; s < 3; ++s) {
                const float* columns[MOST_TAPS];
                for (int64_t k = 0; k < m.taps; ++k) {
                    int64_t at = first + t - (m.taps - 1) + k;
                    columns[k] = (at < 0 ? conv + (m.taps - 1 + at) * channels : in + at * wide + inner) + starts[s];
                }
                convolve(columns, w.taps + starts[s], channels, w.bias ? w.bias + starts[s] : nullptr, m.taps,
                         s ? N : width, sections[s]);
            }
            float* y = out + (first + t) * inner + group * width;
            for (int64_t h = 0; h < per; ++h) {
                int64_t head = group * per + h;
                float dt = softplus(line[inner + channels + head] + w.dt_bias[head]);
                dt = std::min(std::max(dt, m.low), m.high);
                float decay = std::exp(dt * w.A[head]);
                int64_t at = t * width + h * m.head_dim;
#pragma omp simd
                for (int64_t p = 0; p < m.head_dim; ++p) {
                    piece.decay[at + p] = decay;
                    piece.update[at + p] = dt * piece.x[at + p];
                    y[h * m.head_dim + p] = 0.f;
                }
            }
        }
        // y is laid out (tokens, inner): a stride of its own, so it is summed in x's place after D has read x.
        std::vector<float>& read = piece.x;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < per; ++h)
                for (int64_t p = 0; p < m.head_dim; ++p) read[t * width + h * m.head_dim + p] *= w.D[group * per + h];
        recur_all(state, width, piece.decay.data(), piece.update.data(), piece.shared.data(), read.data(), tokens, N,
                  2 * N);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* z = in + (first + t) * wide + group * width;
            float *gated = read.data() + t * width, *y = out + (first + t) * inner + group * width;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) gated[c] *= silu(z[c]);
            float scale = inverse_length(gated, width, m.eps);
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) y[c] = gated[c] * scale;
        }
    }
    for (int64_t t = valid; t < m.tokens; ++t) std::fill_n(out + t * inner + group * width, width, 0.f);
}

// The last K - 1 columns of [held | new].
static void move_columns(const Mamba& m, const float* in, float* conv, int64_t valid) {
    int64_t inner = m.heads * m.head_dim, channels = inner + 2 * m.groups * m.state, wide = inner + channels + m.heads;
    for (int64_t k = 0; k + 1 < m.taps; ++k) {
        int64_t at = valid - (m.taps - 1) + k;
        const float* source = at < 0 ? conv + (m.taps - 1 + at) * channels : in + at * wide + inner;
        if (source != conv + k * channels) std::memcpy(conv + k * channels, source, channels * sizeof(float));
    }
}

constexpr int64_t BLOCK = 64;  // logits summed in float32 before the sums are added in float64

static inline float weight_of(float logit, float highest, float inverse) {
    return exponential((logit - highest) * inverse);
}

static inline float weight_of_block(const float* logits, int64_t n, float highest, float inverse) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += weight_of(logits[i], highest, inverse);
    return sum;
}

// The token in whose share of the row's total weight `uniform` falls, and that share's logarithm.
static void draw_row(const float* logits, int64_t vocab, double uniform, float temperature, bool greedy,
                     int64_t* token, float* logprob) {
    float highest = -INFINITY, inverse = 1.f / temperature;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < vocab; ++i) highest = logits[i] > highest ? logits[i] : highest;
    int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
    std::vector<double> mass(blocks);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        const float* start = logits + b * BLOCK;
        int64_t rest = vocab - b * BLOCK;  // whole blocks apart: their loop needs no bounds
        total += rest < BLOCK ? weight_of_block(start, rest, highest, inverse)
                              : weight_of_block(start, BLOCK, highest, inverse);
        mass[b] = total;
    }
    int64_t chosen = 0;
    if (greedy) {
        while (chosen < vocab - 1 && !(logits[chosen] == highest)) ++chosen;
    } else {
        double point = uniform * total;
        int64_t b = std::upper_bound(mass.begin(), mass.end(), point) - mass.begin();
        b = std::min(b, blocks - 1);
        double before = b ? mass[b - 1] : 0;
        chosen = b * BLOCK;
        int64_t last = chosen, stop = std::min(vocab, (b + 1) * BLOCK);
        for (int64_t i = chosen; i < stop; ++i) {
            float weight = weight_of(logits[i], highest, inverse);
            if (weight > 0) last = i;  // rounding must never choose a token of weight 0
            if ((before += weight) > point) break;
        }
        chosen = last;
    }
    *token = chosen;
    *logprob = static_cast<float>(std::log(weight_of(logits[chosen], highest, inverse) / total));
}

extern "C" {

// x (rows, size) -> x / sqrt(sum of squares + eps).
void unit_length(const float* x, float* out, int64_t rows, int64_t size, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const float* in = x + row * size;
        float scale = inverse_length(in, size, eps);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) out[row * size + i] = in[i] * scale;
    }
}

// in (rows, gated ? 2 * size : size), gate first -> out (rows, size); squared: max(0, x)^2 in place of SiLU.
void activate(const float* in, float* out, int64_t rows, int64_t size, int gated, int squared, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const float *gate = in + row * size * (gated ? 2 : 1), *up = gate + size;
        float* to = out + row * size;
        if (squared) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = gate[i] < 0 ? 0.f : gate[i] * gate[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = silu(gate[i]);
        }
        if (gated) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] *= up[i];
        }
    }
}

// One query token a row over the row's own cache, which is extended first. `qkv` is used as scratch.
void attend(const Attention* a, float* qkv, const float* cos, const float* sin, const float* norm, float* keys,
            float* values, const int64_t* lengths, float* out, int threads) {
    int64_t pairs = a->rows * a->key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && pairs > 1)
    for (int64_t pair = 0; pair < pairs; ++pair) {
        int64_t row = pair / a->key_heads;
        attend_row(*a, row, pair % a->key_heads, qkv, cos, sin, norm, keys, values, lengths[row], out);
    }
}

// Convolution, recurrence and gated norm (its weight left to the caller) of `tokens` tokens a row; the memory moves on.
void mamba(const Mamba* m, const MambaWeights* w, const float* in, float* conv, float* ssm, const int64_t* lengths,
           float* out, int threads) {
    int64_t pairs = m->rows * m->groups, inner = m->heads * m->head_dim;
    int64_t row_in = m->tokens * (2 * inner + 2 * m->groups * m->state + m->heads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && pairs > 1)
    for (int64_t pair = 0; pair < pairs; ++pair) {
        int64_t row = pair / m->groups;
        mamba_group(*m, *w, pair % m->groups, in + row * row_in, conv + row * m->conv_row, ssm + row * m->ssm_row,
                    lengths ? lengths[row] : m->tokens, out + row * m->tokens * inner);
    }
    for (int64_t row = 0; row < m->rows; ++row)
        move_columns(*m, in + row * row_in, conv + row * m->conv_row, lengths ? lengths[row] : m->tokens);
}

// One token a row of logits (rows, vocab), by inverting the running sum of exp(logit / temperature) at `uniform`.
void draw(const float* logits, int64_t rows, int64_t vocab, const double* uniforms, const float* temperatures,
          const uint8_t* greedy, int64_t* tokens, float* logprobs, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row)
        draw_row(logits + row * vocab, vocab, uniforms[row], temperatures[row], greedy[row], tokens + row,
                 logprobs + row);
}
}
