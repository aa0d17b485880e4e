"""The transformer's parts: attention written out once, and the blocks that several models share.

    attention(Q, K, V) = softmax(Q Kᵀ / √d + mask) V        (Attention Is All You Need, Eq. 1)

CLIP, both priors and the decoder's text encoder are built from these blocks. A block is
pre-LayerNorm, as in GPT-2 and CLIP: x + attn(ln_1(x)), then x + mlp(ln_2(x)).

Shapes: B batch, L sequence length, D width (n_embd), H heads, d = D / H head width.
References: Vaswani et al. 2017; GPT-2; CLIP (2103.00020) for QuickGELU and the initialisation;
GLIDE (2112.10741) §4.1 for padding. Read next: clip.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def attention_by_hand(q, k, v, causal=False, mask=None):
    """Compute attention as the formula says: q, k, v (B, H, L, d) -> (B, H, L, d).

    The fused kernel below is tested against this function. causal: if there are more keys than
    queries, the queries are the last places. mask (B, Lk) bool: False hides a place from all
    others. Each place must see at least one place.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])              # (B, H, Lq, Lk)
    if causal:
        scores = scores.masked_fill(~past(q, k), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return scores.softmax(dim=-1) @ v


def past(q, k):
    """Return which places a causal query may see, (Lq, Lk) bool; the queries are the last Lq."""
    queries = q.shape[-2]
    keys = k.shape[-2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    return seen.tril(keys - queries)


def is_short_on_cpu(x):
    """Return whether x holds 16-bit floats on a CPU, where some of torch's kernels are slow."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def attention(q, k, v, causal=False, mask=None):
    """Compute attention by torch's fused kernel, which never stores the (L, L) matrix."""
    if is_short_on_cpu(q) and torch.is_grad_enabled():
        # The CPU's kernel takes several times as long for gradients in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), causal, mask).to(q.dtype)
    queries = q.shape[-2]
    keys = k.shape[-2]
    # A single query is the last place, which may see all others.
    causal = causal and queries > 1
    if mask is not None:
        mask = mask[:, None, None]                                         # (B, 1, 1, Lk)
    # The kernel takes either a mask or `is_causal`, and it counts queries from the first key.
    if causal and (mask is not None or queries < keys):
        mask = past(q, k) if mask is None else mask & past(q, k)
        causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def run_block(block, recompute, *inputs):
    """Run block(*inputs). With `recompute`, do not keep its activations for the backward pass.

    The backward pass then computes the activations a second time. This is gradient checkpointing
    (1604.06174): memory for one block's activations instead of all, the same gradient.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def split_heads(x, head_dim):
    """Turn (B, L, D) into (B, H, L, d).

    The last dimension stays contiguous. Otherwise the fused kernel falls back to the slow path.
    """
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x):
    """Turn (B, H, L, d) into (B, L, D): the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def timestep_embedding(t, dim, max_period=10000.0):
    """Return sinusoids of the diffusion step: t (B,), any number, -> (B, dim); dim is even.

    First come the cosines, then the sines. Frequencies fall geometrically from 1 towards
    1/max_period, which is itself not among them (guided-diffusion's order and spacing).
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(max_period) * exponents / half)
    args = t[:, None].float() * freqs                                      # (B, dim / 2)
    return torch.cat([args.cos(), args.sin()], dim=-1)                     # (B, dim)


def eot_position(tokens, eot_id):
    """Find where each caption ends: tokens (B, L) -> (B,), the index of the first end-of-text.

    The end is found by its id. OpenAI's code takes the arg-max of the ids, which fails as soon as
    a vocabulary has an id above end-of-text. Raises ValueError if a row has no end-of-text.
    """
    is_eot = tokens == eot_id                                              # (B, L)
    has_eot = is_eot.any(dim=1)                                            # (B,)
    advice = "make the rows with BPETokenizer.tokenize"
    if tokens.is_cuda and torch.is_grad_enabled():
        # Waiting for the answer would hold up every training step. The GPU stops by itself.
        torch._assert_async(has_eot.all(), f"a row of tokens holds no end-of-text id: {advice}")
    elif not tokens.is_meta and not has_eot.all():
        missing = int((~has_eot).sum())
        raise ValueError(f"{missing} of {len(tokens)} rows of tokens hold no end-of-text id "
                         f"{eot_id}: {advice}")
    # arg-max returns the first of equal values.
    return is_eot.int().argmax(dim=1)


class QuickGELU(nn.Module):
    """x · σ(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) -> (B, L, D). With `causal`, place i sees 0..i only."""

    def __init__(self, n_embd, n_head, causal=False):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"width {n_embd} is not divisible by {n_head} heads")
        self.head_dim = n_embd // n_head
        self.causal = causal
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, cache=None, mask=None, place=None):
        """Attend.

        cache: a list with the keys and values of all places before x, empty at first. Those of x
        are added to it. mask (B, L) bool: False hides a place; with a cache it covers the cached
        places too. place: the only place whose output is wanted, (B, 1, D); with `causal`, -1.
        """
        parts = self.c_attn(x).chunk(3, dim=-1)                            # 3 × (B, L, D)
        q, k, v = (split_heads(part, self.head_dim) for part in parts)     # (B, H, L, d) each
        if cache:
            k = torch.cat([cache[0], k], dim=2)
            v = torch.cat([cache[1], v], dim=2)
        if cache is not None:
            cache[:] = k, v
        if place is not None:
            q = q[:, :, [place]]                                           # (B, H, 1, d)
        return self.c_proj(merge_heads(attention(q, k, v, self.causal, mask)))


class MLP(nn.Module):
    """The position-wise network: D -> 4D -> D."""

    def __init__(self, n_embd, activation):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.act = activation()
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Pre-LayerNorm residual block: attention, then MLP."""

    def __init__(self, n_embd, n_head, causal=False, activation=nn.GELU):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, causal)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd, activation)

    def forward(self, x, cache=None, mask=None, place=None):
        residual = x if place is None else x[:, [place]]
        x = residual + self.attn(self.ln_1(x), cache, mask, place)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of n_layer blocks, (B, L, D) -> (B, L, D). Each model adds embedding and norm."""

    def __init__(self, n_layer, n_embd, n_head, causal=False, activation=nn.GELU):
        super().__init__()
        # Training may set this; see `run_block`.
        self.recompute = False
        self.blocks = nn.ModuleList(
            Block(n_embd, n_head, causal, activation) for _ in range(n_layer))
        self.init_weights(n_embd, n_layer)

    def init_weights(self, width, depth):
        """Initialise as CLIP does: attention with std width^-½.

        Layers that write to the residual stream shrink with (2·depth)^-½ on top.
        """
        attn_std = width ** -0.5
        proj_std = width ** -0.5 * (2 * depth) ** -0.5
        for block in self.blocks:
            nn.init.normal_(block.attn.c_attn.weight, std=attn_std)
            nn.init.normal_(block.attn.c_proj.weight, std=proj_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=proj_std)
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def new_cache(self):
        """Return an empty cache, for a causal transformer that reads a sequence piece by piece."""
        return [[] for _ in self.blocks]

    def forward(self, x, cache=None, mask=None, place=None):
        """Run all blocks.

        place: the only place whose output is wanted, (B, 1, D); if causal the last one, -1. The
        last block then computes no other place.
        """
        for i, block in enumerate(self.blocks):
            block_cache = None if cache is None else cache[i]
            block_place = place if i == len(self.blocks) - 1 else None
            x = run_block(block, self.recompute, x, block_cache, mask, block_place)
        return x


class CaptionEmbedding(nn.Module):
    """Token plus position embedding, tokens (B, L) -> (B, L, D).

    Places behind the caption hold a learned padding embedding instead, so that no mask is needed
    (GLIDE's way). `keep` (B,) bool: a row with False loses its caption and becomes padding
    throughout. This is what "no caption" looks like in classifier-free guidance.
    """

    def __init__(self, vocab_size, context_length, n_embd, eot_id, std=0.02):
        super().__init__()
        self.eot_id = eot_id
        self.token = nn.Embedding(vocab_size, n_embd)
        self.position = nn.Parameter(torch.empty(context_length, n_embd))
        self.padding = nn.Parameter(torch.empty(context_length, n_embd))
        # The std of 0.02, and half of it for positions, are CLIP's.
        nn.init.normal_(self.token.weight, std=std)
        nn.init.normal_(self.position, std=std / 2)
        nn.init.normal_(self.padding, std=std)

    def forward(self, tokens, keep=None):
        if tokens.shape[1] != len(self.position):
            raise ValueError(f"captions are {tokens.shape[1]} tokens long, but this model reads "
                             f"{len(self.position)}: tokenize with that context_length")
        place = torch.arange(tokens.shape[1], device=tokens.device)        # (L,)
        # The caption ends with its end-of-text.
        mask = place <= eot_position(tokens, self.eot_id)[:, None]         # (B, L)
        if keep is not None:
            mask = mask & keep[:, None]
        return torch.where(mask[..., None], self.token(tokens) + self.position, self.padding)
