#!/usr/bin/env bash
# diffusers' EMAModel warms up even with use_ema_warmup=False, its default.
#
# Expected: EMAModel(parameters, decay=0.9999) averages with 0.9999 from the first step on, for
#   use_ema_warmup is off. A change of the weights is then half taken over after 6,932 steps.
# Seen: "off" means another warm-up, (1 + n) / (10 + n) at step n, with decay as its upper end.
#   At 10,000 steps the decay is 0.9991. A change made then is half taken over after 801 steps.
#   0.9999 comes at step 89,991; a shorter run never has it. The first step copies the weights.
#   With use_ema_warmup=True it comes at step 1,000,000, by the default power of 2/3.
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
# For a user: a diffusion model trained for 10,000 steps gets an average of about the last 1,000.
#   A larger decay changes nothing there. Set min_decay=0.9999 as well to get what decay says.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" diffusers==0.42.1 numpy==2.4.6

cat > "$work/look.py" <<'PY'
import math
import platform
import sys

import diffusers
import torch
from diffusers.training_utils import EMAModel

DECAY, STEPS = 0.9999, 10_000
print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, "
      f"Python {platform.python_version()}")


def measure(**options):
    """(decay at STEPS, how many steps later a change made then is half taken over)."""
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    ema = EMAModel([weight], decay=DECAY, **options)
    for _ in range(STEPS):
        ema.step([weight])
    decay, more = ema.cur_decay_value, 0
    weight.data.fill_(1)
    while ema.shadow_params[0] < 0.5:
        ema.step([weight])
        more += 1
    return decay, more


def reached(**options):
    """The first step at which the decay is DECAY."""
    ema = EMAModel([torch.nn.Parameter(torch.zeros(()))], decay=DECAY, **options)
    low, high = 1, 10**8
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ema.get_decay(middle) >= DECAY else (middle + 1, high)
    return low


print(f"as decay={DECAY} says: half after {math.ceil(math.log(0.5) / math.log(DECAY))} steps")
found = {}
for name, options in {"default": {}, "use_ema_warmup=True": {"use_ema_warmup": True},
                      f"min_decay={DECAY}": {"min_decay": DECAY}}.items():
    decay, half = measure(**options)
    found[name] = decay, half, reached(**options)
    print(f"{name:20} decay at step {STEPS}: {decay:.6f}, a change is half taken over after "
          f"{half} steps; {DECAY} from step {found[name][2]} on")

still = (found["default"][0] < 0.9992 and found["default"][1] < 1000
         and found["default"][2] > 80_000
         and found[f"min_decay={DECAY}"][1] == math.ceil(math.log(0.5) / math.log(DECAY)))
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" -W ignore "$work/look.py"
