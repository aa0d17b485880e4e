"""clip.py against OpenAI's own model with the same weights, a loss written as loops, and a small batch that it must learn by heart."""

import importlib.util
import math
from dataclasses import asdict, replace
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F

from mini_dalle2.clip import CLIP, CLIPConfig
from mini_dalle2.tricks.redrawing import RedrawingCLIP, RedrawingCLIPConfig
from mini_dalle2.pretrained import clip_openai, to_theirs

EOT = 20                                                                   # not the largest id: 21..29 exist, as after training a tokenizer
TINY = CLIPConfig(clip_dim=12, image_size=16, patch_size=4, vision_width=32, vision_layers=2, vision_heads=2, vocab_size=30,
                  context_length=8, eot_id=EOT, text_width=24, text_layers=2, text_heads=3)


def captions(n, seed=0, longest=6):
    """n random captions (n, 8): start 19, words, ids beyond the end-of-text among them, EOT, zeros."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(n, 8, dtype=torch.long)
    for row in tokens:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        words = torch.randint(1, 28, (length,), generator=generator)
        row[0], row[1:length + 1], row[length + 1] = 19, words + (words >= 19) * 2, EOT
    return tokens


def tiny(seed=0):
    torch.manual_seed(seed)
    return CLIP(TINY)


# ---------------------------------------------------------------------- the same numbers as OpenAI's model

def openai_clip():
    """OpenAI's CLIP class from the package clip-anytorch, loaded from its file (importing the package would import torchvision)."""
    try:
        path = metadata.distribution("clip-anytorch").locate_file("clip/model.py")
    except metadata.PackageNotFoundError:
        pytest.fail("this test needs OpenAI's model: pip install --no-deps clip-anytorch==2.6.0")
    spec = importlib.util.spec_from_file_location("openai_clip_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CLIP


def test_embeddings_and_logits_are_those_of_openais_model():
    torch.manual_seed(0)
    cfg = replace(TINY, vision_width=128)                                  # theirs fixes the image tower's heads at 64 wide
    ours = CLIP(cfg)
    with torch.no_grad():                                                  # biases and norms away from 0 and 1
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = openai_clip()(cfg.clip_dim, cfg.image_size, cfg.vision_layers, cfg.vision_width, cfg.patch_size, cfg.context_length,
                           cfg.vocab_size, cfg.text_width, cfg.text_heads, cfg.text_layers)
    theirs.load_state_dict(to_theirs(clip_openai(cfg), dict(ours.named_parameters())), strict=True)
    images, tokens = torch.randn(5, 3, 16, 16), captions(5)
    tokens[tokens > EOT] = 5                                               # theirs takes the arg-max for the end of text
    z_img, z_txt = theirs.encode_image(images), theirs.encode_text(tokens)
    torch.testing.assert_close(ours.encode_image(images), z_img / z_img.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.encode_text(tokens), z_txt / z_txt.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(images, tokens), theirs(images, tokens)[0], atol=1e-4, rtol=1e-4)


def test_initialisation_is_clips():
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(vision_width=320, text_width=256, text_heads=4, vision_heads=5))
    for tensor, std in ((model.visual.projection.weight, 320 ** -0.5), (model.visual.class_embedding, 320 ** -0.5),
                        (model.visual.position_embedding, 320 ** -0.5), (model.text.projection.weight, 256 ** -0.5),
                        (model.text.token_embedding.weight, 0.02), (model.text.position_embedding, 0.01)):
        assert tensor.std().item() == pytest.approx(std, rel=0.12)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ---------------------------------------------------------------------- what the encoders see

def test_embeddings_have_unit_norm():
    model = tiny()
    for z in (model.encode_image(torch.randn(4, 3, 16, 16)), model.encode_text(captions(4))):
        assert z.shape == (4, 12)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("take", ["encode_image", "zero_shot", "forward"])
def test_pictures_of_another_kind_are_refused(take):
    model, images = tiny(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    rest = [] if take == "encode_image" else [captions(2)]
    getattr(model, take)(images / 127.5 - 1, *rest)
    for wrong, said in ((images, "images are torch.uint8"), (images.float(), "give floats in"), (images / 127.5 - torch.nan, "up to nan"),
                        (torch.zeros(2, 3, 8, 8), "takes .B, 3, 16, 16."), (torch.zeros(3, 16, 16), "takes")):
        with pytest.raises(ValueError, match=said):
            getattr(model, take)(wrong, *rest)


def test_text_states_never_see_later_tokens():
    model, tokens, states = tiny(), captions(1, longest=5), []
    tokens[0, 7] = EOT                                                     # so that there is one left whichever token is changed
    model.text.ln_final.register_forward_hook(lambda module, args, output: states.append(output[0]))
    model.encode_text(tokens)
    for position in range(8):
        other = tokens.clone()
        other[0, position] = 11 if tokens[0, position] != 11 else 12
        model.encode_text(other)
        moved = ((states[-1] - states[0]).abs().amax(-1) > 1e-7).tolist()  # (L,)
        assert moved == [i >= position for i in range(8)]


def test_text_is_read_at_the_end_of_text_found_by_its_id():
    model = tiny()
    tokens = torch.tensor([[19, 25, 29, 3, EOT, 0, 0, 0]])                 # 25 and 29 are larger ids than EOT
    z = model.encode_text(tokens)
    behind, before = tokens.clone(), tokens.clone()
    behind[0, 5:] = torch.tensor([28, 1, EOT])                             # behind the end nothing counts, not even a second end
    assert torch.allclose(model.encode_text(behind), z, atol=1e-6)
    before[0, 3] = 4                                                       # the last word before the end does
    assert (model.encode_text(before) - z).abs().max() > 1e-4


def test_every_patch_counts_and_its_place_too():
    model, image = tiny(), torch.randn(1, 3, 16, 16)
    z = model.encode_image(image)
    for y in range(0, 16, 4):
        for x in range(0, 16, 4):
            other = image.clone()
            other[..., y:y + 4, x:x + 4] += 1
            assert (model.encode_image(other) - z).abs().max() > 1e-4
    assert (model.encode_image(image.flip(-1)) - z).abs().max() > 1e-3
    swapped = torch.cat([image[..., 8:], image[..., :8]], dim=-1)          # the same patches elsewhere
    assert (model.encode_image(swapped) - z).abs().max() > 1e-4


# ---------------------------------------------------------------------- the loss

def test_wrong_captions_are_further_wrong_answers_for_each_image():
    model, images, tokens, wrong = tiny(), torch.randn(6, 3, 16, 16), captions(6), captions(4, seed=9)
    wrong[0] = tokens[3]                                                   # wrong for all images but number 3
    logits, labels = model(images, torch.cat([tokens, wrong])).clone(), torch.arange(6)
    of_captions = F.cross_entropy(logits[:, :6].T, labels)                 # a made-up caption has no image
    logits[3, 6] = float("-inf")
    by_hand = ((F.cross_entropy(logits, labels) + of_captions) / 2).item()
    assert model.loss(images, torch.cat([tokens, wrong])).item() == pytest.approx(by_hand, abs=1e-5)
    assert by_hand > model.loss(images, tokens).item()


def loss_by_loops(model, images, tokens):
    """The symmetric contrastive loss of the paper, pair by pair in float64; identical captions are left out of the sums."""
    z_img, z_txt = model.encode_image(images).detach().double(), model.encode_text(tokens).detach().double()
    scale, n = math.exp(min(model.logit_scale.item(), math.log(100))), len(images)
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if j == i or tokens[j].tolist() != tokens[i].tolist()]
        fit = lambda a, b: scale * float(z_img[a] @ z_txt[b])
        total -= fit(i, i) - math.log(sum(math.exp(fit(i, j)) for j in others))    # which caption for this image?
        total -= fit(i, i) - math.log(sum(math.exp(fit(j, i)) for j in others))    # which image for this caption?
    return total / (2 * n)


def test_loss_is_the_papers_and_identical_captions_are_no_negatives():
    model, images, tokens = tiny(), torch.randn(6, 3, 16, 16), captions(6)
    assert model.loss(images, tokens).item() == pytest.approx(loss_by_loops(model, images, tokens), abs=1e-5)
    tokens[4], tokens[5] = tokens[1], tokens[1]
    assert model.loss(images, tokens).item() == pytest.approx(loss_by_loops(model, images, tokens), abs=1e-5)
    same = tokens[1].expand(6, -1)                                         # nothing left to tell apart
    assert model.loss(images, same).item() == pytest.approx(0, abs=1e-6)


def test_temperature_is_learned_but_never_above_100():
    model, images, tokens = tiny(), torch.randn(4, 3, 16, 16), captions(4)
    model.loss(images, tokens).backward()
    assert model.logit_scale.grad.abs() > 0
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    z = model.encode_image(images) @ model.encode_text(tokens).T
    torch.testing.assert_close(model(images, tokens), 100 * z, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(model.zero_shot(images, tokens), (100 * z).softmax(1), atol=1e-3, rtol=1e-3)
    assert model.logit_scale.item() == 10.0                                # using the model does not change it; training does
    model.logit_scale.grad = None
    model.loss(images, tokens).backward()
    assert model.logit_scale.grad.abs() > 0 and model.logit_scale.exp().item() == pytest.approx(100)    # there is still a way back


def test_zero_shot_gives_probabilities_of_the_captions():
    model, images, tokens = tiny(), torch.randn(3, 3, 16, 16), captions(5)
    p = model.zero_shot(images, tokens)
    assert p.shape == (3, 5) and not p.requires_grad
    expected = (model.encode_image(images) @ model.encode_text(tokens).T / 0.07).softmax(1)
    torch.testing.assert_close(p, expected, atol=1e-5, rtol=1e-5)


def test_sixteen_pairs_are_learned_by_heart():
    model, images, tokens = tiny(), torch.randn(16, 3, 16, 16), captions(16)
    assert len({tuple(row) for row in tokens.tolist()}) == 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = model.loss(images, tokens).item()
    for _ in range(80):
        loss = model.loss(images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 2.0 and loss.item() < 0.05                              # chance is ln 16 = 2.77
    assert model(images, tokens).argmax(1).tolist() == list(range(16))


def test_what_captions_leave_unsaid_is_kept_if_pictures_are_to_be_redrawn():
    torch.manual_seed(0)
    model, images, tokens = RedrawingCLIP(RedrawingCLIPConfig(**asdict(TINY), picture_weight=3.0)), torch.rand(8, 3, 16, 16) * 2 - 1, captions(1).expand(8, -1)
    assert not hasattr(tiny(), "redraw") and "redraw" not in str(list(tiny().state_dict()))
    redrawn = model.redraw(12 ** 0.5 * model.encode_image(images)).view(8, 3, 16, 16)
    error = ((redrawn - images) ** 2).mean().item()
    assert model.loss(images, tokens).item() == pytest.approx(3 * error, abs=1e-5)         # one caption for all: nothing to tell apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        loss = model.loss(images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() / 3 < 0.1 * images.var(0, unbiased=False).mean().item()             # which picture it is, z_img now says
