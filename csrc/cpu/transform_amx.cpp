// Change of basis of many tokens on AMX, in bf16 with f32 sums: v and the factors are rounded once, and what is between the two products.
//
// A token at a time: mat(v) is a left operand, row by row as it lies, of v · right; what comes of it goes, two rows a lane, into a right
// operand of leftᵀ · (v · right). The factors, in their tiles, stay in L1 for all tokens of a task. Sizes that are no whole tiles are
// padded with zeros, which the tiles of a task hold from the start.
#include "cpu/isa/amx.h"
#include "cpu/transform.h"

namespace pe {
namespace {

using V = Avx512;
using F = V::F;

constexpr int64_t kMost = 128;  // of a factor: what a task holds takes 256 KiB then, and 27 KiB for factors of 24
constexpr int64_t kLeastTokens = 16, kTaskTokens = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of a task, on the stack of its thread.
struct Room {
  alignas(64) uint16_t tiles[4 * (kMost / 16) * (kMost / 32) * Amx::elements];
  alignas(64) float sum[kMost * kMost], v[kMost * kMost];
};

// Left operands are tiles [16 rows][32 inner indices], right ones [16 pairs of inner indices][16 columns]; `wide` tiles follow each other for
// the same rows.
struct Operand {
  uint16_t* tiles;
  int64_t wide;
  uint16_t* tile(int64_t r, int64_t c) const { return tiles + (r * wide + c) * Amx::elements; }
};

struct AmxTransform {
  const Transform& op;
  Room& room;
  int64_t a16, b16, a32, b32;            // tiles of 16 rows or columns, and of 32 inner indices
  Operand left, right, token, between;   // leftᵀ; right; mat(v), on the left; mat(v) · right, on the right

  AmxTransform(const Transform& op, Room& room)
      : op(op), room(room), a16(divide_up(op.a, 16)), b16(divide_up(op.b, 16)), a32(divide_up(op.a, 32)), b32(divide_up(op.b, 32)) {
    uint16_t* at = room.tiles;
    auto take = [&](int64_t high, int64_t wide) {
      const Operand operand{at, wide};
      at += high * wide * Amx::elements;
      return operand;
    };
    left = take(a16, a32), right = take(b32, b16), token = take(a16, b32), between = take(a32, b16);
    __builtin_memset(room.tiles, 0, size_t(at - room.tiles) * sizeof *at);
    load_factors();
  }

  // 16 columns from c on of a row of `count` floats; zeros beyond it, and without a row.
  static F columns(const float* row, int64_t c, int64_t count) {
    const int64_t left = row ? count - c : 0;
    return left >= 16 ? V::load(row + c) : left > 0 ? V::load(row + c, int(left)) : V::zero();
  }

  // rows[count][width] as a left operand, those beyond `count` untouched.
  static void left_operand(const float* rows, int64_t count, int64_t width, const Operand& to) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; c += 32) {
        const float* row = rows + r * width;
        _mm512_store_si512(to.tile(r / 16, c / 32) + r % 16 * 32, Amx::round(columns(row, c, width), columns(row, c + 16, width)));
      }
  }

  // rows[count][width], `stride` apart, as a right operand.
  static void right_operand(const float* rows, int64_t stride, int64_t count, int64_t width, const Operand& to) {
    for (int64_t r = 0; r < count; r += 2)
      for (int64_t c = 0; c < width; c += 16) {
        const float *low = rows + r * stride, *high = r + 1 < count ? low + stride : nullptr;
        _mm512_store_si512(to.tile(r / 32, c / 16) + r % 32 * 16, Amx::pairs(columns(low, c, width), columns(high, c, width)));
      }
  }

  void load_factors() const {
    const float *from = static_cast<const float*>(op.left), *second = static_cast<const float*>(op.right);
    if (second) right_operand(second, op.b, op.b, op.b, right);
    if (!from) return;
    for (int64_t r = 0; r < op.a; ++r)
      for (int64_t c = 0; c < op.a; ++c) room.sum[r * op.a + c] = from[c * op.a + r];
    left_operand(room.sum, op.a, op.a, left);
  }

  // sum[a][16 · b16] of `steps` products each; two tiles of columns share one of rows.
  void product(int64_t steps, const Operand& rows, const Operand& columns) const {
    const int64_t stride = b16 * 16;
    for (int64_t r = 0; r < a16; ++r)
      for (int64_t c = 0; c < b16; c += 2) {
        const bool two = c + 1 < b16;
        Amx::zero<0>(), Amx::zero<1>();
        for (int64_t s = 0; s < steps; ++s) {
          Amx::load<4>(rows.tile(r, s), 64);
          Amx::load<6>(columns.tile(s, c), 64), Amx::multiply<0, 4, 6>();
          if (two) Amx::load<7>(columns.tile(s, c + 1), 64), Amx::multiply<1, 4, 7>();
        }
        float* to = room.sum + r * 16 * stride + c * 16;
        Amx::store<0>(to, stride * 4);
        if (two) Amx::store<1>(to + 16, stride * 4);
      }
  }

  void run(int64_t i) const {
    const float* v = TransformRow<V>(op, i).input(0, op.n, room.v);
    const int64_t stride = b16 * 16;
    if (op.right) left_operand(v, op.a, op.b, token), product(b32, token, right);
    if (op.left) {
      op.right ? right_operand(room.sum, stride, op.a, op.b, between) : right_operand(v, op.b, op.a, op.b, between);
      product(a32, left, between);
    }
    float* y = op.y + i * op.y_stride;
    for (int64_t r = 0; r < op.a; ++r)
      for (int64_t c = 0; c < op.b; c += 16) {
        const F t = V::load(room.sum + r * stride + c);
        op.b - c >= 16 ? V::store(y + r * op.b + c, t) : V::store(y + r * op.b + c, t, int(op.b - c));
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

void transform_amx(const Transform& op, void*) {
  parallel_for(op.m, kTaskTokens, [&](int64_t begin, int64_t end) {
    Room room;
    const AmxTransform task(op, room);
    Amx::begin();
    for (int64_t i = begin; i < end; ++i) task.run(i);
    Amx::end();
  });
}

const Row<Transform> row{{"transform_amx", Device::cpu, Arch::amx, 4, Layout::canonical, refuses, transform_amx}};

}  // namespace
}  // namespace pe
