"""Slow, obvious re-implementations that share no code with the package; loops where a person can check them by eye."""

import math

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.stack([row / math.sqrt(float((row * row).mean()) + eps) for row in x]) * weight


def softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """One head: query (L, K), key and value (T, K), visible (L, T) of booleans."""
    out = []
    for i in range(query.shape[0]):
        scores = torch.stack([query[i] @ key[j] / math.sqrt(query.shape[1]) for j in range(key.shape[0])])
        if not visible[i].any():  # padding on the left sees nothing, and nobody looks at what comes of it
            out.append(torch.zeros_like(value[0]))
            continue
        scores[~visible[i]] = -float("inf")
        weights = torch.exp(scores - scores.max())
        out.append((weights / weights.sum()) @ value)
    return torch.stack(out)


def multi_head(query, key, value, heads, visible):
    """(L, D) tensors cut into heads along D."""
    parts = [t.chunk(heads, dim=-1) for t in (query, key, value)]
    return torch.cat([softmax_attention(*head, visible) for head in zip(*parts, strict=True)], dim=-1)


def vision_block(state: dict, x: torch.Tensor, heads: int, eps: float) -> torch.Tensor:
    """One InternViT-6B block (RMS norms, q/k norm over the full width) on one image's tokens (N, D)."""
    h = rms_norm(x, state["norm1.weight"], eps)
    q, k, v = (h @ state["attn.qkv.weight"].T).chunk(3, dim=-1)
    q, k = rms_norm(q, state["attn.q_norm.weight"], eps), rms_norm(k, state["attn.k_norm.weight"], eps)
    seen = torch.ones(len(x), len(x), dtype=torch.bool)
    a = multi_head(q, k, v, heads, seen) @ state["attn.proj.weight"].T + state["attn.proj.bias"]
    x = x + state["ls1"] * a
    h = rms_norm(x, state["norm2.weight"], eps) @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return x + state["ls2"] * (h @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"])


def rotate_by_position(x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    """One head (L, K): coordinate pairs (i, i + K/2) turn by position * theta^(-2i/K)."""
    half = x.shape[1] // 2
    out = x.clone()
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-2 * i / x.shape[1])
            a, b = x[row, i], x[row, i + half]
            out[row, i] = a * math.cos(angle) - b * math.sin(angle)
            out[row, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def visible(pattern: str, num_queries: int, length: int, real: list[bool]) -> torch.Tensor:
    """Who sees whom, written out case by case from the table of modeling_qllama."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            i_query, j_query = i < num_queries, j < num_queries
            if pattern == "matching":
                seen[i, j] = True
            elif i_query:
                seen[i, j] = j_query
            elif j_query:
                seen[i, j] = pattern == "generation"
            else:
                seen[i, j] = j <= i
            seen[i, j] = seen[i, j] and real[j]
    return seen


def qllama_layer(
    state: dict,
    x: torch.Tensor,
    image: torch.Tensor | None,
    num_queries: int,
    positions: list[int],
    seen: torch.Tensor,
    heads: int,
    theta: float,
    eps: float,
) -> torch.Tensor:
    """One QLLaMA layer on one row (L, D) that looks at image tokens (N, D_vision)."""
    h = rms_norm(x, state["input_layernorm.weight"], eps)
    q, k, v = (h @ state[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    q = torch.cat([rotate_by_position(part, positions, theta) for part in q.chunk(heads, -1)], -1)
    k = torch.cat([rotate_by_position(part, positions, theta) for part in k.chunk(heads, -1)], -1)
    x = x + multi_head(q, k, v, heads, seen) @ state["self_attn.o_proj.weight"].T
    if "cross_attn.q_proj.weight" in state and num_queries:
        queries = x[:num_queries]
        q = rms_norm(queries, state["cross_attn.norm1.weight"], eps) @ state["cross_attn.q_proj.weight"].T
        p = rms_norm(image, state["cross_attn.norm2.weight"], eps)
        k, v = p @ state["cross_attn.k_proj.weight"].T, p @ state["cross_attn.v_proj.weight"].T
        everything = torch.ones(num_queries, len(image), dtype=torch.bool)
        looked = multi_head(q, k, v, heads, everything) @ state["cross_attn.o_proj.weight"].T
        x = torch.cat([queries + looked, x[num_queries:]])
    h = rms_norm(x, state["post_attention_layernorm.weight"], eps)
    gate = h @ state["mlp.gate_proj.weight"].T
    gate = gate / (1 + torch.exp(-gate))
    return x + (gate * (h @ state["mlp.up_proj.weight"].T)) @ state["mlp.down_proj.weight"].T


def pixel_shuffle(patches: torch.Tensor, fold: int, transposed: bool) -> torch.Tensor:
    """(S*S, D) -> (S*S/fold**2, fold**2 * D), cell by cell."""
    side = int(len(patches) ** 0.5)
    cells = {}
    for i in range(side // fold):
        for j in range(side // fold):
            cells[i, j] = torch.cat(
                [patches[(i * fold + a) * side + j * fold + b] for a in range(fold) for b in range(fold)]
            )
    order = [(i, j) for i in range(side // fold) for j in range(side // fold)]
    return torch.stack([cells[(j, i) if transposed else (i, j)] for i, j in order])
