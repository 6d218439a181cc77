"""Llama: Llama 2 and 3, SmolLM2, TinyLlama and all that share `model_type: llama`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import memory, ops
from ..cache import Batch, KVCache, LayerCache
from ..errors import CheckpointError
from ..layers import Dense, Embedding, weight_layers
from ..linear import Linear
from ..transforms import HeadBasis, Room, SiteInput, Transform

# The linears of a block in the order they run, by the input they share: quantizers treat a site's members alike.
SITES = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_in": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "down_in": ("mlp.down_proj",),
}
GATED = ("mlp_in",)  # sites whose first linear's output goes through SiLU and multiplies the second's
LINEARS = tuple(name for site in SITES.values() for name in site)
NORMS = ("input_layernorm", "post_attention_layernorm")
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
RECORDED_LOGITS = 64  # rows; the logits of a whole prompt are too large to keep
RECORDED = 8  # numbers of rows whose programs are kept: decoding meets few, and a prefill chunk holds megabytes


@dataclass
class Config:
    """The keys of config.json that the model reads, with the defaults of Llama 2."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"

    @classmethod
    def from_dict(cls, config: dict) -> Config:
        """Read a config.json; raises CheckpointError naming the key that is absent or makes no sense."""
        rope = config.get("rope_parameters") or {}  # transformers 5 moved the rope keys in here
        for name, value in (("rope_parameters", rope), ("rope_scaling", config.get("rope_scaling") or {})):
            if not isinstance(value, dict):
                raise CheckpointError(f"config.json: {name} is {value!r}, expected an object")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in config.items() if k in known and v is not None}
        if "rope_theta" in rope:
            values.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            values.setdefault("rope_scaling", rope)
        try:
            c = cls(**values)
            c._check_types()
            c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
            c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
            return c._check()
        except TypeError as e:
            raise CheckpointError(f"config.json: {str(e).replace('Config.__init__() ', '')}") from e

    def _check_types(self) -> None:
        derived = ("num_key_value_heads", "head_dim")  # 0 until the others are known to be sound
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (type(value) is not int or not (f.name not in derived) <= value < 1 << 24):
                raise CheckpointError(f"config.json: {f.name} is {value!r}, expected a positive integer")
            if f.type == "float" and not (type(value) in (int, float) and 0 < value < 1e12):
                raise CheckpointError(f"config.json: {f.name} is {value!r}, expected a positive number")
            if f.type == "bool" and type(value) is not bool:
                raise CheckpointError(f"config.json: {f.name} is {value!r}, expected true or false")

    def _check(self) -> Config:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(f"config.json: {self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key heads")
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head_dim is {self.head_dim}, RoPE needs an even number")
        if self.hidden_act not in ("silu", "swish"):
            raise CheckpointError(f"config.json: hidden_act {self.hidden_act!r} is not supported (silu is)")
        rope_frequencies(self)
        return self

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of one of LINEARS."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        h, i = self.hidden_size, self.intermediate_size
        return {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q),
                "gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}[name.rsplit(".", 1)[-1]]  # fmt: skip

    def has_bias(self, name: str) -> bool:
        return self.attention_bias if name.startswith("self_attn") else self.mlp_bias


def rope_frequencies(c: Config) -> Tensor:
    """f64[head_dim/2]: radians a position turns each pair by. Scaling: "linear", or "llama3" as in Llama 3.1's release."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    scaling = c.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        if kind == "default":
            return freq
        if kind == "linear":
            return freq / _positive(scaling, "factor")
        if kind == "llama3":
            factor, low, high, original = (_positive(scaling, k) for k in LLAMA3_SCALING)
            if high <= low:
                raise CheckpointError(f"config.json: rope_scaling {scaling}: high_freq_factor must be above low_freq_factor")
            turns = original * freq / (2 * math.pi)
            blend = ((turns - low) / (high - low)).clamp(0, 1)
            return freq * (blend + (1 - blend) / factor)
    except KeyError as e:
        raise CheckpointError(f"config.json: rope_scaling {scaling} lacks {e}") from e
    raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported (default, linear and llama3 are)")


def _positive(scaling: dict, key: str) -> float:
    value = scaling[key]
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise CheckpointError(f"config.json: rope_scaling {scaling}: {key} must be a positive number")
    return float(value)


def rope_table(c: Config, length: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each f32[length, head_dim/2]."""
    angle = torch.outer(torch.arange(length, dtype=torch.float64), rope_frequencies(c))
    return angle.cos().float(), angle.sin().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in Hugging Face's half-split order: x[..., t, d] with cos, sin [t, d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def block_forward(w: dict[str, Tensor], x: Tensor, c: Config, cos: Tensor, sin: Tensor, hook=None, edit=None) -> Tensor:
    """One block in plain, differentiable torch over whole sequences: x[b, t, hidden] → the same shape.

    Calibration and tests use it; generation runs `Block`. `w` holds `<linear>.weight`, `<linear>.bias` and `<norm>.weight`;
    cos, sin are f32[t, head_dim/2]. `hook(site, input)` sees the input of each site of SITES. `edit(what, value)` returns what goes
    on instead: of a site's input [b, t, k], and of "query" and "key" after RoPE and "value", each [b, heads, t, head_dim].
    """
    b, t, _ = x.shape

    def linear(name: str, v: Tensor) -> Tensor:
        return F.linear(v, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def heads(v: Tensor) -> Tensor:
        return v.view(b, t, -1, c.head_dim).transpose(1, 2)

    see = hook or (lambda site, value: None)
    edit = edit or (lambda what, value: value)
    h = rms_norm(x, w["input_layernorm.weight"], c.rms_norm_eps)
    see("attn_in", h)
    h = edit("attn_in", h)
    q, k, v = (heads(linear(name, h)) for name in SITES["attn_in"])
    q, k, v = edit("query", rotate(q, cos, sin)), edit("key", rotate(k, cos, sin)), edit("value", v)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    a = a.transpose(1, 2).reshape(b, t, -1)
    see("o_in", a)
    x = x + linear("self_attn.o_proj", edit("o_in", a))
    h = rms_norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps)
    see("mlp_in", h)
    h = edit("mlp_in", h)
    g = F.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
    see("down_in", g)
    return x + linear("mlp.down_proj", edit("down_in", g))


class Block(nn.Module):
    """One block on our kernels. Linears that share an input are one; `transforms` has what changes the basis of each site's, if anything."""

    def __init__(self, c: Config, norms: list[Tensor], linears: list[nn.Module], transforms: list[Transform | None], heads: HeadBasis):
        super().__init__()
        self.config, self.heads = c, heads
        before = (norms[0], None, norms[1], None)  # by site
        self.qkv, self.o, self.gate_up, self.down = linears
        self.exact = isinstance(self.qkv, Dense)  # who runs float weights wants float results
        sites = [_site(c, t, norm, weight_layers(layer), self.exact) for t, norm, layer in zip(transforms, before, linears)]
        self.attn_in, self.o_in, self.mlp_in, self.down_in = sites
        self.transform_bytes = heads.nbytes + sum(t.nbytes for t in transforms if t is not None)  # in a checkpoint

    def forward(self, rows: Rows, kv: LayerCache, rope: tuple[Tensor, Tensor], program: ops.Program | None) -> None:
        """Updates rows.x in place, now or whenever `program` runs."""
        c = self.config
        self._linear(self.qkv, self.attn_in, rows.x, rows, program, out=rows.qkv)
        ops.rope_kv(
            rows.qkv, *rope, kv.k, kv.v, rows.slot, rows.position, c.num_attention_heads,
            kv_scale=kv.scale, basis=self.heads.basis, clip=self.heads.clip, exact=self.exact, program=program,
        )  # fmt: skip
        q = rows.qkv[:, : c.num_attention_heads * c.head_dim]
        ops.attention(
            q, kv.k, kv.v, rows.slot, rows.position, c.head_dim**-0.5, out=rows.a, exact=self.exact, kv_scale=kv.scale, program=program
        )  # fmt: skip
        self._linear(self.o, self.o_in, rows.a, rows, program, residual=rows.x, out=rows.x)
        self._linear(self.gate_up, self.mlp_in, rows.x, rows, program, out=rows.g)
        self._linear(self.down, self.down_in, rows.g, rows, program, residual=rows.x, out=rows.x)

    @staticmethod
    def _linear(layer: nn.Module, site: SiteInput, x: Tensor, rows: Rows, program: ops.Program | None, **results: Tensor) -> None:
        value, codes = site(x, rows.room, program)
        layer(value, program=program, codes=codes, **results)


def _site(c: Config, transform: Transform | None, norm: Tensor | None, layers: list[Linear | Dense], exact: bool) -> SiteInput:
    """Of linears that read the same input."""
    quantized = [layer for layer in layers if isinstance(layer, Linear)]
    both = len(quantized) < len(layers) or any(layer.outliers or layer.columns for layer in quantized)
    bits, clip = (quantized[0].act_bits, quantized[0].act_clip) if quantized else (16, None)
    return SiteInput(transform, norm, c.rms_norm_eps, bits, clip, both, exact)


class Rows:
    """The buffers that m rows pass through the model in: token i64[m], slot and position i32[m]; x f32[m, hidden] and what each linear makes
    of it, room for what it reads; wanted i64[w] and last f32[w, hidden], the rows whose logits are asked for."""

    def __init__(self, c: Config, m: int, wanted: int):
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        widest = max(c.hidden_size, q, c.intermediate_size)
        shapes = (m, c.hidden_size), (m, q + 2 * kv), (m, q), (m, c.intermediate_size), (Room.size(m, widest),)
        self.x, self.qkv, self.a, self.g, room = memory.together(*shapes)
        self.room = Room(room, m, widest)
        self.token, self.wanted = torch.empty(m, dtype=torch.int64), torch.empty(wanted, dtype=torch.int64)
        self.slot, self.position = torch.empty(m, dtype=torch.int32), torch.empty(m, dtype=torch.int32)
        self.last = memory.empty(wanted, c.hidden_size)


class Model(nn.Module):
    """The decoder: rows of tokens in, logits out. One forward serves prefill, decode and a mix of both."""

    def __init__(self, c: Config, embedding: Embedding, blocks: list[Block], norm: Tensor, head: nn.Module, kv_bits: int = 16):
        super().__init__()
        self.config, self.embedding, self.norm, self.head, self.kv_bits = c, embedding, norm, head, kv_bits
        self.blocks = nn.ModuleList(blocks)
        self._rope = rope_table(c, 1)
        self._recordable = all(getattr(layer, "recordable", True) for layer in (*self.blocks.modules(), embedding, head))
        self._recorded: dict[tuple[int, int], tuple[Rows, ops.Program, Tensor]] = {}  # by rows and wanted rows, for the cache below
        self._recorded_for: KVCache | None = None

    def cache(self, slots: int, length: int) -> KVCache:
        c = self.config
        self._recorded, self._recorded_for = {}, None  # let go of the last cache before the next one is allocated
        return KVCache(c.num_hidden_layers, slots, c.num_key_value_heads, length, c.head_dim, self.kv_bits)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Logits f32[wanted rows, vocab]; writes the rows' keys and values to the cache.

        All ops are recorded once for a number of rows and a cache: a decode step is then one native call, where the Python between some
        220 ops would take as long as the ops.
        """
        m, wanted = batch.token.shape[0], batch.wanted if batch.wanted is not None else torch.arange(batch.token.shape[0])
        if self._recorded_for is not cache:
            self._recorded, self._recorded_for = {}, cache
            if self._rope[0].shape[0] < cache.length:
                self._rope = rope_table(self.config, cache.length)
        key = (m, wanted.shape[0])
        rows, program, logits = self._recorded.get(key) or (Rows(self.config, *key), None, None)
        for to, source in ((rows.token, batch.token), (rows.slot, batch.slot), (rows.position, batch.position), (rows.wanted, wanted)):
            to.copy_(source)
        if not self._recordable or wanted.shape[0] > RECORDED_LOGITS:
            return self._run(rows, cache, None)
        if program is None:
            program = ops.Program()
            logits = self._run(rows, cache, program)
            if len(self._recorded) == RECORDED:
                self._recorded.pop(next(iter(self._recorded)))
            self._recorded[key] = rows, program, logits
        program.run()
        # By numpy: torch's copy would wake its threads, which then spin on the cores that the next step needs.
        return torch.from_numpy(logits.numpy().copy())

    def _run(self, rows: Rows, cache: KVCache, program: ops.Program | None) -> Tensor:
        self.embedding(rows.token, rows.x, program)
        for i, block in enumerate(self.blocks):
            block(rows, cache.layer(i), self._rope, program)
        ops.rms_norm(rows.x, self.norm, self.config.rms_norm_eps, out=rows.last, row=rows.wanted, program=program)
        return self.head(rows.last, program=program)
