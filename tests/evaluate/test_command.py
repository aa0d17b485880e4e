"""The command: nothing is done twice, nothing stale is shown, and a kill loses nothing."""

import json
import shutil

import torch

from mini_dalle2.configs import VARIANTS
from mini_dalle2.evaluate import command, lab as lab_module
from mini_dalle2.evaluate.command import known, main
from mini_dalle2.evaluate.experiments import EXPERIMENTS
from mini_dalle2.evaluate.lab import Lab
from mini_dalle2.evaluate.making import Maker


def forbidden(*arguments, **options):
    raise AssertionError("this was done before")


def test_what_is_done_is_not_done_again(copied, monkeypatch):
    before = {path: path.read_bytes() for path in copied.rglob("*.json")}
    report = (copied / "report.md").read_text().splitlines()
    monkeypatch.setattr(Maker, "make_pictures", forbidden)
    monkeypatch.setattr(Maker, "make_embeddings", forbidden)
    monkeypatch.setattr(command, "perform", forbidden)
    (copied / "report.md").unlink()
    assert main([f"--run={copied}", "--n=16", "--device=cpu"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (copied / "report.md").read_text().splitlines()[1:] == report[1:], (
        "but for the name of the folder"
    )


def test_another_format_makes_all_out_of_date(copied, monkeypatch):
    """All but the models, which train.py made."""
    one = EXPERIMENTS["fig8"]
    maker = Maker(Lab(copied, 16, "cpu"))
    assert known(maker, one) is not None and maker.missing(one.needs(maker.lab).values()) == []
    monkeypatch.setattr(lab_module, "CACHE_FORMAT", lab_module.CACHE_FORMAT + 1)
    maker = Maker(Lab(copied, 16, "cpu"))
    assert known(maker, one) is None
    assert maker.missing(one.needs(maker.lab).values()) != []
    for name in VARIANTS:
        assert maker.lab.signature_of(name) is not None


def test_what_is_out_of_date_is_not_shown(copied):
    one = EXPERIMENTS["fig8"]
    assert known(Maker(Lab(copied, 16, "cpu")), one) is not None
    assert known(Maker(Lab(copied, 17, "cpu")), one) is None, "other captions"
    (copied / "evaluate" / "fig8.png").rename(copied / "evaluate" / "elsewhere.png")
    assert known(Maker(Lab(copied, 16, "cpu")), one) is None, "its sheet is gone"
    (copied / "evaluate" / "elsewhere.png").rename(copied / "evaluate" / "fig8.png")
    path = copied / "evaluate" / "fig8.json"
    whole = path.read_text()
    path.write_text(whole[:50])
    assert known(Maker(Lab(copied, 16, "cpu")), one) is None, "damaged"
    path.write_text(whole.replace('"seconds": {', '"seconds": {"other": 7,'))
    assert known(Maker(Lab(copied, 16, "cpu")), one) is None, "another value"
    path.write_text(whole)
    # One weight of the prior is another one. All goes, also what does not depend on the prior.
    saved = torch.load(copied / "prior.pt", weights_only=True)
    saved["ema"]["query"] += 1e-3
    torch.save(saved, copied / "prior.pt")
    lab = Lab(copied, 16, "cpu")
    maker = Maker(lab)
    assert known(maker, one) is None and not lab.cache.exists() and lab.signature_of("judge")
    maker.sweep()
    assert not list((copied / "evaluate").glob("cache-*"))


def test_after_a_kill_it_goes_on_where_it_was(copied, monkeypatch, capsys):
    """The process ends while the third set of an experiment is made. The first two are kept."""
    whole = (copied / "evaluate" / "fig8.json").read_text()
    for path in (copied / "evaluate").glob("cache-*"):
        shutil.rmtree(path)
    (copied / "evaluate" / "fig8.json").unlink()
    made, make = [], Maker.make_pictures

    def killed(maker, recipe):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(recipe)
        return make(maker, recipe)

    def noted(maker, recipe):
        made.append(recipe)
        return make(maker, recipe)

    monkeypatch.setattr(Maker, "make_pictures", killed)
    words = [f"--run={copied}", "--n=16", "--device=cpu", "--only", "fig8"]
    assert main(words) == 130 and "goes on" in capsys.readouterr().err
    first = list(made)
    made.clear()
    monkeypatch.setattr(Maker, "make_pictures", noted)
    assert main(words) == 0
    assert len(first) == 2 and made and not set(first) & set(made)
    now = json.loads((copied / "evaluate" / "fig8.json").read_text())["findings"]
    before = json.loads(whole)["findings"]
    assert {k: v for k, v in now.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }, "as if nothing had happened"
