// Change of basis of many tokens on AMX, in bf16 with f32 sums: v and the factors are rounded once, and what is between the two products.
//
// mat(v) is a left operand, row by row as it lies, of v · right; a few tokens together fill its tiles. What comes of it goes, two rows a
// lane, into a right operand of leftᵀ · (v · right), token by token. The factors, in their tiles, stay in L1 for all tokens of a task. Sizes
// that are no whole tiles are padded with zeros, which the tiles of a task hold from the start.
#include "cpu/amx_operands.h"
#include "cpu/transform.h"

namespace pe {
namespace {

using V = Avx512;

constexpr int64_t kMost = 128;           // of a factor
constexpr int64_t kGroupFloats = 2048;   // sums of a group of several tokens: with the operands they fill L1
constexpr int64_t kLeastTokens = 16, kTaskTokens = 64, kTogether = 4;

// Memory of a task, on the stack of its thread.
struct Room {
  // The factors; a group's mat(v), and what is between the products. A factor below 32 is padded to twice its tiles.
  alignas(64) uint16_t tiles[(2 + 4) * kMost * kMost];
  alignas(64) float sum[2][kMost * kMost], v[kMost * kMost];
};

// For a `right` of W tiles of columns.
template <int W>
struct AmxTransform {
  static constexpr int64_t stride = 16 * W, b32 = (W + 1) / 2;  // of sums; tiles of 32 inner indices of right

  const Transform& op;
  Room& room;
  int64_t a16, a32, together;      // tiles of 16 rows and of 32 inner indices of left; tokens of a group
  __mmask16 last;                  // lanes of the last tile of columns
  AmxOperand left, right, token;   // leftᵀ; right; mat(v) of the group's tokens, on the left
  uint16_t* between;               // mat(v) · right of each token, on the right

  AmxTransform(const Transform& op, Room& room)
      : op(op), room(room), a16(divide_up(op.a, 16)), a32(divide_up(op.a, 32)), last(__mmask16((1u << (op.b - 16 * (W - 1))) - 1)) {
    const int64_t fit = kGroupFloats / (a16 * 16 * stride);
    together = fit < 1 ? 1 : fit < kTogether ? fit : kTogether;
    uint16_t* at = room.tiles;
    auto take = [&](int64_t high, int64_t wide) {
      const AmxOperand operand{at, wide};
      at += high * wide * Amx::elements;
      return operand;
    };
    left = take(a16, a32), right = take(b32, W), token = take(divide_up(together * op.a, 16), b32), between = take(together * a32, W).tiles;
    __builtin_memset(room.tiles, 0, size_t(at - room.tiles) * sizeof *at);
    load_factors();
  }

  AmxOperand between_of(int64_t j) const { return {between + j * a32 * W * Amx::elements, W}; }

  void load_factors() const {
    const float *from = static_cast<const float*>(op.left), *second = static_cast<const float*>(op.right);
    if (second) amx_right_operand(second, op.b, op.b, op.b, right);
    for (int64_t r = 0; r < op.a && from; ++r) {
      for (int64_t c = 0; c < op.a; ++c) room.v[c] = from[c * op.a + r];
      for (int64_t c = 0; c < op.a; c += 32)
        _mm512_store_si512(left.tile(r / 16, c / 32) + r % 16 * 32, Amx::round(amx_columns(room.v, c, op.a), amx_columns(room.v, c + 16, op.a)));
    }
  }

  float factor_of(int64_t i) const { return op.weight ? rms_factor<V>(op.x + i * op.x_stride, op.n, op.eps) : 1.0f; }

  // Columns 16 · w … of a row; zeros where there are none.
  template <int w>
  V::F columns(const float* row) const {
    if constexpr (w < W - 1) return V::load(row + 16 * w);
    else if constexpr (w == W - 1) return _mm512_maskz_loadu_ps(last, row + 16 * w);
    else return V::zero();
  }

  // Token i's mat(v) in row j · a and those that follow of `token`; rms: its factor of RMSNorm.
  void load_token(int64_t i, int64_t j, float rms) const {
    const float *x = op.x + i * op.x_stride, *weight = op.weight;
    const int64_t a = op.a, b = op.b, n = op.n;
    uint16_t* const tiles = token.tiles;
    auto rows = [&](auto value) {
      size_t row = size_t(j * a), at = 0;
      for (const size_t end = row + size_t(a); row < end; ++row, at += size_t(b)) {
        uint16_t* to = tiles + (row / 16 * b32 * Amx::elements + row % 16 * 32);
        auto put = [&]<int s>() {
          if constexpr (s < b32)
            _mm512_store_si512(to + s * Amx::elements, Amx::round(value.template operator()<2 * s>(at), value.template operator()<2 * s + 1>(at)));
        };
        put.template operator()<0>(), put.template operator()<1>(), put.template operator()<2>(), put.template operator()<3>();
      }
    };
    const V::F factor = V::set(rms);
    if (op.gated) rows([&]<int w>(size_t at) { return silu_mul<V>(columns<w>(x + at), columns<w>(x + n + at)); });
    else if (weight) rows([&]<int w>(size_t at) { return V::mul(V::mul(columns<w>(x + at), factor), columns<w>(weight + at)); });
    else rows([&]<int w>(size_t at) { return columns<w>(x + at); });
  }

  // sum[a][stride] → a right operand.
  void load_between(const float* sum, uint16_t* to) const {
    for (size_t r = 0, a = size_t(op.a); r < a; r += 2, sum += 2 * stride) {
      uint16_t* row = to + (r / 32 * W * Amx::elements + r % 32 * 16);
      for (int w = 0; w < W; ++w)
        _mm512_store_si512(row + w * Amx::elements, Amx::pairs(V::load(sum + 16 * w), r + 1 < a ? V::load(sum + stride + 16 * w) : V::zero()));
    }
  }

  // sum[16 · high][stride] of `steps` products each; two tiles of columns share one of rows.
  void product(int64_t high, int64_t steps, const AmxOperand& rows, const uint16_t* columns, float* sum) const {
    for (int64_t r = 0; r < high; ++r)
      for (int c = 0; c < W; c += 2) {
        const bool two = c + 1 < W;
        const uint16_t *row = rows.tile(r, 0), *column = columns + c * Amx::elements;
        Amx::zero<0>(), Amx::zero<1>();
        for (int64_t s = 0; s < steps; ++s, row += Amx::elements, column += W * Amx::elements) {
          Amx::load<4>(row, 64);
          Amx::load<6>(column, 64), Amx::multiply<0, 4, 6>();
          if (two) Amx::load<7>(column + Amx::elements, 64), Amx::multiply<1, 4, 7>();
        }
        float* to = sum + r * 16 * stride + c * 16;
        Amx::store<0>(to, stride * 4);
        if (two) Amx::store<1>(to + 16, stride * 4);
      }
  }

  // put(at, v, count): the `count` elements v of t from `at` on, row by row. Where the end is not near a vector is whole, and what it has
  // beyond its row is put again.
  template <class Put>
  void each_vector(const float* t, Put put) const {
    int64_t at = 0;
    const int64_t b = op.b, whole = op.n - stride;
    for (; at <= whole; at += b, t += stride)
      for (int w = 0; w < W; ++w) put(at + 16 * w, V::load(t + 16 * w), 16);
    for (; at < op.n; at += b, t += stride)
      for (int w = 0; w < W; ++w) put(at + 16 * w, V::load(t + 16 * w), w < W - 1 ? 16 : int(b - 16 * w));
  }

  // ---- a group: tokens begin … end, at most `together`

  struct Group {
    int64_t begin, end;
    int64_t count() const { return end - begin; }
  };

  void load(const Group& g) const {
    float factor[kTogether];
    for (int64_t j = 0; j < g.count() && op.right; ++j) factor[j] = factor_of(g.begin + j);
    for (int64_t j = 0; j < g.count(); ++j, Amx::stay_awake<2, 3, 5>()) {
      if (op.right) load_token(g.begin + j, j, factor[j]);
      else amx_right_operand(TransformRow<V>(op, g.begin + j).input(0, op.n, room.v), op.b, op.a, op.b, between_of(j));
    }
  }

  void times_right(const Group& g) const { product(divide_up(g.count() * op.a, 16), b32, token, right.tiles, room.sum[0]); }
  void turn(const Group& g) const {
    for (int64_t j = 0; j < g.count(); ++j, Amx::stay_awake<2, 3, 5>()) load_between(room.sum[0] + j * op.a * stride, between_of(j).tiles);
  }
  void times_left(const Group& g) const {
    for (int64_t j = 0; j < g.count(); ++j) product(a16, a32, left, between_of(j).tiles, room.sum[1] + j * a16 * 16 * stride);
  }

  void finish(const Group& g) const {
    for (int64_t j = 0; j < g.count(); ++j, Amx::stay_awake<2, 3, 5>()) {
      const float* t = op.left ? room.sum[1] + j * a16 * 16 * stride : room.sum[0] + j * op.a * stride;
      if (float* y = op.y ? op.y + (g.begin + j) * op.y_stride : stride == op.b ? nullptr : room.v) {
        each_vector(t, [&](int64_t at, V::F v, int count) { count == 16 ? V::store(y + at, v) : V::store(y + at, v, count); });
        t = y;
      }
      if (op.code) write_token<V>(op, g.begin + j, t);
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += together) {
      const Group g{i, end - i < together ? end : i + together};
      load(g);
      if (op.right) times_right(g);
      if (op.left && op.right) turn(g);
      if (op.left) times_left(g);
      finish(g);
    }
  }
};

const char* refuses(const Transform& op) {
  if (op.exact) return "it rounds to bf16";
  if (!op.left && !op.right) return "there is nothing to multiply with";
  if (op.a > kMost || op.b > kMost) return "a factor is above 128";
  if (op.m && op.m < kLeastTokens) return "fewer than 16 tokens, which need no matrix unit";
  return transform_refuses(op);
}

template <int W>
void transform_tokens(const Transform& op) {
  parallel_for(op.m, kTaskTokens, [&](int64_t begin, int64_t end) {
    Room room;
    const AmxTransform<W> task(op, room);
    Amx::begin();
    task.run(begin, end);
    Amx::end();
  });
}

void transform_amx(const Transform& op, void*) {
  void (*const tokens[])(const Transform&) = {transform_tokens<1>, transform_tokens<2>, transform_tokens<3>, transform_tokens<4>,
                                              transform_tokens<5>, transform_tokens<6>, transform_tokens<7>, transform_tokens<8>};
  tokens[divide_up(op.b, 16) - 1](op);
}

const Row<Transform> row{{"transform_amx", Device::cpu, Arch::amx, 4, Layout::canonical, refuses, transform_amx}};

}  // namespace
}  // namespace pe
