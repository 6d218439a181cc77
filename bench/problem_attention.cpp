// The problems of the ops that work on a KV cache: up to 16 rows are a decode step of as many sequences, each `context` tokens long; more
// are the prompt of one sequence.
#include "operands.h"

namespace bench {
namespace {

using pe::Attention, pe::Kernel, pe::KVCache, pe::RopeKV;

constexpr int64_t kMostSequences = 16;

// Slots, positions and cache of the rows.
template <class Op>
struct Sequences {
  int64_t slots, length;

  Sequences(Op& op, const Spec& s, std::vector<Buffer>& owned, Random& random)
      : slots(s.m <= kMostSequences ? s.m : 1), length(s.m <= kMostSequences ? s.context : s.m) {
    op.m = s.m, op.heads = s.heads, op.kv_heads = s.kv_heads, op.head_dim = s.head_dim;
    auto *slot = keep<int32_t>(owned, size_t(s.m)), *position = keep<int32_t>(owned, size_t(s.m));
    for (int64_t i = 0; i < s.m; ++i) {
      slot[i] = int32_t(slots > 1 ? i : 0);
      position[i] = int32_t(s.m <= kMostSequences ? length - 1 : i);
    }
    op.slot = slot, op.position = position;
    const size_t count = size_t(slots * s.kv_heads * length * s.head_dim);
    op.cache.k = random_halves(owned, random, count), op.cache.v = random_halves(owned, random, count);
    op.cache.head_stride = length * s.head_dim, op.cache.slot_stride = s.kv_heads * op.cache.head_stride;
  }
};

template <class Op>
size_t cache_count(const Op& op) {  // values of k, and of v
  int64_t slots = 1;
  for (int64_t i = 0; i < op.m; ++i) slots = std::max<int64_t>(slots, op.slot[i] + 1);
  return size_t(slots * op.cache.slot_stride);
}

template <class Op>
std::vector<Cold<Op>> cold_cache(const Op& op) {
  const size_t bytes = cache_count(op) * 2;
  return {{bytes, op.cache.k, [](Op& o, void* at) { o.cache.k = static_cast<uint16_t*>(at); }},
          {bytes, op.cache.v, [](Op& o, void* at) { o.cache.v = static_cast<uint16_t*>(at); }}};
}

double seen(const Attention& op) {  // pairs of a row and a position it sees
  double sum = 0;
  for (int64_t i = 0; i < op.m; ++i) sum += op.position[i] + 1;
  return sum;
}

}  // namespace

template <>
Problem<Attention>::Problem(const Spec& s) {
  Random random(1);
  Sequences sequences(op_, s, owned_, random);
  op_.scale = 1 / std::sqrt(float(s.head_dim));
  op_.q_stride = op_.y_stride = s.heads * s.head_dim;
  op_.q = random_floats(owned_, random, size_t(s.m * op_.q_stride), s.dtype);
  value_bytes_ = value_bytes(s);
  op_.y = keep<float>(owned_, size_t(s.m * op_.y_stride));
  give_workspace(op_, owned_);
}

template <>
double Problem<Attention>::operations() const {
  return 4.0 * double(op_.heads * op_.head_dim) * seen(op_);
}

template <>
double Problem<Attention>::cold_bytes() const {
  return 4.0 * double(cache_count(op_));
}

template <>
double Problem<Attention>::bytes() const {
  return cold_bytes() + 2 * value_bytes_ * double(op_.m * op_.q_stride);
}

template <>
Prepared<Attention> Problem<Attention>::prepare(const Kernel<Attention>&, size_t cold) const {
  Prepared<Attention> prepared;
  rotate(prepared, op_, cold_cache(op_), cold);
  return prepared;
}

template <>
double Problem<Attention>::error(const Kernel<Attention>& kernel) const {
  kernel.run(op_, nullptr);
  return error_of_attention(op_, op_.y);
}

template <>
Problem<RopeKV>::Problem(const Spec& s) {
  Random random(1);
  Sequences sequences(op_, s, owned_, random);
  op_.qkv_stride = (s.heads + 2 * s.kv_heads) * s.head_dim;
  op_.qkv = random_floats(owned_, random, size_t(s.m * op_.qkv_stride), s.dtype);
  value_bytes_ = value_bytes(s);
  const int64_t half = s.head_dim / 2;
  auto *cos = keep<float>(owned_, size_t(sequences.length * half)), *sin = keep<float>(owned_, size_t(sequences.length * half));
  for (int64_t i = 0; i < sequences.length * half; ++i) {
    const float angle = 6.2831853f * random.uniform();
    cos[i] = std::cos(angle), sin[i] = std::sin(angle);
  }
  op_.cos = cos, op_.sin = sin;
  for (auto basis : {&RopeKV::q_transform, &RopeKV::k_transform}) {
    if (!s.basis) continue;
    float* random_basis = random_floats(owned_, random, size_t(s.head_dim * s.head_dim));
    for (int64_t i = 0; i < s.head_dim * s.head_dim; ++i) random_basis[i] /= std::sqrt(float(s.head_dim));
    op_.*basis = random_basis;
  }
}

template <>
double Problem<RopeKV>::operations() const {
  return double(op_.m * (op_.heads + op_.kv_heads) * op_.head_dim) * (op_.q_transform ? 3.0 + 2.0 * double(op_.head_dim) : 3.0);
}

template <>
double Problem<RopeKV>::cold_bytes() const {
  return 0;
}

template <>
double Problem<RopeKV>::bytes() const {
  const int64_t turned = op_.heads * op_.head_dim, cached = op_.kv_heads * op_.head_dim;
  return double(op_.m) * (value_bytes_ * double(op_.qkv_stride + turned) + 4.0 * double(op_.head_dim + cached));
}

template <>
Prepared<RopeKV> Problem<RopeKV>::prepare(const Kernel<RopeKV>&, size_t cold) const {
  Prepared<RopeKV> prepared;
  rotate(prepared, op_, cold_cache(op_), cold);
  return prepared;
}

template <>
double Problem<RopeKV>::error(const Kernel<RopeKV>& kernel) const {
  std::vector<float> qkv[2];
  Prepared<RopeKV> runs[2];
  const Kernel<RopeKV>* kernels[2] = {&kernel, &oracle<RopeKV>()};
  for (int i = 0; i < 2; ++i) {
    qkv[i].assign(op_.qkv, op_.qkv + op_.m * op_.qkv_stride);
    rotate(runs[i], op_, cold_cache(op_), 0);
    runs[i].copies[0].qkv = qkv[i].data();
    kernels[i]->run(runs[i].copies[0], nullptr);
  }
  Norms norms;
  for (int64_t i = 0; i < op_.m; ++i)
    compare(norms, &qkv[0][size_t(i * op_.qkv_stride)], &qkv[1][size_t(i * op_.qkv_stride)], op_.heads * op_.head_dim);
  const KVCache &mine = runs[0].copies[0].cache, &theirs = runs[1].copies[0].cache;
  for (size_t i = 0; i < cache_count(op_); ++i) {
    for (auto member : {&KVCache::k, &KVCache::v})
      norms.add(pe::half_to_float(static_cast<uint16_t*>(mine.*member)[i]), pe::half_to_float(static_cast<uint16_t*>(theirs.*member)[i]));
  }
  return norms.ratio();
}

}  // namespace bench
