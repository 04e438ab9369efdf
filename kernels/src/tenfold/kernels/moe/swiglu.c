/* SwiGLU feed-forwards, one per group of rows, and their gradients, in float32, for x86-64 with AVX-512: see native.py
   and compiled.py.

   Forward, every number of a product is the dot product of two contiguous rows, in LANES sums: no weight is rearranged,
   no number of rows is rounded up, and what comes of a row depends neither on its neighbours nor on the threads. ROWS
   by COLUMNS of these sums fill the registers. Of a weight, TILE rows by DEPTH columns, 32 KB, are taken from memory
   once and meet all rows of a chunk, while the next ones are fetched.

   Backward, products are sums of outer products, of numbers with rows: ROWS by 4 vectors of them fill the registers. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16, ROWS = 6, COLUMNS = 4, TILE = 16, DEPTH = 512, CHUNK = 96 };

typedef float vector __attribute__((vector_size(64)));
typedef float vector_anywhere __attribute__((vector_size(64), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16)));
typedef int32_t integers __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vector load(const float *p) { return (vector) * (const vector_anywhere *)p; }

INLINE vector all(float x) { return (vector){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE vector choose(integers mask, vector a, vector b) {
    return (vector)((mask & (integers)a) | (~mask & (integers)b));
}

/* Σa, Σb, Σc, Σd. Of the two shuffles of a pair, one keeps every lane in its place, which is the cheaper kind. */
INLINE four sums(vector a, vector b, vector c, vector d) {
    const integers stay = {0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31},
                   swap = {1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30},
                   stay2 = {0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31},
                   swap2 = {2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29};
    vector ab = __builtin_shuffle(a, b, stay) + __builtin_shuffle(a, b, swap);
    vector cd = __builtin_shuffle(c, d, stay) + __builtin_shuffle(c, d, swap);
    vector abcd = __builtin_shuffle(ab, cd, stay2) + __builtin_shuffle(ab, cd, swap2);
    four part[4];
    memcpy(part, &abcd, sizeof part);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* out[i, j] = x[i]·w[j], added to what is there if `add`, for i < rows, j < COLUMNS. `rows` is known when compiled. */
INLINE void block(int rows, const float *x, int64_t depth, const float *w, int64_t w_stride, float *out, int add) {
    vector total[ROWS][COLUMNS] = {0};
    UNROLL for (int64_t k = 0; k < depth; k += LANES) {
        vector column[COLUMNS];
        UNROLL for (int j = 0; j < COLUMNS; j++) column[j] = load(w + j * w_stride + k);
        UNROLL for (int i = 0; i < rows; i++) {
            vector row = load(x + i * depth + k);
            UNROLL for (int j = 0; j < COLUMNS; j++) total[i][j] += row * column[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        four sum = sums(total[i][0], total[i][1], total[i][2], total[i][3]), before = {0};
        if (add) memcpy(&before, out + i * TILE, sizeof before);
        sum += before;
        memcpy(out + i * TILE, &sum, sizeof sum);
    }
}

/* Where number j of row i lies among n rows in panels, DEPTH columns each: a panel's rows stay close together. */
INLINE int64_t place(int64_t n, int64_t columns, int64_t i, int64_t j) {
    int64_t from = j / DEPTH * DEPTH;
    return from * n + i * smaller(columns - from, DEPTH) + j - from;
}

/* out[i, j] = x[i]·w[j] for i < n, j < TILE; x in panels. `next`, or null: the tile that will be wanted after this. */
static void tile(const float *x, int64_t n, int64_t columns, const float *w, float *out, const float *next) {
    int64_t steps = (n + ROWS - 1) / ROWS;
    for (int64_t from = 0; from < columns; from += DEPTH) {
        int64_t depth = smaller(columns - from, DEPTH), last = from + depth == columns;
        const float *ahead = last ? next : w + from + DEPTH;
        int64_t width = last ? smaller(columns, DEPTH) : smaller(columns - from - DEPTH, DEPTH);
        int64_t left = ahead ? TILE * width / LANES : 0, share = left / (steps * (TILE / COLUMNS)) + 1, fetched = 0;
        for (int64_t step = 0, row = 0; step < steps; step++) {
            int64_t rows = (n - row + steps - step - 1) / (steps - step);
            for (int64_t j = 0; j < TILE; j += COLUMNS) {
                for (int64_t line = smaller(share, left); line > 0; line--, left--) {
                    __builtin_prefetch(ahead + fetched);
                    if ((fetched += LANES) == width) fetched = 0, ahead += columns;
                }
                const float *a = x + from * n + row * depth, *b = w + j * columns + from;
                float *sum = out + row * TILE + j;
                switch (rows) {
                case 6: block(6, a, depth, b, columns, sum, from > 0); break;
                case 5: block(5, a, depth, b, columns, sum, from > 0); break;
                case 4: block(4, a, depth, b, columns, sum, from > 0); break;
                case 3: block(3, a, depth, b, columns, sum, from > 0); break;
                case 2: block(2, a, depth, b, columns, sum, from > 0); break;
                case 1: block(1, a, depth, b, columns, sum, from > 0); break;
                }
            }
            row += rows;
        }
    }
}

/* e^x to within 2 units in the last place, by Cephes' polynomial; below -87.3 as there, above 88.8 inf. */
INLINE vector exponential(vector x) {
    x = choose(x > all(88.8f), all(88.8f), x);
    x = choose(x < all(-87.3f), all(-87.3f), x);
    const vector shift = all(0x1.8p23f); /* a number as large as this has no fraction */
    vector n = (x * all(1.44269504f) + shift) - shift;               /* x/ln 2, rounded */
    vector r = x - n * all(0.693359375f) - n * all(-2.12194440e-4f); /* x - n·ln 2 */
    vector p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * (r * r) + r + all(1);
    integers power = __builtin_convertvector(n, integers), half = power >> 1; /* in two factors: 2^128 is inf */
    return p * (vector)((half + 127) << 23) * (vector)((power - half + 127) << 23);
}

INLINE vector silu(vector x) { return x / (all(1) + exponential(-x)); }

/* out[target[r]] (+)= share[r]·down[e] (silu(gate[e] x) ⊙ up[e] x), x = x[target[r]], for the rows r of each group e.

   Rows offsets[e]…offsets[e+1]-1 are group e's, with gate[e] above up[e] in gate_up: (E, 2·I, K); down: (E, N, I),
   all contiguous; K, I and N multiples of TILE. Without a `target` row r is its own, and written; with one the shares
   are added to `out`, in the order of the groups, and where it is negative nothing is. `hidden`, or null: (rows, 2·I)
   for the first products. `scratch`: CHUNK·(K + I) numbers. */
void grouped_swiglu(const float *x, const int64_t *target, const float *share, const float *gate_up, const float *down,
                    const int64_t *offsets, int64_t E, int64_t K, int64_t I, int64_t N, float *out, float *hidden,
                    float *scratch, int threads) {
    float *tokens = scratch, *activations = scratch + CHUNK * K;
#pragma omp parallel num_threads(threads)
    for (int64_t e = 0; e < E; e++) {
        const float *gate = gate_up + e * 2 * I * K, *up = gate + I * K, *w = down + e * N * I;
        for (int64_t first = offsets[e]; first < offsets[e + 1]; first += CHUNK) {
            int64_t n = smaller(offsets[e + 1] - first, CHUNK);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; i++) {
                int64_t from = target ? target[first + i] : first + i;
                for (int64_t k = 0; k < K; k += DEPTH) {
                    float *to = tokens + place(n, K, i, k);
                    size_t size = smaller(K - k, DEPTH) * sizeof *x;
                    if (from < 0) memset(to, 0, size);
                    else memcpy(to, x + from * K + k, size);
                }
            }
#pragma omp for schedule(static)
            for (int64_t j = 0; j < I; j += TILE) {
                float gates[CHUNK * TILE], ups[CHUNK * TILE];
                tile(tokens, n, K, gate + j * K, gates, up + j * K);
                tile(tokens, n, K, up + j * K, ups, j + TILE < I ? gate + (j + TILE) * K : 0);
                for (int64_t i = 0; i < n; i++) {
                    vector g = load(gates + i * TILE), u = load(ups + i * TILE), y = silu(g) * u;
                    memcpy(activations + place(n, I, i, j), &y, sizeof y);
                    if (hidden) {
                        float *both = hidden + (first + i) * 2 * I + j;
                        memcpy(both, &g, sizeof g);
                        memcpy(both + I, &u, sizeof u);
                    }
                }
            }
/* Not waited for: whoever is ahead packs the next tokens, and waits before activations are written again. */
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < N; j += TILE) {
                float sum[CHUNK * TILE];
                tile(activations, n, I, w + j * I, sum, j + TILE < N ? w + (j + TILE) * I : 0);
                for (int64_t i = 0; i < n; i++) {
                    int64_t to = target ? target[first + i] : first + i;
                    if (to < 0) continue;
                    float *place_of = out + to * N + j;
                    vector y = load(sum + i * TILE);
                    if (target) y = y * all(share[first + i]) + load(place_of);
                    memcpy(place_of, &y, sizeof y);
                }
            }
        }
    }
}

enum { STEP = 64, WIDE = 4 * LANES };

/* c[i, j] (+)= Σ_p a[p, i]·b[p, j] for p < depth, i < rows, j < vectors·LANES, the last two known when compiled.
   a[p, i] lies at p·a_step + i·a_row; b in rows of WIDE. */
INLINE void outer_block(int rows, int vectors, int64_t depth, const float *a, int64_t a_step, int64_t a_row,
                        const float *b, float *c, int64_t c_stride, int add) {
    vector total[ROWS][4] = {0};
    _Pragma("GCC unroll 4") for (int64_t p = 0; p < depth; p++) {
        vector row[4];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = load(b + p * WIDE + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            vector factor = all(a[p * a_step + i * a_row]);
            UNROLL for (int v = 0; v < vectors; v++) total[i][v] += factor * row[v];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++) {
            float *place_of = c + i * c_stride + v * LANES;
            vector sum = add ? total[i][v] + load(place_of) : total[i][v]; /* last: long sums lose less in two levels */
            memcpy(place_of, &sum, sizeof sum);
        }
}

INLINE void outer_rows(int64_t rows, int vectors, int64_t depth, const float *a, int64_t a_step, int64_t a_row,
                       const float *b, float *c, int64_t c_stride, int add) {
    switch (rows) {
    case 1: outer_block(1, vectors, depth, a, a_step, a_row, b, c, c_stride, add); break;
    case 2: outer_block(2, vectors, depth, a, a_step, a_row, b, c, c_stride, add); break;
    case 3: outer_block(3, vectors, depth, a, a_step, a_row, b, c, c_stride, add); break;
    case 4: outer_block(4, vectors, depth, a, a_step, a_row, b, c, c_stride, add); break;
    case 5: outer_block(5, vectors, depth, a, a_step, a_row, b, c, c_stride, add); break;
    default: outer_block(ROWS, vectors, depth, a, a_step, a_row, b, c, c_stride, add);
    }
}

/* c (+)= a b, a: (m, depth), m ≤ CHUNK; b: (depth, width), width a multiple of LANES; or, `transposed`, a: (depth, m)
   and c (+)= aᵀ b. */
static void outer(int transposed, int64_t m, int64_t depth, int64_t width, const float *a, int64_t a_stride,
                  const float *b, int64_t b_stride, float *c, int64_t c_stride, int add) {
    float packed[CHUNK * STEP], rows[STEP * WIDE];
    for (int64_t from = 0; from < depth; from += STEP, add = 1) {
        int64_t some = smaller(depth - from, STEP);
        if (transposed) /* what a block needs, together: at a large stride, it would share a place in the cache */
            for (int64_t p = 0; p < some; p++)
                for (int64_t i = 0; i < m; i++)
                    packed[(i / ROWS * some + p) * ROWS + i % ROWS] = a[(from + p) * a_stride + i];
        for (int64_t j = 0; j < width; j += WIDE) {
            int64_t columns = smaller(width - j, WIDE);
            for (int64_t p = 0; p < some; p++) {
                const float *row = b + (from + p) * b_stride + j;
                memcpy(rows + p * WIDE, row, columns * sizeof *b);
                if (from + STEP + p < depth) /* the next step's */
                    for (int64_t k = 0; k < columns; k += LANES) __builtin_prefetch(row + STEP * b_stride + k);
            }
            for (int64_t i = 0; i < m; i += ROWS) {
                const float *numbers = transposed ? packed + i * some : a + i * a_stride + from;
                int64_t step = transposed ? ROWS : 1, next = transposed ? 1 : a_stride, n = smaller(m - i, ROWS);
                float *sum = c + i * c_stride + j;
                if (columns == WIDE) outer_rows(n, 4, some, numbers, step, next, rows, sum, c_stride, add);
                else
                    for (int64_t k = 0; k < columns; k += LANES)
                        outer_rows(n, 1, some, numbers, step, next, rows + k, sum + k, c_stride, add);
            }
        }
    }
}

/* The gradients of grouped_swiglu without a target, from `hidden`: dx, dgate_up and ddown, each null if not wanted.
   `scratch`: CHUNK·4·I numbers. */
void grouped_swiglu_backward(const float *grad, const float *x, const float *gate_up, const float *down,
                             const int64_t *offsets, const float *hidden, int64_t E, int64_t K, int64_t I, int64_t N,
                             float *dx, float *dgate_up, float *ddown, float *scratch, int threads) {
    float *dhidden = scratch, *act = scratch + CHUNK * 2 * I, *dact = scratch + CHUNK * 3 * I;
#pragma omp parallel num_threads(threads)
    for (int64_t e = 0; e < E; e++) {
        const float *w = gate_up + e * 2 * I * K, *v = down + e * N * I;
        float *dw = dgate_up ? dgate_up + e * 2 * I * K : 0, *dv = ddown ? ddown + e * N * I : 0;
        if (offsets[e] == offsets[e + 1]) {
#pragma omp single nowait
            {
                if (dw) memset(dw, 0, 2 * I * K * sizeof *dw);
                if (dv) memset(dv, 0, N * I * sizeof *dv);
            }
        }
        for (int64_t first = offsets[e]; first < offsets[e + 1]; first += CHUNK) {
            int64_t n = smaller(offsets[e + 1] - first, CHUNK), later = first > offsets[e];
            const float *dy = grad + first * N, *rows = x + first * K, *both = hidden + first * 2 * I;
#pragma omp for schedule(static)
            for (int64_t j = 0; j < I; j += WIDE) {
                int64_t columns = smaller(I - j, WIDE);
                outer(0, n, N, columns, dy, N, v + j, I, dact + j, I, 0);
                for (int64_t i = 0; i < n; i++)
                    for (int64_t k = j; k < j + columns; k += LANES) {
                        vector g = load(both + i * 2 * I + k), u = load(both + i * 2 * I + I + k);
                        vector d = load(dact + i * I + k);
                        vector sigmoid = all(1) / (all(1) + exponential(-g)), s = g * sigmoid;
                        vector y = s * u, dg = d * u * sigmoid * (all(1) + g - s), du = d * s;
                        memcpy(act + i * I + k, &y, sizeof y);
                        memcpy(dhidden + i * 2 * I + k, &dg, sizeof dg);
                        memcpy(dhidden + i * 2 * I + I + k, &du, sizeof du);
                    }
            }
            if (dx) {
#pragma omp for schedule(static) nowait
                for (int64_t k = 0; k < K; k += WIDE)
                    outer(0, n, 2 * I, smaller(K - k, WIDE), dhidden, 2 * I, w + k, K, dx + first * K + k, K, 0);
            }
            if (dw) {
#pragma omp for schedule(static) nowait
                for (int64_t o = 0; o < 2 * I; o += CHUNK)
                    outer(1, smaller(2 * I - o, CHUNK), n, K, dhidden + o, 2 * I, rows, K, dw + o * K, K, later);
            }
            if (dv) {
#pragma omp for schedule(static) nowait
                for (int64_t o = 0; o < N; o += CHUNK)
                    outer(1, smaller(N - o, CHUNK), n, I, dy + o, N, act, I, dv + o * I, I, later);
            }
#pragma omp barrier
        }
    }
}
