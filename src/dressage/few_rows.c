/* Few rows times a matrix, y = x W' + b in float32: what decoding does with every weight for every token.

   BLAS puts a matrix into an order of its own before it multiplies, which pays with many rows only; here the weight is
   read once, as it lies. A row's numbers are added up in the same order whatever rows stand beside
   it, so they are the same to the last bit. few_rows.py says when it is used. */

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define ALWAYS static inline __attribute__((always_inline)) AVX2

enum {
    LANES = 8,
    ROWS = 4,   /* of x at once, and */
    OUTS = 3,   /* of W at once: 12 sums, in registers */
    BLOCK = 24, /* of W that a thread holds in its cache for all rows */
    SMALL = 1 << 16
};

ALWAYS float sum_of(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* y [rows, outs] of rows of x and of W; both counts are known when this is compiled. */
ALWAYS void tile(const int rows, const int outs, const float *x, const float *w, const float *b, float *y, int64_t in,
                 int64_t out) {
    __m256 sum[ROWS][OUTS];
    int64_t k = 0;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) sum[r][o] = _mm256_setzero_ps();
    for (; k + LANES <= in; k += LANES) {
        __m256 weights[OUTS];
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) weights[o] = _mm256_loadu_ps(w + o * in + k);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256 of_row = _mm256_loadu_ps(x + r * in + k);
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++) sum[r][o] = _mm256_fmadd_ps(of_row, weights[o], sum[r][o]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) {
            float whole = sum_of(sum[r][o]);
            for (int64_t rest = k; rest < in; rest++) whole += x[r * in + rest] * w[o * in + rest];
            y[r * out + o] = whole + (b ? b[o] : 0.0f);
        }
}

ALWAYS void tiles(const int outs, int64_t rows, const float *x, const float *w, const float *b, float *y, int64_t in,
                  int64_t out) {
    switch (rows) {
        case 1: tile(1, outs, x, w, b, y, in, out); break;
        case 2: tile(2, outs, x, w, b, y, in, out); break;
        case 3: tile(3, outs, x, w, b, y, in, out); break;
        default: tile(4, outs, x, w, b, y, in, out);
    }
}

AVX2 static void block(int64_t first, int64_t last, const float *x, const float *w, const float *b, float *y, int64_t n,
                       int64_t in, int64_t out) {
    for (int64_t r = 0; r < n; r += ROWS) {
        int64_t o = first;
        for (; o + OUTS <= last; o += OUTS)
            tiles(OUTS, n - r, x + r * in, w + o * in, b ? b + o : 0, y + r * out + o, in, out);
        for (; o < last; o++) tiles(1, n - r, x + r * in, w + o * in, b ? b + o : 0, y + r * out + o, in, out);
    }
}

/* x [n, in], W [out, in], b [out] or none, y [n, out], all without gaps. */
void few_rows(const float *x, const float *w, const float *b, float *y, int64_t n, int64_t in, int64_t out) {
    const int64_t blocks = (out + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (n * in * out > SMALL)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t end = (i + 1) * BLOCK;
        block(i * BLOCK, end < out ? end : out, x, w, b, y, n, in, out);
    }
}

/* Is this a processor of the kind that it was measured on? With 512 bits at once nobody has looked. */
int few_rows_suit(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !__builtin_cpu_supports("avx512f");
}

#else

void few_rows(const float *x, const float *w, const float *b, float *y, int64_t n, int64_t in, int64_t out) {}

int few_rows_suit(void) { return 0; }

#endif
