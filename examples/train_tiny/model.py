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
    """What attention needs to know about one batch: C context tokens, then groups of W tokens.

    A bias is 0 where a token may look and very negative elsewhere. It is laid out as `attend` wants
    it, once for all layers: K is the number of KV heads, S that of query heads for each.
    """

    context_biases: list[Tensor]  # for one block of context tokens each: (batch * K, S * n, keys)
    question_bias: Tensor  # (batch * K * groups, S * W, C + W)
    rotation: tuple[Tensor, Tensor]  # cos and sin, (batch, 1, C + groups * W, head_size)
    context: int  # C
    group: int  # W


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
    """Queries (b, S, n, size) over keys and values (b, keys, size); bias (b, S * n, keys).

    Two plain products: on CPU in bfloat16 faster than the fused kernel.
    """
    scores = torch.baddbmm(bias, q.flatten(1, 2), k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1).to(v.dtype) @ v).view(q.shape)


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
        q = q.view(len(x), self.config.kv_heads, -1, *q.shape[2:])  # (batch, K, S, tokens, size)
        mixed = torch.cat((self.context(q, k, v, rows), self.questions(q, k, v, rows)), 3)
        out: Tensor = self.o_proj(mixed.flatten(1, 2).transpose(1, 2).flatten(2))
        return out

    @staticmethod
    def context(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Block after block of the context over the keys up to its end: (batch, K, S, C, size)."""
        batch, heads = k.shape[:2]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        parts, start = [], 0
        for bias in rows.context_biases:
            end = bias.shape[2]
            part = attend(q[:, :, :, start:end].flatten(0, 1), k[:, :end], v[:, :end], bias)
            parts.append(part.view(batch, heads, *part.shape[1:]))
            start = end
        return torch.cat(parts, 3)

    @staticmethod
    def questions(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Every group over the context and itself: (batch, K, S, groups * W, size)."""
        c = rows.context

        def grouped(x: Tensor) -> Tensor:  # (batch, K, C + groups * W, size)
            own = x[:, :, c:].reshape(*x.shape[:2], -1, rows.group, x.shape[3])
            shared = x[:, :, None, :c].expand(-1, -1, own.shape[2], -1, -1)
            return torch.cat((shared, own), 3).flatten(0, 2)

        asking = q[:, :, :, c:].reshape(*q.shape[:3], -1, rows.group, q.shape[4]).transpose(2, 3)
        mixed = attend(asking.flatten(0, 2), grouped(k), grouped(v), rows.question_bias)
        return mixed.view(asking.shape).transpose(2, 3).flatten(3, 4)


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
    """Embedding, layers, final norm; the output weights are the embedding's.

    ``precision``: of products and masks in training and its checks; the weights are float32.
    """

    inverse: Tensor

    def __init__(self, config: TinyConfig, precision: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.precision = config, precision
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
        for place in (0, 1):
            self.look_back(place, 0, (1, 2), direction)

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

    def autocast(self) -> torch.autocast:
        """What a forward is to run in."""
        lower = self.precision != torch.float32
        return torch.autocast(self.inverse.device.type, self.precision, enabled=lower)

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
