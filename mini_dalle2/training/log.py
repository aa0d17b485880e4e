"""What a training says while it runs: the progress bar, metrics.jsonl, and Ctrl-C.

Read next: state.py.
"""

import json
import math
import signal
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..runtime.files import atomic_open, read_metrics, writing
from ..runtime.processes import is_main, mean


class Log:
    """Progress bar and metrics.jsonl: collects losses on the device and reads them once per window, so that a GPU need not wait.

    indices: step -> (B,), which examples it learned from; written to STAGE.not_finite.json when that went wrong.
    """

    def __init__(self, stage, run, cfg, step, seconds, indices=None):
        self.stage, self.path, self.every, self.lr = stage, Path(run) / "metrics.jsonl", cfg.log_every, cfg.lr
        self.start, self.smooth, self.window = time.perf_counter() - seconds, None, []
        self.indices, self.culprit = indices, Path(run) / f"{stage}.not_finite.json"
        self.bar = tqdm(total=cfg.steps, initial=step, desc=stage, unit="step", dynamic_ncols=True, mininterval=0.5, disable=not is_main())
        if not is_main():
            return
        self.culprit.unlink(missing_ok=True)
        # Lines after `step` are those of a run that went down after its last checkpoint and is now repeated.
        kept = [entry for entry in read_metrics(run) if entry["stage"] != stage or entry["step"] <= step]
        with atomic_open(self.path) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def seconds(self):
        """Time spent in this stage, those of earlier, interrupted sessions included."""
        return time.perf_counter() - self.start

    def add(self, step, loss, norm, lr):
        """Notes one step; `step` counts the steps done."""
        self.window.append((step, loss, norm, lr))
        self.bar.update()
        if step % self.every == 0:
            self.flush()

    def flush(self):
        """Writes the window, if there is one, as one line. Raises FloatingPointError when a loss or a gradient in it was not finite."""
        if not self.window:
            return
        steps, losses, norms, rates = zip(*self.window)
        self.window = []
        values = mean(torch.stack([torch.stack(losses), torch.stack(norms)])).tolist()
        for step, loss, norm in zip(steps, *values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.stop(step, loss, norm)
        if not is_main():
            return
        loss, norm = (sum(column) / len(column) for column in values)
        self.smooth = loss if self.smooth is None else 0.8 * self.smooth + 0.2 * loss
        self.bar.set_postfix_str(f"loss {self.smooth:.4f}", refresh=False)
        entry = {"stage": self.stage, "step": steps[-1], "loss": loss, "lr": rates[-1], "grad_norm": norm, "seconds": self.seconds()}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def stop(self, step, loss, norm):
        """Notes which examples a step learned from that was not finite, and raises FloatingPointError."""
        listed = ""
        if self.indices:
            listed = f" (its examples are listed in {self.culprit})"
            if is_main():
                found = {"stage": self.stage, "step": step, "loss": str(loss), "grad_norm": str(norm)}
                with atomic_open(self.culprit) as file:
                    file.write(json.dumps(found | {"indices": self.indices(step - 1).tolist()}).encode())
        raise FloatingPointError(f"{self.stage}: loss {loss:g}, gradient norm {norm:g} at step {step}{listed}; nothing was saved after it: "
                                 f"go on with --resume and a lower rate, say --{self.stage}.lr={self.lr / 3:.1e}")


class Interrupt:
    """While it is entered, the first Ctrl-C only sets `requested`; a second one interrupts at once, as usual."""
    def __enter__(self):
        self.requested = False
        self.here = threading.current_thread() is threading.main_thread()      # only there may a handler be set
        self.previous = self.here and signal.signal(signal.SIGINT, self._request) or signal.default_int_handler
        return self

    def _request(self, signum, frame):
        self.requested = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_):
        if self.here:
            signal.signal(signal.SIGINT, self.previous)
