// Problems on a GPU: the operands of problem.h, rounded to f16 or bf16, weights packed for the kernel and copied until they do not fit L2.
#pragma once

#include <optional>

#include "gpu.h"
#include "problem.h"

namespace bench::gpu {

template <class Op>
constexpr bool measured = std::is_same_v<Op, pe::QLinear> || std::is_same_v<Op, pe::RmsNorm> || std::is_same_v<Op, pe::SiluMul> ||
                          std::is_same_v<Op, pe::Transform> || std::is_same_v<Op, pe::RopeKV> || std::is_same_v<Op, pe::Attention>;

// The operands of a problem as one kernel reads them. `copies` differ only in where their weights lie.
template <class Op>
struct Placed {
  std::vector<Op> copies;
  std::vector<Memory> owned;
};

// What a row of the table is asked about: the op before its operands are on the GPU, with the strides that they will have there.
template <class Op>
Op asked(const Problem<Op>& problem, const Spec& spec) {
  Op op = problem.op();
  op.dtype = spec.dtype;
  if constexpr (std::is_same_v<Op, pe::QLinear>) op.x_stride = (op.k + 7) / 8 * 8;
  return op;
}

// With `cold` = 0 there is one copy.
template <class Op>
Placed<Op> place(const Problem<Op>& problem, const Spec& spec, size_t cold);

// ‖y − oracle‖ / ‖oracle‖ of a kernel's first run over placed operands; a long problem is checked in some of its tokens.
template <class Op>
double error(const pe::Kernel<Op>& kernel, const Problem<Op>& problem, const Spec& spec, const Placed<Op>& placed);

// What that may be: ops.h says it of most; the others round each value once.
template <class Op>
double bound(pe::Dtype dtype) {
  const bool f16 = dtype == pe::Dtype::f16;
  if constexpr (std::is_same_v<Op, pe::Transform>) return f16 ? 1e-3 : 1e-2;
  if constexpr (std::is_same_v<Op, pe::Attention>) return f16 ? 2e-3 : 6e-3;
  return f16 ? 1e-3 : 6e-3;
}

// A transform with a launch for each step: norm or SiLU, factors, quantization. None where there is one step alone.
struct Apart {
  std::optional<double> us, error;
};
Apart apart(const Problem<pe::Transform>& problem, const Spec& spec, const Placed<pe::Transform>& placed, bool check);

}  // namespace bench::gpu
