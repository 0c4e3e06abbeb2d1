// Weights in NF4 on the CPU, in the order of `nf4_weight.py`: cpu.c runs the linear layers, cpu_nf4.c the decoding.

#pragma once

#include <stdint.h>

enum { NF4_GROUP = 128, NF4_GROUP_BYTES = NF4_GROUP / 2 };  // columns whose codes lie together, a cache line

// A matrix; rows are whole groups.
typedef struct {
  const uint8_t *codes;  // (N, groups * 64)
  const float *scales;   // (N, groups * 128 / block)
  int64_t groups;        // of a row
  int64_t block;         // columns of one scale: 64, 32 or 16
} NF4Matrix;

typedef struct {
  int64_t operation;
  const void *codes, *scales;
  void *out;
  int64_t num_rows, width, block, bf16, num_threads;
} NF4DequantizeArguments;

// Tokens x (T, stride), padded with zeros to whole groups and to 1, 2, 4 or 8 tokens, in the order in which a
// weight is decoded; `arranged` has room for as many.
void hayate_nf4_arrange(const float *x, int64_t stride, int64_t num_tokens, float *arranged);

// out[t * out_stride + r] = x[t] . weight[row + r] for r < n and tokens arranged as above, those of zeros with
// them. The order of a sum depends on nothing else.
void hayate_nf4_dot(const float *arranged, const NF4Matrix *weight, int64_t row, int64_t n, float *out,
                    int64_t out_stride, int64_t num_tokens);

// out (N, K) = codebook[code] * scale in fp32, rounded once.
int64_t hayate_nf4_dequantize(const NF4DequantizeArguments *arguments);
