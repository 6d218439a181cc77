"""The forms that touch memory, wait for other threads or multiply matrices: each becomes a call of the emulated machine (runtime/machine.h)."""

from __future__ import annotations

import re

from forms import form
from ptx import PtxError

TYPES = "b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64"
SPACE = {"global": "g", "shared": "s", "shared::cta": "s", "shared::cluster": "s", "local": "l", "const": "g", "": "a"}
SCOPE = ".cta|.gpu|.sys"


# ---- loads and stores ------------------------------------------------------------------------------------------------------------
def _load(g, ins) -> str:
    order, space, width, kind = g[0], g[1].lstrip("."), g[2], g[3]
    ins.expect(2)
    parts = ins.vector(0)
    if len(parts) != int(width[2:] or 1 if width else 1):
        raise PtxError("a load of another number of registers than its vector has")
    raw = ins.storage(kind)
    if space.startswith("param"):
        load = f"load_param<{raw}, {len(parts)}>(reinterpret_cast<const u8*>({ins.address(1)}), 0)"
    elif order.startswith((".volatile", ".relaxed", ".acquire")):
        load = f"load_strong<{raw}, {len(parts)}>(me, '{SPACE[space]}', {ins.address(1)}, {ins.site()}, {_bool(order.startswith('.acquire'))})"
    else:
        load = f"load<{raw}, {len(parts)}>(me, '{SPACE[space]}', {ins.address(1)}, {ins.site()})"
    return f"const auto v = {load}; " + " ".join(f"put({ins.register(p)}, v.v[{i}]);" for i, p in enumerate(parts) if p != "_")


def _store(g, ins) -> str:
    order, space, width, kind = g[0], g[1].lstrip("."), g[2], g[3]
    ins.expect(2)
    parts = ins.vector(1)
    if len(parts) != int(width[2:] or 1 if width else 1):
        raise PtxError("a store of another number of registers than its vector has")
    raw = ins.storage(kind)
    vector = f"Vector<{raw}, {len(parts)}>{{{{{', '.join(ins.value_of(p, raw) for p in parts)}}}}}"
    if space.startswith("param"):
        return f"const auto v = {vector}; memcpy(reinterpret_cast<u8*>({ins.address(0)}), &v, sizeof v);"
    if order:
        return f"store_strong(me, '{SPACE[space]}', {ins.address(0)}, {ins.site()}, {_bool(order.startswith('.release'))}, {vector});"
    return f"store(me, '{SPACE[space]}', {ins.address(0)}, {ins.site()}, {vector});"


def _bool(v: object) -> str:
    return "true" if v else "false"


# `.nc` and the hints for caches change no result; that nobody writes what `.nc` reads follows from the race detector.
_HINTS = "(.L1::no_allocate|.L1::evict_first)?(.L2::128B|.L2::256B)?"
form(f"ld(.volatile|.relaxed.gpu|.relaxed.sys|.acquire.gpu|.acquire.sys)?(.global|.shared|.shared::cta|.shared::cluster)?(.v2|.v4)?.({TYPES})", _load)
form(f"ld()(.local|.param|.const)(.v2|.v4)?.({TYPES})", _load)
form(f"ld.global.nc{_HINTS}(.v2|.v4)?.({TYPES})", lambda g, ins: _load(("", ".global", g[2], g[3]), ins))
form(f"ld.global(.L1::no_allocate|.ca|.cg|.cs)(.v2|.v4)?.({TYPES})", lambda g, ins: _load(("", ".global", g[1], g[2]), ins))
form(f"st(.volatile|.relaxed.gpu|.relaxed.sys|.release.gpu|.release.sys)?(.global|.shared|.shared::cta|.shared::cluster)?(.v2|.v4)?.({TYPES})", _store)
form(f"st()(.local|.param)(.v2|.v4)?.({TYPES})", _store)
form(f"st.global(.cg|.cs)(.v2|.v4)?.({TYPES})", lambda g, ins: _store(("", ".global", g[1], g[2]), ins))


def _cvta(g, ins) -> str:
    ins.expect(2)
    if "shared" not in g[1]:
        return ins.put(0, ins.value(1, "u64"))
    return ins.put(0, f"u64(to_shared(me, {ins.value(1, 'u64')}, {ins.site()}))" if g[0] else f"to_generic(me, u32({ins.value(1, 'u64')}))")


form("cvta().(global|shared|local|const|param).u64", _cvta)
form("cvta(.to).(global|shared|local|const).u64", _cvta)
form("mapa.shared::cluster.u32", lambda g, ins: ins.put(0, f"map_rank(me, {ins.value(1, 'u32')}, {ins.value(2, 'u32')}, {ins.site()})"), 3)
form(
    "isspacep.(global|shared|local)",
    lambda g, ins: f"{ins.register(ins.operands[0])} = space_of(me, {ins.value(1, 'u64')}) == '{g[0][0]}';",
    2,
)
form("prefetch.global.(L1|L2)", lambda g, ins: ins.nothing(1))
form("prefetch.tensormap", lambda g, ins: f"check_tensor_map(me, {ins.address(0)}, {ins.site()});", 1)
form("createpolicy.fractional.(L2::evict_first|L2::evict_last).b64", lambda g, ins: ins.put(0, "u64(0)"), 2)


# ---- atomics ---------------------------------------------------------------------------------------------------------------------
ATOMIC = {
    "add": "add({o}, {b})", "min": "min({o}, {b})", "max": "max({o}, {b})", "and": "bit_and({o}, {b})", "or": "bit_or({o}, {b})",
    "xor": "bit_xor({o}, {b})", "exch": "{b}", "cas": "{o} == {b} ? {c} : {o}", "inc": "increment({o}, {b})", "dec": "decrement({o}, {b})",
}  # fmt: skip


def _atomic(order, space, op, kind, ins, returns: bool) -> str:
    ins.expect((3 if returns else 2) + (op == "cas"))
    first = 1 if returns else 0
    kind = kind.replace("noftz.", "").replace("b", "u") if kind not in ("noftz.bf16", "noftz.bf16x2") else kind.replace("noftz.", "")
    step = ATOMIC[op].format(o="o", b=ins.value(first + 1, kind), c=ins.value(first + 2, kind) if op == "cas" else "")
    acquire, release = order in (".acquire", ".acq_rel"), order in (".release", ".acq_rel")
    space = SPACE[space.lstrip(".")]
    call = f"modify<{kind}>(me, '{space}', {ins.address(first)}, {ins.site()}, {_bool(acquire)}, {_bool(release)}, [&]({kind} o) {{ return {step}; }})"
    return ins.put(0, call) if returns else call + ";"


for _op, _types in {
    "add": "u32|s32|u64|f32|f64|noftz.f16|noftz.f16x2|noftz.bf16|noftz.bf16x2", "min": "u32|s32|u64|s64", "max": "u32|s32|u64|s64", "and": "b32|b64",
    "or": "b32|b64", "xor": "b32|b64", "exch": "b32|b64", "cas": "b16|b32|b64", "inc": "u32", "dec": "u32",
}.items():  # fmt: skip
    form(
        f"atom(.relaxed|.acquire|.release|.acq_rel)?({SCOPE})?(.global|.shared)?.{_op}.({_types})",
        lambda g, ins, op=_op: _atomic(g[0], g[2], op, g[3], ins, True),
    )
    if _op not in ("exch", "cas"):
        form(
            f"red(.relaxed|.release)?({SCOPE})?(.global|.shared)?.{_op}.({_types})",
            lambda g, ins, op=_op: _atomic(g[0], g[2], op, g[3], ins, False),
        )

# ---- control and synchronisation -------------------------------------------------------------------------------------------------
form("(ret|exit)(.uni)?", lambda g, ins: "return;", 0)
form("trap", lambda g, ins: f'report(&me, "trap", {ins.site()}, "the kernel gives up"); stop(me);', 0)
form("nanosleep.u32", lambda g, ins: f"pause(me, {ins.site()});", 1)
form("bra(.uni)?", lambda g, ins: ins.branch(ins.operands[0]), 1)
form("brx.idx(.uni)?", lambda g, ins: ins.branch_table(), 2)
form("call(.uni)?", lambda g, ins: ins.call())
form("griddepcontrol.wait", lambda g, ins: "grid_wait(me);", 0)
form("griddepcontrol.launch_dependents", lambda g, ins: ";", 0)
form("setmaxnreg.(inc|dec).sync.aligned.u32", lambda g, ins: ins.register_count(), 1)

form("membar.(cta|gl|sys)", lambda g, ins: f"fence(me, {_bool(g[0] == 'cta')});", 0)
form("fence.(sc|acq_rel).(cta|gpu|sys)", lambda g, ins: f"fence(me, {_bool(g[1] == 'cta')});", 0)
form("fence.proxy.async(.global|.shared::cta|.shared::cluster)?", lambda g, ins: "proxy_fence(me);", 0)
form("fence.mbarrier_init.release.cluster", lambda g, ins: "mbarrier_init_fence(me);", 0)


def _bar(g, ins) -> str:
    arrive = g[1] == "arrive"
    ins.expect(2 if arrive else (1, 2))
    threads = ins.value(1, "u32") if len(ins.operands) > 1 else "0"
    return f"bar_{g[1]}(me, {ins.value(0, 'u32')}, {threads}, {ins.site()});"


form("(bar|barrier)(.cta)?.(sync|arrive)(.aligned)?", lambda g, ins: _bar((g[0], g[2]), ins))
form(
    "(bar|barrier)(.cta)?.red(.aligned)?.(popc.u32|and.pred|or.pred)",
    lambda g, ins: f"{ins.register(ins.operands[0])} = bar_reduce(me, {ins.value(1, 'u32')}, {ins.value(2, 'pred')}, {('popc.u32', 'and.pred', 'or.pred').index(g[3])}, {ins.site()});",
    3,
)
form("bar.warp.sync", lambda g, ins: f"warp_sync(me, {ins.value(0, 'u32')}, {ins.site()});", 1)
form("barrier.cluster.arrive(.release|.relaxed)?(.aligned)?", lambda g, ins: f"cluster_arrive(me, {_bool(g[0] != '.relaxed')}, {ins.site()});", 0)
form("barrier.cluster.wait(.acquire)?(.aligned)?", lambda g, ins: f"cluster_wait(me, {ins.site()});", 0)


def _shfl(g, ins) -> str:
    ins.expect(5)
    targets = [t.strip() for t in ins.operands[0].split("|")]
    mode = ("idx", "up", "down", "bfly").index(g[0])
    call = f"shuffle(me, {ins.value(1, 'u32')}, {mode}, {ins.value(2, 'u32')}, {ins.value(3, 'u32')}, {ins.value(4, 'u32')}, {ins.site()}, &valid)"
    valid = f" {ins.register(targets[1])} = valid;" if len(targets) > 1 and targets[1] != "_" else ""
    return f"bool valid; put({ins.register(targets[0])}, {call});{valid}"


def _vote(g, ins) -> str:
    ins.expect(3)
    mask = ins.value(2, "u32")
    ballot = f"ballot(me, {ins.value(1, 'pred')}, {mask}, {ins.site()})"
    if g[0] == "ballot.b32":
        return ins.put(0, ballot)
    test = {"any": "all != 0", "all": f"all == {mask}", "uni": f"all == 0 || all == {mask}"}[g[0].split(".")[0]]
    return f"const u32 all = {ballot}; {ins.register(ins.operands[0])} = {test};"


def _redux(g, ins) -> str:
    ins.expect(3)
    names = {"add": 0, "and": 1, "or": 2, "xor": 3, "min.s32": 4, "max.s32": 5, "min.u32": 6, "max.u32": 7}
    op = names.get(g[0], names.get(g[0].split(".")[0]))
    return ins.put(0, f"redux(me, {ins.value(1, 'u32')}, {op}, {ins.value(2, 'u32')}, {ins.site()})")


def _elect(g, ins) -> str:
    ins.expect(2)
    lane, predicate = (t.strip() for t in ins.operands[0].split("|"))
    if lane != "_":
        raise PtxError("elect.sync with a destination for the lane")
    return f"{ins.register(predicate)} = elect(me, {ins.value(1, 'u32')}, {ins.site()});"


form("shfl.sync.(idx|up|down|bfly).b32", _shfl)
form("vote.sync.(any.pred|all.pred|uni.pred|ballot.b32)", _vote)
form("match.any.sync.b32", lambda g, ins: ins.put(0, f"match_any(me, {ins.value(1, 'u32')}, {ins.value(2, 'u32')}, {ins.site()})"), 3)
form("redux.sync.(add.u32|add.s32|and.b32|or.b32|xor.b32|min.s32|max.s32|min.u32|max.u32)", _redux)
form("elect.sync", _elect)

# ---- mbarrier --------------------------------------------------------------------------------------------------------------------
_SHARED = "(.shared|.shared::cta)?"


def _shared_address(ins, i: int, space: str) -> str:
    """A shared address, or a generic one that the instruction takes for such."""
    return f"u32({ins.address(i)})" if space else f"to_shared(me, {ins.address(i)}, {ins.site()})"


def _arrive(g, ins) -> str:
    expects = bool(g[0])
    has_state = not ins.operands[0].startswith("[")
    ins.expect((1, 2, 3))
    first = 1 if has_state else 0
    count = ins.value(first + 1, "u32") if len(ins.operands) > first + 1 else "1"
    if expects and len(ins.operands) != first + 2:
        raise PtxError("mbarrier.arrive.expect_tx without a count of bytes")
    call = f"mbarrier_arrive(me, {_shared_address(ins, first, g[1])}, {'1' if expects else count}, {count if expects else '0'}, {ins.site()})"
    return ins.put(0, call) if has_state and ins.operands[0] != "_" else call + ";"


def _wait(g, ins) -> str:
    ins.expect((3, 4))  # the fourth is a limit of time
    state = ins.value(2, "u32" if g[1] else "u64")
    call = f"mbarrier_test(me, {_shared_address(ins, 1, g[2])}, {state}, {_bool(g[1])}, {_bool(g[0] == 'try_wait')}, {ins.site()})"
    return f"{ins.register(ins.operands[0])} = {call};"


form(f"mbarrier.init{_SHARED}.b64", lambda g, ins: f"mbarrier_init(me, {_shared_address(ins, 0, g[0])}, {ins.value(1, 'u32')}, {ins.site()});", 2)
form(f"mbarrier.inval{_SHARED}.b64", lambda g, ins: f"mbarrier_inval(me, {_shared_address(ins, 0, g[0])}, {ins.site()});", 1)
form("mbarrier.arrive(.expect_tx)?(.shared|.shared::cta)?.b64", _arrive)
form("mbarrier.arrive(.expect_tx)?.release.cluster.(shared::cluster|shared::cta).b64", _arrive)
form("mbarrier.expect_tx.relaxed.cta.shared::cta.b64", lambda g, ins: f"mbarrier_expect(me, u32({ins.address(0)}), {ins.value(1, 'u32')}, {ins.site()});", 2)
form("mbarrier.(try_wait|test_wait)(.parity)?(.shared|.shared::cta)?.b64", _wait)
form(
    f"cp.async.mbarrier.arrive(.noinc)?{_SHARED}.b64",
    lambda g, ins: f"mbarrier_copies_arrive(me, {_shared_address(ins, 0, g[1])}, {_bool(g[0])}, {ins.site()});",
    1,
)


# ---- copies ----------------------------------------------------------------------------------------------------------------------
def _cp_async(g, ins) -> str:
    if g[2]:
        ins.operands = ins.operands[:-1]  # the policy
    ins.expect((3, 4))
    size = ins.value(2, "u32")
    source = ins.value(3, "u32") if len(ins.operands) > 3 else size
    return f"cp_async(me, u32({ins.address(0)}), {ins.address(1)}, {size}, {source}, {ins.site()});"


form("cp.async.(ca|cg).(shared|shared::cta).global(.L2::128B|.L2::256B)?", lambda g, ins: _cp_async((g[0], g[1], ""), ins))
form("cp.async.(ca|cg).(shared|shared::cta).global.L2::cache_hint", lambda g, ins: _cp_async((g[0], g[1], "hint"), ins))
form("cp.async.commit_group", lambda g, ins: "cp_async_commit(me);", 0)
form("cp.async.wait_group", lambda g, ins: f"cp_async_wait(me, {ins.value(0, 'u32')});", 1)
form("cp.async.wait_all", lambda g, ins: "cp_async_commit(me); cp_async_wait(me, 0);", 0)
form("cp.async.bulk.commit_group", lambda g, ins: "bulk_commit(me);", 0)
form("cp.async.bulk.wait_group(.read)?", lambda g, ins: f"bulk_wait(me, {ins.value(0, 'u32')});", 1)


def _bulk_load(g, ins) -> str:
    multicast, hint = bool(g[1]), bool(g[2])
    ins.expect(4 + multicast + hint)
    ranks = ins.value(4, "u16") if multicast else "0"
    return f"bulk_load(me, u32({ins.address(0)}), {ins.address(1)}, {ins.value(2, 'u32')}, u32({ins.address(3)}), {ranks}, {ins.site()});"


def _tensor(ins, i: int, rank: int) -> tuple[str, str]:
    """The map and the coordinates of [map, {x, y}]."""
    m = re.fullmatch(r"\[\s*([^,]+?)\s*,\s*\{([^}]*)\}\s*\]", ins.operands[i])
    at = [x.strip() for x in m[2].split(",")] if m else []
    if len(at) != rank:
        raise PtxError("a tensor address with another number of coordinates than the instruction has dimensions")
    return ins.address_of(m[1]), f"const int x[] = {{{', '.join(ins.value_of(x, 's32') for x in at)}}};"


def _tensor_load(g, ins) -> str:
    rank, multicast, hint = int(g[0]), bool(g[3]), bool(g[4])
    ins.expect(3 + multicast + hint)
    tensor, at = _tensor(ins, 1, rank)
    ranks = ins.value(3, "u16") if multicast else "0"
    return f"{at} tensor_load(me, u32({ins.address(0)}), {tensor}, x, {rank}, u32({ins.address(2)}), {ranks}, {ins.site()});"


def _tensor_store(g, ins) -> str:
    ins.expect(2 + bool(g[2]))
    tensor, at = _tensor(ins, 0, int(g[0]))
    return f"{at} tensor_store(me, {tensor}, x, {g[0]}, u32({ins.address(1)}), {ins.site()});"


_BYTES = "mbarrier::complete_tx::bytes"
form(f"cp.async.bulk.(shared::cluster|shared::cta).global.{_BYTES}(.multicast::cluster)?(.L2::cache_hint)?", _bulk_load)
form(f"cp.async.bulk.tensor.(1|2|3|4|5)d.(shared::cluster|shared::cta).global(.tile)?.{_BYTES}(.multicast::cluster)?(.L2::cache_hint)?", _tensor_load)
form(
    "cp.async.bulk.global.shared::cta.bulk_group(.L2::cache_hint)?",
    lambda g, ins: ins.expect(3 + bool(g[0])) or f"bulk_store(me, {ins.address(0)}, u32({ins.address(1)}), {ins.value(2, 'u32')}, {ins.site()});",
)
form("cp.async.bulk.tensor.(1|2|3|4|5)d.global.shared::cta(.tile)?.bulk_group(.L2::cache_hint)?", _tensor_store)


# ---- matrices --------------------------------------------------------------------------------------------------------------------
def _ldmatrix(g, ins) -> str:
    ins.expect(2)
    parts = ins.vector(0)
    if len(parts) != int(g[0]):
        raise PtxError("ldmatrix of another number of registers than matrices")
    sets = " ".join(f"{ins.register(p)} = r[{i}];" for i, p in enumerate(parts))
    return f"u32 r[4]; ldmatrix(me, r, {g[0]}, {_bool(g[1])}, u32({ins.address(1)}), {ins.site()}); {sets}"


def _stmatrix(g, ins) -> str:
    ins.expect(2)
    parts = ins.vector(1)
    if len(parts) != int(g[0]):
        raise PtxError("stmatrix of another number of registers than matrices")
    return f"const u32 r[] = {{{', '.join(ins.value_of(p, 'b32') for p in parts)}}}; stmatrix(me, r, {g[0]}, {_bool(g[1])}, u32({ins.address(0)}), {ins.site()});"


form("ldmatrix.sync.aligned.m8n8.x(1|2|4)(.trans)?.(shared|shared::cta).b16", _ldmatrix)
form("stmatrix.sync.aligned.m8n8.x(1|2|4)(.trans)?.(shared|shared::cta).b16", _stmatrix)
form("movmatrix.sync.aligned.m8n8.trans.b16", lambda g, ins: ins.put(0, f"movmatrix(me, {ins.value(1, 'b32')}, {ins.site()})"), 2)


def _mma(k: int, a: str, b: str, saturate: bool, half_sum: bool, ins) -> str:
    ins.expect(4)
    d, x, y, c = (ins.vector(i) for i in range(4))
    width = 16 if "f" in a else int(a[1:])
    if len(x) != k * width // 64 or len(y) * 2 != len(x) or len(d) != len(c) or len(d) != (2 if half_sum else 4):
        raise PtxError("mma with another number of registers than its shape has")
    arrays = "".join(f"const u32 {n}[] = {{{', '.join(ins.value_of(p, 'b32') for p in v)}}}; " for n, v in (("x", x), ("y", y), ("z", c)))
    sets = " ".join(f"{ins.register(p)} = r[{i}];" for i, p in enumerate(d))
    return f"{arrays}u32 r[4]; mma(me, Element::{a}, Element::{b}, {k}, {_bool(half_sum)}, {_bool(saturate)}, r, x, y, z, {ins.site()}); {sets}"


form("mma.sync.aligned.m16n8k(8|16).row.col.f32.(f16.f16|bf16.bf16).f32", lambda g, ins: _mma(int(g[0]), *g[1].split("."), False, False, ins))
form("mma.sync.aligned.m16n8k(8|16).row.col.f16.f16.f16.f16", lambda g, ins: _mma(int(g[0]), "f16", "f16", False, True, ins))
form("mma.sync.aligned.m16n8k(16|32).row.col(.satfinite)?.s32.(s8|u8).(s8|u8).s32", lambda g, ins: _mma(int(g[0]), g[2], g[3], bool(g[1]), False, ins))
form("mma.sync.aligned.m16n8k(32|64).row.col(.satfinite)?.s32.(s4|u4).(s4|u4).s32", lambda g, ins: _mma(int(g[0]), g[2], g[3], bool(g[1]), False, ins))


def _wgmma(n: int, k: int, out: str, a: str, b: str, ins) -> str:
    d = ins.vector(0)
    if len(d) != (n // 4 if out == "f16" else n // 2):
        raise PtxError("wgmma with another number of accumulators than its shape has")
    registers = ins.operands[1].startswith("{")
    first = "const u32* a[] = {" + ", ".join("&" + ins.register(p) for p in ins.vector(1)) + "}; " if registers else ""
    ins.expect((4, 7, 8))
    numbers = ins.operands[4:]  # scale-a, scale-b, and for 16 bits the transpositions: of shared operands only
    if len(numbers) != (0 if out == "s32" else 3 if registers else 4):
        raise PtxError("wgmma with another number of operands than its form has")
    negate = numbers[:2] or ["1", "1"]
    transpose = ["0", "0"] if not numbers else ["0", numbers[2]] if registers else numbers[2:]
    return (
        f"u32* d[] = {{{', '.join('&' + ins.register(p) for p in d)}}}; {first}"
        f"static const WgmmaShape shape{{Element::{a}, Element::{b}, {n}, {k}, {_bool(out == 'f16')}}}; "
        f"wgmma(me, shape, d, {len(d)}, {'a' if registers else 'nullptr'}, {'0' if registers else ins.value(1, 'u64')}, {ins.value(2, 'u64')}, "
        f"{ins.value(3, 'pred')}, {', '.join(negate)}, {', '.join(transpose)}, {ins.site()});"
    )


_N = "8|16|32|64|112|128|256"
form(f"wgmma.mma_async.sync.aligned.m64n({_N})k16.(f32|f16).f16.f16", lambda g, ins: _wgmma(int(g[0]), 16, g[1], "f16", "f16", ins))
form(f"wgmma.mma_async.sync.aligned.m64n({_N})k16.f32.bf16.bf16", lambda g, ins: _wgmma(int(g[0]), 16, "f32", "bf16", "bf16", ins))
form(f"wgmma.mma_async.sync.aligned.m64n({_N})k32.s32.(s8|u8).(s8|u8)", lambda g, ins: _wgmma(int(g[0]), 32, "s32", g[1], g[2], ins))
form("wgmma.fence.sync.aligned", lambda g, ins: "wgmma_fence(me);", 0)
form("wgmma.commit_group.sync.aligned", lambda g, ins: "wgmma_commit(me);", 0)
form("wgmma.wait_group.sync.aligned", lambda g, ins: f"wgmma_wait(me, {ins.value(0, 'u32')});", 1)
