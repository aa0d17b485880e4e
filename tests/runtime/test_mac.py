"""The GPU of a Mac: every stage and every verb on a stand-in that refuses what MPS refuses (mac.py)."""

import pytest
import torch
from PIL import Image

import train
from conftest import SMALL
from mac import Kernels, Mac, kernels_of_mps, mac
from mini_dalle2 import DALLE2, configs
from mini_dalle2.metrics import frechet_distance
from mini_dalle2.runtime.device import pick_device, stream_kept
from mini_dalle2.runtime.files import load_checkpoint, read_metrics

ONE_STEP = [*(word for word in SMALL if "steps=" not in word and not word.startswith(("--device", "--data.images"))), "--data.images=12",
            *(f"--{stage}.steps=1" for stage in configs.MODELS),
            *(f"--{stage}.sampling_steps=2" for stage in ("prior", "decoder", "upsampler1", "upsampler2"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One step of each stage, on the CPU and on the stand-in: {device: run folder}, and the kernels: "lacking"."""
    folders = {kind: tmp_path_factory.mktemp("runs") / kind for kind in ("cpu", "mps")}
    train.main([*ONE_STEP, "--device=cpu", f"--out={folders['cpu']}"])
    with pytest.MonkeyPatch.context() as patch, mac(patch), Kernels() as kernels:
        args = train.parse([*ONE_STEP, f"--out={folders['mps']}"])
        assert train.work(args, pick_device(args.device)) == 0
    assert len(kernels.used) > 100 and "convolution_backward" in kernels.used
    return {**folders, "lacking": kernels.lacking()}


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    with mac(monkeypatch):
        assert pick_device("auto").type == "mps" and pick_device("cpu").type == "cpu"
        with pytest.raises(ValueError, match="cuda was asked for"):
            pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    monkeypatch.undo()
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="mps was asked for"):
            pick_device("mps")


def test_the_stand_in_refuses_what_mps_refuses(monkeypatch):
    with mac(monkeypatch):
        x = torch.ones(3, 3, device="mps")
        assert isinstance(x, Mac) and x.device.type == "mps" and (x + 1).sum().item() == 18
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(NotImplementedError, match="eigh"):
            torch.linalg.eigh(x)
        with pytest.raises(RuntimeError, match="on the cpu"):
            x + torch.ones(3, 3)
        with pytest.raises(RuntimeError, match="from a stream on cpu"):
            torch.randn(3, generator=torch.Generator(), device="mps")
        assert x.cpu().double().dtype == torch.float64 and not isinstance(x.cpu(), Mac)


def test_every_stage_trains_as_on_the_cpu(runs):
    """The stand-in computes on the CPU, so the losses are the same. Checkpoints can be read anywhere."""
    losses = {kind: {line["stage"]: line["loss"] for line in read_metrics(folder)} for kind, folder in runs.items() if kind != "lacking"}
    assert losses["mps"].keys() == set(configs.MODELS)
    assert losses["mps"] == pytest.approx(losses["cpu"], rel=1e-4)
    for stage in configs.MODELS:
        weights = load_checkpoint(runs["mps"] / f"{stage}.pt")["ema"]
        assert all(type(value) is torch.Tensor and value.dtype != torch.float64 for value in weights.values())


def test_every_kernel_of_training_is_there_on_mps(runs, monkeypatch):
    """By the table of this torch. It lacks others, so that the question has two answers."""
    assert not runs["lacking"]
    table = kernels_of_mps()
    assert {"convolution_backward", "upsample_nearest2d", "add.Tensor", "reshape"} <= table
    assert not table & {"cudnn_convolution", "geqrf"}
    with mac(monkeypatch), Kernels() as kernels:
        torch.geqrf(torch.ones(3, 3, device="mps") + 1)
    assert kernels.lacking() == {"geqrf"}


def test_previews_leave_the_stream_of_the_mac_as_it_was(monkeypatch):
    """What is drawn on the way, and what is tried to measure steps, does not change the training after it."""
    stream = [torch.arange(3)]
    with mac(monkeypatch):
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda: stream[-1])
        monkeypatch.setattr(torch.mps, "set_rng_state", stream.append)
        with pytest.raises(ZeroDivisionError), stream_kept(torch.device("mps")):
            stream.append(torch.zeros(3))
            raise ZeroDivisionError
    assert stream[-1] is stream[0] and len(stream) == 3


def test_sampling_and_editing_work(runs, monkeypatch):
    with mac(monkeypatch), Kernels() as kernels:
        model = DALLE2.load(runs["mps"], device="mps")
        assert model.device.type == "mps"
        [[picture]] = model.text_to_image(["a red circle"], progress=False)
        [[other]] = model.text_to_image(["two cyan rings"], prior="ar", stage="base", progress=False)
        assert picture.size == (64, 64) and other.size == (16, 16)
        assert len(model.interpolate(picture, other, n=3, stage="base", progress=False)) == 3
        mask = Image.new("L", picture.size)
        mask.paste(255, (0, 0, 64, 32))
        assert model.inpaint(picture, mask, "a red circle", stage="base", progress=False)
        z_img = model.encode_image([picture, other])
        assert not kernels.lacking()
        assert z_img.shape[0] == 2 and frechet_distance(z_img, z_img.cpu()) < 1e-6


def test_the_walk_notices_what_is_left_on_the_mac(runs, monkeypatch):
    """Without off_mps, the walk fails: it does reach the places that MPS cannot compute."""
    with mac(monkeypatch):
        model = DALLE2.load(runs["mps"], device="mps")
        from mini_dalle2 import ar_prior, sampling, upsampler
        for module in (ar_prior, sampling, upsampler):
            monkeypatch.setattr(module, "off_mps", lambda x: x)
        for options in ({"prior": "ar", "stage": "base"}, {"stage": "full"}):
            with pytest.raises((TypeError, NotImplementedError)):
                model.text_to_image(["a red circle"], progress=False, **options)
