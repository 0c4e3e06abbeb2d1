// Training on the CPU: what stands between the matrix products, each operation in one pass over memory. PyTorch
// takes a pass an elementwise operation; at a few hundred tokens a step that was half of the step's time.
//
// fp32, contiguous. Rows are shared out among threads and no sum crosses a thread's rows, so that the number of
// threads changes no bit. The formulas stand in kernels/training, beside the reference of each operation.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu_vectors.h"

enum {
  SERIAL = 1 << 15,     // elements below which one thread is faster than a team
  LANES = 4 * W,        // of a sum, in four vectors
  IGNORE = -100,        // the target of a token that predicts nothing
};

#define ROWS(n, width) _Pragma_(omp parallel for num_threads(threads) if (threads > 1 && (n) * (width) > SERIAL))
#define _Pragma_(x) _Pragma(#x)

INLINE vfloat at(const float *p, int64_t i, int64_t n) { return load_up_to(p, i, n - i, 0); }
INLINE void put(float *p, int64_t i, int64_t n, vfloat x) { store_up_to(p, i, n - i, 0, x); }

// ---- AdamW --------------------------------------------------------------------------------------------------

void hayate_adamw(float *w, const float *gradient, float *first, float *second, int64_t n, const float *grad_scale,
                  double beta1, double beta2, double eps, double keep, double step_size, double unbias,
                  int64_t threads) {
  const float scale = grad_scale ? *grad_scale : 1.0f, to_first = 1 - beta1, to_second = 1 - beta2;
  const float b2 = beta2, k = keep, step = step_size, u = unbias, e = eps;
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1 && n > SERIAL)
  for (int64_t i = 0; i < n; i++) {
    const float g = gradient[i] * scale;
    const float m = first[i] + to_first * (g - first[i]);
    const float v = b2 * second[i] + to_second * g * g;
    first[i] = m;
    second[i] = v;
    w[i] = k * w[i] - step * m / (sqrtf(v) * u + e);
  }
}

// ---- cross-entropy ------------------------------------------------------------------------------------------

INLINE vfloat larger(vfloat a, vfloat b) { return choose(a < b, b, a); }

// The largest element; a NaN may be passed over, the sum of exponentials finds it.
static float row_max(const float *z, int64_t n) {
  vfloat top[4];
  UNROLL for (int j = 0; j < 4; j++) top[j] = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    UNROLL for (int j = 0; j < 4; j++) top[j] = larger(top[j], load(z, i + j * W, 0));
  const vfloat all = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  float max = -INFINITY;
  for (int j = 0; j < W; j++) max = all[j] > max ? all[j] : max;
  for (; i < n; i++) max = z[i] > max ? z[i] : max;
  return max;
}

// The sum of e^(z - top); the terms are left in z if `keep`.
static float exponentials(float *z, int64_t n, float top, int64_t keep) {
  vfloat total[2] = {{0}, {0}};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    UNROLL for (int j = 0; j < 2; j++) {
      const vfloat e = exponential(load(z, i + j * W, 0) - top);
      total[j] += e;
      if (keep) put(z, i + j * W, n, e);
    }
  }
  float result = sum(total[0] + total[1]);
  for (; i < n; i++) {
    const vfloat e = exponential(broadcast(z[i] - top));
    result += e[0];
    if (keep) z[i] = e[0];
  }
  return result;
}

// loss[row] = log sum e^z - z[target]; with `keep` z becomes softmax(z) - one at the target, and zeros where
// there is no target. Returns 1 when a target is out of its range.
int64_t hayate_cross_entropy(float *logits, const int64_t *targets, float *loss, int64_t rows, int64_t width,
                             int64_t keep, int64_t threads) {
  for (int64_t r = 0; r < rows; r++)
    if (targets[r] != IGNORE && (targets[r] < 0 || targets[r] >= width)) return 1;
  ROWS(rows, width)
  for (int64_t r = 0; r < rows; r++) {
    float *z = logits + r * width;
    const int64_t target = targets[r];
    if (target == IGNORE) {
      loss[r] = 0;
      if (keep) memset(z, 0, 4 * width);
      continue;
    }
    const float top = row_max(z, width), at_target = z[target];
    const float total = exponentials(z, width, top, keep);
    loss[r] = logf(total) + (top - at_target);
    if (!keep) continue;
    const float factor = 1.0f / total;
    for (int64_t i = 0; i < width; i += W) put(z, i, width, at(z, i, width) * factor);
    z[target] -= 1.0f;
  }
  return 0;
}

// ---- SwiGLU -------------------------------------------------------------------------------------------------

// out = silu(gate) up of h (rows, 2 F) = [gate, up].
void hayate_swiglu(const float *h, float *out, int64_t rows, int64_t width, int64_t threads) {
  ROWS(rows, width)
  for (int64_t r = 0; r < rows; r++) {
    const float *gate = h + 2 * r * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += W)
      put(out + r * width, i, width, silu(at(gate, i, width)) * at(up, i, width));
  }
}

// With weights, by the routed row order[r]: dweights = g . act, dh of w g, and w act in the place of g.
void hayate_swiglu_backward(const float *h, float *g, const int64_t *order, const float *weights, float *dh,
                            float *dweights, int64_t rows, int64_t width, int64_t threads) {
  ROWS(rows, width)
  for (int64_t r = 0; r < rows; r++) {
    const float *gate = h + 2 * r * width, *up = gate + width;
    float *dgate = dh + 2 * r * width, *dup = dgate + width, *gr = g + r * width;
    const float weight = weights ? weights[order[r]] : 1.0f;
    vfloat dot = {0};
    for (int64_t i = 0; i < width; i += W) {
      const vfloat x = at(gate, i, width), u = at(up, i, width), y = at(gr, i, width);
      const vfloat s = 1.0f / (1.0f + exponential(-x)), z = x * s, act = z * u, wy = weight * y;
      dot += y * act;  // beyond the row all are zero
      put(dgate, i, width, wy * u * (s + z * (1.0f - s)));
      put(dup, i, width, wy * z);
      if (weights) put(gr, i, width, weight * act);
    }
    if (weights) dweights[order[r]] = sum(dot);
  }
}

// ---- experts ------------------------------------------------------------------------------------------------

// out[t] = sum_a weights[t, a] y[place[t, a]]; weights may be null: ones.
void hayate_combine_rows(const float *y, const int64_t *place, const float *weights, float *out, int64_t tokens,
                         int64_t active, int64_t width, int64_t threads) {
  ROWS(tokens, width)
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t i = 0; i < width; i += W) {
      vfloat total = {0};
      for (int64_t a = t * active; a < (t + 1) * active; a++) {
        const vfloat row = at(y + place[a] * width, i, width);
        total += weights ? weights[a] * row : row;
      }
      put(out + t * width, i, width, total);
    }
  }
}

// ---- RMS norm -----------------------------------------------------------------------------------------------

static float scale_of(const float *x, int64_t n, float eps) {
  vfloat squares = {0};
  for (int64_t i = 0; i < n; i += W) squares += at(x, i, n) * at(x, i, n);
  return 1.0f / sqrtf(sum(squares) / n + eps);
}

void hayate_rmsnorm(const float *x, const float *weight, float *out, int64_t rows, int64_t width, double eps,
                    int64_t threads) {
  ROWS(rows, width)
  for (int64_t r = 0; r < rows; r++) {
    const float *xr = x + r * width, s = scale_of(xr, width, eps);
    for (int64_t i = 0; i < width; i += W) put(out + r * width, i, width, at(xr, i, width) * s * at(weight, i, width));
  }
}

// dx, and the gradient of the weight from each block of `block` rows: dweight (blocks, width).
void hayate_rmsnorm_backward(const float *x, const float *dy, const float *weight, float *dx, float *dweight,
                             int64_t rows, int64_t block, int64_t width, double eps, int64_t threads) {
  ROWS(rows, width)
  for (int64_t b = 0; b < (rows + block - 1) / block; b++) {
    float *sums = dweight + b * width;
    memset(sums, 0, 4 * width);
    for (int64_t r = b * block; r < rows && r < (b + 1) * block; r++) {
      const float *xr = x + r * width, *dyr = dy + r * width, s = scale_of(xr, width, eps);
      vfloat dot = {0};
      for (int64_t i = 0; i < width; i += W) dot += at(dyr, i, width) * at(weight, i, width) * at(xr, i, width);
      const float pull = sum(dot) * s * s / width;
      for (int64_t i = 0; i < width; i += W) {
        const vfloat xi = at(xr, i, width), dyi = at(dyr, i, width);
        put(dx + r * width, i, width, (dyi * at(weight, i, width) - xi * pull) * s);
        put(sums, i, width, at(sums, i, width) + dyi * xi * s);
      }
    }
  }
}

// ---- heads --------------------------------------------------------------------------------------------------

// `count` heads of `dim` elements, the first 2 `half` of them turned by the angle of `cos_sin` times `sign`.
static void turn(const float *x, float *out, int64_t count, int64_t dim, int64_t half, const float *cos_sin,
                 float sign) {
  for (int64_t head = 0; head < count; head++, x += dim, out += dim) {
    for (int64_t i = 0; i < half; i += W) {
      const vfloat a = at(x, i, half), b = at(x + half, i, half);
      const vfloat c = at(cos_sin, i, half), s = at(cos_sin + half, i, half) * sign;
      put(out, i, half, a * c - b * s);
      put(out + half, i, half, b * c + a * s);
    }
    memcpy(out + 2 * half, x + 2 * half, 4 * (dim - 2 * half));
  }
}

// Splits qkv (T, (H + 2G) K) into q, k and v and turns q and k; backward, the reverse. Returns 1 when a position is
// out of its range.
int64_t hayate_split_heads(float *qkv, float *q, float *k, float *v, const int64_t *positions, const float *cos_sin,
                           int64_t tokens, int64_t num_positions, int64_t num_heads, int64_t num_kv_heads, int64_t dim,
                           int64_t half, int64_t backward, int64_t threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (positions[t] < 0 || positions[t] >= num_positions) return 1;
  const int64_t q_width = num_heads * dim, kv_width = num_kv_heads * dim, width = q_width + 2 * kv_width;
  ROWS(tokens, width)
  for (int64_t t = 0; t < tokens; t++) {
    const float *angle = cos_sin + positions[t] * 2 * half;
    float *row = qkv + t * width, *key = row + q_width, *value = key + kv_width;
    float *qt = q + t * q_width, *kt = k + t * kv_width, *vt = v + t * kv_width;
    if (backward) {
      turn(qt, row, num_heads, dim, half, angle, -1);
      turn(kt, key, num_kv_heads, dim, half, angle, -1);
      memcpy(value, vt, 4 * kv_width);
    } else {
      turn(row, qt, num_heads, dim, half, angle, 1);
      turn(key, kt, num_kv_heads, dim, half, angle, 1);
      memcpy(vt, value, 4 * kv_width);
    }
  }
  return 0;
}
