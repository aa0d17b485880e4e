"""Transformer parts: attention written out once, and the blocks that CLIP, the priors and the decoder's text encoder share.

    attention(Q, K, V) = softmax(Q Kᵀ / √d + mask) V                                  (Attention Is All You Need, Eq. 1)

Blocks are pre-LayerNorm, x + attn(ln_1(x)) and then x + mlp(ln_2(x)), as in GPT-2 and CLIP. Context tokens enter attention as
extra keys and values *before* the sequence's own, in one softmax, which is how GLIDE's U-Net reads a caption (see unet.py).

Shapes: B batch, L sequence length, D width (n_embd), H heads, d = D / H head width.
References: Vaswani et al. 2017; GPT-2; CLIP (2103.00020) for QuickGELU and the initialisation; GLIDE (2112.10741) §4.1 for padding.
Read next: clip.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def attention_by_hand(q, k, v, causal=False, mask=None):
    """Attention as the formula says it: q, k, v (B, H, L, d) -> (B, H, L, d). The reference that the fused kernel is tested against.

    causal: where there are more keys than queries, the queries are the last places. mask (B, Lk) bool: False hides a place from all others.
    Each place must see one at least.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])              # (B, H, Lq, Lk)
    if causal:
        scores = scores.masked_fill(~past(q, k), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return scores.softmax(dim=-1) @ v


def past(q, k):
    """Which places a causal query may see, (Lq, Lk) bool: the queries are the last Lq of Lk places."""
    queries, keys = q.shape[-2], k.shape[-2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


def is_short_on_cpu(x):
    """Whether a tensor has numbers of 16 bits on a CPU, for which some of torch's kernels take several times as long as for float32."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def attention(q, k, v, causal=False, mask=None):
    """The same function by torch's fused kernel, which is what runs: it never stores the (L, L) matrix."""
    if is_short_on_cpu(q) and torch.is_grad_enabled():
        # The CPU's kernel takes three to eight times as long for gradients in bfloat16 as in float32 (torch 2.13, 17 to 96 places; not for 1,000).
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), causal, mask).to(q.dtype)
    queries, keys = q.shape[-2], k.shape[-2]
    causal = causal and queries > 1                                        # the last place may see all
    if mask is not None:
        mask = mask[:, None, None]                                         # (B, 1, 1, Lk)
    if causal and (mask is not None or queries < keys):                    # the kernel takes one or the other, and counts queries from the first key
        mask, causal = past(q, k) if mask is None else mask & past(q, k), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def run_block(block, recompute, *inputs):
    """block(*inputs); with `recompute`, what happens inside is not kept for the backward pass but computed a second time in it.

    That is gradient checkpointing (1604.06174): memory for one block's activations instead of all, a third more time, the same gradient.
    """
    return checkpoint(block, *inputs, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(*inputs)


def split_heads(x, head_dim):
    """(B, L, D) -> (B, H, L, d). The last dimension stays contiguous: otherwise the fused kernel falls back to the slow path."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x):
    """(B, H, L, d) -> (B, L, D), the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def timestep_embedding(t, dim, max_period=10000.0):
    """Sinusoids of the diffusion step: t (B,), any number, -> (B, dim), dim even, first the cosines, then the sines.

    Frequencies fall geometrically from 1 towards 1/max_period, which itself is not among them (guided-diffusion's order and spacing).
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    args = t[:, None].float() * freqs                                      # (B, dim / 2)
    return torch.cat([args.cos(), args.sin()], dim=-1)                     # (B, dim)


def eot_position(tokens, eot_id):
    """Where each caption ends: tokens (B, L) -> (B,), the index of the row's first end-of-text. ValueError if a row has none.

    Found by id. OpenAI's code takes the arg-max of the ids, which goes wrong as soon as a vocabulary has an id above end-of-text.
    """
    is_eot = tokens == eot_id                                              # (B, L)
    # On a GPU the check would have to wait for the result, in every training step. Rows from `tokenize` always have their end-of-text.
    if tokens.device.type == "cpu" and not is_eot.any(dim=1).all():
        raise ValueError(f"{int((~is_eot.any(dim=1)).sum())} of {len(tokens)} rows of tokens hold no end-of-text id {eot_id}")
    return is_eot.int().argmax(dim=1)                                      # the first of equal ones


class QuickGELU(nn.Module):
    """x · σ(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) -> (B, L, D); with `causal`, position i sees positions 0..i only."""

    def __init__(self, n_embd, n_head, causal=False):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"width {n_embd} is not divisible by {n_head} heads")
        self.head_dim = n_embd // n_head
        self.causal = causal
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, cache=None, mask=None, place=None):
        """cache: the keys and values of all places before x; a list, empty at first, to which x's are added.

        mask (B, L) bool: False hides a place; with a cache, one for each place in it as well. place: the only one whose output is wanted,
        (B, 1, D); with `causal`, -1.
        """
        q, k, v = (split_heads(part, self.head_dim) for part in self.c_attn(x).chunk(3, dim=-1))   # (B, H, L, d) each
        if cache:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache, (k, v)))
        if cache is not None:
            cache[:] = k, v
        q = q if place is None else q[:, :, [place]]
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
        x = (x if place is None else x[:, [place]]) + self.attn(self.ln_1(x), cache, mask, place)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of n_layer blocks, (B, L, D) -> (B, L, D), without embedding or final norm: each model adds its own."""

    def __init__(self, n_layer, n_embd, n_head, causal=False, activation=nn.GELU):
        super().__init__()
        self.recompute = False                                             # see run_block; set for training
        self.blocks = nn.ModuleList(Block(n_embd, n_head, causal, activation) for _ in range(n_layer))
        self.init_weights(n_embd, n_layer)

    def init_weights(self, width, depth):
        """CLIP's initialisation: attention width^-½; whatever writes to the residual stream shrinks with (2·depth)^-½ on top."""
        for block in self.blocks:
            nn.init.normal_(block.attn.c_attn.weight, std=width ** -0.5)
            nn.init.normal_(block.attn.c_proj.weight, std=width ** -0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * depth) ** -0.5)
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def new_cache(self):
        """An empty cache, for a causal transformer that is shown a sequence piece by piece."""
        return [[] for _ in self.blocks]

    def forward(self, x, cache=None, mask=None, place=None):
        """place: the only one whose output is wanted, (B, 1, D), if causal the last, -1. The last block then spares itself the others."""
        for i, block in enumerate(self.blocks):
            last = block is self.blocks[-1]
            x = run_block(block, self.recompute, x, None if cache is None else cache[i], mask, place if last else None)
        return x


class CaptionEmbedding(nn.Module):
    """Token plus position embedding; positions after the caption hold a learned padding embedding instead (GLIDE's way, no mask needed).

    tokens (B, L) -> (B, L, D). `keep` (B,) bool: a False row loses its caption, that is, becomes padding throughout, which is
    what the models learn as "no caption" for classifier-free guidance.
    """

    def __init__(self, vocab_size, context_length, n_embd, eot_id, std=0.02):
        super().__init__()
        self.eot_id = eot_id
        self.token = nn.Embedding(vocab_size, n_embd)
        self.position = nn.Parameter(torch.empty(context_length, n_embd))
        self.padding = nn.Parameter(torch.empty(context_length, n_embd))
        nn.init.normal_(self.token.weight, std=std)
        nn.init.normal_(self.position, std=std / 2)                        # CLIP's ratio, as is 0.02
        nn.init.normal_(self.padding, std=std)

    def forward(self, tokens, keep=None):
        if tokens.shape[1] != len(self.position):
            raise ValueError(f"captions are {tokens.shape[1]} tokens long, this model was built for {len(self.position)}")
        place = torch.arange(tokens.shape[1], device=tokens.device)        # (L,)
        mask = place <= eot_position(tokens, self.eot_id)[:, None]         # (B, L): the caption, its end-of-text included
        if keep is not None:
            mask = mask & keep[:, None]
        return torch.where(mask[..., None], self.token(tokens) + self.position, self.padding)


class FrozenText(nn.Module):
    """Captions as a frozen text encoder sees them, its states projected: what Karlo's models read instead of training their own.

    `encoder(tokens (B, L)) -> (states (B, L, S), z_txt (B, D))` is lent by whoever puts the models together (pretrained.py). It is no
    part of this model, neither of its weights nor of its checkpoint. A dropped caption is the empty one, "": start and end of text.
    """

    def __init__(self, state_width, n_embd, eot_id):
        super().__init__()
        self.eot_id, self.encoder = eot_id, None
        self.proj = nn.Linear(state_width, n_embd)

    def forward(self, tokens, keep=None):
        """tokens (B, L), keep (B,) bool -> projected states (B, L, n_embd), z_txt (B, D), mask (B, L): False behind the end of text."""
        if self.encoder is None:
            raise ValueError("this model reads captions through a frozen CLIP, which it was not given")
        if keep is not None:
            empty = torch.zeros_like(tokens)
            empty[:, 0], empty[:, 1] = self.eot_id - 1, self.eot_id        # as CLIP's tokenizer has them: start of text is one below
            tokens = torch.where(keep[:, None], tokens, empty)
        states, z_txt = self.encoder(tokens)
        mask = torch.arange(tokens.shape[1], device=tokens.device) <= eot_position(tokens, self.eot_id)[:, None]
        return self.proj(states), z_txt, mask
