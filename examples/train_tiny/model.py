"""A Llama with packed questions, whose parameter names are LlamaForCausalLM's without "model."."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TinyConfig:
    vocabulary: int = 2048
    width: int = 128
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    hidden: int = 352
    rope_base: float = 5e5
    epsilon: float = 1e-5
    max_length: int = 2048


@dataclass(slots=True)
class Rows:
    """What attention needs to know about one batch: contexts of C tokens, questions of Q tokens."""

    context_bias: Tensor  # (1 or batch, C, C): 0 where a token may look, very negative elsewhere
    question_bias: Tensor  # (batch, Q, C + Q)
    rotation: tuple[Tensor, Tensor]  # cos and sin, (batch, 1, C + Q, head_size)
    context: int  # C


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (x * scale * self.weight).to(x.dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE in Llama's half-split layout."""
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat((-second, first), -1) * rotation[1]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention as two plain products: on CPU in bfloat16 faster than the fused kernel."""
    batch, heads, tokens, size = q.shape
    q, k, v = (x.reshape(batch * heads, -1, size) for x in (q, k, v))
    wide = bias[:, None].expand(batch, heads, -1, -1).reshape(batch * heads, tokens, -1)
    scores = torch.baddbmm(wide, q, k.transpose(1, 2), alpha=size**-0.5)
    return (scores.softmax(-1).to(v.dtype) @ v).view(batch, heads, tokens, size)


class Attention(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        inner, kv = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, kv, bias=False)
        self.v_proj = nn.Linear(config.width, kv, bias=False)
        self.o_proj = nn.Linear(inner, config.width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before RoPE: (batch, heads, tokens, head_size) each."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        size = self.config.head_size
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
        return q, k, v

    def forward(self, x: Tensor, rows: Rows, seen: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        q, k, v = self.project(x)
        q, k = rotate(q, rows.rotation), rotate(k, rows.rotation)
        if seen is not None:
            seen.append((q, k))
        repeat = self.config.heads // self.config.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        c = rows.context
        half = c // 2
        parts = [
            attend(
                q[:, :, :half], k[:, :, :half], v[:, :, :half], rows.context_bias[:, :half, :half]
            ),
            attend(q[:, :, half:c], k[:, :, :c], v[:, :, :c], rows.context_bias[:, half:]),
            attend(q[:, :, c:], k, v, rows.question_bias),
        ]
        mixed = torch.cat(parts, 2).transpose(1, 2).flatten(2)
        out: Tensor = self.o_proj(mixed)
        return out


class MLP(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rows: Rows, seen: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rows, seen)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class TinyLlama(nn.Module):
    """Embedding, layers, final norm; the output weights are the embedding's."""

    inverse: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.epsilon)
        steps = torch.arange(0, config.head_size, 2).float() / config.head_size
        self.register_buffer("inverse", 1.0 / config.rope_base**steps, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Small random weights with a head start: see `copying`, `matching` and `look_back`."""
        for name, weight in self.named_parameters():
            if name.startswith("embed"):
                nn.init.normal_(weight, std=0.05)
            elif weight.ndim == 2:
                fan = weight.shape[1]
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.3 / math.sqrt(fan * self.config.layers) if out else 0.7 / math.sqrt(fan)
                nn.init.normal_(weight, std=std)
        shared = torch.sign(torch.randn(self.config.width))
        self.embed_tokens.weight.add_(0.035 * shared)
        direction = shared / (self.config.width * 0.57)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            self.copying(layer.self_attn, 0.25 if number < self.config.layers // 2 else 0.5)
            self.matching(layer.self_attn)
        for place, kv_head, offsets in ((0, 0, (1, 2)), (0, 1, (3, 1)), (1, 0, (1, 2))):
            self.look_back(place, kv_head, offsets, direction)

    def copying(self, attention: Attention, scale: float) -> None:
        """Let every head start out writing what it reads: o_proj = scale * v_proj^T."""
        size, group = self.config.head_size, self.config.heads // self.config.kv_heads
        for head in range(self.config.heads):
            kv_head = head // group
            values = attention.v_proj.weight[kv_head * size : (kv_head + 1) * size]
            attention.o_proj.weight[:, head * size : (head + 1) * size] = scale * values.T

    def matching(self, attention: Attention) -> None:
        """Let every second head start out looking for what is like itself: q_proj = k_proj.

        Only in RoPE's slower half, where places hardly matter.
        """
        size, group = self.config.head_size, self.config.heads // self.config.kv_heads
        slow = torch.arange(size) % (size // 2) >= size // 4
        for head in range(0, self.config.heads, 2):
            kv_head = head // group
            keys = attention.k_proj.weight[kv_head * size : (kv_head + 1) * size]
            attention.q_proj.weight[head * size : (head + 1) * size][slow] = keys[slow]

    def look_back(
        self, layer: int, kv_head: int, offsets: tuple[int, ...], direction: Tensor
    ) -> None:
        """Let the queries of one KV head's group start out attending `offset` tokens back.

        Keys point one way along RoPE's faster half; queries point there after a turn by -offset.
        """
        size, group = self.config.head_size, self.config.heads // self.config.kv_heads
        attention = self.layers[layer].self_attn
        assert isinstance(attention, Attention)
        keys = attention.k_proj.weight[kv_head * size : (kv_head + 1) * size]
        keys.mul_(0.3)[: size // 4] += 5.0 * direction
        for j, offset in enumerate(offsets[:group]):
            head = kv_head * group + j
            queries = attention.q_proj.weight[head * size : (head + 1) * size]
            queries.mul_(0.3)
            angle = -offset * self.inverse[: size // 4, None]
            queries[: size // 4] += 5.0 * torch.cos(angle) * direction
            queries[size // 2 : size // 2 + size // 4] += 5.0 * torch.sin(angle) * direction

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for positions (batch, tokens): (batch, 1, tokens, head_size)."""
        angles = positions.float()[..., None] * self.inverse
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self, ids: Tensor, rows: Rows, seen: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Final hidden states. `seen` collects each layer's rotated queries and keys."""
        x: Tensor = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, rows, seen)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)
