#include "gpu_problem.h"

#include "operands.h"

namespace bench::gpu {
namespace {

using pe::Attention, pe::Dtype, pe::Kernel, pe::QLinear, pe::RmsNorm, pe::RopeKV, pe::SiluMul, pe::Transform;

size_t aligned256(size_t bytes) { return (bytes + 255) / 256 * 256; }

char* put(std::vector<Memory>& owned, const void* from, size_t bytes) {
  owned.emplace_back(bytes);
  if (bytes) owned.back().upload(from, bytes);
  return owned.back().data();
}

template <class T>
const T* put_all(std::vector<Memory>& owned, const T* from, size_t count) {
  return reinterpret_cast<const T*>(put(owned, from, count * sizeof(T)));
}

// Rows of `width` floats as dtype, `stride` values apart on the GPU.
float* put_rows(std::vector<Memory>& owned, const float* from, int64_t rows, int64_t width, int64_t stride, Dtype dtype) {
  std::vector<uint16_t> bits(size_t(rows * stride));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) bits[size_t(r * stride + c)] = to_bits(from[r * width + c], dtype);
  return reinterpret_cast<float*>(put(owned, bits.data(), bits.size() * 2));
}

float* room(std::vector<Memory>& owned, int64_t values) {
  owned.emplace_back(size_t(values) * 2);
  return reinterpret_cast<float*>(owned.back().data());
}

std::vector<float> fetch(const float* from, int64_t count, Dtype dtype, const std::vector<Memory>& owned) {
  std::vector<uint16_t> bits(static_cast<size_t>(count));
  std::vector<float> values(bits.size());
  for (const Memory& memory : owned)
    if (memory.data() == reinterpret_cast<const char*>(from)) memory.download(bits.data(), bits.size() * 2);
  std::transform(bits.begin(), bits.end(), values.begin(), [&](uint16_t b) { return from_bits(b, dtype); });
  return values;
}

template <class Op>
void run_once(const Kernel<Op>& kernel, const Op& op) {
  kernel.run(op, nullptr);
  finish();
}

}  // namespace

// ---- QLinear

namespace {
// The codes of activations as Transform makes them for the linears of a site: a time of its own, not that of a linear.
void give_codes(QLinear& op, std::vector<Memory>& owned) {
  Transform quantizer = pe::quantizer_of(op);
  owned.emplace_back(size_t(op.m * op.k * op.act_bits / 8));
  op.x_code = quantizer.code = owned.back().data();
  owned.emplace_back(size_t(op.m) * 4);
  op.x_scale = quantizer.scale = reinterpret_cast<float*>(owned.back().data());
  pe::run(quantizer);
  finish();
}
}  // namespace

template <>
Placed<QLinear> place(const Problem<QLinear>& problem, const Spec& spec, size_t cold) {
  Placed<QLinear> placed;
  auto& owned = placed.owned;
  const QLinear& canonical = problem.op();
  const pe::PackedBytes size = pe::packed_bytes(canonical, pe::Layout::mma);
  const pe::OutlierCounts counts = canonical.outlier_row ? pe::outlier_counts(canonical) : pe::OutlierCounts{};
  std::vector<uint8_t> weight(size.weight), scale(size.scale);
  std::vector<uint32_t> offset(counts.offset), entry(counts.entry);
  pe::pack(canonical, pe::Layout::mma, weight.data(), scale.data(), nullptr);
  if (canonical.outlier_row) pe::pack_outliers(canonical, offset.data(), entry.data());

  QLinear op = asked(problem, spec);
  op.layout = pe::Layout::mma;
  op.outlier_row = nullptr, op.outlier_col = nullptr, op.outlier_value = nullptr;
  op.x = put_rows(owned, canonical.x, op.m, op.k, op.x_stride, op.dtype);
  op.y = room(owned, op.m * op.n), op.y_stride = op.n;
  owned.emplace_back(pe::workspace_bytes(op));
  op.workspace = owned.back().data();
  if (op.act_bits < 16) give_codes(op, owned);

  // One allocation for all copies: what lies side by side cannot share a line of the cache.
  const std::pair<const void*, size_t> parts[] = {
      {weight.data(), weight.size()}, {scale.data(), scale.size()}, {offset.data(), offset.size() * 4}, {entry.data(), entry.size() * 4},
      {op.column_index, size_t(op.columns) * 4}, {op.column_value, size_t(op.n * op.columns) * 2}};
  constexpr size_t kParts = std::size(parts);
  size_t each = 0;
  for (const auto& part : parts) each += aligned256(part.second);
  const size_t count = std::max<size_t>(1, (cold + each - 1) / each);
  owned.emplace_back(each * count);
  Memory& memory = owned.back();
  size_t at[kParts], end = 0;
  for (size_t i = 0; i < kParts; ++i) {
    at[i] = end, end += aligned256(parts[i].second);
    if (parts[i].second) memory.upload(parts[i].first, parts[i].second, at[i]);
  }
  memory.fill_from(each);
  for (size_t copy = 0; copy < count; ++copy) {
    char* base = memory.data() + copy * each;
    op.weight = reinterpret_cast<uint8_t*>(base + at[0]), op.scale = base + at[1];
    if (canonical.outlier_row)
      op.outlier_offset = reinterpret_cast<uint32_t*>(base + at[2]), op.outlier_entry = reinterpret_cast<uint32_t*>(base + at[3]);
    op.column_index = reinterpret_cast<int32_t*>(base + at[4]), op.column_value = reinterpret_cast<uint16_t*>(base + at[5]);
    placed.copies.push_back(op);
  }
  return placed;
}

template <>
double error(const Kernel<QLinear>& kernel, const Problem<QLinear>& problem, const Spec&, const Placed<QLinear>& placed) {
  const QLinear& op = placed.copies[0];
  run_once(kernel, op);
  return error_of_tokens(problem.op(), fetch(op.y, op.m * op.n, op.dtype, placed.owned).data(), op.n);
}

// ---- RmsNorm and SiluMul

template <>
Placed<RmsNorm> place(const Problem<RmsNorm>& problem, const Spec& spec, size_t) {
  Placed<RmsNorm> placed;
  RmsNorm op = asked(problem, spec);
  op.weight = put_all(placed.owned, op.weight, size_t(op.n));
  op.x = put_rows(placed.owned, op.x, op.m, op.n, op.n, op.dtype), op.y = room(placed.owned, op.m * op.n);
  placed.copies.push_back(op);
  return placed;
}

template <>
Placed<SiluMul> place(const Problem<SiluMul>& problem, const Spec& spec, size_t) {
  Placed<SiluMul> placed;
  SiluMul op = asked(problem, spec);
  op.x = put_rows(placed.owned, op.x, op.m, 2 * op.n, 2 * op.n, op.dtype), op.y = room(placed.owned, op.m * op.n);
  placed.copies.push_back(op);
  return placed;
}

template <>
double error(const Kernel<RmsNorm>& kernel, const Problem<RmsNorm>& problem, const Spec&, const Placed<RmsNorm>& placed) {
  const RmsNorm& op = placed.copies[0];
  run_once(kernel, op);
  return error_of_rows(problem.op(), fetch(op.y, op.m * op.n, op.dtype, placed.owned).data());
}
template <>
double error(const Kernel<SiluMul>& kernel, const Problem<SiluMul>& problem, const Spec&, const Placed<SiluMul>& placed) {
  const SiluMul& op = placed.copies[0];
  run_once(kernel, op);
  return error_of_rows(problem.op(), fetch(op.y, op.m * op.n, op.dtype, placed.owned).data());
}

// ---- Transform

template <>
Placed<Transform> place(const Problem<Transform>& problem, const Spec& spec, size_t cold) {
  Placed<Transform> placed;
  auto& owned = placed.owned;
  Transform op = asked(problem, spec);
  const bool codes = spec.act_bits < 16;
  op.left = put_rows(owned, static_cast<const float*>(op.left), op.a, op.a, op.a, Dtype::f16);
  if (op.right) op.right = put_rows(owned, static_cast<const float*>(op.right), op.b, op.b, op.b, Dtype::f16);
  if (op.weight) op.weight = put_all(owned, op.weight, size_t(op.n));
  // A token's activations come from memory, and what is made of them goes there.
  const size_t x_bytes = aligned256(size_t(op.m * op.x_stride) * 2), made = aligned256(size_t(op.m * op.n) * size_t(codes ? op.bits : 16) / 8);
  const size_t each = x_bytes + made + aligned256(size_t(op.m) * 4), count = std::max<size_t>(1, (cold + each - 1) / each);
  owned.emplace_back(each * count);
  Memory& memory = owned.back();
  std::vector<uint16_t> x(size_t(op.m * op.x_stride));
  std::transform(op.x, op.x + x.size(), x.begin(), [&](float v) { return to_bits(v, op.dtype); });
  memory.upload(x.data(), x.size() * 2);
  memory.fill_from(each);
  for (size_t copy = 0; copy < count; ++copy) {
    char* base = memory.data() + copy * each;
    op.x = reinterpret_cast<float*>(base);
    if (codes)
      op.code = base + x_bytes, op.scale = reinterpret_cast<float*>(base + x_bytes + made);
    else
      op.y = reinterpret_cast<float*>(base + x_bytes);
    placed.copies.push_back(op);
  }
  return placed;
}

namespace {
// Of y, as run(op) makes it; with codes none of them may be further from the oracle's than the next one.
template <class Run>
double error_of_transform(const Problem<Transform>& problem, const Spec& spec, const Placed<Transform>& placed, Run&& run) {
  Transform op = placed.copies[0];
  std::vector<Memory> room_for;
  const bool codes = spec.act_bits < 16;
  const size_t width = size_t(op.n * op.bits / 8);
  op.y = room(room_for, op.m * op.n), op.y_stride = op.n;
  std::vector<uint8_t> found(size_t(op.m) * width), wanted(width);
  if (codes) room_for.emplace_back(found.size()), op.code = room_for.back().data();
  run(op);
  finish();
  if (codes) room_for.back().download(found.data(), found.size());
  const std::vector<float> y = fetch(op.y, op.m * op.n, op.dtype, room_for);
  std::vector<float> t(static_cast<size_t>(op.n));
  float scale = 0;
  Norms norms;
  for (int64_t i : sample(op.m)) {
    Transform one = problem.op();
    one.m = 1, one.x += i * one.x_stride, one.y = t.data();
    if (codes) one.code = wanted.data(), one.scale = &scale;
    oracle<Transform>().run(one, nullptr);
    compare(norms, &y[size_t(i * op.n)], t.data(), op.n);
    for (size_t c = 0; codes && c < size_t(op.n); ++c) {
      auto code = [&](const uint8_t* row) { return op.bits == 8 ? int8_t(row[c]) : ((row[c / 2] >> c % 2 * 4 & 15) ^ 8) - 8; };
      if (std::abs(code(&found[size_t(i) * width]) - code(wanted.data())) > 1) return INFINITY;
    }
  }
  return norms.ratio();
}

// Norm or SiLU·mul, factors and quantization, a launch each. v: room for what the first makes; without y in the op, t: for the second.
void run_apart(const Transform& op, float* v, float* t, void* stream) {
  Transform product = op, quantizer = op;
  if (op.gated) {
    SiluMul silu;
    silu.m = op.m, silu.n = op.n, silu.dtype = op.dtype, silu.x = op.x, silu.y = v;
    pe::run(silu, stream);
  } else if (op.weight) {
    RmsNorm norm;
    norm.m = op.m, norm.n = op.n, norm.dtype = op.dtype, norm.x = op.x, norm.weight = op.weight, norm.eps = op.eps, norm.y = v;
    pe::run(norm, stream);
  }
  if (op.gated || op.weight) product.x = v, product.x_stride = op.n, product.gated = false, product.weight = nullptr;
  if (!op.y) product.y = t, product.y_stride = op.n;
  product.code = nullptr, product.scale = nullptr;
  pe::run(product, stream);
  if (!op.code) return;
  quantizer.gated = false, quantizer.weight = nullptr, quantizer.left = quantizer.right = nullptr, quantizer.y = nullptr;
  quantizer.x = product.y, quantizer.x_stride = product.y_stride;
  pe::run(quantizer, stream);
}
}  // namespace

template <>
double error(const Kernel<Transform>& kernel, const Problem<Transform>& problem, const Spec& spec, const Placed<Transform>& placed) {
  return error_of_transform(problem, spec, placed, [&](const Transform& op) { kernel.run(op, nullptr); });
}

Apart apart(const Problem<Transform>& problem, const Spec& spec, const Placed<Transform>& placed, bool check) {
  const Transform& whole = placed.copies[0];
  if (!whole.gated && !whole.weight && !whole.code) return {};
  std::vector<Memory> owned;
  float *v = room(owned, whole.m * whole.n), *t = room(owned, whole.m * whole.n);
  Apart found;
  if (check) found.error = error_of_transform(problem, spec, placed, [&](const Transform& op) { run_apart(op, v, t, nullptr); });
  found.us = timed(int(placed.copies.size()), [&](int i, void* stream) { run_apart(placed.copies[size_t(i)], v, t, stream); });
  return found;
}

// ---- RopeKV

namespace {
int64_t cached(const RopeKV& op) {  // values of k, and of v
  return (*std::max_element(op.slot, op.slot + op.m) + 1) * op.cache.slot_stride;
}
}  // namespace
template <>
Placed<RopeKV> place(const Problem<RopeKV>& problem, const Spec& spec, size_t) {
  Placed<RopeKV> placed;
  auto& owned = placed.owned;
  const RopeKV& canonical = problem.op();
  RopeKV op = asked(problem, spec);
  const size_t angles = size_t(*std::max_element(op.position, op.position + op.m) + 1) * size_t(op.head_dim / 2);
  const size_t bytes = size_t(cached(canonical)) * 2;
  op.qkv = put_rows(owned, op.qkv, op.m, op.qkv_stride, op.qkv_stride, op.dtype);
  op.cos = put_all(owned, op.cos, angles), op.sin = put_all(owned, op.sin, angles);
  op.slot = put_all(owned, op.slot, size_t(op.m)), op.position = put_all(owned, op.position, size_t(op.m));
  op.cache.k = put(owned, canonical.cache.k, bytes), op.cache.v = put(owned, canonical.cache.v, bytes);
  placed.copies.push_back(op);
  return placed;
}
template <>
double error(const Kernel<RopeKV>& kernel, const Problem<RopeKV>& problem, const Spec&, const Placed<RopeKV>& placed) {
  const RopeKV& op = placed.copies[0];
  RopeKV reference = problem.op();
  run_once(kernel, op);
  const int64_t values = cached(reference), row = reference.qkv_stride;
  std::vector<float> qkv(reference.qkv, reference.qkv + op.m * row);
  std::vector<uint16_t> k(static_cast<size_t>(values)), v(k.size());
  std::memcpy(k.data(), reference.cache.k, k.size() * 2), std::memcpy(v.data(), reference.cache.v, v.size() * 2);
  reference.qkv = qkv.data(), reference.cache.k = k.data(), reference.cache.v = v.data();
  oracle<RopeKV>().run(reference, nullptr);
  Norms norms;
  const std::vector<float> turned = fetch(op.qkv, op.m * row, op.dtype, placed.owned);
  for (int64_t i = 0; i < op.m; ++i) compare(norms, &turned[size_t(i * row)], &qkv[size_t(i * row)], op.heads * op.head_dim);
  for (const auto& [mine, theirs] : {std::pair(op.cache.k, &k), std::pair(op.cache.v, &v)}) {
    const std::vector<float> found = fetch(static_cast<const float*>(mine), values, Dtype::f16, placed.owned);
    for (size_t i = 0; i < found.size(); ++i) norms.add(found[i], pe::half_to_float((*theirs)[i]));
  }
  return norms.ratio();
}

// ---- Attention

template <>
Placed<Attention> place(const Problem<Attention>& problem, const Spec& spec, size_t cold) {
  Placed<Attention> placed;
  auto& owned = placed.owned;
  Attention op = asked(problem, spec);
  const size_t bytes = size_t(problem.cold_bytes()) / 2, each = 2 * aligned256(bytes), count = std::max<size_t>(1, (cold + each - 1) / each);
  op.q = put_rows(owned, op.q, op.m, op.q_stride, op.q_stride, op.dtype), op.y = room(owned, op.m * op.y_stride);
  op.slot = put_all(owned, op.slot, size_t(op.m)), op.position = put_all(owned, op.position, size_t(op.m));
  owned.emplace_back(pe::workspace_bytes(op));
  op.workspace = owned.back().data();
  owned.emplace_back(each * count);
  Memory& memory = owned.back();
  memory.upload(op.cache.k, bytes), memory.upload(op.cache.v, bytes, each / 2);
  memory.fill_from(each);
  for (size_t copy = 0; copy < count; ++copy) {
    op.cache.k = memory.data() + copy * each, op.cache.v = memory.data() + copy * each + each / 2;
    placed.copies.push_back(op);
  }
  return placed;
}

template <>
double error(const Kernel<Attention>& kernel, const Problem<Attention>& problem, const Spec&, const Placed<Attention>& placed) {
  const Attention& op = placed.copies[0];
  run_once(kernel, op);
  return error_of_attention(problem.op(), fetch(op.y, op.m * op.y_stride, op.dtype, placed.owned).data());
}

}  // namespace bench::gpu
