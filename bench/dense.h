// The baseline on qbench's lines: y[m,n] = x[m,k] · w[n,k]ᵀ with float or bfloat16 weights, products and sums in float.
#pragma once

#include <cstdint>

namespace bench {

using bf16 = uint16_t;

struct Dense {
  int64_t m, n, k;
  const float* x;
  float* y;
};

void dense(const Dense& op, const float* w);
void dense(const Dense& op, const bf16* w);

}  // namespace bench
