"""A run folder, opened for one call of train.py: its configuration, and what its stages share.

    Run.open(args, device)     decides once: what is there, what is finished, what may change

A run folder holds config.json, tokenizer.json, one checkpoint STAGE.pt for each stage, the
embeddings of all training pictures, metrics.jsonl, commands.txt and words.txt, the words of the
training captions.

Shapes: N pictures or captions, L context length, D = clip_dim, S side of a picture.
Read next: guards.py for the checks, stages.py for what each model learns.
"""

import contextlib
import shlex

import torch

from .. import configs
from ..data import words
from ..data.pixels import to_float
from ..data.tables import Pictures
from ..pipeline import load_model
from ..runtime.commands import word
from ..runtime.files import (
    FLOATS, atomic_open, load_checkpoint, read_json, save_checkpoint, signature, write_json)
from ..runtime.processes import barrier, is_main, launcher, main_first
from ..tokenizer import BPETokenizer
from . import changes, guards, hints, made, overrides
from .origin import copy_origin
from .variants import variant


class Run:
    """A run folder, and what its stages hand to each other."""

    def __init__(self, config, folder, device, resume=False, names=()):
        """config: see configs.py. names: the stages and variants that this call trains.

        resume: go on with what is in the folder. Prints a line about a folder of pictures.
        """
        self.config = config
        self.folder = folder
        self.device = device
        self.resume = resume
        self.names = list(names)
        self.pictures = Pictures(config.data, device, folder)
        self.done = []
        # The command that goes on with this call, its own words, and the seconds of a step of
        # each stage.
        self.go_on = hints.go_on(folder, device)
        self.words = [f"--out={folder}"]
        self.pace = {}
        self._clip = None
        self._cut_is_said = False

    @classmethod
    def open(cls, args, device):
        """The run that a command line asks for; args: what train.parse returns.

        Everything that can be checked is checked here, before the first step. The folder is
        written only after that. Raises OSError, ValueError.
        """
        config = guards.settle(args)
        names = guards.stages_to_train(args, config)
        resume = args.resume or args.origin is not None
        run = cls(config, args.run, device, resume, names)
        run.go_on = hints.go_on(args.run, device, args.stage)
        run.words = args.given
        guards.check_memory(run)
        guards.check_compile(run)
        if args.origin is None:
            run.done = guards.check_folder(run)
        args.run.mkdir(parents=True, exist_ok=True)
        # The other processes may still be looking at what the folder holds.
        barrier()
        if args.origin is not None:
            with main_first():
                if is_main():
                    copy_origin(run, args.origin)
            run.done = guards.check_folder(run)
        run.keep_config()
        run.note_pictures()
        return run

    def is_done(self, name):
        """Whether a stage needs no more steps. Raises ValueError when it cannot go on."""
        return name in self.done or self.resume and made.is_finished(self, name)

    def lacks(self, names):
        """Those of the stages that are not finished; this call has finished its own.

        Raises ValueError for a stage that cannot go on, and says what to do.
        """
        return [name for name in names
                if name not in self.names and not made.is_finished(self, name)]

    def config_of(self, name):
        """The configuration that a stage is trained with; a variant has some other settings."""
        return variant(self.config, name) if name in configs.VARIANTS else self.config

    # ------------------------------------------------------------------------ what is written

    def keep_config(self):
        """Write the configuration into the run folder."""
        if is_main():
            write_json(overrides.to_dict(self.config), self.folder / "config.json")

    def note_pictures(self):
        """Write down which pictures the run knows. Say so when they are others than last time."""
        if self.config.data.source == "shapes" or not is_main():
            return
        now = self.pictures.digest
        if changes.recorded_digest(self.folder) not in (None, now):
            print(f"note: {self.config.data.source} has changed since this run began: "
                  f"the stages from here on learn from what it holds now")
        write_json({"digest": now}, self.folder / "pictures.json")
        self.note_small_pictures()

    def note_small_pictures(self):
        """Say so when an upsampler will learn from pictures that must be enlarged for it."""
        sides = {getattr(self.config, name).model.high_size: name for name in self.names
                 if name.startswith("upsampler") and name not in self.done}
        if not sides:
            return
        side = max(sides)
        small, least = self.pictures.smaller_than(side)
        if small:
            print(f"note: {small} of {self.pictures.available} pictures have less than the {side} "
                  f"pixels of {sides[side]}. They are enlarged up to {side / least:.1f} times, and "
                  f"teach it blur: larger pictures would make it sharper")

    def adopt_tokenizer(self):
        """Give the models the vocabulary that the tokenizer came out with."""
        tokenizer = self.tokenizer()
        values = {"clip.vocab_size": tokenizer.vocab_size, "clip.eot_id": tokenizer.eot_id}
        self.config = configs.changed(self.config, values)
        self.keep_config()
        if is_main() and not (self.folder / words.FILE).is_file():
            words.write_words(self.pictures.captions(), self.folder)

    def note_command(self, words):
        """Add a command line to commands.txt, which says how the run was made."""
        if is_main():
            path = self.folder / "commands.txt"
            before = path.read_bytes() if path.is_file() else b""
            line = f"{launcher()} {shlex.join(['train.py', *words])}\n"
            with atomic_open(path) as file:
                # The names of files need not be UTF-8.
                file.write(before + line.encode(errors="surrogateescape"))

    # ------------------------------------------------------------------------ earlier stages

    def tokenizer(self):
        """The run's tokenizer. Raises FileNotFoundError before it is trained, ValueError."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {self.first('tokenizer')}")
        try:
            return BPETokenizer.from_state_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def finished_model(self, stage):
        """(model, checkpoint) of an earlier stage to build upon.

        Raises FileNotFoundError when the stage is missing, ValueError when it is not finished.
        """
        path = self.folder / f"{stage}.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {self.first(stage)}")
        model, checkpoint = load_model(path, stage)
        if checkpoint["step"] < checkpoint["steps"]:
            raise ValueError(f"{path} has {checkpoint['step']} of {checkpoint['steps']} steps: "
                             f"{self.first(stage, ' --resume')}")
        return model, checkpoint

    def first(self, stage, more=""):
        """What to do when an earlier stage is missing. Ends in a command."""
        command = hints.instead(self.words, stage)
        if any(made.is_made(self.folder, other) for other in configs.STAGES):
            # The folder knows all settings.
            command = f"python train.py --stage {stage} --out {word(self.folder)}{more}"
        return f"run `{command}` first"

    def frozen_clip(self):
        """(the run's finished CLIP, the signature of its weights). Raises as finished_model."""
        if self._clip is None:
            model, checkpoint = self.finished_model("clip")
            self._clip = model.to(self.device), signature(checkpoint["ema"])
        return self._clip

    def frozen_sketch(self):
        """The run's finished sketch, which the decoder is shown. Raises as finished_model."""
        return self.finished_model("sketch")[0]

    # ------------------------------------------------------------------------ pictures and captions

    def tokens(self, captions):
        """Captions -> tokens (N, L) on the device. Says once when captions are cut off."""
        tokenizer = self.tokenizer()
        length = self.config.clip.model.context_length
        tokens = tokenizer.tokenize(captions, length, truncate=True)
        # Start and end of text take two places.
        lengths = [len(tokenizer.encode(caption)) + 2 for caption in set(captions)]
        cut = sum(one > length for one in lengths)
        if cut and not self._cut_is_said:
            self._cut_is_said = True
            print(f"note: {cut} captions have more than {length} tokens and lose their end; only "
                  f"a new run, not --from, can keep all, with --clip.context_length={max(lengths)}")
        return tokens.to(self.device)

    def table(self, split, size):
        """(pictures uint8 (N, 3, size, size), N captions) of "train" or "val".

        N is as many as CLIP, priors, sketch and decoder learn from. The upsamplers have fewer.
        """
        data = self.config.data
        most = data.images if split == "train" else data.val_images
        return self.pictures.table(split, size, most)

    @torch.no_grad()
    def clip_embeddings(self, pictures, captions, clip=None):
        """(z_img, z_txt), each (N, D) of unit norm, of uint8 pictures and their captions.

        clip: the model that embeds; None: the run's own, frozen.
        """
        clip = clip or self.frozen_clip()[0]
        z_img = [clip.encode_image(to_float(part.to(self.device))) for part in pictures.split(500)]
        z_txt = [clip.encode_text(part) for part in self.tokens(captions).split(500)]
        return torch.cat(z_img), torch.cat(z_txt)

    def training_embeddings(self):
        """(captions, z_img, z_txt) of all training pictures, by the frozen CLIP.

        They are kept in embeddings.pt, and made again when CLIP or the pictures change.
        """
        path = self.folder / "embeddings.pt"
        made_from = f"{self.frozen_clip()[1]} {self.pictures.fingerprint()}"
        with main_first():
            saved = {}
            # A damaged file is made again.
            with contextlib.suppress(FileNotFoundError, ValueError):
                saved = load_checkpoint(path, "embeddings")
            if saved.get("key") != made_from or not are_embeddings(saved, self.config.clip.model):
                pictures, captions = self.table("train", self.config.clip.model.image_size)
                z_img, z_txt = self.clip_embeddings(pictures, captions)
                saved = {"stage": "embeddings", "key": made_from, "captions": captions,
                         "z_img": z_img.cpu(), "z_txt": z_txt.cpu()}
                save_checkpoint(saved, path)
        return saved["captions"], saved["z_img"].to(self.device), saved["z_txt"].to(self.device)


def are_embeddings(saved, cfg):
    """Whether what embeddings.pt holds are captions with a z_img and a z_txt (N, D) each."""
    captions = saved.get("captions")
    if not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
        return False
    return all(torch.is_tensor(z) and z.dtype in FLOATS
               and z.shape == (len(captions), cfg.clip_dim)
               for z in (saved.get("z_img"), saved.get("z_txt")))
