"""Whatever is wrong with what a person gives: one sentence on standard error, exit code 2, and every file as it was."""

import errno
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import sample
import train
from conftest import SMALL
from mini_dalle2 import evaluate
from mini_dalle2.runtime.files import (
    load_checkpoint, read_json, read_metrics, save_checkpoint, write_json)

FRESH = [*SMALL, "--out=new"]
MORE = ["--out=run", "--resume", "--stage=prior", "--prior.steps=4"]
PATCH = pytest.MonkeyPatch()                                               # undone after each case
DRAW = ["--run=run", "--device=cpu", "--stage=base", "--out=drawn.png"]


# ---------------------------------------------------------------------------------------------------------------- what may be wrong
# Each: (...) -> a function without arguments that spoils the folder a case works in.

def file(name, contents):
    """A file of these bytes, or of this text, in place of what was there."""
    def spoil():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return spoil


def pictures(texts, contents=None):
    """A folder `pictures` with an image and a side-car text for each of `texts`; None: no text."""
    def spoil():
        Path("pictures").mkdir()
        for i, text in enumerate(texts):
            Path(f"pictures/{i}.png").write_bytes(contents or Path("cat.png").read_bytes())
            if text is not None:
                Path(f"pictures/{i}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return spoil


def cut(name, part=0.5):
    """The first part of a file, as a broken download leaves it."""
    return lambda: file(name, Path(name).read_bytes()[:int(part * Path(name).stat().st_size)])()


def copied(source, name):
    """One file in another one's place."""
    return lambda: shutil.copy(source, name)


def gone(*names):
    """Files that are not there."""
    return lambda: [Path(name).unlink() for name in names]


def amended(name, **values):
    """A checkpoint with other values; None: without that key."""
    def spoil():
        changed = load_checkpoint(name) | values
        save_checkpoint({key: value for key, value in changed.items() if value is not None}, name)
    return spoil


def poisoned(name, part):
    """A checkpoint with a number in it that is none."""
    def spoil():
        weights = load_checkpoint(name)[part]
        key = next(key for key, value in weights.items() if value.is_floating_point())
        amended(name, **{part: weights | {key: torch.full_like(weights[key], float("nan"))}})()
    return spoil


def changed_weight(name, part, change):
    """A checkpoint with one weight changed by a function."""
    def spoil():
        weights = load_checkpoint(name)[part]
        key = next(key for key, value in weights.items() if value.ndim == 2)
        amended(name, **{part: weights | {key: change(weights[key])}})()
    return spoil


def kept_as(dtype):
    """An AR prior whose list of components has another type."""
    def spoil():
        weights = load_checkpoint("run/ar_prior.pt")["ema"]
        amended("run/ar_prior.pt", ema=weights | {"codes.kept": weights["codes.kept"].to(dtype)})()
    return spoil


# A list that holds itself.
ENDLESS = []
ENDLESS.append(ENDLESS)


def changed_moments(change):
    """A prior to go on with, whose first moments are changed by a function."""
    def spoil():
        moments = load_checkpoint("run/prior.resume.pt")["optimizer"]
        amended("run/prior.resume.pt", optimizer=moments | {0: change(moments[0])})()
    return spoil


def more_words():
    """Every stage has a tokenizer of one merge more than its model has ids for."""
    for name in map("run/{}.pt".format, ("clip", "prior", "ar_prior", "decoder", "upsampler1", "upsampler2")):
        tokenizer = load_checkpoint(name).get("tokenizer")
        if tokenizer:
            amended(name, tokenizer={"merges": [*tokenizer["merges"], "q q"]})()


def other_tokenizer():
    """A tokenizer.json of fewer merges."""
    state = read_json(Path("run/tokenizer.json"))
    write_json({"merges": state["merges"][:-1]}, "run/tokenizer.json")


def edited():
    """A config.json that somebody has changed by hand."""
    path = Path("run/config.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def resized(name, **sizes):
    """A checkpoint whose model has other sizes."""
    return lambda: amended(name, model_config=load_checkpoint(name)["model_config"] | sizes)()


def configured(section, **values):
    """A config.json with other values in a section ("decoder.train")."""
    def spoil():
        config = read_json(Path("run/config.json"))
        part = config
        for key in section.split("."):
            part = part[key]
        part.update(values)
        write_json(config, "run/config.json")
    return spoil


def image(name, size, mode="RGB", colour=0, white=None):
    """A picture of one colour; `white` is a box that is white."""
    def spoil():
        picture = Image.new(mode, size, colour)
        if white:
            ImageDraw.Draw(picture).rectangle(white, fill="white")
        picture.save(name)
    return spoil


def huge(name):
    """The head of a picture of ten thousand million pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return file(name, b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)))


def no_room():
    """A disk that is full by the time a file is to be complete."""
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    PATCH.setattr(os, "fsync", fsync)


# ---------------------------------------------------------------------------------------------------------------- the cases
# name: (script, arguments, part of the sentence, what spoils the folder...)

FLAGS = {
    "an unknown preset": (train, ["--preset=huge", "--out=new"], "invalid choice: 'huge'"),
    "a preset that has no training": (train, ["--preset=karlo", "--out=new"], "invalid choice: 'karlo'"),
    "an unknown stage": (train, [*FRESH, "--stage=vae"], "invalid choice: 'vae'"),
    "an unknown device": (train, [*FRESH, "--device=tpu"], "invalid choice: 'tpu'"),
    "an unknown precision": (train, [*FRESH, "--dtype=fp8"], "invalid choice: 'fp8'"),
    "a misspelt setting": (train, [*FRESH, "--decoder.lrr=1"], "the closest is --decoder.lr"),
    "a setting of no section": (train, [*FRESH, "--unet.model_channels=1"], "the closest is --decoder.model_channels"),
    "a setting without a value": (train, [*FRESH, "--decoder.lr"], "needs a value, as in --decoder.lr="),
    "a setting with one dash": (train, [*FRESH, "-decoder.lr=1"], "settings look like"),
    "a word that belongs to nothing": (train, [*FRESH, "decoder"], "settings look like"),
    "a shortened flag": (train, [*FRESH, "--res"], "there is no setting --res"),
    "half a step": (train, [*FRESH, "--clip.steps=2.5"], "takes a whole number"),
    "a rate that is no number": (train, [*FRESH, "--prior.lr=nan"], "takes a finite number"),
    "neither true nor false": (train, [*FRESH, "--decoder.recompute=maybe"], "takes true or false"),
    "a letter in a list": (train, [*FRESH, "--decoder.channel_mult=1,x"], "takes a whole number"),
    "an empty list": (train, [*FRESH, "--decoder.channel_mult="], "channel_mult"),
    "no steps": (train, [*FRESH, "--clip.steps=0"], "steps must be at least 1"),
    "a rate below zero": (train, [*FRESH, "--upsampler1.lr=-1"], "lr must be above 0"),
    "an average that never moves": (train, [*FRESH, "--prior.ema=1"], "ema must be at least 0 and below 1"),
    "a probability above one": (train, [*FRESH, "--decoder.z_drop=1.5"], "z_drop must be from 0 to 1"),
    "a seed below zero": (train, [*FRESH, "--data.seed=-1"], "seed must be from 0"),
    "a seed of thirty digits": (train, [*FRESH, "--data.seed=" + "9" * 30], "data: seed must be at most 9223372036854775806"),
    "a number of ten thousand digits": (train, [*FRESH, "--data.seed=" + "9" * 10000], "data.seed"),
    "more pictures than memory": (train, [*FRESH, "--data.images=1000000000"], "clip needs at least"),
    "a network larger than memory": (train, [*FRESH, "--decoder.model_channels=160000"], "decoder needs at least"),
    "more processes than memory": (train, FRESH, "in each of 1000000 processes, and this machine has",
                                   lambda: PATCH.setenv("LOCAL_WORLD_SIZE", "1000000")),
    "a vocabulary smaller than the bytes": (train, [*FRESH, "--tokenizer.vocab_size=10"], "vocab_size must be at least 514"),
    "heads that do not divide the width": (train, [*FRESH, "--clip.text_heads=7"], "not divisible"),
    "patches larger than the picture": (train, [*FRESH, "--clip.patch_size=32"], "patch_size"),
    "norm groups that do not divide": (train, [*FRESH, "--decoder.norm_groups=7"], "norm_groups"),
    "attention at a size that never occurs": (train, [*FRESH, "--decoder.attn_resolutions=7"], "attn_resolutions"),
    "an upsampler that makes pictures smaller": (train, [*FRESH, "--upsampler1.high_size=8"], "upsampler1: high_size"),
    "upsamplers that do not fit together": (train, [*FRESH, "--upsampler1.high_size=48"], "upsampler2: high_size"),
    "a size that belongs to another stage": (train, [*FRESH, "--prior.clip_dim=64"], "follows --clip.clip_dim"),
    "a context without room": (train, [*FRESH, "--clip.context_length=1"], "context_length must be at least 2"),
    "an unknown objective": (train, [*FRESH, "--decoder.objective=score"], "objective"),
    "parts that do not divide the batch": (train, [*FRESH, "--decoder.accumulate=3"], "not divisible by accumulate"),
    "CLIP in parts": (train, [*FRESH, "--clip.accumulate=2"], "clip.accumulate must be 1"),
    "more sampling steps than timesteps": (train, [*FRESH, "--prior.sampling_steps=5000"], "sampling_steps"),
    "an empty name for the data": (train, [*FRESH, "--data="], "source is empty"),
    "an empty name for the run": (train, [*SMALL, "--out="], "--out is empty"),
    "no verb": (sample, [], "say what to do: text, variations"),
    "an unknown verb": (sample, ["paint", "a circle", *DRAW], 'no verb "paint"; the closest is inpaint'),
    "no caption": (sample, ["text", *DRAW], "required: CAPTION"),
    "an unknown flag": (sample, ["text", "a circle", "--colour=red", *DRAW], "there is no option --colour"),
    "no pictures": (sample, ["text", "a circle", "--n=0", *DRAW], "--n 0"),
    "a thousand and one pictures": (sample, ["text", "a circle", "--n=1001", *DRAW], "--n 1001"),
    "the best of fewer": (sample, ["text", "a circle", "--n=4", "--rerank=2", *DRAW], "rerank 2"),
    "a sample's seed below zero": (sample, ["text", "a circle", "--seed=-1", *DRAW], "--seed -1"),
    "no sampling steps": (sample, ["text", "a circle", "--steps=0", *DRAW], "0 sampling steps"),
    "a million sampling steps": (sample, ["text", "a circle", "--steps=1000000", *DRAW], "1000000 sampling steps"),
    "guidance that is no number": (sample, ["text", "a circle", "--guidance=nan", *DRAW], "guidance nan"),
    "an unknown prior": (sample, ["text", "a circle", "--prior=gan", *DRAW], "invalid choice: 'gan'"),
    "an eta above one": (sample, ["variations", "cat.png", "--eta=2", *DRAW], "--eta 2"),
    "an angle beyond the other caption": (sample, ["textdiff", "cat.png", "a", "b", "--theta=1.5", *DRAW], "theta"),
    "an angle that is no number": (sample, ["textdiff", "cat.png", "a", "b", "--theta=nan", *DRAW], "theta"),
    "a text diff between equals": (sample, ["textdiff", "cat.png", "a cat", "a cat", *DRAW], "both captions mean the same"),
    "an interpolation of one": (sample, ["interpolate", "cat.png", "mask.png", "--n=1", *DRAW], "at least two"),
    "no component": (sample, ["reconstruct", "cat.png", "--components=0", *DRAW], "component"),
    "more components than there are": (sample, ["reconstruct", "cat.png", "--components=1000", *DRAW], "component"),
    "a GPU that is not there": (sample, ["text", "a circle", "--run=run", "--device=cuda", "--out=drawn.png"], "no usable GPU",
                                lambda: PATCH.setattr(torch.cuda, "is_available", lambda: False)),
}

DATA = {
    "no such folder": (train, [*FRESH, "--data=nowhere"], "no such folder: nowhere"),
    "a picture for a folder": (train, [*FRESH, "--data=cat.png"], "no such folder: cat.png"),
    "an empty folder": (train, [*FRESH, "--data=pictures"], "no image files", lambda: Path("pictures").mkdir()),
    "texts without pictures": (train, [*FRESH, "--data=pictures"], "1 × no picture of this name", file("pictures/a.txt", "a cat")),
    "pictures without texts": (train, [*FRESH, "--data=pictures"], "2 × no caption", pictures([None, None])),
    "nothing but empty captions": (train, [*FRESH, "--data=pictures"], "2 × no caption", pictures(["", " \n\t "])),
    "captions in binary": (train, [*FRESH, "--data=pictures"], "2 × side-car text is not UTF-8", pictures([b"\xff\xfe\x00a", b"\x80"])),
    "captions of which nothing can be seen": (train, [*FRESH, "--data=pictures"], "2 × no caption", pictures(["\x01", "\x02\x03"])),
    "pictures that are none": (train, [*FRESH, "--data=pictures"], "2 × not an image", pictures(["a", "b"], b"<html>not found</html>")),
    "metadata that is no JSON": (train, [*FRESH, "--data=pictures"], "1 × line not understood", file("pictures/metadata.jsonl", "cat.png,a cat")),
    "metadata that names no picture": (train, [*FRESH, "--data=pictures"], "1 × file missing",
                                       file("pictures/metadata.jsonl", '{"file_name": "cat.png", "text": "a cat"}')),
    "metadata with numbers for names": (train, [*FRESH, "--data=pictures"], "2 × line not understood",
                                        file("pictures/metadata.jsonl", '{"file_name": 3, "text": "a"}\n{"file_name": "a.png", "text": 3}')),
    "metadata with a name no system takes": (train, [*FRESH, "--data=pictures"], "no usable captioned picture",
                                             file("pictures/metadata.jsonl", '{"file_name": "a\\u0000.png", "text": "a"}')),
}

CAPTIONS = {
    "an empty caption": (sample, ["text", "a circle", "", *DRAW], "a caption is empty"),
    "a caption of blanks": (sample, ["text", " \t\n", *DRAW], "a caption is empty"),
    "a caption of control characters": (sample, ["text", "\x01\x02", *DRAW], "a caption is empty"),
    "a caption in binary": (sample, ["text", b"\xff\xfe\x9d".decode(errors="surrogateescape"), *DRAW], "caption"),
    "a caption too long for the context": (sample, ["text", "red circle " * 40, *DRAW], "the model reads 32"),
    "a caption of a million letters": (sample, ["text", "x" * 10 ** 6, *DRAW], "the model reads 32"),
    "an empty target": (sample, ["textdiff", "cat.png", "a cat", "", *DRAW], "a caption is empty"),
}

PICTURES = {
    "no such picture": (sample, ["variations", "dog.png", *DRAW], "there is no picture dog.png"),
    "a folder for a picture": (sample, ["variations", "run", *DRAW], "there is no picture run"),
    "an empty picture": (sample, ["variations", "dog.png", *DRAW], "dog.png cannot be read", file("dog.png", b"")),
    "a text for a picture": (sample, ["interpolate", "cat.png", "dog.png", *DRAW], "dog.png cannot be read", file("dog.png", "a dog")),
    "half a picture": (sample, ["classify", "cat.png", "a", *DRAW[:2], DRAW[-1]], "cat.png cannot be read", cut("cat.png")),
    "a picture that would fill the memory": (sample, ["variations", "dog.png", *DRAW], "dog.png cannot be read",
                                             huge("dog.png")),
    "a mask of another size": (sample, ["inpaint", "cat.png", "dog.png", "a cat", *DRAW], "must be of the same size", image("dog.png", (9, 9))),
    "a black mask": (sample, ["inpaint", "cat.png", "dog.png", "a cat", *DRAW], "nothing", image("dog.png", (64, 64))),
    "a mask of glass": (sample, ["inpaint", "cat.png", "dog.png", "a cat", *DRAW], "nothing", image("dog.png", (64, 64), "RGBA", (255, 255, 255, 0))),
    "a mask that is white where nothing is taken": (sample, ["inpaint", "dog.png", "edge.png", "a cat", *DRAW], "central square",
                                                    image("dog.png", (90, 30)), image("edge.png", (90, 30), white=(0, 0, 20, 30))),
    "half a mask": (sample, ["inpaint", "cat.png", "mask.png", "a cat", *DRAW], "mask.png cannot be read", cut("mask.png")),
}

RUNS = {
    "no such run": (sample, ["text", "a circle", "--run=nowhere"], "no run folder nowhere"),
    "a file for a run": (sample, ["text", "a circle", "--run=cat.png", "--out=drawn.png"], "no run folder cat.png"),
    "a run without a prior": (sample, ["text", "a circle", *DRAW], "run has no prior.pt", gone("run/prior.pt")),
    "half a checkpoint": (sample, ["text", "a circle", *DRAW], "run/decoder.pt cannot be read", cut("run/decoder.pt")),
    "an empty checkpoint": (sample, ["text", "a circle", *DRAW], "run/upsampler2.pt cannot be read", file("run/upsampler2.pt", b"")),
    "a picture for a checkpoint": (sample, ["text", "a circle", *DRAW], "run/clip.pt cannot be read", copied("cat.png", "run/clip.pt")),
    "weights of somebody else": (sample, ["text", "a circle", *DRAW], "no checkpoint of mini_dalle2",
                                 lambda: torch.save({"weight": torch.zeros(3)}, "run/prior.pt")),
    "a checkpoint of another stage": (sample, ["text", "a circle", *DRAW], "run/prior.pt is a checkpoint of ar_prior",
                                      copied("run/ar_prior.pt", "run/prior.pt")),
    "upsamplers in each other's place": (sample, ["text", "a circle", *DRAW], "run/upsampler1.pt is a checkpoint of upsampler2",
                                         copied("run/upsampler2.pt", "run/upsampler1.pt")),
    "a checkpoint of a future version": (sample, ["text", "a circle", *DRAW], "does not fit this version's models",
                                         amended("run/prior.pt", stage="prior", model_config={"depth": 3})),
    "a checkpoint with impossible sizes": (sample, ["text", "a circle", *DRAW], "run/prior.pt does not fit", resized("run/prior.pt", heads=7)),
    "a checkpoint of other sizes": (sample, ["text", "a circle", *DRAW], "run/prior.pt does not fit", resized("run/prior.pt", width=48)),
    "a checkpoint without weights": (sample, ["text", "a circle", *DRAW], "run/decoder.pt does not fit", amended("run/decoder.pt", ema=None)),
    "a checkpoint without its step": (sample, ["text", "a circle", *DRAW], "run/decoder.pt", amended("run/decoder.pt", step=None)),
    "a checkpoint with text for weights": (sample, ["text", "a circle", *DRAW], "run/decoder.pt", amended("run/decoder.pt", ema="weights")),
    "a CLIP without its tokenizer": (sample, ["text", "a circle", *DRAW], "run/clip.pt", amended("run/clip.pt", tokenizer=None)),
    "a decoder of another CLIP": (sample, ["text", "a circle", *DRAW], "another CLIP", amended("run/decoder.pt", clip_signature="0" * 16)),
    "an upsampler of other sizes": (sample, ["text", "a circle", *DRAW], "upsampler1", lambda: (
        amended("run/upsampler2.pt", stage="upsampler1")(), shutil.copy("run/upsampler2.pt", "run/upsampler1.pt"), gone("run/upsampler2.pt")())),
    "a run and public weights": (sample, ["text", "a circle", "--run=run", "--weights=run", "--out=drawn.png"], "use one of the two"),
    "no public weights": (sample, ["text", "a circle", "--weights=nowhere", "--out=drawn.png"], "nowhere"),
    "public weights that are none": (sample, ["text", "a circle", "--weights=run", "--out=drawn.png"], "run"),
    "nothing to go on with": (train, ["--preset=micro", "--out=new", "--resume"], "nothing to resume"),
    "a run that is there already": (train, [*SMALL, "--out=run"], "already holds"),
    "a run of another preset": (train, ["--out=run", "--resume", "--preset=tiny"], "begun with the preset micro"),
    "a run of other sizes": (train, ["--out=run", "--resume", "--clip.text_width=64"], "already holds a clip of other sizes"),
    "a run of other pictures": (train, ["--out=run", "--resume", "--data=pictures"], "from other data", pictures(["a cat"])),
    "half a config.json": (train, MORE, "run/config.json cannot be used", cut("run/config.json")),
    "a config.json in binary": (train, MORE, "run/config.json cannot be used", file("run/config.json", b"\xff\xfe\x00")),
    "a config.json that is a list": (train, MORE, "run/config.json cannot be used", file("run/config.json", "[1, 2]")),
    "a config.json nested too deeply": (train, MORE, "run/config.json cannot be used", file("run/config.json", "[" * 10 ** 5)),
    "a config.json of a future version": (train, MORE, "run/config.json cannot be used", configured("decoder.model", depth=3)),
    "a config.json with a word for a number": (train, MORE, "run/config.json cannot be used", configured("prior.train", lr="fast")),
    "a config.json with half a step": (train, MORE, "run/config.json cannot be used", configured("prior.train", batch_size=2.5)),
    "no config.json": (train, MORE, "config.json", gone("run/config.json")),
    "no config.json, and one stage more": (train, [*SMALL, "--out=run", "--stage=upsampler2"], "config.json",
                                           gone("run/config.json", "run/upsampler2.pt", "run/upsampler2.resume.pt")),
    "to begin with nothing": (train, ["--from=nowhere", "--out=new"], "no checkpoint nowhere/clip.pt"),
    "to begin with half a decoder": (train, ["--from=run", "--out=new"], "run/decoder.pt cannot be read", cut("run/decoder.pt")),
    "to begin with other sizes": (train, ["--from=run", "--out=new", "--decoder.text_width=64"], "holds a decoder of other sizes"),
    "to begin twice": (train, ["--from=run", "--out=run"], "--from begins a new run"),
    "to begin and go on": (train, ["--from=run", "--out=new", "--resume"], "--from begins a run"),
    "to begin with another preset": (train, ["--from=run", "--out=new", "--preset=tiny"], "--from begins a run"),
    "to begin without a tokenizer": (train, ["--from=run", "--out=new"], "tokenizer", amended("run/clip.pt", tokenizer=None)),
    "no tokenizer yet": (train, [*FRESH, "--stage=clip"], "tokenizer.json is missing"),
    "half a tokenizer": (train, MORE, "run/tokenizer.json is damaged", cut("run/tokenizer.json")),
    "a tokenizer with impossible merges": (train, MORE, "run/tokenizer.json is damaged", file("run/tokenizer.json", '{"merges": ["zz zz"]}')),
    "another tokenizer than CLIP's": (train, MORE, "run/clip.pt knows another tokenizer than run/tokenizer.json", other_tokenizer),
    "a prior of another tokenizer": (sample, ["text", "a circle", *DRAW], "run/prior.pt was trained with another tokenizer",
                                     amended("run/prior.pt", tokenizer={"merges": []})),
    "weights that are no numbers": (sample, ["text", "a circle", *DRAW], "run/decoder.pt cannot be used: ema", poisoned("run/decoder.pt", "ema")),
    "moments that are no numbers": (train, MORE, "run/prior.resume.pt cannot be used: model", poisoned("run/prior.resume.pt", "model")),
    "weights that are whole numbers": (sample, ["text", "a circle", *DRAW], "run/decoder.pt does not fit this version's models", changed_weight(
        "run/decoder.pt", "ema", lambda value: value.to(torch.int8))),
    "weights of eight bits": (sample, ["text", "a circle", *DRAW], "holds torch.float8_e4m3fn, and this model's torch.float32", changed_weight(
        "run/decoder.pt", "ema", lambda value: value.to(torch.float8_e4m3fn))),
    "places that are yes or no": (sample, ["text", "a circle", *DRAW], "codes.kept holds torch.bool, and this model's torch.int64", kept_as(torch.bool)),
    "weights of several shapes": (sample, ["text", "a circle", *DRAW], "is not whole, or not finite", changed_weight(
        "run/decoder.pt", "ema", lambda value: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided))),
    "moments that are whole numbers": (train, MORE, "run/prior.resume.pt is not from training", changed_moments(
        lambda of: of | {"exp_avg": of["exp_avg"].to(torch.int8)})),
    "moments without spread": (train, MORE, "is not from training", changed_moments(lambda of: {"step": of["step"], "exp_avg": of["exp_avg"]})),
    "no moments": (train, MORE, "is not from training", amended("run/prior.resume.pt", optimizer={})),
    "a version that is a tensor": (sample, ["text", "a circle", *DRAW], "its version is a Tensor", amended("run/decoder.pt", version=torch.ones(3))),
    "seconds without end": (train, MORE, "its seconds is no number of seconds", amended("run/prior.resume.pt", seconds=float("inf"))),
    "a tokenizer of more words than its models": (sample, ["text", "a circle", *DRAW], "ids and a tokenizer of", more_words),
    "a batch beyond all machines": (train, [*FRESH, "--prior.batch_size=1" + "0" * 400], "prior: batch_size must be at most 1000000"),
    "pictures beyond all machines": (train, [*FRESH, "--data.images=1" + "0" * 400], "data: images must be at most 1000000000"),
    "a rate without end": (train, MORE, "lr must be a finite number, not inf", configured("prior.train", lr=float("inf"))),
    "weights that are mostly left out": (sample, ["text", "a circle", *DRAW], "is not whole, or not finite", changed_weight(
        "run/decoder.pt", "ema", lambda value: value.to_sparse())),
    "weights that could be stretched": (train, MORE, "run/prior.resume.pt", changed_weight("run/prior.resume.pt", "ema", lambda value: value.flatten()[:1])),
    "steps in words": (sample, ["text", "a circle", *DRAW], "its step is a str", amended("run/decoder.pt", step="many")),
    "fewer steps than none": (sample, ["text", "a circle", *DRAW], "its steps is no number of steps", amended("run/decoder.pt", steps=-3)),
    "a stage that is a list": (sample, ["text", "a circle", *DRAW], "no checkpoint of mini_dalle2", amended("run/decoder.pt", stage=["decoder"])),
    "a hundred million layers": (sample, ["text", "a circle", *DRAW], "layers must be at most 500", resized("run/prior.pt", layers=10 ** 8)),
    "layers in a word": (sample, ["text", "a circle", *DRAW], "layers is 'two'", resized("run/prior.pt", layers="two")),
    "a configuration that holds itself": (sample, ["text", "a circle", *DRAW], "is a value of the type", resized("run/prior.pt", layers=ENDLESS)),
    "a layer too many, to go on with": (train, MORE, "run/prior.resume.pt does not fit", resized("run/prior.resume.pt", layers=3)),
    "a hundred million layers in a flag": (train, [*FRESH, "--clip.vision_layers=100000000"], "vision_layers must be at most 500, not 100000000"),
    "a width beyond all machines": (train, [*FRESH, "--clip.vision_width=1000000000000"], "vision_width must be at most 1000000"),
    "a thousand levels": (train, [*FRESH, "--decoder.channel_mult=" + ",".join("1" * 1000)], "channel_mult has 1000 numbers"),
    "a config.json that was edited": (train, MORE, "run/config.json cannot be used: it was edited or damaged", edited),
    "no CLIP yet": (train, [*MORE[:2], "--stage=prior"], "run/clip.pt is missing", gone("run/clip.pt", "run/prior.pt", "run/prior.resume.pt")),
    "half a CLIP": (train, MORE, "run/clip.pt cannot be read", cut("run/clip.pt")),
    "a prior of another CLIP": (train, MORE, "run/prior.pt was trained on the embeddings of another CLIP",
                                amended("run/prior.pt", clip_signature="0" * 16)),
    "half of what is needed to go on": (train, MORE, "run/prior.resume.pt cannot be read", cut("run/prior.resume.pt")),
    "nothing of what is needed to go on": (train, MORE, "prior.resume.pt, which is needed to go on", gone("run/prior.resume.pt")),
    "to go on from another stage": (train, MORE, "run/prior.resume.pt", copied("run/decoder.resume.pt", "run/prior.resume.pt")),
    "to go on with a model of other sizes": (train, MORE, "run/prior.resume.pt does not fit", resized("run/prior.resume.pt", width=48)),
    "to go on from what is only for sampling": (train, MORE, "run/prior.resume.pt", copied("run/prior.pt", "run/prior.resume.pt")),
}

OUTPUTS = {
    "a file for the run folder": (train, [*SMALL, "--out=cat.png"], "cat.png"),
    "a run folder below a file": (train, [*SMALL, "--out=cat.png/new"], "cat.png/new"),
    "a run folder where none may be": (train, [*SMALL, "--out=/proc/new"], "/proc/new"),
    "a run folder with a name too long": (train, [*SMALL, "--out=" + "x" * 300], "too long"),
    "a full disk at the start": (train, [*SMALL, "--out=run", "--stage=tokenizer"], "run/config.json could not be written (No space left",
                                 no_room, gone("run/tokenizer.json")),
    "a full disk at the end": (sample, ["text", "a circle", "--n=1", *DRAW], "drawn.png could not be written (No space left", no_room),
    "a picture over the one given": (sample, ["variations", "cat.png", *DRAW[:3], "--out=cat.png"], "would overwrite the input picture"),
    "single pictures over the one given": (sample, ["variations", "a-1-1.png", *DRAW[:3], "--out=a.png", "--singles"], "would overwrite the input picture",
                                           copied("cat.png", "a-1-1.png")),
    "a picture into no folder": (sample, ["text", "a circle", *DRAW[:3], "--out=nowhere/a.png"], "no folder nowhere"),
    "a picture in place of a folder": (sample, ["text", "a circle", *DRAW[:3], "--out=a.png"], "is a folder", lambda: Path("a.png").mkdir()),
    "a picture of another format": (sample, ["text", "a circle", *DRAW[:3], "--out=a.gif"], "written as .png"),
    "a picture where none may be": (sample, ["text", "a circle", *DRAW[:3], "--out=/proc/a.png"], "cannot be written"),
}

EVALUATION = {
    "an unknown experiment": (evaluate, ["--run=run", "--only", "fig9"], "the closest is fig8"),
    "no experiment": (evaluate, ["--run=run", "--only"], "expected at least one argument"),
    "an experiment for other pictures": (evaluate, ["--run=run", "--device=cpu", "--only", "pictures"], "needs a folder of real pictures"),
    "too few captions": (evaluate, ["--run=run", "--n=3"], "--n 3: from 16"),
    "a number of captions that is none": (evaluate, ["--run=run", "--n=many"], "invalid int value"),
    "an unknown flag of the evaluation": (evaluate, ["--run=run", "--steps=3"], "there is no option --steps"),
    "no run to evaluate": (evaluate, ["--run=nowhere"], "no run folder nowhere"),
    "a picture to evaluate": (evaluate, ["--run=cat.png"], "no run folder cat.png"),
    "a run without a decoder": (evaluate, ["--run=run", "--device=cpu"], "run has no decoder.pt", gone("run/decoder.pt")),
    "a run that is not finished": (evaluate, ["--run=run", "--device=cpu"], "run/decoder.pt is not finished: 2 of 3 steps", amended("run/decoder.pt", step=2)),
    "a run that has lost its config.json": (evaluate, ["--run=run", "--device=cpu"], "`python train.py --from run --stage evaluation --out runs/box`",
                                         gone("run/config.json")),
    "a run with another's config.json": (evaluate, ["--run=run", "--device=cpu"], "describes other models", configured("decoder.model", guidance=1.5)),
    "a page of results that is not there": (evaluate, ["--run=run", "--device=cpu", "--results=nowhere.md"], "there is no nowhere.md"),
    "a page without a place for the table": (evaluate, ["--run=run", "--device=cpu", "--results=page.md"], "does not say where the table goes",
                                              file("page.md", "# a")),
    "a page that ends before it begins": (evaluate, ["--run=run", "--device=cpu", "--results=page.md"], "does not say where the table goes",
                                            file("page.md", "<!-- evaluate shapes: end -->\n<!-- evaluate shapes: begin -->\n")),
    "a page of some experiments": (evaluate, ["--run=run", "--results=page.md", "--only", "fig8"], "leave out --only"),
}

CASES = EVALUATION | FLAGS | DATA | CAPTIONS | PICTURES | RUNS | OUTPUTS


@pytest.fixture
def box(run, tmp_path):
    """A folder to spoil: a finished run, a picture, a mask; it is the current one."""
    PATCH.chdir(tmp_path)
    shutil.copytree(run, "run")
    image("cat.png", (64, 64), colour="orange", white=(10, 10, 30, 40))()
    image("mask.png", (64, 64), white=(0, 0, 31, 31))()
    yield tmp_path
    PATCH.undo()


def contents(folder):
    """{path: bytes} of all files, and of the folders None."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.suffix != ".tmp"}


@pytest.mark.parametrize("script, arguments, said, spoil", [(*case[:3], case[3:]) for case in CASES.values()], ids=CASES)
def test_a_mistake_is_one_sentence_and_changes_nothing(box, capsys, script, arguments, said, spoil):
    for change in spoil:
        change()
    before = contents(box)
    capsys.readouterr()
    code = script.main(arguments)
    error = capsys.readouterr().err.split("\r")[-1]                         # bars that were drawn until then wipe themselves away
    # Notes about the captions may stand before the mistake. Their further lines are indented.
    error = re.sub(r"\A(note: .*\n( .*\n)*)*", "", error)
    name = script.__name__.split(".")[-1]
    assert code == 2 and said in error and error.startswith((f"{name}.py: ", f"{name}: ")) and error.count("\n") == 1, error
    assert len(error) < 1000 and "Traceback" not in error and "[Errno" not in error, error
    assert contents(box) == before


# Odd, but what is meant is clear: it works. Under its name, what a person would expect.
ODD = {
    "one pixel is a picture of one colour": (sample, ["variations", "dog.png", "--n=1", *DRAW], image("dog.png", (1, 1))),
    "of a stripe, the square in its middle is taken": (sample, ["variations", "dog.png", "--n=1", *DRAW], image("dog.png", (20000, 10))),
    "of a tower too": (sample, ["reconstruct", "dog.png", *DRAW], image("dog.png", (10, 20000))),
    "a picture of which only the end mark is lost is whole": (sample, ["reconstruct", "cat.png", *DRAW], cut("cat.png", 0.98)),
    "grey of 16 bits": (sample, ["reconstruct", "dog.png", *DRAW], image("dog.png", (64, 64), "I;16", 40000)),
    "a mask for one pixel": (sample, ["inpaint", "dog.png", "dot.png", "a cat", "--n=1", *DRAW], image("dog.png", (1, 1)),
                             image("dot.png", (1, 1), colour="white")),
    "a mask that is white all over": (sample, ["inpaint", "cat.png", "all.png", "a cat", "--n=1", *DRAW], image("all.png", (64, 64), colour="white")),
    "a caption in other letters": (sample, ["text", "красный круг 🐈", "--n=1", *DRAW]),
    "a picture called like a flag": (sample, ["reconstruct", *DRAW, "--", "--dog.png"], copied("cat.png", "--dog.png")),
    "lines of metrics.jsonl that are none are left out": (
        train, MORE, file("run/metrics.jsonl", b'{"stage": 1}\n[1]\n3\n\xff{"st\n' + b"[" * 10 ** 5)),
    "no metrics.jsonl": (train, MORE, gone("run/metrics.jsonl")),
    "damaged embeddings are made again": (train, MORE, cut("run/embeddings.pt")),
    "embeddings of what are no captions too": (train, MORE, amended("run/embeddings.pt", captions=[1, 2])),
    "embeddings of another kind too": (train, MORE, amended("run/embeddings.pt", z_img=3)),
    "what is no embeddings too": (train, MORE, copied("run/clip.pt", "run/embeddings.pt")),
    "one captioned picture is a data set": (train, [*FRESH, "--data=pictures", "--stage=tokenizer"], pictures(["a cat"])),
    "a caption of a hundred thousand words loses its end": (train, [*FRESH, "--data=pictures", "--stage=tokenizer"], pictures(["cat " * 10 ** 5])),
    "pictures of one pixel, and stripes": (train, [*FRESH, "--data=pictures", "--stage=tokenizer"], pictures(["a cat"]),
                                           image("pictures/0.png", (1, 1)), image("pictures/1.png", (20000, 10)), file("pictures/1.txt", "a dog")),
}


@pytest.mark.parametrize("script, arguments, prepare", [(*case[:2], case[2:]) for case in ODD.values()], ids=ODD)
def test_what_is_odd_but_clear_works(box, script, arguments, prepare):
    for change in prepare:
        change()
    assert script.main(arguments) == 0
    assert script is train or Image.open("drawn.png").size > (16, 16)
    if "--stage=prior" in arguments:
        assert load_checkpoint("run/prior.pt")["step"] == 4 and {line["stage"] for line in read_metrics("run")} >= {"prior"}
