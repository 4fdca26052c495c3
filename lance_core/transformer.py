"""The two-expert decoder: a token's projections, norms and MLP depend on its expert, its attention does not.

Text, boundary and vision-tower tokens use the understanding expert (plain names in the checkpoint), latent tokens
the generation expert (names with `_moe_gen`). Inside the decoder the tokens of each expert stand together, one
stream each, so that neither is gathered or scattered; attention joins them. A noise block, and every visual block of
the context, is bidirectional, so the order of the tokens inside it is free.

Three forwards share the layers and differ in what attention sees: `prefill` computes the context once and returns
its keys and values, `velocities` runs a noise block against those of one or more branches and keeps nothing, `decode`
adds one token at a time. Each calls every layer once, whatever the number of branches, so that weights which come and
go with the layers come once.

Source: modeling/lance/{lance,qwen2_navit}.py of bytedance/Lance; arXiv 2605.18678.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, attention as default_attention
from .config import LATENT_CHANNELS, MAX_LATENT_SIDE, TextConfig
from .errors import LanceError
from .rope import rotary_table, rotate

EXPERTS = ("", "_moe_gen")

Streams = tuple[Tensor, ...]  # [B, n, D] of the understanding expert and, where there are any, of the other one
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v `[B, L, heads, hd]`) -> `[B, L, nh, hd]`
COMPILED_VARIANTS = 64  # of a function; behind 8 torch would give up
MLP_CHUNK = 10752  # tokens in an MLP at a time: a clip of 121 frames would take 3 GB in bf16; 49 frames are two chunks


@dataclass(frozen=True)
class Block:
    """One attention segment of the context. Its tokens, in this order: ids, embeddings, latent rows."""

    ids: Tensor  # [n] token ids: a text, or a visual block's two boundaries
    positions: Tensor  # [3, n + m] of the tokens in the order above
    embeddings: Tensor | None = None  # [m, D] from the vision tower
    latent: Tensor | None = None  # [m, 48] clean rows, normalised
    latent_ids: Tensor | None = None  # [m] rows of the position table
    causal: bool = False

    def without_last(self) -> Block:
        """A text block without its last token, which the decoder reads on its own to write the first new one."""
        return replace(self, ids=self.ids[:-1], positions=self.positions[:, :-1])


@dataclass(frozen=True)
class NoiseBlock:
    """What a request's noise block has beside the latent itself; the same at every step."""

    boundaries: Tensor  # [1, 2, D] embeddings of <|vision_start|> and <|vision_end|>
    position_rows: Tensor  # [N, D] rows of the latent position table
    cos: Tensor  # [N + 2, 1, hd], boundaries first
    sin: Tensor


@dataclass(frozen=True)
class Context:
    """Keys and values of everything before the noise block: per layer, pieces `[1, n, nkv, hd]` in order.

    Pieces are shared, not copied, by contexts that begin alike (the two branches of guidance).
    """

    layers: tuple[tuple[tuple[Tensor, Tensor], ...], ...]

    @property
    def length(self) -> int:
        return sum(k.shape[1] for k, _ in self.layers[0])

    def to(self, device: torch.device | str) -> Context:
        return Context(tuple(tuple((k.to(device), v.to(device)) for k, v in pieces) for pieces in self.layers))


@dataclass(frozen=True)
class Branch:
    """One side of guidance: its context and its noise block. attention: instead of the model's."""

    context: Context
    block: NoiseBlock
    attention: Attention | None = None


@dataclass(frozen=True)
class Run:
    """What goes through the layers as one batch: streams, their rotations, and what they attend to."""

    streams: Streams
    cos: Tensor  # `[L, 1, hd]`, or `[B, L, 1, hd]`
    sin: Tensor
    attend: Attend


class DecodeCache:
    """A context with room for `extra` more tokens, filled in place as text is written."""

    def __init__(self, context: Context, extra: int):
        self.length = context.length
        self.layers = []
        for pieces in context.layers:
            pair = [torch.cat([piece[i] for piece in pieces], dim=1) for i in (0, 1)]
            self.layers.append(tuple(F.pad(x, (0, 0, 0, 0, 0, extra)) for x in pair))

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0][0].dtype

    def append(self, layer: int, k: Tensor, v: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Stores k and v `[1, n, nkv, hd]` behind what is there; returns all of this layer.

        index `[n]`: where to store them, on the device; the result is then the whole memory, used or not.
        """
        keys, values = self.layers[layer]
        if index is not None:
            return keys.index_copy_(1, index, k), values.index_copy_(1, index, v)
        end = self.length + k.shape[1]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]


def latent_position_ids(t: int, h: int, w: int) -> Tensor:
    """Rows of the latent position table for a block of t x h x w tokens, `[t * h * w]` int64, (t h w) row-major.

    Frames are 4,096 apart and latent rows 64, whatever the block's size: a block wider than 64 runs over into the
    next row, as in the official code (data/data_utils.py).
    """
    frame, row, column = torch.arange(t), torch.arange(h), torch.arange(w)
    ids = frame[:, None, None] * MAX_LATENT_SIDE**2 + row[:, None] * MAX_LATENT_SIDE + column
    return ids.flatten()


def latent_position_rows(ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Those rows of the table, `[n, dim]` on the CPU: sines and cosines of the frame, the row and the column.

    Computed in float64 rather than looked up, for the whole table would take 1 GB; each axis has few positions, so only
    their rows are computed and then repeated. Source: modeling/lance/modeling_utils.py, PositionEmbedding3D.
    """
    third = 2 * (dim // 6)
    axes = (ids // MAX_LATENT_SIDE**2, ids // MAX_LATENT_SIDE % MAX_LATENT_SIDE, ids % MAX_LATENT_SIDE)
    columns = []
    for position, width in zip(axes, (third, third, dim - 2 * third)):
        frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
        places, where = position.cpu().unique(return_inverse=True)
        angles = places.double()[:, None] * frequencies
        columns.append(torch.cat((angles.sin(), angles.cos()), dim=1).to(dtype)[where])
    return torch.cat(columns, dim=1)


def timestep_features(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """`[cos | sin]` features `[..., dim]` float32 of timesteps t `[...]` in 0..1 (not x1000)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedder(nn.Module):
    def __init__(self, dim: int, operations, **factory):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(256, dim, **factory), nn.SiLU(), operations.Linear(dim, dim, **factory)
        )

    def forward(self, t: Tensor, dtype) -> Tensor:
        return self.mlp(timestep_features(t).to(dtype))


class MLP(nn.Module):
    def __init__(self, config: TextConfig, operations, **factory):
        super().__init__()
        inner = config.intermediate_size
        self.gate_proj = operations.Linear(config.hidden_size, inner, bias=False, **factory)
        self.up_proj = operations.Linear(config.hidden_size, inner, bias=False, **factory)
        self.down_proj = operations.Linear(inner, config.hidden_size, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SelfAttention(nn.Module):
    """Projections, head norms and output of both experts around one attention."""

    def __init__(self, config: TextConfig, operations, **factory):
        super().__init__()
        self.head_dim = config.head_dim
        inner, inner_kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        for expert in EXPERTS:
            for name, width in (("q", inner), ("k", inner_kv), ("v", inner_kv)):
                self.add_module(f"{name}_proj{expert}", operations.Linear(config.hidden_size, width, **factory))
            self.add_module(f"o_proj{expert}", operations.Linear(inner, config.hidden_size, bias=False, **factory))
            for name in ("q_norm", "k_norm"):
                norm = operations.RMSNorm(config.head_dim, eps=config.rms_norm_eps, **factory)
                self.add_module(f"{name}{expert}", norm)

    def heads(self, name: str, expert: str, x: Tensor) -> Tensor:
        return getattr(self, f"{name}_proj{expert}")(x).unflatten(-1, (-1, self.head_dim))  # [B, n, heads, hd]

    def project(self, streams: Streams, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, L, heads, hd]` of all streams."""
        pairs = tuple(zip(EXPERTS, streams))
        q = rotate(join([getattr(self, "q_norm" + e)(self.heads("q", e, x)) for e, x in pairs]), cos, sin)
        k = rotate(join([getattr(self, "k_norm" + e)(self.heads("k", e, x)) for e, x in pairs]), cos, sin)
        return q, k, join([self.heads("v", e, x) for e, x in pairs])


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for all layers, for changing sizes."""
    return torch.compile(function, dynamic=True)


class DecoderLayer(nn.Module):
    compiled = False  # what comes before and after attention; attention itself stays outside, with a host's work there

    def __init__(self, config: TextConfig, operations, **factory):
        super().__init__()
        self.self_attn = SelfAttention(config, operations, **factory)
        for expert in EXPERTS:
            self.add_module(f"mlp{expert}", MLP(config, operations, **factory))
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
                self.add_module(f"{name}{expert}", norm)

    def forward(self, index: int, runs: Sequence[Run]) -> list[Run]:
        """All runs, one after another, through this layer, which is the index-th."""
        return [replace(run, streams=self.step(index, run)) for run in runs]

    def step(self, index: int, run: Run) -> Streams:
        q, k, v = self.maybe_compiled(DecoderLayer.before)(self, run.streams, run.cos, run.sin)
        attended = run.attend(index, q, k, v).flatten(2)  # [B, L, D]
        parts = attended.split([x.shape[1] for x in run.streams], dim=1)
        return tuple(self.by_chunks(e, x, part) for e, x, part in zip(EXPERTS, run.streams, parts))

    def before(self, streams: Streams, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes, of all streams."""
        normed = tuple(getattr(self, "input_layernorm" + e)(x) for e, x in zip(EXPERTS, streams))
        return self.self_attn.project(normed, cos, sin)

    def after(self, expert: str, x: Tensor, attended: Tensor) -> Tensor:
        """A stream `[B, n, D]` with what attention gave for it, and with the MLP of that."""
        x = x + getattr(self.self_attn, "o_proj" + expert)(attended)
        return x + getattr(self, "mlp" + expert)(getattr(self, "post_attention_layernorm" + expert)(x))

    def by_chunks(self, expert: str, x: Tensor, attended: Tensor) -> Tensor:
        """`after`, in chunks where a stream is so long that the MLP would fill the memory."""
        size = max(1, MLP_CHUNK // len(x))
        after = partial(self.maybe_compiled(DecoderLayer.after), self, expert)
        if x.shape[1] <= size:
            return after(x, attended)
        if torch.is_grad_enabled():  # gradients cannot pass through what is written into
            return torch.cat([after(*parts) for parts in zip(x.split(size, 1), attended.split(size, 1))], dim=1)
        out = torch.empty_like(x)
        for result, *parts in zip(out.split(size, 1), x.split(size, 1), attended.split(size, 1)):
            result.copy_(after(*parts))
        return out

    def maybe_compiled(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(method) if self.compiled else method


class Decoder(nn.Module):
    def __init__(self, config: TextConfig, operations, **factory):
        super().__init__()
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, operations, **factory) for _ in range(config.num_hidden_layers)
        )
        for expert in EXPERTS:
            norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
            self.add_module(f"norm{expert}", norm)

    def forward(self, runs: Sequence[Run]) -> list[Streams]:
        """All layers, without the final norms: each caller needs one stream of the result at most."""
        for index, layer in enumerate(self.layers):
            runs = layer(index, runs)
        return [run.streams for run in runs]


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig, operations, **factory):
        super().__init__()
        self.model = Decoder(config, operations, **factory)
        self.lm_head = operations.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)


class LanceTransformer(nn.Module):
    """The language model with both experts and the layers that take latents in and out.

    operations: where layers come from (`torch.nn`, or a host's replacement that casts and offloads).
    attention: called once per layer and forward (and per block in `prefill`), so a host's may raise to stop.
    dtype: of the weights, float32 or bfloat16; each forward computes in it, or in the dtype that it is given where
    the layers cast their weights.
    rounded_rope: whether rotary frequencies are rounded to bf16; None: exactly when computing in bfloat16.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        attention: Attention = default_attention,
        operations=nn,
        dtype=None,
        device=None,
        rounded_rope: bool | None = None,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.attention = attention
        self.dtype = dtype or torch.get_default_dtype()
        self.rounded_rope = rounded_rope
        self.language_model = LanguageModel(config, operations, **factory)
        self.time_embedder = TimeEmbedder(config.hidden_size, operations, **factory)
        self.vae2llm = operations.Linear(LATENT_CHANNELS, config.hidden_size, **factory)
        self.llm2vae = operations.Linear(config.hidden_size, LATENT_CHANNELS, **factory)

    def context_memory(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the keys and values of a context of so many tokens."""
        config = self.config
        width = config.num_key_value_heads * config.head_dim
        return 2 * tokens * width * config.num_hidden_layers * (dtype or self.dtype).itemsize

    def working_memory(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of what lives at the same time in a layer for so many tokens, all samples of a batch together.

        The residual streams and what attention takes and gives, of all tokens; gate, up and their product, of those
        that are in an MLP at a time. A quick figure for hosts; `memory.painting` counts.
        """
        width = 10.5 * self.config.hidden_size * tokens + 3 * self.config.intermediate_size * min(tokens, MLP_CHUNK)
        return int(width * (dtype or self.dtype).itemsize)

    def noise_memory(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the noise blocks of both branches for a target of so many tokens: position rows, and rotations."""
        rows = self.config.hidden_size * (dtype or self.dtype).itemsize
        return tokens * (rows + 2 * 2 * self.config.head_dim * torch.float32.itemsize)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`rotary_table` of positions `[3, L]` with this model's sections, theta and rounding."""
        config = self.config
        rounded = dtype == torch.bfloat16 if self.rounded_rope is None else self.rounded_rope
        return rotary_table(positions, config.mrope_section, config.rope_theta, rounded, dtype)

    def embed_text(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids `[n]` -> `[1, n, D]`."""
        return self.language_model.model.embed_tokens(ids)[None].to(dtype)

    def embed_latent(self, rows: Tensor, t: Tensor, position_rows: Tensor) -> Tensor:
        """Latent rows `[B, N, 48]` (normalised) at times t -> `[B, N, D]`.

        t `[B, n]`: each of the n times belongs to N/n consecutive rows, so n is 1, the number of frames, or N.
        position_rows `[N, D]`, whose dtype is that of the computation.
        """
        dtype = position_rows.dtype
        time = self.time_embedder(t, dtype)
        if t.shape[1] > 1:
            time = time.repeat_interleave(rows.shape[1] // t.shape[1], dim=1)
        return self.vae2llm(rows.to(dtype)) + time + position_rows

    def noise_block(self, boundary_ids: Tensor, positions: Tensor, rows: Tensor) -> NoiseBlock:
        """Prepares a noise block for `denoise`, which computes in the dtype of `rows`.

        boundary_ids `[2]`, positions `[3, 2 + N]` boundaries first, rows `[N, D]` of the latent position table.
        """
        return NoiseBlock(self.embed_text(boundary_ids, rows.dtype), rows, *self.rotary(positions, rows.dtype))

    def prefill(
        self,
        blocks: Sequence[Block],
        past: Context | None = None,
        *,
        dtype: torch.dtype | None = None,
        attention: Attention | None = None,
    ) -> Context:
        """Keys and values of `blocks`, behind those of `past`. One pass: the weights are read once.

        A block sees every block before it and, of itself, everything, or what came before where it is causal.
        dtype: of the computation; attention: instead of the model's.
        """
        dtype = dtype or self.dtype
        if len(blocks) > 1 and sum(block.positions.shape[1] for block in blocks) > MLP_CHUNK:
            for block in blocks:  # in one pass they would fill the memory, and passes as long as these are no slower
                past = self.prefill([block], past, dtype=dtype, attention=attention)
            return past
        und, gen, und_positions, gen_positions = [], [], [], []
        order, lengths = [[], []], []  # where each block's tokens stand in the streams
        for index, block in enumerate(blocks):
            own = [self.embed_text(block.ids, dtype)]
            if block.embeddings is not None:
                own.append(block.embeddings[None].to(dtype))
            und += own
            n = sum(x.shape[1] for x in own)
            und_positions.append(block.positions[:, :n])
            order[0].append(torch.full((n,), index))
            if block.latent is not None:
                rows = latent_position_rows(block.latent_ids, self.config.hidden_size, dtype)
                rows = rows.to(block.latent.device)
                gen.append(self.embed_latent(block.latent[None], block.latent.new_zeros(1, 1), rows))
                gen_positions.append(block.positions[:, n:])
                order[1].append(torch.full((gen[-1].shape[1],), index))
            lengths.append(block.positions.shape[1])

        streams = tuple(torch.cat(parts, dim=1) for parts in (und, gen) if parts)
        cos, sin = self.rotary(torch.cat(und_positions + gen_positions, dim=1), dtype)
        to_blocks = torch.argsort(torch.cat(order[0] + order[1]), stable=True).to(cos.device) if gen else None
        to_streams = torch.argsort(to_blocks) if gen else None
        ends = list(accumulate(lengths))
        past_layers = past.layers if past is not None else ((),) * self.config.num_hidden_layers
        layers: list[tuple[tuple[Tensor, Tensor], ...]] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if to_blocks is not None:
                q, k, v = (x.index_select(1, to_blocks) for x in (q, k, v))
            pieces = (*past_layers[layer], (k, v))
            layers.append(pieces)
            keys, values = joined(pieces)
            earlier = keys.shape[1] - k.shape[1]
            out = []
            for block, length, end in zip(blocks, lengths, ends):
                mask = lower_right(length, earlier + end, q.device) if block.causal and length > 1 else None
                visible = slice(0, earlier + end)
                q_own = q[:, end - length : end]
                out.append(self.attend(q_own, keys[:, visible], values[:, visible], mask, attention))
            out = join(out)
            return out if to_streams is None else out.index_select(1, to_streams)

        self.language_model.model([Run(streams, cos, sin, attend)])
        return Context(tuple(layers))

    def denoise(self, rows: Tensor, t: Tensor, block: NoiseBlock, context: Context) -> Tensor:
        """Velocity of one branch, as `velocities` gives it."""
        return self.velocities(rows, t, [Branch(context, block)])[0]

    def velocities(
        self, rows: Tensor, t: Tensor, branches: Sequence[Branch], *, together: bool = False
    ) -> list[Tensor]:
        """Velocities (from data to noise) of the same rows on each branch, `[B, N, 48]`, in the blocks' dtype.

        rows `[B, N, 48]` normalised latents; t `[B, n]` as in `embed_latent`. together: the branches as one batch, so
        that there are half as many operations and twice the working memory; otherwise in turn, layer by layer.
        """
        gen = self.embed_latent(rows, t, branches[0].block.position_rows)
        if together:
            return self.embedded_velocities([(gen.repeat(len(branches), 1, 1), branches)])
        return self.embedded_velocities([(gen, [branch]) for branch in branches])

    def batch_velocities(
        self, rows: Tensor, t: Tensor, branches: Sequence[Branch], *, together: bool = True
    ) -> list[Tensor]:
        """As `velocities`, where each of n branches has rows of its own: `[n * B, N, 48]`, branch by branch."""
        gen = self.embed_latent(rows, t, branches[0].block.position_rows)
        if together:
            return self.embedded_velocities([(gen, branches)])
        return self.embedded_velocities([(own, [branch]) for own, branch in zip(gen.chunk(len(branches)), branches)])

    def embedded_velocities(self, groups: Sequence[tuple[Tensor, Sequence[Branch]]]) -> list[Tensor]:
        """Velocities of embedded rows `[n * B, N, D]` on n branches each, all groups in one pass through the layers."""
        results = self.language_model.model([self.noise_run(gen, branches) for gen, branches in groups])
        norm = self.language_model.model.norm_moe_gen
        return [v for (_, x), (_, branches) in zip(results, groups) for v in self.llm2vae(norm(x)).chunk(len(branches))]

    def noise_run(self, gen: Tensor, branches: Sequence[Branch]) -> Run:
        """Embedded rows `[n * B, N, D]` of n branches, and their boundaries, as one batch."""
        batch = len(gen) // len(branches)
        und = torch.cat([branch.block.boundaries.expand(batch, -1, -1) for branch in branches])
        cos, sin = branches[0].block.cos, branches[0].block.sin
        if len(branches) > 1:
            cos = torch.stack([branch.block.cos for branch in branches]).repeat_interleave(batch, 0)
            sin = torch.stack([branch.block.sin for branch in branches]).repeat_interleave(batch, 0)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = []
            for branch, *own in zip(branches, q.split(batch), k.split(batch), v.split(batch)):
                pieces = branch.context.layers[layer]
                if batch > 1:
                    pieces = tuple(tuple(x.expand(batch, -1, -1, -1) for x in piece) for piece in pieces)
                out.append(self.attend(own[0], *joined((*pieces, (own[1], own[2]))), attention=branch.attention))
            return out[0] if len(out) == 1 else torch.cat(out)

        return Run((und, gen), cos, sin, attend)

    def decode(self, ids: Tensor, cos: Tensor, sin: Tensor, cache: DecodeCache, index: Tensor | None = None) -> Tensor:
        """Logits `[vocab_size]` after one more token, ids `[1]`, by which the cache grows.

        cos, sin: its row of `rotary`, `[1, 1, hd]`. index `[1]`: the token's place in the cache, where nothing may
        change its shape from one token to the next, as in a CUDA graph; the cache then stays as long as it is.
        """
        size = cache.layers[0][0].shape[1]
        mask = None if index is None else (torch.arange(size, device=ids.device) <= index)[None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attend(q, *cache.append(layer, k, v, index), mask)

        ((x,),) = self.language_model.model([Run((self.embed_text(ids, cache.dtype),), cos, sin, attend)])
        if index is None:
            cache.length += 1
        return self.language_model.lm_head(self.language_model.model.norm(x))[0, -1]

    @property
    def compiled(self) -> bool:
        return self.language_model.model.layers[0].compiled

    def compile_layers(self, device: torch.device) -> None:
        """Compiles the layers, once for all and for changing sizes, to compute on that device.

        Raises LanceError where torch finds no compiler.
        """
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except Exception as error:  # each backend has its own
            needed = "a C++ compiler" if device.type == "cpu" else "Triton"
            raise LanceError(
                f"compiling needs {needed}, which torch does not find: install it, or leave out compile."
            ) from error
        # One function serves both experts, one and several tokens, branches and samples, chunks, dtypes and formats.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, COMPILED_VARIANTS)
        for layer in self.language_model.model.layers:
            layer.compiled = True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attention: Attention | None = None
    ) -> Tensor:
        """Attention for tensors `[B, L, heads, hd]`: the one given, or the model's."""
        attention = attention or self.attention
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenation over tokens, `[B, n, ...]`; a single part is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def joined(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values of all pieces, `[B, S, nkv, hd]` each."""
    return join([k for k, _ in pieces]), join([v for _, v in pieces])


def lower_right(length: int, total: int, device) -> Tensor:
    """Mask `[length, total]` of a causal segment that stands at the end of `total` keys."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
