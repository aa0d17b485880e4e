#!/usr/bin/env bash
# DDPMScheduler.from_config gives Karlo's prior another noise schedule, and says nothing.
#
# Expected: the call DDPMScheduler.from_config(unclip_scheduler.config) keeps the noise schedule.
#   UnCLIPScheduler's docstring refers to DDPMScheduler for more. The converter of such
#   checkpoints in diffusers makes this very call.
# Seen: Karlo's scheduler_config.json has no key beta_schedule: it is older than that option.
#   UnCLIPScheduler falls back on its default, the cosine schedule. from_config hands no defaults
#   on. DDPMScheduler falls back on its own default, the linear schedule, without a warning.
#   Saving and loading the same scheduler first keeps the cosine, because saving writes defaults.
#   The timesteps change either way: they start at 960 instead of 999 ("leading" spacing).
#   A perfect prior shows the harm. Its embeddings scatter 0.77 about their centre, not 0.44.
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
# For a user: name both options, beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace".
#   The two then agree to about 1e-3 of the scatter.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" diffusers==0.42.1 numpy==2.4.6

cat > "$work/look.py" <<'PY'
import json
import platform
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler

STEPS, SPREAD = 25, 0.5
folder = Path(sys.argv[1])
print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, "
      f"Python {platform.python_version()}")

# What the file in the public folder of Karlo's prior says, key by key.
karlo = {"_class_name": "UnCLIPScheduler", "_diffusers_version": "0.11.0.dev0",
         "clip_sample": True, "clip_sample_range": 5.0, "num_train_timesteps": 1000,
         "prediction_type": "sample", "variance_type": "fixed_small_log"}
(folder / "karlo").mkdir()
(folder / "karlo" / "scheduler_config.json").write_text(json.dumps(karlo))
unclip = UnCLIPScheduler.from_pretrained(folder / "karlo")
unclip.save_pretrained(folder / "again")
again = UnCLIPScheduler.from_pretrained(folder / "again")
assert torch.equal(unclip.betas, again.betas)

named = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}
schedulers = {"UnCLIPScheduler": unclip,
              "swapped": DDPMScheduler.from_config(unclip.config),
              "saved, loaded, swapped": DDPMScheduler.from_config(again.config),
              "swapped, both named": DDPMScheduler.from_config(unclip.config, **named)}


def prior(x, t, centre):
    """E[x_0 | x_t] of normal data about `centre` under the cosine schedule: a perfect prior."""
    bar = unclip.alphas_cumprod[t]
    gain = bar.sqrt() * SPREAD**2 / (bar * SPREAD**2 + 1 - bar)
    return centre + gain * (x - bar.sqrt() * centre)


def draw(scheduler):
    """Embeddings (64, 768) less their centre; every scheduler gets the same noise."""
    noise = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 768, generator=noise) * (1 - SPREAD**2) ** 0.5
    x = torch.randn(64, 768, generator=noise)
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps.tolist()
    for t, after in zip(times, [*times[1:], None]):
        more = {"prev_timestep": after} if scheduler is unclip else {}
        x = scheduler.step(prior(x, t, centre), t, x, generator=noise, **more).prev_sample
    return x - centre


drawn = {name: draw(scheduler) for name, scheduler in schedulers.items()}
right = drawn["UnCLIPScheduler"]
away = {name: ((x - right).norm() / right.norm()).item() for name, x in drawn.items()}
for name, scheduler in schedulers.items():
    print(f"{name:22}  {scheduler.config.beta_schedule:17}  "
          f"alpha_bar(500) {scheduler.alphas_cumprod[500]:.4f}  "
          f"t = {scheduler.timesteps[0]} .. {scheduler.timesteps[-1]}  "
          f"scatter {drawn[name].std():.3f}  off by {away[name]:.1e}")

lost, kept, both = (schedulers[name] for name in list(schedulers)[1:])
still = (lost.config.beta_schedule == "linear"
         and kept.config.beta_schedule == named["beta_schedule"]
         and lost.timesteps[0] == kept.timesteps[0] == 960
         and unclip.timesteps[0] == both.timesteps[0] == 999
         and drawn["swapped"].std() > 1.5 * right.std() and away["swapped, both named"] < 2e-3)
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" -W ignore "$work/look.py" "$work"
