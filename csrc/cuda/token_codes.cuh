// Activations' and cached codes: reading a token as Transform's v, and turning numbers into codes.
#pragma once

#include <type_traits>

#include "cuda/half.cuh"
#include "cuda/ptx.cuh"
#include "ops.h"

namespace pe {

// Why none of them takes this problem.
inline const char* refuses_transform(const Transform& op) {
  const bool large = op.a > 256 || op.b > 256;
  if (op.a < 1 || op.b < 1 || (large && (op.left || op.right)) || op.a * op.b != op.n) return "takes factors of 1 to 256 whose product is n";
  if (op.n % 8) return "n is no multiple of 8";
  if (op.weight && op.gated) return "norms no gated input";
  if (!aligned16(op.x) || op.x_stride % 8 || !aligned16(op.weight)) return "rows of x are not 16-byte aligned";
  if (op.y && (!aligned16(op.y) || op.y_stride % 8)) return "rows of y are not 16-byte aligned";
  if (op.code && op.bits != 8 && op.bits != 4) return "makes codes of 8 or 4 bits";
  return aligned16(op.code) ? nullptr : "codes are not 16-byte aligned";
}

// Eight neighbouring values of a token's v; with a weight `factor` is what RMSNorm divides by, inverted.
template <class T>
__device__ __forceinline__ void read_v(const Transform& op, const T* row, int at, float factor, float (&v)[8]) {
  load8(row + at, v);
  if (op.weight) {
    float weight[8];
    load8(op.weight + at, weight);
    for (int i = 0; i < 8; ++i) v[i] *= factor * weight[i];
  }
  if (!op.gated) return;
  float up[8];
  load8(row + op.n + at, up);
  for (int i = 0; i < 8; ++i) v[i] = v[i] / (1 + __expf(-v[i])) * up[i];  // a gate below −88 makes the quotient 0, as it should
}

// The largest t and −t of a token; infinity where one is not finite.
struct Range {
  float high = 0, low = 0;
  __device__ __forceinline__ void add(float t) {
    high = fmaxf(high, t), low = fmaxf(low, -t);
    if (!(fabsf(t) < INFINITY)) high = INFINITY;
  }
  __device__ __forceinline__ void add(Range other) { high = fmaxf(high, other.high), low = fmaxf(low, other.low); }
  __device__ __forceinline__ bool finite() const { return high < INFINITY && low < INFINITY; }
};

// How codes of 8 or 4 bits are made: ops.h, Transform. clip: nullable.
struct Quantizer {
  float scale, inverse, least, most;
  __device__ __forceinline__ Quantizer(int bits, const float* clip, Range range) {
    most = bits == 8 ? 127 : 7, least = -most - 1;
    const float high = clip ? clip[0] * range.high : range.high, low = clip ? clip[1] * range.low : range.low;
    scale = range.finite() ? fmaxf(high, low) / most : NAN;
    inverse = scale > 0 ? 1 / scale : 0;
  }
  // Adding 1.5 · 2^23 rounds to a whole number, which then stands in the lowest bits in two's complement.
  __device__ __forceinline__ uint32_t code(float t) const {
    const float v = t * inverse;
    return __float_as_uint((v == v ? fminf(fmaxf(v, least), most) : 0) + 12582912.0f);
  }
};

}  // namespace pe
