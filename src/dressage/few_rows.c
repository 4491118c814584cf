/* Few rows times a matrix, y = x W' + b in float32: what decoding does with every weight for every token.

   The rows are laid side by side, as many as a register holds, and each number of W meets all of them: W is read once,
   as it lies, where BLAS puts it into an order of its own first, which pays with many rows only. Every number of y is
   added up from first to last whatever rows stand beside it, so it is the same to the last bit. few_rows.py says when
   this is used. */

#include "few_rows.h"

#if X86_BUILD

#ifdef WITH_AVX512
enum { LANES = 16, GROUPS = 4 };
#else
enum { LANES = 8, GROUPS = 2 };
#endif

/* A register of rows, also where it lies in memory. */
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum {
    THREE = 3,             /* outputs in a group: so many addresses the processor makes of two registers */
    OUTS = THREE * GROUPS, /* of W at once, times */
    WIDE = 2,              /* registers of rows: all sums in registers */
    BLOCK = 24,            /* of W that a thread holds in its cache for all rows */
    PART = 128,            /* numbers of a row that are added up before their sum is: that is more exact, and stays near */
    PIECE = 16,            /* numbers of a row that a thread lays beside the others' at once */
    SMALL = 1 << 16
};

/* x [n, in] as [panels, in, LANES]: a panel's rows side by side, the last one's filled up with zeros. For a team of
   threads, which goes on when all of them are done. */
VECTORS void side_by_side(const float *x, float *beside, int64_t n, int64_t in) {
    const int64_t panels = (n + LANES - 1) / LANES, pieces = (in + PIECE - 1) / PIECE;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels * pieces; i++) {
        const int64_t first = i / pieces * LANES, begin = i % pieces * PIECE;
        const int64_t end = begin + PIECE < in ? begin + PIECE : in;
        for (int64_t k = begin; k < end; k++)
            for (int64_t r = 0; r < LANES; r++)
                beside[first * in + k * LANES + r] = first + r < n ? x[(first + r) * in + k] : 0.0f;
    }
}

/* A part of the sums: n numbers of the rows of `wide` panels times n of 3 groups of W's. Meanwhile what comes next is
   fetched, `share` numbers at a time. The other counts are known when this is compiled. */
ALWAYS void tile(const int groups, const int three, const int wide, const float *x, const float *w,
                 float (*sums)[WIDE * LANES], int64_t n, int64_t in, const float *next, int64_t share) {
    Lanes sum[OUTS][WIDE];
    const float *at[GROUPS];
#pragma GCC unroll 16
    for (int o = 0; o < groups * three; o++)
#pragma GCC unroll 16
        for (int v = 0; v < wide; v++) sum[o][v] = (Lanes){0};
#pragma GCC unroll 16
    for (int g = 0; g < groups; g++) at[g] = w + g * three * in;
    for (int64_t k = 0; k < n; k++, next += share) {
        Lanes rows[WIDE];
        _mm_prefetch((const char *)next, _MM_HINT_T0);
#pragma GCC unroll 16
        for (int v = 0; v < wide; v++) rows[v] = *(const Lanes *)(x + (v * in + k) * LANES);
#pragma GCC unroll 16
        for (int g = 0; g < groups; g++) {
#pragma GCC unroll 16
            for (int o = 0; o < three; o++) {
                const float weight = at[g][o * in];
#pragma GCC unroll 16
                for (int v = 0; v < wide; v++) sum[g * three + o][v] += rows[v] * weight;
            }
            at[g]++;
        }
    }
#pragma GCC unroll 16
    for (int o = 0; o < groups * three; o++)
#pragma GCC unroll 16
        for (int v = 0; v < wide; v++) *(Lanes *)(sums[o] + v * LANES) += sum[o][v];
}

/* y [n, outs] of n rows in `wide` panels, added to what is there with `add`. */
ALWAYS void panels(const int wide, const float *x, const float *w, const float *b, float *y, int64_t n, int64_t outs,
                   int64_t in, int64_t out, int add, const float *next, int64_t share) {
    float sums[BLOCK][WIDE * LANES];
    for (int64_t o = 0; o < outs; o++)
        for (int v = 0; v < wide; v++) *(Lanes *)(sums[o] + v * LANES) = (Lanes){0};
    for (int64_t k = 0; k < in; k += PART) {
        const int64_t many = k + PART < in ? PART : in - k;
        int64_t o = 0;
        for (; o + OUTS <= outs; o += OUTS, next += share * many)
            tile(GROUPS, THREE, wide, x + k * LANES, w + o * in + k, sums + o, many, in, next, share);
        for (; o < outs; o++) tile(1, 1, wide, x + k * LANES, w + o * in + k, sums + o, many, in, next, 0);
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t o = 0; o < outs; o++)
            y[r * out + o] = sums[o][r] + (b ? b[o] : 0.0f) + (add ? y[r * out + o] : 0.0f);
}

/* y [n, out] of rows that lie `side_by_side`, W [out, in] and b [out] or none. For a team of threads as well. */
VECTORS void few_rows_together(const float *beside, const float *w, const float *b, float *y, int64_t n, int64_t in,
                               int64_t out, int add) {
    const int64_t step = WIDE * LANES, visits = (n + step - 1) / step;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < (out + BLOCK - 1) / BLOCK * BLOCK; o += BLOCK) {
        const int64_t outs = o + BLOCK < out ? BLOCK : out - o;
        const int64_t share = visits && o + 2 * BLOCK <= out ? (OUTS + visits - 1) / visits : 0;
        const float *next = w + (o + outs) * in, *bias = b ? b + o : 0;
        for (int64_t r = 0; r < n; r += step, next += share * (outs / OUTS) * in) {
            const int64_t left = n - r < step ? n - r : step;
            if (left > LANES)
                panels(2, beside + r * in, w + o * in, bias, y + r * out + o, left, outs, in, out, add, next, share);
            else
                panels(1, beside + r * in, w + o * in, bias, y + r * out + o, left, outs, in, out, add, next, share);
        }
    }
}

/* x [n, in], W [out, in], b [out] or none, y [n, out], all without gaps; `beside` is room for n, rounded up to 16,
   times `in` numbers. */
void few_rows(const float *x, const float *w, const float *b, float *y, float *beside, int64_t n, int64_t in,
              int64_t out) {
#pragma omp parallel if (n * in * out > SMALL)
    {
        side_by_side(x, beside, n, in);
        few_rows_together(beside, w, b, y, n, in, out, 0);
    }
}

/* Is this a processor for it? */
int few_rows_suit(void) {
#ifdef WITH_AVX512
    if (!__builtin_cpu_supports("avx512f")) return 0;
#endif
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#else

void few_rows(const float *x, const float *w, const float *b, float *y, float *beside, int64_t n, int64_t in,
              int64_t out) {}

int few_rows_suit(void) { return 0; }

#endif
