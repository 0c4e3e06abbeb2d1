// Products with matrices in NF4, decoded in registers; see cpu_nf4.h.
//
// Lane l = 4 t + r of the 16 integers of a group holds, in bits 4 j .. 4 j + 3, the code of column
// 32 r + 16 (j / 4) + 4 t + j % 4. So a shift puts one code of every lane where a table lookup takes it, and
// instead of the weights it is x that is brought into order, once a call. A lane's eight columns lie in the
// halves j < 4 and j >= 4 of the 32 columns from 32 r on, each with one scale, which multiplies the half's sum.

#include <string.h>

#include "cpu_nf4.h"
#include "cpu_vectors.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

enum {
  PREFETCH_BYTES = 4096,  // bytes of codes ahead of the reader
  VECTORS = 16 / W,       // of the lanes of a group
  TOKENS_AT_ONCE = 4,
  ROWS_AT_ONCE = W == 16 ? 2 : 1,  // of several tokens, by the number of vector registers
};

// bitsandbytes' constants, as in nf4_weight.py.
static const float CODEBOOK[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

// ---- decoding -----------------------------------------------------------------------------------------------

// CODEBOOK[bits 4 j .. 4 j + 3 of codes], j a constant.
INLINE vfloat decode(vuint codes, const int j) {
#if W == 16
  return _mm512_permutexvar_ps((__m512i)(codes >> 4 * j), (__m512)load(CODEBOOK, 0, 0));
#elif defined(__AVX2__)  // two tables of eight, chosen by a code's first bit
  const __m256i index = (__m256i)(codes >> 4 * j), high = (__m256i)(codes << (28 - 4 * j));
  const __m256 below = _mm256_permutevar8x32_ps((__m256)load(CODEBOOK, 0, 0), index);
  const __m256 above = _mm256_permutevar8x32_ps((__m256)load(CODEBOOK, 8, 0), index);
  return (vfloat)_mm256_blendv_ps(below, above, (__m256)high);
#else
  vfloat values = {0};
  UNROLL for (int l = 0; l < W; l++) values[l] = CODEBOOK[codes[l] >> 4 * j & 15];
  return values;
#endif
}

// The four scales of q for the lanes r of each quarter of a vector.
INLINE vfloat repeat(vquad q) {
#if W == 16
  return (vfloat)_mm512_broadcast_f32x4((__m128)q);
#elif W == 8
  return (vfloat){q[0], q[1], q[2], q[3], q[0], q[1], q[2], q[3]};
#else
  return q;
#endif
}

// repeat of s[0], s[0], s[1], s[1].
INLINE vfloat repeat_two(const float *s) {
#if defined(__AVX__)
  double both;
  memcpy(&both, s, sizeof both);
#if W == 16
  return (vfloat)_mm512_permute_ps(_mm512_castpd_ps(_mm512_set1_pd(both)), 0x50);
#else
  return (vfloat)_mm256_permute_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), 0x50);
#endif
#else
  return repeat((vquad){s[0], s[0], s[1], s[1]});
#endif
}

// The scales s of a group for the two halves of each lane.
INLINE void find_scales(const float *s, int64_t block, vfloat *halves) {
  if (block == 16) {
    halves[0] = repeat((vquad){s[0], s[2], s[4], s[6]});
    halves[1] = repeat((vquad){s[1], s[3], s[5], s[7]});
  } else {
    halves[0] = halves[1] = block == 64 ? repeat_two(s) : repeat((vquad){s[0], s[1], s[2], s[3]});
  }
}

// ---- products -----------------------------------------------------------------------------------------------

// Tokens of one pass over the weight, of which `rest` remain.
static int64_t tokens_of_pass(int64_t rest) { return rest > 2 ? TOKENS_AT_ONCE : rest; }

void hayate_nf4_arrange(const float *x, int64_t stride, int64_t num_tokens, float *arranged) {
  for (int64_t first = 0; first < num_tokens; first += TOKENS_AT_ONCE) {
    const int64_t tokens = tokens_of_pass(num_tokens - first);
    for (int64_t t = 0; t < tokens; t++) {
      const float *from = x + (first + t) * stride;
      float *to = arranged + first * stride + t * W;
      for (int64_t i = 0; i < stride; i += W, to += tokens * W) {  // vector i / W of the row holds (v, j)
        const int64_t group = i / NF4_GROUP * NF4_GROUP, v = i % NF4_GROUP / W / 8, j = i / W % 8;
        for (int64_t l = v * W; l < (v + 1) * W; l++)
          to[l - v * W] = from[group + 32 * (l % 4) + 16 * (j / 4) + l / 4 * 4 + j % 4];
      }
    }
  }
}

// out[t * out_stride + r] = x[t] . row[r]; `rows` and `tokens` are constants.
INLINE void dot_rows(const float *x, const NF4Matrix *weight, int64_t row, float *out, int64_t out_stride,
                     const int rows, const int tokens) {
  const int64_t groups = weight->groups, block = weight->block, num_scales = NF4_GROUP / block;
  const uint8_t *codes = weight->codes + row * groups * NF4_GROUP_BYTES;
  const float *scales = weight->scales + row * groups * num_scales;
  vfloat acc[ROWS_AT_ONCE][TOKENS_AT_ONCE] = {0};
  for (int64_t g = 0; g < groups; g++, codes += NF4_GROUP_BYTES, scales += num_scales) {
    vfloat scale[ROWS_AT_ONCE][2];
    UNROLL for (int r = 0; r < rows; r++) {
      __builtin_prefetch(codes + r * groups * NF4_GROUP_BYTES + PREFETCH_BYTES, 0, 2);
      find_scales(scales + r * groups * num_scales, block, scale[r]);
    }
    UNROLL for (int v = 0; v < VECTORS; v++, x += 8 * tokens * W) {
      vuint lanes[ROWS_AT_ONCE];
      UNROLL for (int r = 0; r < rows; r++)
        memcpy(&lanes[r], codes + r * groups * NF4_GROUP_BYTES + v * sizeof *lanes, sizeof *lanes);
      UNROLL for (int half = 0; half < 2; half++) {
        vfloat part[ROWS_AT_ONCE][TOKENS_AT_ONCE] = {0};
        UNROLL for (int j = 4 * half; j < 4 * half + 4; j++) {
          vfloat w[ROWS_AT_ONCE];
          UNROLL for (int r = 0; r < rows; r++) w[r] = decode(lanes[r], j);
          UNROLL for (int t = 0; t < tokens; t++) {
            const vfloat xt = load(x, (j * tokens + t) * W, 0);
            UNROLL for (int r = 0; r < rows; r++) part[r][t] += w[r] * xt;
          }
        }
        UNROLL for (int r = 0; r < rows; r++) {
          UNROLL for (int t = 0; t < tokens; t++) acc[r][t] += part[r][t] * scale[r][half];
        }
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int t = 0; t < tokens; t++) out[t * out_stride + r] = sum(acc[r][t]);
  }
}

void hayate_nf4_dot(const float *arranged, const NF4Matrix *weight, int64_t row, int64_t n, float *out,
                    int64_t out_stride, int64_t num_tokens) {
  for (int64_t t = 0; t < num_tokens; t += TOKENS_AT_ONCE) {
    const int64_t tokens = tokens_of_pass(num_tokens - t);
    const float *x = arranged + t * weight->groups * NF4_GROUP;
    float *to = out + t * out_stride;
    int64_t r = 0;
    for (; tokens > 1 && r + ROWS_AT_ONCE <= n; r += ROWS_AT_ONCE) {
      if (tokens == 2) dot_rows(x, weight, row + r, to + r, out_stride, ROWS_AT_ONCE, 2);
      else dot_rows(x, weight, row + r, to + r, out_stride, ROWS_AT_ONCE, TOKENS_AT_ONCE);
    }
    for (; r < n; r++) {
      if (tokens == 1) dot_rows(x, weight, row + r, to + r, out_stride, 1, 1);
      else if (tokens == 2) dot_rows(x, weight, row + r, to + r, out_stride, 1, 2);
      else dot_rows(x, weight, row + r, to + r, out_stride, 1, TOKENS_AT_ONCE);
    }
  }
}

// ---- the whole matrix ---------------------------------------------------------------------------------------

// The values of a byte's two codes, the low half's first.
typedef struct {
  float values[2];
} Pair;

INLINE void dequantize_group(const Pair *pairs, const uint8_t *codes, const float *scales, int64_t block,
                             void *out, int64_t at, int64_t n, const int bf16) {
  float values[NF4_GROUP];
  for (int t = 0; t < 4; t++) {
    for (int r = 0; r < 4; r++) {
      for (int p = 0; p < 4; p++)
        memcpy(values + 32 * r + p / 2 * 16 + 4 * t + p % 2 * 2, &pairs[*codes++], sizeof(Pair));
    }
  }
  for (int64_t i = 0; i < n && i < NF4_GROUP; i += W)
    store_up_to(out, at + i, n - i, bf16, load(values, i, 0) * scales[i >> __builtin_ctzll(block)]);
}

INLINE void dequantize_row(const NF4DequantizeArguments *a, const Pair *pairs, int64_t row, const int bf16) {
  const int64_t groups = (a->width + NF4_GROUP - 1) / NF4_GROUP, per_group = NF4_GROUP / a->block;
  for (int64_t g = row * groups; g < (row + 1) * groups; g++) {
    const int64_t column = (g - row * groups) * NF4_GROUP;
    dequantize_group(pairs, (const uint8_t *)a->codes + g * NF4_GROUP_BYTES, (const float *)a->scales + g * per_group,
                     a->block, a->out, row * a->width + column, a->width - column, bf16);
  }
}

int64_t hayate_nf4_dequantize(const NF4DequantizeArguments *a) {
  Pair pairs[256];
  for (int byte = 0; byte < 256; byte++) pairs[byte] = (Pair){{CODEBOOK[byte & 15], CODEBOOK[byte >> 4]}};
  const int64_t threads = a->num_rows * a->width < 32768 ? 1 : a->num_threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < a->num_rows; row++) {
    if (a->bf16) dequantize_row(a, pairs, row, 1);
    else dequantize_row(a, pairs, row, 0);
  }
  return 0;
}
