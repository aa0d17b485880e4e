"""What a training tells: progress, metrics.jsonl and previews.

Read next: stages.py.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..runtime.files import atomic_open, read_metrics, writing
from ..runtime.processes import is_main, mean_over_processes, whole

# Seconds between two previews of a stage.
PREVIEW = 120
# Drawing them takes no more than this share of the time.
DRAWING = 0.05
# Without a terminal there is a line after each of so many parts of the steps.
LINES = 20


def recent_loss(lines):
    """The loss that people see: the mean over the last tenth of the steps so far.

    lines: [(step, loss)] of a stage in metrics.jsonl. The loss of one line is a mean already, but
    jumps; a mean over more steps would still contain the beginning.
    """
    now = lines[-1][0]
    last = [loss for step, loss in lines if step > 0.9 * now]
    return sum(last) / len(last)


class Log:
    """The progress and the lines of metrics.jsonl for one stage. Enter it as a context.

    Progress is a bar in a terminal; elsewhere, such as in a file, it is a line per 5 %. Losses
    are collected on the device and read once per window of `log_every` steps, so that a GPU need
    not wait for the log.
    """

    def __init__(self, stage, folder, step=0, seconds=0.0):
        """stage: see stages.py; step, seconds: what the training has behind it."""
        self.stage = stage
        self.name = stage.name
        self.cfg = stage.cfg
        self.path = Path(folder) / "metrics.jsonl"
        self.culprit = Path(folder) / f"{stage.name}.not_finite.json"
        self.begin = time.perf_counter()
        self.start = self.begin - seconds
        self.first = step
        # (step, loss) of each line of metrics.jsonl.
        self.losses = []
        self.window = []
        # When the last step ended, and how long each step of the window took.
        self.last = self.begin
        self.times = []
        self.is_said = False
        self.looked = self.begin
        self.drawing = 0.0
        self.live = sys.stderr.isatty()
        self.lines = step * LINES // self.cfg.steps
        self.bar = tqdm(total=self.cfg.steps, initial=step, desc=stage.title, unit="step",
                        dynamic_ncols=True, mininterval=0.5,
                        disable=not (is_main() and self.live))
        if is_main():
            self.culprit.unlink(missing_ok=True)
            self.take_back(step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def take_back(self, step):
        """Remove the lines after `step`: the run broke off after its last checkpoint.

        These steps are taken again. The losses of the lines that stay are remembered.
        """
        kept = [entry for entry in read_metrics(self.path.parent)
                if entry["stage"] != self.name or entry["step"] <= step]
        self.losses = [(entry["step"], entry["loss"])
                       for entry in kept if entry["stage"] == self.name]
        with atomic_open(self.path) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def seconds(self):
        """Seconds spent in this stage, with those of earlier, interrupted sessions."""
        return time.perf_counter() - self.start

    def add(self, step, loss, norm, lr):
        """Note one step. step: the number of steps done; loss, norm: scalars on the device."""
        self.window.append((step, loss, whole(norm).to(loss.device), lr))
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now
        self.bar.update()
        if step % self.cfg.log_every == 0:
            self.flush()

    def flush(self):
        """Write the window as one line of metrics.jsonl.

        Raises FloatingPointError when a loss or a gradient in the window was not finite.
        """
        if not self.window:
            return
        steps, losses, norms, rates = zip(*self.window)
        # A checkpoint or a preview makes one step longer, but not half of them.
        pace = statistics.median(self.times)
        self.window = []
        self.times = []
        values = mean_over_processes(torch.stack([torch.stack(losses), torch.stack(norms)]))
        losses, norms = values.tolist()
        for step, loss, norm in zip(steps, losses, norms):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.stop(step, loss, norm)
        if not is_main():
            return
        loss = sum(losses) / len(losses)
        norm = sum(norms) / len(norms)
        self.losses.append((steps[-1], loss))
        self.bar.set_postfix_str(f"loss {recent_loss(self.losses):.4f}", refresh=False)
        entry = {"stage": self.name, "step": steps[-1], "loss": loss, "lr": rates[-1],
                 "grad_norm": norm, "seconds": self.seconds()}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        self.tell(steps[-1])
        self.warn(pace)

    def tell(self, step):
        """Without a terminal: print a line if another twentieth of the steps is done."""
        lines = step * LINES // self.cfg.steps
        if self.live or lines == self.lines:
            return
        self.lines = lines
        spent = time.perf_counter() - self.begin
        left = spent / (step - self.first) * (self.cfg.steps - step) / 60
        print(f"{self.stage.title}: step {step} of {self.cfg.steps}, "
              f"loss {recent_loss(self.losses):.4f}, {left:.1f} minutes left", flush=True)

    def warn(self, pace):
        """Say once if steps take several times the seconds that they took at the start."""
        note = self.stage.slow_note(pace)
        if note and not self.is_said:
            self.is_said = True
            tqdm.write(note)

    def preview(self):
        """Draw what the model has learned so far, if the last preview was minutes ago."""
        began = time.perf_counter()
        if not is_main() or began - self.looked < max(PREVIEW, self.drawing / DRAWING):
            return
        tqdm.write(f"{self.name}: a preview is in {self.stage.preview()}")
        self.looked = time.perf_counter()
        self.drawing = self.looked - began

    def stop(self, step, loss, norm):
        """Write down the examples of a step that was not finite. Raises FloatingPointError."""
        listed = ""
        if self.stage.indices:
            listed = f" (its examples are listed in {self.culprit})"
            if is_main():
                found = {"stage": self.name, "step": step, "loss": str(loss),
                         "grad_norm": str(norm), "indices": self.stage.indices(step - 1).tolist()}
                with atomic_open(self.culprit) as file:
                    file.write(json.dumps(found).encode())
        raise FloatingPointError(
            f"{self.name}: loss {loss:g}, gradient norm {norm:g} at step {step}{listed}; "
            f"nothing was saved after it: {self.stage.lower_rate()}")
