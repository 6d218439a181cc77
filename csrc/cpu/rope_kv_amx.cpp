// RoPE with a change of basis for many rows on AMX, in bf16 with f32 sums: the heads are rounded after the rotation, and the bases once.
//
// The rows of a tile are the same head of 16 tokens, so that results go from the tile registers to where the heads were, a row of qkv
// apart. Both bases, in their tiles, stay in L1 for all rows of a task (16 KiB at head_dim 64). Stores cannot be forwarded to a tile's load:
// a few heads are turned before the first of them is multiplied.
#include "cpu/amx_operands.h"
#include "cpu/rope_kv.h"

namespace pe {
namespace {

using V = Avx512;

constexpr int64_t kMost = 128;   // head_dim
constexpr int64_t kHeads = 4;    // turned together
constexpr int64_t kLeastRows = 16, kTaskRows = 64;

// Memory of a task, on the stack of its thread.
struct Room {
  alignas(64) uint16_t basis[2][kMost / 32 * (kMost / 16) * Amx::elements];
  alignas(64) uint16_t head[kHeads][kMost / 32 * Amx::elements];
  alignas(64) float turned[kMost], out[Amx::rows * kMost];
};

struct RopeTiles {
  const RopeKV& op;
  Room& room;
  int64_t d;

  RopeTiles(const RopeKV& op, Room& room) : op(op), room(room), d(op.head_dim) {
    const void* const from[] = {op.q_transform, op.k_transform};
    for (int i = 0; i < 2; ++i) amx_right_operand(static_cast<const float*>(from[i]), d, d, d, basis(i));
  }

  AmxOperand basis(int i) const { return {room.basis[i], d / 16}; }
  AmxOperand head(int64_t h) const { return {room.head[h], d / 32}; }

  // [16][d] of a head times its basis, to rows `stride` apart.
  void multiply(const AmxOperand& left, const AmxOperand& right, float* to, int64_t stride) const {
    for (int64_t c = 0; c < d / 16; c += 2) {
      Amx::zero<0>(), Amx::zero<1>();
      for (int64_t s = 0; s < d / 32; ++s) {
        Amx::load<4>(left.tile(0, s), 64);
        Amx::load<6>(right.tile(s, c), 64), Amx::multiply<0, 4, 6>();
        Amx::load<7>(right.tile(s, c + 1), 64), Amx::multiply<1, 4, 7>();
      }
      Amx::store<0>(to + c * 16, stride * 4), Amx::store<1>(to + c * 16 + 16, stride * 4);
    }
  }

  // Rows i … i + count, at most 16. What tiles hold of rows beyond is multiplied as well, and left behind.
  void rows(int64_t i, int64_t count) const {
    for (int64_t h = 0; h < op.heads + op.kv_heads; h += kHeads) {
      const int64_t left = op.heads + op.kv_heads - h, some = left < kHeads ? left : kHeads;
      for (int64_t r = 0; r < count; ++r, Amx::stay_awake<2, 3, 5>())
        for (int64_t j = 0; j < some; ++j) {
          const RopeRow<V> row{op, i + r};
          row.turn(row.heads() + (h + j) * d, room.turned, nullptr);
          for (int64_t c = 0; c < d; c += 32)
            _mm512_store_si512(head(j).tile(0, c / 32) + r * 32, Amx::round(V::load(room.turned + c), V::load(room.turned + c + 16)));
        }
      for (int64_t j = 0; j < some; ++j) {
        float* to = RopeRow<V>{op, i}.heads() + (h + j) * d;
        const AmxOperand right = basis(h + j >= op.heads);
        if (count == Amx::rows) {
          multiply(head(j), right, to, op.qkv_stride);
        } else {
          multiply(head(j), right, room.out, d);
          for (int64_t r = 0; r < count; ++r) __builtin_memcpy(to + r * op.qkv_stride, room.out + r * d, size_t(d) * sizeof(float));
        }
      }
    }
    for (int64_t r = 0; r < count; ++r, Amx::stay_awake<2, 3, 5>()) RopeRow<V>{op, i + r}.write();
  }
};

const char* refuses(const RopeKV& op) {
  if (op.exact) return "it rounds to bf16";
  if (!op.q_transform) return "there is nothing to multiply with";
  if (op.head_dim % 32 || op.head_dim > kMost) return "head_dim is no multiple of 32, or above 128";
  return op.m < kLeastRows ? "fewer than 16 rows, which need no matrix unit" : nullptr;
}

void rope_kv_amx(const RopeKV& op, void*) {
  parallel_for(op.m, kTaskRows, [&](int64_t begin, int64_t end) {
    Room room;
    const RopeTiles task(op, room);
    Amx::begin();
    for (int64_t i = begin; i < end; i += Amx::rows) task.rows(i, end - i < Amx::rows ? end - i : Amx::rows);
    Amx::end();
  });
}

const Row<RopeKV> row{{"rope_kv_amx", Device::cpu, Arch::amx, 4, Layout::canonical, refuses, rope_kv_amx}};

}  // namespace
}  // namespace pe
