// Problems for every op: random operands in the shapes asked for, rotated through copies so that weights come from memory, the bytes and
// operations that count, and the comparison with the oracle.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace bench {

// The numbers of one problem. What an op does not have is ignored.
struct Spec {
  std::string label;            // what the layer is, or the shape
  int64_t m = 1, n = 0, k = 0;  // of a linear; n alone of norms and activations
  int64_t heads = 0, kv_heads = 0, head_dim = 0, context = 512;
  int64_t a = 0, b = 0;  // of a change of basis: its factors, after RMSNorm, SiLU·mul or nothing, and with the right one or not
  bool norm = false, gated = false, left_alone = false;
  bool basis = false;    // of rope_kv: q and k change theirs
  int64_t group = 128;
  int bits = 4, act_bits = 16;
  double outliers = 0.01;
  double columns = 0;   // share of the inputs that stay FP16 whole
  pe::Dtype dtype = pe::Dtype::f32;  // of the activations: f16 and bf16 are for a GPU. A Problem holds them as f32, rounded to it
  bool skewed = true;  // outliers crowd into some rows and columns, as masks chosen by gradients do; else each weight has the same chance
};

// Memory that is freed with the object, 64-byte aligned. Arrays that kernels read cold are copied behind each other in one.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  template <class T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_ = 0;
};

// A problem as one kernel sees it: `copies` differ only in where their cold operands lie. A run of copy i is kernel.run(copies[i]).
template <class Op>
struct Prepared {
  std::vector<Op> copies;
  std::vector<Buffer> owned;
};

template <class Op>
class Problem {
 public:
  explicit Problem(const Spec& spec);
  // Repeats the cold operands until they take `cold` bytes; 0 is a single copy.
  Prepared<Op> prepare(const pe::Kernel<Op>& kernel, size_t cold) const;
  // ‖y − oracle‖ / ‖oracle‖; a long problem is checked in some of its tokens.
  double error(const pe::Kernel<Op>& kernel) const;
  const Op& op() const { return op_; }
  double operations() const;
  double bytes() const;       // read and written once
  double cold_bytes() const;  // of them those that come from memory; 0 where all is what the op before has just written

 private:
  Op op_;
  std::vector<Buffer> owned_;
  double value_bytes_ = 4;    // of an activation
};

// Which error a kernel may have (ops.h states the bounds): rank 4 multiplies bf16 on matrix units, rank 3 may take float activations as
// fixed point. The cache of RopeKV is f16, and a few values that lie between two of them go the other way.
template <class Op>
double bound(const pe::Kernel<Op>& kernel, const Op& op) {
  if constexpr (std::is_same_v<Op, pe::RmsNorm> || std::is_same_v<Op, pe::SiluMul>) return 1e-6;
  if constexpr (std::is_same_v<Op, pe::RopeKV> || std::is_same_v<Op, pe::Transform>)
    return kernel.rank >= 4 ? 1e-2 : std::is_same_v<Op, pe::RopeKV> ? 1e-4 : 1e-5;
  if constexpr (std::is_same_v<Op, pe::Attention>) return kernel.rank >= 4 ? 1e-2 : 1e-5;
  if constexpr (requires { op.act_bits; }) {
    if (op.act_bits == 16 && kernel.rank >= 3) return kernel.rank >= 4 ? 5e-3 : 1e-4;
  }
  return 1e-5;
}

}  // namespace bench
