// What the generated code includes: loads, stores and atomics over the memories, and the arithmetic of ops.h.
#pragma once

#include "machine.h"
#include "ops.h"

namespace emu::ops {

template <class T, int N>
struct Vector {
  T v[N];
};
template <class T, int N>
Vector<T, N> load(Lane& lane, char space, u64 address, u32 site) {
  Vector<T, N> r;
  memcpy(&r, at(lane, space, address, sizeof r, {site, "a load"}), sizeof r);
  return r;
}
template <class T, int N>
void store(Lane& lane, char space, u64 address, u32 site, Vector<T, N> v) {
  memcpy(at(lane, space, address, sizeof v, {site, "a store", true}), &v, sizeof v);
}
// Volatile and with a memory order: others may synchronise through them.
template <class T, int N>
Vector<T, N> load_strong(Lane& lane, char space, u64 address, u32 site, bool acquire) {
  Vector<T, N> r;
  memcpy(&r, atomic_begin(lane, space, address, sizeof r, site, true, false, acquire, false), sizeof r);
  return r;
}
template <class T, int N>
void store_strong(Lane& lane, char space, u64 address, u32 site, bool release, Vector<T, N> v) {
  memcpy(atomic_begin(lane, space, address, sizeof v, site, false, true, false, release), &v, sizeof v);
  atomic_end(lane, address);
}
template <class T, class F>
T modify(Lane& lane, char space, u64 address, u32 site, bool acquire, bool release, F f) {
  u8* p = atomic_begin(lane, space, address, sizeof(T), site, true, true, acquire, release);
  T old;
  memcpy(&old, p, sizeof old);
  const T now = f(old);
  memcpy(p, &now, sizeof now);
  atomic_end(lane, address);
  return old;
}
template <class T>
T increment(T old, T limit) {
  return old >= limit ? T(0) : T(old + 1);
}
template <class T>
T decrement(T old, T limit) {
  return old == 0 || old > limit ? limit : T(old - 1);
}

// Parameters of a kernel.
template <class T, int N>
Vector<T, N> load_param(const u8* params, u64 offset) {
  Vector<T, N> r;
  memcpy(&r, params + offset, sizeof r);
  return r;
}

}  // namespace emu::ops
