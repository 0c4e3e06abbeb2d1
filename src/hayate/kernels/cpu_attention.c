// Causal attention over paged keys for a few queries a sequence; see cpu.c.
//
// A range of keys is taken block by block for all heads, so that the caches are read in one stream, with the
// softmax of Milakov and Gimelshein (arXiv 1805.02867): a running maximum, and sums rescaled when it rises.

#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "cpu_vectors.h"

enum {
  HEADS_AT_ONCE = 4,  // query heads that share one pass over the keys
  KEYS = 64,          // keys of one block
  SPAN = 512,         // keys of a range when a token's sums may not depend on the other tokens
  TOKENS = 256,       // whose partial sums are kept at a time
  MAX_HEAD_DIM = 256,
};

typedef struct {
  int64_t operation;
  const void *q, *k_cache, *v_cache;
  const int32_t *page_table, *cu_seqlens_q, *seq_lens;
  void *out;
  int64_t num_tokens, num_sequences, num_heads, num_kv_heads, head_dim;
  int64_t page_size, num_pages, pages_per_sequence;
  int64_t page_table_stride, k_page_stride, v_page_stride;  // in elements
  int64_t window;                                           // 0: none
  int64_t bf16, num_threads;
  int64_t invariant;  // the ranges of a token's keys do not depend on the other tokens
  double scale;
} AttentionArguments;

const int64_t hayate_attention_size = sizeof(AttentionArguments);

// What a pass over some keys leaves of each head h:
// total[h] = sum_j e^(score_hj - max[h]) and out[h] = sum_j e^(score_hj - max[h]) v_j.
typedef struct {
  float *max, *total;  // (H,)
  float *out, *q;      // (H, stride); q is the scaled query
  int64_t stride;      // the head width in whole vectors
} Partial;

static int64_t partial_size(const AttentionArguments *a) {
  return a->num_heads * (2 + 2 * ((a->head_dim + W - 1) / W * W));
}

static Partial partial_at(const AttentionArguments *a, float *memory, int64_t i) {
  const int64_t stride = (a->head_dim + W - 1) / W * W;
  float *p = memory + i * partial_size(a);
  return (Partial){p, p + a->num_heads, p + 2 * a->num_heads, p + (2 + stride) * a->num_heads, stride};
}

static int64_t block_size(int64_t begin, int64_t end) {
  return begin >= end ? 0 : end - begin < KEYS ? end - begin : KEYS;
}

// The element offsets of keys [begin, begin + n) within the caches, which are fetched into L2; 1 if one has no
// page.
static int64_t find_keys(const AttentionArguments *a, int64_t sequence, int64_t begin, int64_t n, int64_t *k_at,
                         int64_t *v_at) {
  const int32_t *pages = a->page_table + sequence * a->page_table_stride;
  const int64_t row = a->num_kv_heads * a->head_dim, size = a->bf16 ? 2 : 4;
  int64_t index = begin / a->page_size, offset = begin % a->page_size;
  for (int64_t j = 0; j < n; j++) {
    if (index >= a->pages_per_sequence || pages[index] < 0 || pages[index] >= a->num_pages) return 1;
    k_at[j] = pages[index] * a->k_page_stride + offset * row;
    v_at[j] = pages[index] * a->v_page_stride + offset * row;
    for (int64_t at = 0; at < row * size; at += CACHE_LINE) {
      __builtin_prefetch((const char *)a->k_cache + k_at[j] * size + at, 0, 2);
      __builtin_prefetch((const char *)a->v_cache + v_at[j] * size + at, 0, 2);
    }
    if (++offset == a->page_size) offset = 0, index++;
  }
  return 0;
}

// Turns n scores into e^(score - max), having raised the maximum, and rescales what was summed before.
static void softmax_step(const Partial *p, int64_t head, float *scores, int64_t n) {
  const int64_t padded = (n + W - 1) / W * W;
  for (int64_t j = n; j < padded; j++) scores[j] = -INFINITY;
  vfloat maxima = broadcast(p->max[head]), total = {0};
  for (int64_t j = 0; j < padded; j += W) maxima = choose(load(scores, j, 0) > maxima, load(scores, j, 0), maxima);
  float max = maxima[0];
  for (int l = 1; l < W; l++) max = maxima[l] > max ? maxima[l] : max;
  for (int64_t j = 0; j < padded; j += W) {
    vfloat score = load(scores, j, 0);
    vfloat weight = choose(score == -INFINITY, (vfloat){0}, exponential(score - max));
    total += weight;
    memcpy(scores + j, &weight, sizeof weight);
  }
  const float rescale = expf(p->max[head] - max);
  p->max[head] = max;
  p->total[head] = p->total[head] * rescale + sum(total);
  for (int64_t d = head * p->stride; d < (head + 1) * p->stride; d += W) {
    vfloat out = load(p->out, d, 0) * rescale;
    memcpy(p->out + d, &out, sizeof out);
  }
}

// scores[h][j] = q[h] . k[j] for n <= KEYS keys and `heads` (a constant) query heads of one kv head.
INLINE void score_keys(const Partial *p, int64_t head, const void *k_cache, const int64_t *k_at, int64_t channel,
                       int64_t n, int64_t head_dim, float (*scores)[KEYS], const int heads, const int bf16) {
  const float *q = p->q + head * p->stride;
  vquad folded[HEADS_AT_ONCE][KEYS];  // summing all keys' lanes at the end takes half the time
  for (int64_t j = 0; j < n; j++) {
    const int64_t at = k_at[j] + channel;
    vfloat acc[HEADS_AT_ONCE] = {0};
    int64_t d = 0;
    for (; d + W <= head_dim; d += W) {
      vfloat k = load(k_cache, at + d, bf16);
      UNROLL for (int h = 0; h < heads; h++) acc[h] += k * load(q + h * p->stride, d, 0);
    }
    if (d < head_dim) {
      vfloat k = load_part(k_cache, at + d, head_dim - d, bf16);
      UNROLL for (int h = 0; h < heads; h++) acc[h] += k * load(q + h * p->stride, d, 0);
    }
    UNROLL for (int h = 0; h < heads; h++) folded[h][j] = fold(acc[h]);
  }
  for (int h = 0; h < heads; h++) {
    const float *parts = (const float *)folded[h];
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
      scores[h][j] = (parts[4 * j] + parts[4 * j + 2]) + (parts[4 * j + 1] + parts[4 * j + 3]);
  }
}

// out[h] += sum_j weights[h][j] v[j] for channels [d, d + vectors * W), `heads` and `vectors` constants; the last
// vector may be a part.
INLINE void add_values(const Partial *p, int64_t head, const void *v_cache, const int64_t *v_at, int64_t channel,
                       int64_t n, int64_t d, int64_t head_dim, float (*weights)[KEYS], const int heads,
                       const int vectors, const int bf16) {
  float *out = p->out + head * p->stride + d;
  vfloat acc[HEADS_AT_ONCE][2];
  UNROLL for (int h = 0; h < heads; h++) {
    UNROLL for (int i = 0; i < vectors; i++) acc[h][i] = load(out + h * p->stride, i * W, 0);
  }
  for (int64_t j = 0; j < n; j++) {
    UNROLL for (int i = 0; i < vectors; i++) {
      const int64_t at = v_at[j] + channel + d + i * W;
      vfloat v = vectors == 1 ? load_up_to(v_cache, at, head_dim - d, bf16) : load(v_cache, at, bf16);
      UNROLL for (int h = 0; h < heads; h++) acc[h][i] += weights[h][j] * v;
    }
  }
  UNROLL for (int h = 0; h < heads; h++) {
    UNROLL for (int i = 0; i < vectors; i++) memcpy(out + h * p->stride + i * W, &acc[h][i], sizeof acc[h][i]);
  }
}

// One online-softmax step over n <= KEYS keys for `heads` (a constant) query heads of one kv head.
INLINE void attend_keys(const AttentionArguments *a, const Partial *p, int64_t head, const int64_t *k_at,
                        const int64_t *v_at, int64_t n, const int heads, const int bf16) {
  const int64_t head_dim = a->head_dim, channel = head / (a->num_heads / a->num_kv_heads) * head_dim;
  float scores[HEADS_AT_ONCE][KEYS];
  score_keys(p, head, a->k_cache, k_at, channel, n, head_dim, scores, heads, bf16);
  for (int h = 0; h < heads; h++) softmax_step(p, head + h, scores[h], n);
  int64_t d = 0;
  for (; d + 2 * W <= head_dim; d += 2 * W)
    add_values(p, head, a->v_cache, v_at, channel, n, d, head_dim, scores, heads, 2, bf16);
  for (; d < head_dim; d += W)
    add_values(p, head, a->v_cache, v_at, channel, n, d, head_dim, scores, heads, 1, bf16);
}

static void attend_heads(const AttentionArguments *a, const Partial *p, int64_t head, int64_t heads,
                         const int64_t *k_at, const int64_t *v_at, int64_t n) {
#define CASE(count)                                                        \
  case count:                                                              \
    if (a->bf16) attend_keys(a, p, head, k_at, v_at, n, count, 1);         \
    else attend_keys(a, p, head, k_at, v_at, n, count, 0);                 \
    break;
  switch (heads) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
}

// All heads of one token over keys [begin, end), block by block, the next one on its way from memory meanwhile.
static int64_t attend(const AttentionArguments *a, int64_t sequence, int64_t token, int64_t begin, int64_t end,
                      const Partial *p) {
  const int64_t group = a->num_heads / a->num_kv_heads;
  int64_t k_at[2][KEYS], v_at[2][KEYS];  // of this block and of the next
  for (int64_t h = 0; h < a->num_heads; h++) {
    p->max[h] = -INFINITY;
    p->total[h] = 0;
    memset(p->out + h * p->stride, 0, sizeof(float) * p->stride);
    for (int64_t d = 0; d < a->head_dim; d += W) {
      const int64_t at = (token * a->num_heads + h) * a->head_dim + d;
      vfloat q = load_up_to(a->q, at, a->head_dim - d, a->bf16) * (float)a->scale;
      memcpy(p->q + h * p->stride + d, &q, sizeof q);
    }
  }
  int64_t n = block_size(begin, end);
  if (find_keys(a, sequence, begin, n, k_at[0], v_at[0])) return 1;
  for (int64_t j = begin, turn = 0; n > 0; j += KEYS, turn ^= 1) {
    const int64_t next = block_size(j + KEYS, end);
    if (find_keys(a, sequence, j + KEYS, next, k_at[turn ^ 1], v_at[turn ^ 1])) return 1;
    for (int64_t first = 0; first < a->num_heads; first += group) {
      for (int64_t h = 0; h < group; h += HEADS_AT_ONCE) {
        const int64_t heads = group - h < HEADS_AT_ONCE ? group - h : HEADS_AT_ONCE;
        attend_heads(a, p, first + h, heads, k_at[turn], v_at[turn], n);
      }
    }
    n = next;
  }
  return 0;
}

// Joins what n ranges of keys left of one head into its output row; those of the token begin at `first`.
static void merge(const AttentionArguments *a, int64_t token, int64_t head, float *partials, int64_t first,
                  int64_t n) {
  float max = -INFINITY, total = 0;
  vfloat out[MAX_HEAD_DIM / W] = {0};
  for (int64_t i = first; i < first + n; i++) {
    const float other = partial_at(a, partials, i).max[head];
    max = other > max ? other : max;
  }
  for (int64_t i = first; i < first + n; i++) {
    const Partial p = partial_at(a, partials, i);
    if (p.total[head] == 0) continue;  // an empty range: its maximum is -infinity
    const float weight = expf(p.max[head] - max);
    total += weight * p.total[head];
    for (int64_t d = 0; d < p.stride; d += W) out[d / W] += weight * load(p.out + head * p.stride, d, 0);
  }
  const float scale = total == 0 ? 0 : 1 / total;
  for (int64_t d = 0; d < a->head_dim; d += W) {
    const int64_t at = (token * a->num_heads + head) * a->head_dim + d;
    store_up_to(a->out, at, a->head_dim - d, a->bf16, out[d / W] * scale);
  }
}

// Causal attention over paged keys, a few queries a sequence. The work is cut by token and range of keys; the
// ranges of a token are joined after a barrier.
int64_t hayate_attention(const void *arguments) {
  const AttentionArguments *a = arguments;
  int32_t *sequence_of = malloc(sizeof(int32_t) * (a->num_tokens + 1));
  for (int64_t t = 0; t < a->num_tokens; t++) sequence_of[t] = -1;  // padding
  int64_t longest = 1;
  for (int64_t s = 0; s < a->num_sequences; s++) {
    for (int64_t t = a->cu_seqlens_q[s]; t < a->cu_seqlens_q[s + 1] && t < a->num_tokens; t++) sequence_of[t] = s;
    if (a->seq_lens[s] > longest) longest = a->seq_lens[s];
  }
  if (a->window > 0 && a->window < longest) longest = a->window;
  const int64_t work = a->num_tokens * longest * a->num_heads * a->head_dim;
  const int64_t threads = work < 32768 ? 1 : a->num_threads, most = (longest + KEYS - 1) / KEYS;
  int64_t splits = threads == 1 ? 1 : (4 * threads + a->num_tokens - 1) / a->num_tokens;
  if (splits > most) splits = most;
  if (a->invariant) splits = (longest + SPAN - 1) / SPAN;
  const int64_t room = a->num_tokens < TOKENS ? a->num_tokens : TOKENS;
  float *partials = malloc(sizeof(float) * partial_size(a) * room * splits);
  int64_t bad = 0;
  for (int64_t first = 0; first < a->num_tokens; first += TOKENS) {
    const int64_t tokens = a->num_tokens - first < TOKENS ? a->num_tokens - first : TOKENS;
#pragma omp parallel num_threads(threads) reduction(| : bad) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < tokens * splits; i++) {
        const int64_t token = first + i / splits, sequence = sequence_of[token];
        const Partial p = partial_at(a, partials, i);
        int64_t begin = 0, end = 0;
        if (sequence >= 0) {
          const int64_t keys_end = a->seq_lens[sequence] - (a->cu_seqlens_q[sequence + 1] - token) + 1;
          const int64_t start = a->window > 0 && keys_end > a->window ? keys_end - a->window : 0;
          int64_t span = ((keys_end - start + splits - 1) / splits + KEYS - 1) / KEYS * KEYS;
          if (a->invariant) span = SPAN;
          begin = start + i % splits * span;
          end = begin + span < keys_end ? begin + span : keys_end;
        }
        bad |= attend(a, sequence, token, begin, end, &p);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tokens * a->num_heads; i++) {
        const int64_t token = i / a->num_heads;
        merge(a, first + token, i % a->num_heads, partials, token * splits, splits);
      }
    }
  }
  free(sequence_of);
  free(partials);
  return bad;
}
