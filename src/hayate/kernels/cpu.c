// Decode on the CPU: one call an operation, one OpenMP region a call.
//
// A batch of one to eight tokens is bound by the reading of the weights, so every weight is read once, in one
// contiguous span a thread, with a software prefetch into L2 that runs across the page boundaries where the
// hardware's prefetchers stop. Arithmetic is fp32 throughout: bf16 operands are widened exactly and each
// result is rounded once, to nearest even. (The bf16 dot-product instructions would want the normalised input
// rounded to bf16 first, and at one token the multiplications already hide behind the loads.)
//
// An operation's arguments are a struct of 64-bit fields, packed in that order by cpu.py; `hayate_run` runs one
// after the other. An operation returns 1 when an index (token, slot, position, page) is out of its range.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_nf4.h"
#include "cpu_vectors.h"

enum {
  PREFETCH_BYTES = 8192,             // ahead of the reader; measured, flat from 4 to 12 KiB
  TILE = 64,                         // output columns whose epilogue runs together
  MAX_TOKENS = 8,                    // of one linear; a larger batch is a matrix product
  TOKENS_AT_ONCE = W == 16 ? 8 : 4,  // by the number of vector registers, 32 or 16
};

enum { NORM_NONE, NORM_RMS, NORM_LAYER1P };
enum { ACT_NONE, ACT_RELU2, ACT_SILU, ACT_SILU_AND_MUL };

// ---- normalisation ------------------------------------------------------------------------------------------

typedef struct {
  int64_t kind;  // NORM_*
  const void *weight, *bias;
  int64_t weight_bf16, bias_bf16;
  double eps;
} Norm;

// Normalises x[0 .. n) in place; x is padded with zeros to a whole number of vectors.
static void normalise(const Norm *norm, float *x, int64_t n) {
  float mean = 0;
  if (norm->kind == NORM_LAYER1P) {
    vfloat total = {0};
    for (int64_t i = 0; i < n; i += W) total += load(x, i, 0);
    mean = sum(total) / n;
  }
  vfloat squares = {0};
  for (int64_t i = 0; i < n; i += W) {
    vfloat centred = load(x, i, 0) - mean;
    if (n - i < W) {  // the padding is not part of the variance
      float lanes[W] = {0};
      memcpy(lanes, &centred, 4 * (n - i));
      centred = load(lanes, 0, 0);
    }
    squares += centred * centred;
  }
  float scale = 1.0f / sqrtf(sum(squares) / n + (float)norm->eps);
  for (int64_t i = 0; i < n; i += W) {
    vfloat y = (load(x, i, 0) - mean) * scale;
    vfloat weight = load_up_to(norm->weight, i, n - i, norm->weight_bf16);
    if (norm->kind == NORM_LAYER1P) {
      y = y * (1.0f + weight);
      if (norm->bias) y += load_up_to(norm->bias, i, n - i, norm->bias_bf16);
    } else {
      y = y * weight;
    }
    store_up_to(x, i, n - i, 0, y);
  }
}

// ---- linear -------------------------------------------------------------------------------------------------

typedef struct {
  int64_t operation;
  const void *x, *weight, *bias, *residual;
  void *out;
  int64_t num_tokens, width, num_columns;  // T, D and the columns of the result (F for silu_and_mul)
  int64_t activation, bf16, bias_bf16, residual_bf16, num_threads;
  int64_t invariant;  // a token's sums are taken in one order, whether it comes alone or with others
  const void *scales;  // of a weight in NF4, with the columns of one; otherwise null
  int64_t block;
  Norm norm;
} LinearArguments;

// out[t][r] = x[t] . weight[r] for `tokens` tokens and `rows` consecutive rows, both constants.
INLINE void dot_rows(const float *x, int64_t x_stride, const char *weight, int64_t width, float (*out)[TILE],
                     const int rows, const int tokens, const int bf16) {
  const int64_t size = bf16 ? 2 : 4, line = CACHE_LINE / size, row_bytes = width * size;
  const int sums = rows * tokens == 1 ? 2 : 1;  // of one dot product: two hide the latency of the additions
  vfloat acc[2][TOKENS_AT_ONCE][2] = {0};
  int64_t d = 0;
  for (; d + line <= width; d += line) {
    UNROLL for (int r = 0; r < rows; r++)
      __builtin_prefetch(weight + r * row_bytes + d * size + PREFETCH_BYTES, 0, 2);
    UNROLL for (int v = 0; v < line / W; v++) {
      vfloat w[2];
      UNROLL for (int r = 0; r < rows; r++) w[r] = load(weight + r * row_bytes, d + v * W, bf16);
      UNROLL for (int t = 0; t < tokens; t++) {
        vfloat xt = load(x + t * x_stride, d + v * W, 0);
        UNROLL for (int r = 0; r < rows; r++) acc[r][t][v % sums] += w[r] * xt;
      }
    }
  }
  for (; d < width; d += W) {
    UNROLL for (int r = 0; r < rows; r++) {
      vfloat w = load_up_to(weight + r * row_bytes, d, width - d, bf16);
      UNROLL for (int t = 0; t < tokens; t++) acc[r][t][0] += w * load(x + t * x_stride, d, 0);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int t = 0; t < tokens; t++) out[t][r] = sum(acc[r][t][0] + acc[r][t][1]);
  }
}

// The same for n <= TILE rows and any number of tokens. A single token reads row after row, in two sums. Several
// share a pair of rows (`pairs`), in groups of 2, 4 or 8, the last one filled up with tokens of zeros; a tile's
// rows are still in the cache when its second group comes.
INLINE void dot_tile(const float *x, int64_t x_stride, const char *weight, int64_t width, int64_t n,
                     float (*out)[TILE], int64_t num_tokens, int64_t pairs, const int bf16) {
  const int64_t row_bytes = width * (bf16 ? 2 : 4);
  const int64_t paired = pairs ? n / 2 * 2 : 0;
  for (int64_t t = 0; t < num_tokens; t += TOKENS_AT_ONCE) {
    for (int64_t r = 0; r < paired; r += 2) {
      const float *xt = x + t * x_stride;
      const char *rows = weight + r * row_bytes;
      float(*to)[TILE] = (float(*)[TILE])(out[t] + r);
      if (num_tokens - t <= 2) dot_rows(xt, x_stride, rows, width, to, 2, 2, bf16);
      else if (num_tokens - t <= 4) dot_rows(xt, x_stride, rows, width, to, 2, 4, bf16);
      else dot_rows(xt, x_stride, rows, width, to, 2, TOKENS_AT_ONCE, bf16);
    }
  }
  for (int64_t r = paired; r < n; r++) {
    for (int64_t t = 0; t < num_tokens; t++)
      dot_rows(x + t * x_stride, 0, weight + r * row_bytes, width, (float(*)[TILE])(out[t] + r), 1, 1, bf16);
  }
}

static void dot_tile_bf16(const float *x, int64_t x_stride, const char *weight, int64_t width, int64_t n,
                          float (*out)[TILE], int64_t num_tokens, int64_t pairs) {
  dot_tile(x, x_stride, weight, width, n, out, num_tokens, pairs, 1);
}

static void dot_tile_fp32(const float *x, int64_t x_stride, const char *weight, int64_t width, int64_t n,
                          float (*out)[TILE], int64_t num_tokens, int64_t pairs) {
  dot_tile(x, x_stride, weight, width, n, out, num_tokens, pairs, 0);
}

// Bias, activation, residual and the rounding of columns [column, column + n) of one token.
static void finish_tile(const LinearArguments *a, int64_t token, int64_t column, int64_t n, const float *tile,
                        const float *up_tile) {
  const int64_t row = token * a->num_columns + column;
  for (int64_t i = 0; i < n; i += W) {
    vfloat y = load(tile, i, 0);
    if (a->bias) y += load_up_to(a->bias, column + i, n - i, a->bias_bf16);
    if (a->activation == ACT_RELU2) {
      y = choose(y < 0.0f, (vfloat){0}, y);
      y = y * y;
    } else if (a->activation == ACT_SILU) {
      y = silu(y);
    } else if (a->activation == ACT_SILU_AND_MUL) {
      vfloat up = load(up_tile, i, 0);
      if (a->bias) up += load_up_to(a->bias, a->num_columns + column + i, n - i, a->bias_bf16);
      y = silu(y) * up;
    }
    if (a->residual) y += load_up_to(a->residual, row + i, n - i, a->residual_bf16);
    store_up_to(a->out, row + i, n - i, a->bf16, y);
  }
}

// x . weight[row] for n <= TILE rows, whatever the form of the weight.
static void products(const LinearArguments *a, const float *x, int64_t x_stride, int64_t row, int64_t n,
                     float (*out)[TILE]) {
  if (a->scales) {
    const NF4Matrix weight = {a->weight, a->scales, (a->width + NF4_GROUP - 1) / NF4_GROUP, a->block};
    hayate_nf4_dot(x, &weight, row, n, *out, TILE, a->num_tokens);
    return;
  }
  const char *rows = (const char *)a->weight + row * a->width * (a->bf16 ? 2 : 4);
  const int64_t pairs = a->num_tokens > 1 || a->invariant;
  (a->bf16 ? dot_tile_bf16 : dot_tile_fp32)(x, x_stride, rows, a->width, n, out, a->num_tokens, pairs);
}

static void linear_columns(const LinearArguments *a, const float *x, int64_t x_stride, int64_t begin,
                           int64_t end) {
  float tile[MAX_TOKENS][TILE] = {0}, up[MAX_TOKENS][TILE] = {0};
  for (int64_t c = begin; c < end; c += TILE) {
    const int64_t n = end - c < TILE ? end - c : TILE;
    products(a, x, x_stride, c, n, tile);
    if (a->activation == ACT_SILU_AND_MUL) products(a, x, x_stride, a->num_columns + c, n, up);
    for (int64_t t = 0; t < a->num_tokens; t++) finish_tile(a, t, c, n, tile[t], up[t]);
  }
}

// residual + act(norm(x) weight^T + bias): x (T, D), weight (N, D), T <= MAX_TOKENS, everything contiguous.
static int64_t run_linear(const LinearArguments *a) {
  const int64_t whole = a->scales ? NF4_GROUP : W, stride = (a->width + whole - 1) / whole * whole;
  const int64_t padded = a->num_tokens <= 2 ? 2 : a->num_tokens <= 4 ? 4 : MAX_TOKENS;
  float *x = calloc(stride * padded, sizeof(float));
  for (int64_t t = 0; t < a->num_tokens; t++) {
    for (int64_t d = 0; d < a->width; d += W) {
      vfloat v = load_up_to(a->x, t * a->width + d, a->width - d, a->bf16);
      memcpy(x + t * stride + d, &v, sizeof v);
    }
    if (a->norm.kind != NORM_NONE) normalise(&a->norm, x + t * stride, a->width);
  }
  if (a->scales) {
    float *arranged = aligned_alloc(CACHE_LINE, stride * padded * sizeof(float));
    hayate_nf4_arrange(x, stride, a->num_tokens, arranged);
    free(x);
    x = arranged;
  }
  const int64_t blocks = (a->num_columns + 15) / 16;  // a thread's span starts at a multiple of 16 columns
  int64_t threads = a->num_columns * a->width < 32768 ? 1 : a->num_threads;
  if (threads > blocks) threads = blocks;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t i = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = blocks * i / team * 16;
    int64_t end = blocks * (i + 1) / team * 16;
    if (end > a->num_columns) end = a->num_columns;
    linear_columns(a, x, stride, begin, end);
  }
  free(x);
  return 0;
}

// ---- rope and cache -----------------------------------------------------------------------------------------

typedef struct {
  int64_t operation;
  const void *qkv;
  void *k_cache, *v_cache;
  const void *slots, *positions;
  const float *cos_sin;
  void *q_out;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, max_position;
  int64_t page_size, num_pages, k_page_stride, v_page_stride;  // strides in elements
  int64_t bf16, slots_int64, positions_int64, num_threads;
  int64_t q_norm_len, k_norm_len;  // the elements one normalisation spans: a head, or all heads
  double clip;                     // infinity: none
  Norm q_norm, k_norm;
} RopeArguments;

static int64_t integer_at(const void *p, int64_t i, int64_t is_int64) {
  return is_int64 ? ((const int64_t *)p)[i] : ((const int32_t *)p)[i];
}

static void normalise_heads(const Norm *norm, float *x, int64_t total, int64_t len, float *scratch) {
  if (norm->kind == NORM_NONE) return;
  for (int64_t i = 0; i < total; i += len) {
    for (int64_t d = len / W * W; d < len; d += W) memset(scratch + d, 0, 4 * W);
    memcpy(scratch, x + i, 4 * len);
    normalise(norm, scratch, len);
    memcpy(x + i, scratch, 4 * len);
  }
}

// Half-split rotation of the first 2 * half channels; cos_sin holds half cosines, then half sines.
static void rotate(float *restrict x, const float *restrict cos_sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half], c = cos_sin[i], s = cos_sin[i + half];
    x[i] = first * c - second * s;
    x[i + half] = second * c + first * s;
  }
}

static void store_row(void *p, int64_t offset, const float *x, int64_t n, int bf16) {
  for (int64_t i = 0; i < n; i += W) store_up_to(p, offset + i, n - i, bf16, load_up_to(x, i, n - i, 0));
}

static int64_t rope_token(const RopeArguments *a, int64_t t, float *x, float *scratch) {
  const int64_t q_len = a->num_heads * a->head_dim, kv_len = a->num_kv_heads * a->head_dim;
  const int64_t total = q_len + 2 * kv_len;
  const int64_t slot = integer_at(a->slots, t, a->slots_int64);
  const int64_t position = integer_at(a->positions, t, a->positions_int64);
  if (slot >= a->num_pages * a->page_size || position < 0 || position >= a->max_position) return 1;
  for (int64_t i = 0; i < total; i += W)
    store_up_to(x, i, total - i, 0, load_up_to(a->qkv, t * total + i, total - i, a->bf16));
  normalise_heads(&a->q_norm, x, q_len, a->q_norm_len, scratch);
  normalise_heads(&a->k_norm, x + q_len, kv_len, a->k_norm_len, scratch);
  const float clip = a->clip;
  if (clip < INFINITY) {
    for (int64_t i = 0; i < total; i++) {
      if (x[i] > clip) x[i] = clip;
      if (x[i] < -clip) x[i] = -clip;
    }
  }
  for (int64_t head = 0; head < a->num_heads + a->num_kv_heads; head++)
    rotate(x + head * a->head_dim, a->cos_sin + position * a->rotary_dim, a->rotary_dim / 2);
  store_row(a->q_out, t * q_len, x, q_len, a->bf16);
  if (slot >= 0) {
    const int64_t page = slot / a->page_size, row = slot % a->page_size * kv_len;
    store_row(a->k_cache, page * a->k_page_stride + row, x + q_len, kv_len, a->bf16);
    store_row(a->v_cache, page * a->v_page_stride + row, x + q_len + kv_len, kv_len, a->bf16);
  }
  return 0;
}

// QK-norm, clip, rotate, write keys and values to their slots; q_out (T, H, K) gets the queries.
static int64_t run_rope_and_cache(const RopeArguments *a) {
  const int64_t total = (a->num_heads + 2 * a->num_kv_heads) * a->head_dim;
  const int64_t threads = total * a->num_tokens < 8192 ? 1 : a->num_threads;
  int64_t bad = 0;
#pragma omp parallel num_threads(threads) reduction(| : bad) if (threads > 1)
  {
    float *x = malloc(sizeof(float) * (2 * total + 2 * W));
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->num_tokens; t++) bad |= rope_token(a, t, x, x + total + W);
    free(x);
  }
  return bad;
}

// ---- argmax -------------------------------------------------------------------------------------------------

typedef struct {
  int64_t operation;
  const void *x;
  int64_t *out;
  int64_t num_rows, width, bf16;
} ArgmaxArguments;

// Is `x` at index i a better answer than `best` at index j? The first NaN wins, then the largest, then the lowest
// index among equals.
static int better(float x, int64_t i, float best, int64_t j) {
  if (x != x || best != best) return x != x && (best == best || i < j);
  return x > best || (x == best && i < j);
}

INLINE int64_t argmax_row(const void *x, int64_t row, int64_t width, const int bf16) {
  vfloat best = load_up_to(x, row * width, width, bf16);
  vint best_vector = {0};  // lane l: best[l] is element W * best_vector[l] + l
  int64_t i = W;
  for (; i + W <= width; i += W) {
    vfloat v = load(x, row * width + i, bf16);
    vint wins = (v > best) | ((v != v) & (best == best));
    best = choose(wins, v, best);
    best_vector = (wins & (int32_t)(i / W)) | (~wins & best_vector);
  }
  float max = best[0];
  int64_t index = W * (int64_t)best_vector[0];
  for (int64_t lane = 1; lane < W && lane < width; lane++) {
    const int64_t at = W * (int64_t)best_vector[lane] + lane;
    if (better(best[lane], at, max, index)) max = best[lane], index = at;
  }
  for (; i < width; i++) {
    const float v = load_part(x, row * width + i, 1, bf16)[0];
    if (better(v, i, max, index)) max = v, index = i;
  }
  return index;
}

// The index (lowest among equals) of each row's largest element, or of its first NaN.
static int64_t run_argmax(const ArgmaxArguments *a) {
  for (int64_t row = 0; row < a->num_rows; row++)
    a->out[row] = a->bf16 ? argmax_row(a->x, row, a->width, 1) : argmax_row(a->x, row, a->width, 0);
  return 0;
}

// ---- embedding ----------------------------------------------------------------------------------------------

typedef struct {
  int64_t operation;
  const void *token_ids, *weight;
  void *out;
  int64_t num_tokens, num_rows, row_bytes, token_ids_int64;
} EmbeddingArguments;

static int64_t run_embedding(const EmbeddingArguments *a) {
  for (int64_t t = 0; t < a->num_tokens; t++) {
    const int64_t row = integer_at(a->token_ids, t, a->token_ids_int64);
    if (row < 0 || row >= a->num_rows) return 1;
    memcpy((char *)a->out + t * a->row_bytes, (const char *)a->weight + row * a->row_bytes, a->row_bytes);
  }
  return 0;
}

// ---- entry --------------------------------------------------------------------------------------------------

enum { LINEAR, ROPE_AND_CACHE, ATTENTION, ARGMAX, EMBEDDING, NF4_DEQUANTIZE };

int64_t hayate_attention(const void *arguments);  // of cpu_attention.c
extern const int64_t hayate_attention_size;

// Runs the calls laid end to end in `length` bytes; returns 0, or the first call's failure.
int64_t hayate_run(const char *calls, int64_t length) {
  for (const char *end = calls + length; calls < end;) {
    int64_t failed = 0;
    switch (*(const int64_t *)calls) {
#define CASE(name, type, run)             \
  case name:                              \
    failed = run((const type *)calls);    \
    calls += sizeof(type);                \
    break;
      CASE(LINEAR, LinearArguments, run_linear)
      CASE(ROPE_AND_CACHE, RopeArguments, run_rope_and_cache)
      case ATTENTION:
        failed = hayate_attention(calls);
        calls += hayate_attention_size;
        break;
      CASE(ARGMAX, ArgmaxArguments, run_argmax)
      CASE(EMBEDDING, EmbeddingArguments, run_embedding)
      CASE(NF4_DEQUANTIZE, NF4DequantizeArguments, hayate_nf4_dequantize)
#undef CASE
      default: return 2;
    }
    if (failed) return failed;
  }
  return 0;
}
