/* Few rows times a matrix, y = x W' + b in float32: what decoding does with every weight for every token.

   BLAS puts a matrix into an order of its own before it multiplies, which pays with many rows only; here the weight is
   read once, as it lies. A row's numbers are added up in the same order whatever rows stand beside
   it, so they are the same to the last bit. few_rows.py says when it is used. */

#include "few_rows.h"

#if AVX2_BUILD

enum {
    ROWS = 4,   /* of x at once, and */
    OUTS = 3,   /* of W at once: 12 sums, in registers */
    BLOCK = 24, /* of W that a thread holds in its cache for all rows */
    LINE = 64,  /* bytes that the processor fetches together */
    SMALL = 1 << 16
};

/* Four sums of eight at once. */
ALWAYS __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

/* y [rows, outs] of rows of x and of W, added to what is there with `add`; the counts are known when this is compiled. */
ALWAYS void tile(const int rows, const int outs, const float *x, const float *w, const float *b, float *y, int64_t in,
                 int64_t out, int add) {
    __m256 sum[ROWS][OUTS];
    int64_t k = 0;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < OUTS; o++) sum[r][o] = _mm256_setzero_ps();
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
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        float whole[4];
        _mm_storeu_ps(whole, sums_of(sum[r][0], sum[r][1], sum[r][2], _mm256_setzero_ps()));
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) {
            for (int64_t rest = k; rest < in; rest++) whole[o] += x[r * in + rest] * w[o * in + rest];
            y[r * out + o] = whole[o] + (b ? b[o] : 0.0f) + (add ? y[r * out + o] : 0.0f);
        }
    }
}

ALWAYS void tiles(const int outs, int64_t rows, const float *x, const float *w, const float *b, float *y, int64_t in,
                  int64_t out, int add) {
    switch (rows) {
        case 1: tile(1, outs, x, w, b, y, in, out, add); break;
        case 2: tile(2, outs, x, w, b, y, in, out, add); break;
        case 3: tile(3, outs, x, w, b, y, in, out, add); break;
        default: tile(4, outs, x, w, b, y, in, out, add);
    }
}

/* Outputs `first` to `last` of all rows. While the block is at work with all rows but the first few, the next one is
   fetched: memory and arithmetic take turns otherwise. */
ALWAYS void block(int64_t first, int64_t last, const float *x, const float *w, const float *b, float *y, int64_t n,
                       int64_t in, int64_t out, int add) {
    const char *next = (const char *)(w + last * in);
    const char *end = (const char *)(w + (last + BLOCK < out ? last + BLOCK : out) * in);
    const int64_t visits = ((n - 1) / ROWS) * ((last - first + OUTS - 1) / OUTS);
    const int64_t share = visits ? ((end - next) / visits + LINE - 1) / LINE : 0;
    for (int64_t r = 0; r < n; r += ROWS) {
        int64_t o = first;
        for (; o + OUTS <= last; o += OUTS) {
            for (int64_t i = 0; r && i < share && next < end; i++, next += LINE) _mm_prefetch(next, _MM_HINT_T1);
            tiles(OUTS, n - r, x + r * in, w + o * in, b ? b + o : 0, y + r * out + o, in, out, add);
        }
        for (; o < last; o++) tiles(1, n - r, x + r * in, w + o * in, b ? b + o : 0, y + r * out + o, in, out, add);
    }
}

/* The same within a team of threads, which goes on when all of them are done. */
AVX2 void few_rows_together(const float *x, const float *w, const float *b, float *y, int64_t n, int64_t in,
                            int64_t out, int add) {
    const int64_t blocks = (out + BLOCK - 1) / BLOCK;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t end = (i + 1) * BLOCK < out ? (i + 1) * BLOCK : out;
        if (add)
            block(i * BLOCK, end, x, w, b, y, n, in, out, 1);
        else
            block(i * BLOCK, end, x, w, b, y, n, in, out, 0);
    }
}

/* x [n, in], W [out, in], b [out] or none, y [n, out], all without gaps. */
void few_rows(const float *x, const float *w, const float *b, float *y, int64_t n, int64_t in, int64_t out) {
#pragma omp parallel if (n * in * out > SMALL)
    few_rows_together(x, w, b, y, n, in, out, 0);
}

/* Is this a processor of the kind that it was measured on? With 512 bits at once nobody has looked. */
int few_rows_suit(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !__builtin_cpu_supports("avx512f");
}

#else

void few_rows(const float *x, const float *w, const float *b, float *y, int64_t n, int64_t in, int64_t out) {}

int few_rows_suit(void) { return 0; }

#endif
