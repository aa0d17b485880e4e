"""Karlo's folders, small and random, that several test files read."""

import gzip

import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from mini_dalle2 import pretrained
from mini_dalle2.pretrained.clip import load_clip
from mini_dalle2.pretrained.karlo import load_karlo
from mini_dalle2.pretrained.rows import to_theirs
from public_models import L, MERGES, small_karlo, their_clip, their_decoder, their_prior, their_text_proj, their_upsampler


@pytest.fixture(scope="session")
def diffusers_folder(tmp_path_factory):
    """A tiny Karlo of random weights in the diffusers layout, and the modules in it."""
    folder, clip = tmp_path_factory.mktemp("karlo") / "diffusers", their_clip()
    text = CLIPTextModelWithProjection(clip.config.text_config)
    text.load_state_dict({name: value for name, value in clip.state_dict().items() if name.startswith("text_")})
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    vision.load_state_dict({name: value for name, value in clip.state_dict().items() if name.startswith("visi") or name.startswith("visual_")})
    modules = {"prior": their_prior(), "decoder": their_decoder(), "text_proj": their_text_proj(), "text_encoder": text.eval(),
               "super_res_first": their_upsampler(4), "super_res_last": their_upsampler(5), "image_encoder": vision.eval()}
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    merges = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:48895]              # as Hugging Face keeps them, with a line before
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder, modules


@pytest.fixture(scope="session")
def original_folder(tmp_path_factory, diffusers_folder):
    """The same weights under Karlo's own names, as its files have them."""
    folder, modules = tmp_path_factory.mktemp("karlo") / "original", diffusers_folder[1]
    folder.mkdir()
    config = small_karlo()
    model = load_karlo(diffusers_folder[0], "cpu", config)
    for name, module, table in (("prior", model.prior, pretrained.prior_karlo), ("decoder", model.decoder, pretrained.decoder_karlo),
                                ("upsampler1", model.upsamplers[0], pretrained.upsampler_karlo)):
        state = to_theirs(table(getattr(config, name).model), dict(module.named_parameters()))
        torch.save({"state_dict": {key: value.detach().clone() for key, value in state.items()}}, folder / pretrained.KARLO_FILES[name])
    torch.save((modules["prior"].clip_mean[0].detach(), modules["prior"].clip_std[0].detach()), folder / pretrained.KARLO_FILES["stats"])
    clip = load_clip(their_clip().state_dict(), "quick_gelu")
    torch.save(to_theirs(pretrained.clip_openai(clip.cfg), dict(clip.named_parameters())) | {"context_length": torch.tensor(L)},
               folder / pretrained.KARLO_FILES["clip"])
    (folder / MERGES.name).write_bytes(MERGES.read_bytes())
    return folder
