"""transformer.py against torch's own layers, diffusers' sinusoids, and loops that say the same thing slowly."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from mini_dalle2.transformer import (
    Attention, Block, CaptionEmbedding, MLP, QuickGELU, Transformer, attention, attention_by_hand,
    eot_position, merge_heads, split_heads, timestep_embedding)

EOT = 7


def caption(length, *rows):
    """Rows of ids, padded with zeros to `length`."""
    return torch.tensor([list(row) + [0] * (length - len(row)) for row in rows])


# ---------------------------------------------------------------------- attention

def attention_by_loops(q, k, v, causal):
    """One query at a time, one key at a time."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = range(i + 1 + k.shape[2] - q.shape[2]) if causal else range(k.shape[2])
        weights = [math.exp(float(q[b, h, i] @ k[b, h, j]) / math.sqrt(q.shape[-1])) for j in keys]
        out[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, keys)) / sum(weights)
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_the_formula(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind(0)
    expected = attention_by_loops(q, k, v, causal)
    torch.testing.assert_close(attention_by_hand(q, k, v, causal), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(q, k, v, causal), expected, atol=1e-5, rtol=1e-5)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)                    # more keys than queries
    expected = attention_by_loops(q, k, v, causal)                         # if causal, the queries are the last places
    torch.testing.assert_close(attention_by_hand(q, k, v, causal), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(q, k, v, causal), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(q[:, :, -1:], k, v, causal), expected[:, :, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_places_do_not_exist(causal):
    """With a mask, attention is what it would be without the places that it hides; both ways of writing it agree."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind(0)
    mask = torch.tensor([[True, True, False, True, False, True]])
    shown = mask[0].nonzero()[:, 0]
    for masked in (attention(q, k, v, causal, mask), attention_by_hand(q, k, v, causal, mask)):
        for i in range(6):                                                 # row by row: "causal" then only says which keys are left
            left = [int(j) for j in shown if not causal or j <= i]
            expected = attention_by_hand(q[:, :, i:i + 1], k[:, :, left], v[:, :, left])
            torch.testing.assert_close(masked[:, :, i:i + 1], expected, atol=1e-5, rtol=1e-5)


def test_heads_split_and_merge():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    heads = split_heads(x, 4)                                              # two heads of four
    assert heads.shape == (2, 2, 3, 4) and heads.stride(-1) == 1
    assert torch.equal(heads[1, 1, 2], x[1, 2, 4:]) and torch.equal(merge_heads(heads), x)


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="heads"):
        Attention(10, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
def test_block_is_torchs_pre_norm_encoder_layer(causal, activation):
    torch.manual_seed(0)
    ours = Block(12, 3, causal, activation)
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, activation(), batch_first=True, norm_first=True)
    for mine, name in ((ours.ln_1, "norm1"), (ours.ln_2, "norm2"), (ours.attn.c_proj, "self_attn.out_proj"), (ours.mlp.c_fc, "linear1"),
                       (ours.mlp.c_proj, "linear2")):
        nn.init.normal_(mine.weight), nn.init.normal_(mine.bias)
        theirs.get_submodule(name).load_state_dict(mine.state_dict())
    theirs.self_attn.load_state_dict({"in_proj_weight": ours.attn.c_attn.weight, "in_proj_bias": ours.attn.c_attn.bias,
                                      "out_proj.weight": ours.attn.c_proj.weight, "out_proj.bias": ours.attn.c_proj.bias})
    x, mask = torch.randn(2, 5, 12), nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    torch.testing.assert_close(ours(x), theirs(x, src_mask=mask), atol=1e-4, rtol=1e-4)


def test_causal_stack_never_looks_ahead_and_the_other_does():
    torch.manual_seed(0)
    for causal in (True, False):
        model, x = Transformer(2, 16, 2, causal), torch.randn(1, 6, 16)
        for position in range(6):
            other = x.clone()
            other[:, position] += torch.randn(16)
            moved = (model(other) - model(x)).abs().amax(-1)[0] > 1e-6     # (L,)
            assert moved.tolist() == [i >= position if causal else True for i in range(6)]


def test_initialisation_is_clips():
    width, depth = 256, 6
    torch.manual_seed(0)
    block = Transformer(depth, width, 4).blocks[3]
    residual = width ** -0.5 * (2 * depth) ** -0.5
    for linear, std in ((block.attn.c_attn, width ** -0.5), (block.attn.c_proj, residual), (block.mlp.c_fc, (2 * width) ** -0.5),
                        (block.mlp.c_proj, residual)):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02) and linear.bias.abs().sum() == 0


def test_mlp_and_quick_gelu():
    x = torch.linspace(-4, 4, 50)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))
    assert (QuickGELU()(x) - F.gelu(x)).abs().max() < 0.021                # a good approximation
    mlp = MLP(8, nn.GELU)
    assert mlp.c_fc.weight.shape == (32, 8)
    hidden = F.gelu(mlp.c_fc.weight @ x[:8] + mlp.c_fc.bias)
    torch.testing.assert_close(mlp(x[:8]), mlp.c_proj.weight @ hidden + mlp.c_proj.bias)


# ---------------------------------------------------------------------- time and captions

def test_timestep_embedding_is_the_published_one():
    t = torch.tensor([0, 1, 17, 999])
    ours = timestep_embedding(t, 64)
    torch.testing.assert_close(ours, get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0), atol=1e-4, rtol=1e-5)
    i = torch.arange(32, dtype=torch.float64)
    angle = t[:, None].double() * torch.exp(-math.log(10000) * i / 32)
    torch.testing.assert_close(ours.double(), torch.cat([angle.cos(), angle.sin()], 1), atol=1e-4, rtol=1e-5)


def test_eot_position_is_the_first_eot_by_id():
    tokens = caption(6, [6, 3, EOT], [6, 9, 30, EOT, EOT], [EOT], [6, 1, 2, 3, 4, EOT], [6, 3, EOT, 4, EOT, 9])
    assert eot_position(tokens, EOT).tolist() == [row.index(EOT) for row in tokens.tolist()] == [2, 3, 0, 5, 2]
    assert eot_position(tokens, EOT).dtype == torch.long


def test_a_caption_without_end_is_an_error_not_an_empty_one():
    tokens = caption(6, [6, 3, EOT], [6, 3, 4])
    for read in (lambda: eot_position(tokens, EOT), lambda: CaptionEmbedding(40, 6, 8, EOT)(tokens)):
        with pytest.raises(ValueError, match="1 of 2 rows of tokens hold no end-of-text id 7"):
            read()


class OnGPU(torch.Tensor):
    """A tensor on the CPU that says it lies on a GPU, as no GPU is at hand."""

    is_cuda = property(lambda self: True)


def test_a_caption_without_end_is_an_error_on_a_gpu_too():
    good, bad = (caption(6, *rows).as_subclass(OnGPU) for rows in ([[6, 3, EOT]], [[6, 3, EOT], [6, 3, 4]]))
    with torch.no_grad(), pytest.raises(ValueError, match="1 of 2 rows of tokens hold no end-of-text id 7"):
        eot_position(bad, EOT)
    # In training the check runs on the GPU, which stops by itself.
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a row of tokens holds no end-of-text id"):
        eot_position(bad, EOT)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert eot_position(good, EOT).tolist() == [2]
    assert eot_position(bad.to("meta"), EOT).shape == (2,)                 # no numbers, nothing to check


def test_caption_embedding_adds_positions_and_pads_with_learned_vectors():
    torch.manual_seed(0)
    embedding = CaptionEmbedding(40, 6, 8, EOT)
    tokens = caption(6, [6, 30, EOT], [6, 1, 2, 3, 4, EOT])
    x = embedding(tokens)
    for b, i, length in ((0, 1, 3), (0, 3, 3), (0, 5, 3), (1, 5, 6)):
        expected = embedding.token.weight[tokens[b, i]] + embedding.position[i] if i < length else embedding.padding[i]
        assert torch.equal(x[b, i], expected)
    noise = tokens.clone()
    noise[0, 3:] = torch.tensor([9, EOT, 39])                              # whatever stands behind the end is padding
    assert torch.equal(embedding(noise), x)


def test_dropped_caption_is_padding_throughout():
    torch.manual_seed(0)
    embedding, tokens = CaptionEmbedding(40, 6, 8, EOT), caption(6, [6, 30, EOT], [6, 1, EOT])
    x = embedding(tokens, torch.tensor([True, False]))
    assert torch.equal(x[0], embedding(tokens)[0]) and torch.equal(x[1], embedding.padding)


def test_caption_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="5"):
        CaptionEmbedding(40, 6, 8, EOT)(caption(5, [6, EOT]))


@pytest.mark.parametrize("causal, place", [(False, 0), (False, 3), (True, -1)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_place_asked_for_alone_is_what_it_is_among_all(causal, place, masked):
    """Its state, and the gradient of a loss that looks at nothing else."""
    torch.manual_seed(0)
    transformer, x = Transformer(3, 16, 2, causal=causal), torch.randn(2, 6, 16, requires_grad=True)
    mask = torch.tensor([[True] * 6, [True, False, True, False, True, True]]) if masked else None
    all_places, alone = transformer(x, mask=mask)[:, [place]], transformer(x, mask=mask, place=place)
    assert alone.shape == (2, 1, 16)
    torch.testing.assert_close(alone, all_places, atol=1e-5, rtol=1e-5)
    learned = [x, *transformer.parameters()]
    for one, other in zip(torch.autograd.grad(alone.square().sum(), learned), torch.autograd.grad(all_places.square().sum(), learned)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[4, 1, 1, 1, 1], [4, 3, 1], [5, 3]])
@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_shows_a_sequence_piece_by_piece(pieces, masked):
    """The same states as for all eight places together."""
    torch.manual_seed(0)
    transformer, x = Transformer(3, 16, 2, causal=True), torch.randn(2, 8, 16)
    mask = torch.tensor([[True] * 8, [True, True, False, False, True, False, True, True]]) if masked else None
    cache, parts, done = transformer.new_cache(), [], 0
    for n in pieces:
        parts.append(transformer(x[:, done:done + n], cache, None if mask is None else mask[:, :done + n]))
        done += n
    torch.testing.assert_close(torch.cat(parts, dim=1), transformer(x, mask=mask), atol=1e-5, rtol=1e-5)
    assert cache[0][0].shape == (2, 2, 8, 8)                               # keys of all places: (B, H, L, d)
