/* What the compiled parts of decoding have in common. */

#ifndef FEW_ROWS_H
#define FEW_ROWS_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define AVX2_BUILD 1
#define AVX2 __attribute__((target("avx2,fma")))
#define ALWAYS static inline __attribute__((always_inline)) AVX2

enum { LANES = 8 };

void few_rows_together(const float *x, const float *w, const float *b, float *y, int64_t n, int64_t in, int64_t out,
                       int add);

#endif
#endif
