#!/usr/bin/env bash
# diffusers writes a UnCLIPPipeline that the same diffusers refuses to read.
#
# Expected: UnCLIPPipeline.from_pretrained(folder) reads what save_pretrained(folder) wrote. It also
#   reads folders of older versions, such as those of Karlo.
# Seen: both end in a ValueError. The class UnCLIPTextProjModel has moved out of the top of
#   diffusers, and model_index.json names it there: "diffusers has no class UnCLIPTextProjModel".
#   Older folders name the module "unclip", which is no longer among the libraries that are known.
# Versions: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0, Python 3.11.
#   Handing the module over, text_proj=..., does not help: its class is looked up all the same.
# For a user: put the class back, diffusers.UnCLIPTextProjModel = ..., and write "diffusers" into
#   older folders. Then the folder is read.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" diffusers==0.42.1 transformers==5.23.0 numpy==2.4.6

cat > "$work/look.py" <<'PY'
import json
import logging
import platform
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers import UnCLIPPipeline, UnCLIPScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
      f"torch {torch.__version__}, Python {platform.python_version()}")
logging.disable(logging.WARNING)
folder = Path(sys.argv[1], "pipeline")
words = Path(sys.argv[1], "words")
words.mkdir()
known = ["<|startoftext|>", "<|endoftext|>", "a</w>"]
(words / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(known)}))
(words / "merges.txt").write_text("#version: 0.2\n")

# The place of the class is asked of the pipeline's module, so that the script finds it anywhere.
TextProj = sys.modules[UnCLIPPipeline.__module__].UnCLIPTextProjModel
text_proj = TextProj(clip_extra_context_tokens=2, clip_embeddings_dim=8, time_embed_dim=32,
                     cross_attention_dim=8)
blocks = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=8)
small = UNet2DModel(in_channels=6, out_channels=3, down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2, **blocks)
pipeline = UnCLIPPipeline(
    tokenizer=CLIPTokenizer.from_pretrained(words),
    text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, projection_dim=8,
        num_hidden_layers=1, num_attention_heads=1, bos_token_id=0, eos_token_id=1)),
    prior=PriorTransformer(num_attention_heads=1, attention_head_dim=8, num_layers=1,
                           embedding_dim=8, num_embeddings=77),
    decoder=UNet2DConditionModel(
        in_channels=3, out_channels=6, cross_attention_dim=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **blocks),
    text_proj=text_proj, super_res_first=small, super_res_last=small,
    **{f"{name}_scheduler": UnCLIPScheduler() for name in ("prior", "decoder", "super_res")})
pipeline.save_pretrained(folder)
index = folder / "model_index.json"


def read(module, **parts):
    """What reading the folder ends in, with text_proj from this module in model_index.json."""
    entry = json.loads(index.read_text())
    entry["text_proj"] = [module, "UnCLIPTextProjModel"]
    index.write_text(json.dumps(entry))
    try:
        return type(UnCLIPPipeline.from_pretrained(folder, **parts)).__name__
    except (AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"


written = json.loads(index.read_text())["text_proj"][0]
found = {
    f"as it was written, {written!r}": read(written),
    "the same, with text_proj=": read(written, text_proj=text_proj),
    "as older versions, 'unclip'": read("unclip"),
}
diffusers.UnCLIPTextProjModel = TextProj
found["with the class put back"] = read(written)
for name, result in found.items():
    print(f"{name}: {result}")
still = [result == "UnCLIPPipeline" for result in found.values()] == [False, False, False, True]
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" -W ignore "$work/look.py" "$work"
