// Vectors of floats for cpu.c: W of them, in the GNU C extension that gcc and clang share, so that one source
// serves AVX-512, AVX2 and NEON; loads and stores of bf16 and fp32, sums, and e^x.

#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

#if defined(__AVX512F__)
#define W 16  // floats in a vector
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

enum { CACHE_LINE = 64 };

typedef float vfloat __attribute__((vector_size(4 * W)));
typedef uint32_t vuint __attribute__((vector_size(4 * W)));
typedef int32_t vint __attribute__((vector_size(4 * W)));
typedef uint16_t vhalf __attribute__((vector_size(2 * W)));

INLINE vfloat broadcast(float x) { return x - (vfloat){0}; }

INLINE vfloat widen(vhalf h) {
#if defined(__AVX512F__)  // gcc 12 makes four instructions of the conversion
  return (vfloat)((vuint)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
#endif
}

// Elements i .. i + W of an array of bf16 or fp32; `bf16` is a constant wherever speed matters.
INLINE vfloat load(const void *p, int64_t i, int bf16) {
  if (bf16) {
    vhalf h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return widen(h);
  }
  vfloat f;
  memcpy(&f, (const float *)p + i, sizeof f);
  return f;
}

// The first n < W of them, zeros after.
INLINE vfloat load_part(const void *p, int64_t i, int64_t n, int bf16) {
  if (bf16) {
    vhalf h = {0};
    memcpy(&h, (const uint16_t *)p + i, 2 * n);
    return widen(h);
  }
  vfloat f = {0};
  memcpy(&f, (const float *)p + i, 4 * n);
  return f;
}

INLINE vfloat load_up_to(const void *p, int64_t i, int64_t n, int bf16) {
  return n >= W ? load(p, i, bf16) : load_part(p, i, n, bf16);
}

INLINE void store_up_to(void *p, int64_t i, int64_t n, int bf16, vfloat x) {
  if (n > W) n = W;
  if (bf16) {
    vuint bits = (vuint)x;
    vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vuint nan = (vuint)(x != x);
    vhalf h = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vhalf);
    if (n == W) memcpy((uint16_t *)p + i, &h, sizeof h);
    else memcpy((uint16_t *)p + i, &h, 2 * n);
  } else if (n == W) {
    memcpy((float *)p + i, &x, sizeof x);
  } else {
    memcpy((float *)p + i, &x, 4 * n);
  }
}

typedef float vquad __attribute__((vector_size(16)));

// Four floats with the sum of W.
INLINE vquad fold(vfloat x) {
#if W == 16
  typedef float veight __attribute__((vector_size(32)));
  union { vfloat whole; veight half[2]; } a = {x};
  union { veight whole; vquad half[2]; } b = {a.half[0] + a.half[1]};
  return b.half[0] + b.half[1];
#elif W == 8
  union { vfloat whole; vquad half[2]; } b = {x};
  return b.half[0] + b.half[1];
#else
  return x;
#endif
}

INLINE float sum(vfloat x) {
  const vquad q = fold(x);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

INLINE vfloat choose(vint mask, vfloat yes, vfloat no) {
  return (vfloat)((mask & (vint)yes) | (~mask & (vint)no));
}

// e^x to within 2 units in the last place on [-87, 88], clamped there: 2^n * p(r) with r = x - n ln 2 and the
// Taylor polynomial of degree 7 on |r| <= ln 2 / 2, whose remainder is below 2^-27.
INLINE vfloat exponential(vfloat x) {
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = choose(x < -87.0f, broadcast(-87.0f), x);
  x = choose(x > 88.0f, broadcast(88.0f), x);
  vfloat n = x * 1.44269504f + shifter;
  vuint exponent = ((vuint)n - 0x4b400000u) << 23;
  n -= shifter;
  vfloat r = x - n * 0.693145752f;  // ln 2 in two parts, the first exact in a product with n
  r -= n * 1.42860677e-6f;
  vfloat p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vfloat)((vuint)p + exponent);
}

INLINE vfloat silu(vfloat x) { return x / (1.0f + exponential(-x)); }
