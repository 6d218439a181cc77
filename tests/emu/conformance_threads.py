"""Conformance of the forms by which threads meet: branches, barriers, warp operations, mbarrier, copies and matrices. See conformance_machine.py."""

from __future__ import annotations

import numpy as np
from conformance_machine import asm, kernel

U32 = np.uint64(0xFFFFFFFF)
T = np.arange(64, dtype=np.uint64)


def low(x, start: int = 0, count: int = 64):
    return x[start : start + count].astype(np.uint32)


def joined(*parts):
    return np.concatenate([np.asarray(p).astype(np.uint64) for p in parts])


# ---- control ---------------------------------------------------------------------------------------------------------------------
_branches = (
    "uint32_t d;\n"
    + asm("{.reg .u32 i; .reg .pred p; mov.u32 %0, 0; mov.u32 i, 0; L: add.u32 i, i, 1; add.u32 %0, %0, i; setp.le.u32 p, i, %1; @p bra L; bra.uni M; mov.u32 %0, 9; M: add.u32 %0, %0, 1;}", '"=&r"(d)', '"r"(t)')
    + "out[t] = d;\n"
    + asm("{.reg .u32 i; and.b32 i, %1, 3; ts: .branchtargets A, B, C, D; brx.idx i, ts; A: mov.u32 %0, 10; bra E; B: mov.u32 %0, 11; bra E; C: mov.u32 %0, 12; bra E; D: mov.u32 %0, 13; E: }", '"=r"(d)', '"r"(t)')
    + "out[64 + t] = d;\n"
    + asm("{.reg .u32 i; and.b32 i, %1, 1; tu: .branchtargets F, G; brx.idx.uni i, tu; F: mov.u32 %0, 10; bra H; G: mov.u32 %0, 11; H: }", '"=r"(d)', '"r"(t & ~63)')
    + "out[128 + t] = d; out[192 + t] = times_three(t) + times_three(d);\n"
    + "if (t == 3) { " + asm("exit;") + " } if (t == 70) { " + asm("ret.uni;") + " __trap(); } out[256 + t] = t;"
)
kernel("branches and calls", _branches, lambda x: joined((T + 1) * (T + 2) // 2 + 1, 10 + T % 4, T * 0 + 10, 3 * (T + 10), [0, 1, 2]))

# ---- barriers --------------------------------------------------------------------------------------------------------------------
_exchange = "s[t] = t + {k}; {bar} out[{at} + t] = s[63 - t]; __syncthreads();\n"
_barriers = ["bar.sync 0;", "barrier.sync 1;", "barrier.cta.sync.aligned 2, 64;", "bar.cta.arrive 5, 64; bar.sync 5, 64;"]
_pairs = "".join(_exchange.format(k=i, bar=asm(b), at=64 * i) for i, b in enumerate(_barriers[:3]))
_pairs += "if (t < 32) { s[t] = t; " + asm("bar.arrive 3, 64;") + "} else { " + asm("bar.cta.sync 3, 64;") + " out[192 + t - 32] = s[63 - t]; }"
_pairs += "if (t < 32) { s[64 + t] = t; " + asm("barrier.arrive.aligned 4, 64;") + "} else { " + asm("barrier.sync.aligned 4, 64;") + " out[224 + t - 32] = s[64 + 63 - t]; }"
kernel("barriers", _pairs, lambda x: joined(63 - T, 64 - T, 65 - T, 31 - T[:32], 31 - T[:32]))
_red = "uint32_t d;\n" + "".join(
    asm(f"{{.reg .pred p, q; setp.lt.u32 p, %1, {n}; {op} {'%0' if 'popc' in op else 'q'}, {i}, p; {'' if 'popc' in op else 'selp.u32 %0, 1, 0, q;'}}}", '"=r"(d)', '"r"(t)') + f"out[{64 * i} + t] = d;\n"
    for i, (op, n) in enumerate([("bar.red.popc.u32", 21), ("bar.red.and.pred", 63), ("barrier.cta.red.or.pred", 1), ("barrier.red.aligned.and.pred", 64), ("bar.cta.red.or.pred", 0)])
)
kernel("barriers that reduce", _red, lambda x: np.repeat(np.array([21, 0, 1, 1, 0], np.uint64), 64))
kernel("bar.warp.sync", "s[t] = t; " + asm("bar.warp.sync 0xffffffff;") + "out[t] = s[t ^ 1];", lambda x: T ^ np.uint64(1))
_fences = " ".join(["membar.cta; membar.gl; membar.sys;", *(f"fence.{k}.{s};" for k in ("sc", "acq_rel") for s in ("cta", "gpu", "sys"))])
kernel("fences", "out[1024 + t] = t; " + asm(_fences) + "out[t] = out[1024 + t];", lambda x: T)
_cluster = "".join(f"s[t] = t + {i}; " + asm(b) + f"out[{64 * i} + t] = s[63 - t]; __syncthreads();\n" for i, b in enumerate(["barrier.cluster.arrive; barrier.cluster.wait;", "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"]))
_cluster += asm("barrier.cluster.arrive.relaxed; barrier.cluster.wait;") + "uint32_t d; " + asm("mapa.shared::cluster.u32 %0, %1, 0; sub.u32 %0, %0, %1;", '"=r"(d)', '"r"(S)') + "out[128 + t] = d;"
kernel("a cluster of one block", _cluster, lambda x: joined(63 - T, 64 - T, 0 * T), arch=90)
_proxies = asm("fence.proxy.async; fence.proxy.async.global; fence.proxy.async.shared::cta; fence.proxy.async.shared::cluster; griddepcontrol.launch_dependents; griddepcontrol.wait;")
kernel("fences of proxies and grids", "out[1024 + t] = t;" + _proxies + "out[t] = out[1024 + t];", lambda x: T, arch=90)
kernel("setmaxnreg", asm("setmaxnreg.dec.sync.aligned.u32 40;") + asm("setmaxnreg.inc.sync.aligned.u32 64;") + "out[t] = t;", lambda x: np.arange(128, dtype=np.uint64), arch=90, threads=128)

# ---- warp ------------------------------------------------------------------------------------------------------------------------
_MODES = [("idx", 5, 31), ("up", 3, 0), ("down", 3, 31), ("bfly", 17, 31), ("idx", 2, 0x181F), ("up", 1, 0x1800), ("down", 9, 0x101F)]
_shfl = "uint32_t d, p;\n" + "".join(
    asm(f"{{.reg .pred q; shfl.sync.{mode}.b32 %0|q, %2, {b}, {c}, 0xffffffff; selp.u32 %1, 1, 0, q;}}", '"=r"(d), "=r"(p)', '"r"(uint32_t(in[t]))') + f"out[{64 * i} + t] = uint64_t(p) << 32 | d;\n"
    for i, (mode, b, c) in enumerate(_MODES)
)


def shfl(x):
    out = []
    for mode, b, c in _MODES:
        for t in range(64):
            lane, segment, clamp = t % 32, c >> 8 & 31, c & 31
            top, base = (lane & segment) | (clamp & ~segment & 31), lane & segment
            j = {"idx": base | (b & ~segment & 31), "up": lane - b, "down": lane + b, "bfly": lane ^ b}[mode]
            valid = j >= top if mode == "up" else j <= top
            out.append(int(valid) << 32 | int(x[t // 32 * 32 + (j if valid else lane)]) & 0xFFFFFFFF)
    return np.array(out, np.uint64)


kernel("shfl", _shfl, shfl)
_VOTES = [("any.pred", 1), ("all.pred", 1), ("uni.pred", 1), ("any.pred", 0), ("all.pred", 32), ("uni.pred", 0)]
_vote = "uint32_t d;\n" + "".join(asm(f"{{.reg .pred p, q; and.b32 %0, %1, 31; setp.lt.u32 p, %0, {n}; vote.sync.{op} q, p, 0xffffffff; selp.u32 %0, 1, 0, q;}}", '"=&r"(d)', '"r"(t)') + f"out[{64 * i} + t] = d;\n" for i, (op, n) in enumerate(_VOTES))
_vote += asm("{.reg .pred p; setp.lt.u32 p, %1, 37; vote.sync.ballot.b32 %0, p, 0xffffffff;}", '"=r"(d)', '"r"(t)') + "out[384 + t] = d;\n"
_vote += asm("match.any.sync.b32 %0, %1, 0xffffffff;", '"=r"(d)', '"r"(t % 3)') + "out[448 + t] = d;\n"


def votes(x):
    match = [sum(1 << j for j in range(32) if (t // 32 * 32 + j) % 3 == t % 3) for t in range(64)]
    return joined(np.repeat(np.array([1, 0, 0, 0, 1, 1], np.uint64), 64), np.where(T < 32, U32, np.uint64(31)), np.array(match, np.uint64))


kernel("vote and match", _vote, votes)
_REDUX = ["add.u32", "add.s32", "and.b32", "or.b32", "xor.b32", "min.s32", "max.s32", "min.u32", "max.u32"]
_FUNCTIONS = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum}
_redux = "uint32_t d;\n" + "".join(asm(f"redux.sync.{op} %0, %1, 0xffffffff;", '"=r"(d)', '"r"(uint32_t(in[t]))') + f"out[{64 * i} + t] = d;\n" for i, op in enumerate(_REDUX))


def reduced(x):
    rows = []
    for op in _REDUX:
        v = low(x).view(np.int32 if op.endswith("s32") else np.uint32).reshape(2, 32)
        rows.append(np.repeat(_FUNCTIONS[op[:-4]].reduce(v, 1, v.dtype).view(np.uint32).astype(np.uint64), 32))
    return np.concatenate(rows)


kernel("redux", _redux, reduced)
kernel("elect", "uint32_t d; " + asm("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}", '"=r"(d)') + "d = __reduce_add_sync(0xffffffff, d); out[t] = d;", lambda x: 0 * T + 1, arch=90)

# ---- mbarrier --------------------------------------------------------------------------------------------------------------------
_B, _GENERIC = '"r"(S + 4096)', '"l"(s + 512)'
_wait = "{{.reg .pred p; W: mbarrier.{0}.b64 p, [%0], {1}; @!p bra W;}}"


def handshake(space: str, address: str, slot: int, wait: str, arch_text: str = "") -> str:
    """Threads of warp 0 write and arrive; all of warp 1 wait and read."""
    arrive = arch_text or f"{{.reg .b64 q; mbarrier.arrive{space}.b64 q, [%0];}}"
    return (
        "if (t == 0) { " + asm(f"mbarrier.init{space}.b64 [%0], 32;", "", address) + "} __syncthreads();\n"
        f"if (t < 32) {{ s[t] = t + {slot}; " + asm(arrive, "", address) + "} else { " + asm(_wait.format(wait + space, 0), "", address)
        + f"out[{32 * slot} + t - 32] = s[63 - t]; }} __syncthreads();\n if (t == 0) {{ " + asm(f"mbarrier.inval{space}.b64 [%0];", "", address) + "} __syncthreads();\n"
    )  # fmt: skip


_mbar = handshake(".shared", _B, 0, "try_wait.parity") + handshake(".shared::cta", _B, 1, "test_wait.parity") + handshake("", _GENERIC, 2, "try_wait.parity")
_state = "if (t == 0) { " + asm("mbarrier.init.shared.b64 [%0], 64;", "", _B) + "} __syncthreads(); s[t] = t;\n" + asm("{.reg .pred p; .reg .b64 q; mbarrier.arrive.shared.b64 q, [%0]; W: mbarrier.try_wait.shared.b64 p, [%0], q; @!p bra W; V: mbarrier.test_wait.shared.b64 p, [%0], q; @!p bra V;}", "", _B) + "out[96 + t] = s[63 - t];"
_state += "__syncthreads(); if (t == 0) { " + asm("mbarrier.inval.shared.b64 [%0];", "", _B) + asm("mbarrier.init.shared.b64 [%0], 1;", "", _B) + "} __syncthreads(); if (t == 0) { " + asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 0;", "", _B) + "} " + asm(_wait.format("try_wait.parity.shared", 0), "", _B)
kernel("mbarrier", _mbar + _state, lambda x: joined(31 - T[:32], 32 - T[:32], 33 - T[:32], 63 - T), arch=90)
_expect = (
    "if (t == 0) { " + asm("mbarrier.init.shared::cta.b64 [%0], 2; fence.mbarrier_init.release.cluster;", "", _B) + "} __syncthreads();\n"
    "if (t == 0) { " + asm("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], 256; mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], 256;", "", _B)
    + asm("mbarrier.arrive.release.cluster.shared::cta.b64 _, [%0];", "", _B)
    + asm("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%1], [%2], 256, [%0];", "", '"r"(S + 4096), "r"(S), "l"(in)')
    + asm("{.reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%1], [%2], 256, [%0], p;}", "", '"r"(S + 4096), "r"(S + 256), "l"(in + 32)')
    + "}\n" + asm(_wait.format("try_wait.parity.shared::cta", 0), "", _B) + "out[t] = s[t];"
)  # fmt: skip
kernel("bulk copies", _expect, lambda x: x[:64], arch=90)
_store = "s[t] = in[t]; " + asm("fence.proxy.async.shared::cta;") + "__syncthreads(); if (t == 0) { " + asm("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256; {.reg .b64 p; createpolicy.fractional.L2::evict_last.b64 p, 1.0; cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%2], [%3], 256, p;} cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0;", "", '"l"(out), "r"(S), "l"(out + 32), "r"(S + 256)') + "}"
kernel("bulk stores", _store, lambda x: x[:64], arch=90)


def cp_async(instruction: str, count: str = "", slot: int = 0, wait: str = "cp.async.commit_group; cp.async.wait_group 0;") -> str:
    size = 16 if ".cg" in instruction else 8
    policy = "createpolicy.fractional.L2::evict_first.b64 p, 1.0;" if "hint" in instruction else ""
    text = f"{{.reg .b64 p; {policy} {instruction} [%0], [%1], {size}{count}{', p' if policy else ''}; {wait}}}"
    return "s[2 * t] = s[2 * t + 1] = 9; " + asm(text, "", '"r"(S + 16 * t), "l"(in + 2 * t)') + f"out[{128 * slot} + 2 * t] = s[2 * t]; out[{128 * slot} + 2 * t + 1] = s[2 * t + 1];\n"


_COPIES = ["cp.async.ca.shared.global", "cp.async.cg.shared::cta.global", "cp.async.cg.shared.global.L2::128B", "cp.async.ca.shared.global.L2::256B", "cp.async.cg.shared.global.L2::cache_hint", "cp.async.ca.shared::cta.global.L2::cache_hint"]
_copies = "".join(cp_async(c, slot=i) for i, c in enumerate(_COPIES)) + cp_async("cp.async.cg.shared.global", ", 8", 6, "cp.async.wait_all;") + cp_async("cp.async.ca.shared.global", ", 0", 7)


def copied(x):
    both = x[:128].reshape(64, 2)
    half, first, none = both.copy(), both.copy(), both.copy()
    half[:, 1], first[:, 1] = 9, 0
    none[:] = [0, 9]
    return joined(*(v.reshape(-1) for v in (half, both, both, half, both, half, first, none)))


kernel("cp.async", _copies, copied)


def cp_arrive(mode: str, space: str, address: str, count: int, slot: int) -> str:
    arrive = "" if mode else f"mbarrier.arrive{space}.b64 q, [%2];"
    return (
        "if (t == 0) { " + asm(f"mbarrier.init{space}.b64 [%0], {count};", "", address) + "} __syncthreads();\n"
        + asm(f"{{.reg .b64 q; cp.async.ca.shared.global [%0], [%1], 8; cp.async.mbarrier.arrive{mode}{space}.b64 [%2]; {arrive}}}", "", f'"r"(S + 8 * t), "l"(in + t), {address}')
        + asm(_wait.format("try_wait.parity" + space, 0), "", address) + f"out[{64 * slot} + t] = s[63 - t]; " + asm("cp.async.wait_all;") + "__syncthreads(); if (t == 0) { " + asm(f"mbarrier.inval{space}.b64 [%0];", "", address) + "} __syncthreads();\n"
    )  # fmt: skip


_arrivals = cp_arrive(".noinc", ".shared", _B, 64, 0) + cp_arrive("", ".shared::cta", _B, 64, 1) + cp_arrive(".noinc", "", _GENERIC, 64, 2)
kernel("cp.async.mbarrier.arrive", _arrivals, lambda x: np.tile(x[:64][::-1], 3), arch=90)
