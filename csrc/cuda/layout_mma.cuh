// What the kernels over layout mma have in common.
#pragma once

#include "cuda/half.cuh"
#include "ops.h"

namespace pe {

// Why none of them takes this problem.
inline const char* refuses_mma(const QLinear& op) {
  if (op.act_bits != 16) return "takes activations of 16 bits";
  if (op.scale_f32) return "takes f16 scales";
  if (op.bits != 4 && op.bits != 8) return "takes codes of 4 or 8 bits";
  if (op.group != 32 && op.group != 64 && op.group != 128 && op.group != op.k) return "takes groups of 32, 64, 128 or a whole row";
  if (!aligned16(op.x) || op.x_stride % 8) return "rows of x are not 16-byte aligned";
  return nullptr;
}

// input >> group_shift is the input's group.
inline int group_shift(const QLinear& op) { return op.group == op.k ? 31 : op.group == 32 ? 5 : op.group == 64 ? 6 : 7; }

}  // namespace pe
