/* One more token of every answer, by a whole model built like Llama in float32: embeddings in, logits out.

   A layer is h += O(attention(norm(h))), h += down(silu(gate(norm(h))) up(norm(h))), with rotary positions. By torch
   it is forty calls, and with few rows the calls take as long as what they compute. Every thread goes through all of
   it; a row's numbers do not depend on the rows beside it. next_token.py says for which models. */

#include "few_rows.h"

#if X86_BUILD

#include <math.h>

enum { LANES = 8 };

/* y = x W' + b + scale x down' up'; without bias or adapter those are none. */
typedef struct {
    const float *weight, *bias, *down, *up;
    int64_t rank;
    float scale;
} Linear;

typedef struct {
    Linear query, key, value, output, gate, up, down;
    const float *before_attention, *before_mlp; /* weights of the norms */
    float *keys, *values;                       /* [rows, kv_heads, capacity, dim] */
} Layer;

typedef struct {
    int64_t width, inner, heads, kv_heads, dim, capacity, vocabulary;
    float epsilon, scaling;
} Sizes;

ALWAYS float total(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

ALWAYS float dot(const float *a, const float *b, int64_t n) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum);
    return total(sum);
}

/* e^x to float32's rounding: 2^n e^r with |r| <= ln(2) / 2, and e^r by its series. */
ALWAYS __m256 exponential(__m256 x) {
    /* In this order of operands NaN stays NaN. */
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(_mm256_set1_ps(-87.0f), x));
    const __m256 n =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x); /* ln(2) in two parts, the first exact */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.0f / 5040);
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 720));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 120));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 24));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 6));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.5f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

VECTORS static void norm(const float *x, const float *weight, float *y, int64_t n, const Sizes *s) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < n; r++) {
        const float *row = x + r * s->width;
        const __m256 by = _mm256_set1_ps(1.0f / sqrtf(dot(row, row, s->width) / s->width + s->epsilon));
        for (int64_t i = 0; i < s->width; i += LANES)
            _mm256_storeu_ps(y + r * s->width + i,
                             _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(row + i), by), _mm256_loadu_ps(weight + i)));
    }
}

/* Room for what the products are given and an adapter makes of it. */
typedef struct {
    float *beside, *low, *low_beside;
} Room;

/* Of rows that lie in room->beside. */
VECTORS static void linear(const Linear *by, float *y, const Room *room, int64_t n, int64_t in, int64_t out, int add) {
    few_rows_together(room->beside, by->weight, by->bias, y, n, in, out, add);
    if (!by->down) return;
    few_rows_together(room->beside, by->down, 0, room->low, n, in, by->rank, 0);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n * by->rank; i++) room->low[i] *= by->scale;
    side_by_side(room->low, room->low_beside, n, by->rank);
    few_rows_together(room->low_beside, by->up, 0, y, n, by->rank, out, 1);
}

/* x [dim] turned by the angles of its position: (a, b) -> (a cos - b sin, b cos + a sin), a the first half. */
VECTORS static void rotate(const float *x, const float *cosine, const float *sine, float *y, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = a * cosine[i] - b * sine[i];
        y[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

/* Some of an answer's values [n, dim] by their weights: so many registers of each. */
ALWAYS void mix(const int many, const float *weights, const float *values, float *y, int64_t n, int64_t dim, float scale) {
    __m256 sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < many; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t t = 0; t < n; t++) {
        const __m256 weight = _mm256_set1_ps(weights[t]);
#pragma GCC unroll 8
        for (int i = 0; i < many; i++)
            sum[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(values + t * dim + i * LANES), sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < many; i++) _mm256_storeu_ps(y + i * LANES, _mm256_mul_ps(sum[i], _mm256_set1_ps(scale)));
}

/* The group of heads that share the keys `kv` of one answer: its own key and value enter, then each head looks back. */
VECTORS static void attend(float *query, const float *key, const float *value, float *keys, float *values, float *scores,
                        const float *cosine, const float *sine, int64_t length, const Sizes *s) {
    const int64_t dim = s->dim, group = s->heads / s->kv_heads;
    rotate(key, cosine, sine, keys + length * dim, dim);
    for (int64_t i = 0; i < dim; i++) values[length * dim + i] = value[i];
    for (int64_t h = 0; h < group; h++) {
        float *q = query + h * dim, largest = -INFINITY;
        rotate(q, cosine, sine, q, dim);
        for (int64_t t = 0; t <= length; t++) {
            scores[t] = s->scaling * dot(q, keys + t * dim, dim);
            largest = scores[t] > largest ? scores[t] : largest;
        }
        int64_t t = length + 1;
        for (; t % LANES; t++) scores[t] = -INFINITY;
        __m256 sum = _mm256_setzero_ps();
        for (int64_t i = 0; i < t; i += LANES) {
            __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(largest)));
            if (i + LANES > length + 1) /* what was filled up counts for nothing */
                e = _mm256_and_ps(e, _mm256_cmp_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ));
            _mm256_storeu_ps(scores + i, e);
            sum = _mm256_add_ps(sum, e);
        }
        const float whole = 1.0f / total(sum);
        int64_t i = 0;
        for (; i + 8 * LANES <= dim; i += 8 * LANES) mix(8, scores, values + i, q + i, length + 1, dim, whole);
        for (; i < dim; i += LANES) mix(1, scores, values + i, q + i, length + 1, dim, whole);
    }
}

VECTORS static void gated(float *gate, const float *up, int64_t n) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        const __m256 g = _mm256_loadu_ps(gate + i), one = _mm256_set1_ps(1.0f);
        const __m256 below = _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), g)));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_loadu_ps(up + i)));
    }
}

/* Of n tokens the states [n, width] become logits [n, vocabulary]; cosine and sine [n, dim] are of their positions, and
   lengths [n] says how many tokens stand before each. For all that lies between, `between` has
   n (width + heads dim + 2 kv_heads dim + 2 inner + rank + kv_heads (capacity + LANES)) numbers, and `beside`
   (n rounded up to 16) (the largest of width, heads dim and inner, + rank). */
void next_token(const Layer *layers, int64_t depth, const Sizes *s, const float *last_norm, const Linear *head,
                float *states, const float *cosine, const float *sine, const int64_t *lengths, int64_t n,
                float *between, float *beside, float *logits) {
    const int64_t of_heads = s->heads * s->dim, of_kv = s->kv_heads * s->dim, group = s->heads / s->kv_heads;
    const int64_t seen = (s->capacity + LANES) / LANES * LANES, filled_up = (n + 15) / 16 * 16;
    int64_t rank = 0;
    for (int64_t l = 0; l < depth; l++)
        for (const Linear *one = &layers[l].query; one <= &layers[l].down; one++)
            rank = one->rank > rank ? one->rank : rank;
    float *normed = between, *query = normed + n * s->width, *key = query + n * of_heads, *value = key + n * of_kv;
    float *gate = value + n * of_kv, *up = gate + n * s->inner, *low = up + n * s->inner, *scores = low + n * rank;
    const Room room = {beside + filled_up * rank, low, beside};
#pragma omp parallel
    {
        for (int64_t l = 0; l < depth; l++) {
            const Layer *layer = layers + l;
            norm(states, layer->before_attention, normed, n, s);
            side_by_side(normed, room.beside, n, s->width);
            linear(&layer->query, query, &room, n, s->width, of_heads, 0);
            linear(&layer->key, key, &room, n, s->width, of_kv, 0);
            linear(&layer->value, value, &room, n, s->width, of_kv, 0);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n * s->kv_heads; i++) {
                const int64_t r = i / s->kv_heads, at = i * s->capacity * s->dim;
                attend(query + i * group * s->dim, key + i * s->dim, value + i * s->dim, layer->keys + at,
                       layer->values + at, scores + i * seen, cosine + r * s->dim, sine + r * s->dim, lengths[r], s);
            }
            side_by_side(query, room.beside, n, of_heads);
            linear(&layer->output, states, &room, n, of_heads, s->width, 1);
            norm(states, layer->before_mlp, normed, n, s);
            side_by_side(normed, room.beside, n, s->width);
            linear(&layer->gate, gate, &room, n, s->width, s->inner, 0);
            linear(&layer->up, up, &room, n, s->width, s->inner, 0);
            gated(gate, up, n * s->inner);
            side_by_side(gate, room.beside, n, s->inner);
            linear(&layer->down, states, &room, n, s->inner, s->width, 1);
        }
        norm(states, last_norm, normed, n, s);
        side_by_side(normed, room.beside, n, s->width);
        linear(head, logits, &room, n, s->width, s->vocabulary, 0);
    }
}

#endif
