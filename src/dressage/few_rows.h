/* What the compiled parts of decoding have in common. */

#ifndef FEW_ROWS_H
#define FEW_ROWS_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define X86_BUILD 1
/* setup.py builds all of it for either kind of processor. */
#ifdef WITH_AVX512
#define VECTORS __attribute__((target("avx512f,avx2,fma")))
#else
#define VECTORS __attribute__((target("avx2,fma")))
#endif
#define ALWAYS static inline __attribute__((always_inline)) VECTORS

void side_by_side(const float *x, float *beside, int64_t n, int64_t in);

void few_rows_together(const float *beside, const float *w, const float *b, float *y, int64_t n, int64_t in,
                       int64_t out, int add);

#endif
#endif
