"""Trains a nano language model twice, once killed three times, and draws both loss curves and their difference.

    python recipes/resume/run.py LATENTS OUT [STEPS [KEY=VALUE ...]]

OUT gets whole/, killed/, resume.png and resume.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib as mpl
import torch
from safetensors.torch import load_file

mpl.use("Agg")
from matplotlib import pyplot as plt

KILLS, EVERY_STEPS, SEED = 3, 20, 0


def command(latents: Path, out: Path, steps: int, more: list[str]) -> list[str]:
    """One training; dropout makes the global random generators matter, a data worker runs ahead of the step."""
    words = ["experiment=quickstart_lm", "lm.latent_dim=" + str(json.loads((latents / "info.json").read_text())["latent_dim"])]
    words += ["+lm.backbone.attention_dropout=0.1", f"data.latents={latents}", "data.num_workers=1", f"trainer.max_steps={steps}"]
    words += ["data.max_positions=300", "data.drop_longer_than=300"]  # small batches: steps matter here, not speech
    words += [f"callbacks.checkpoint.every_steps={EVERY_STEPS}", "trainer.val_check_interval=100", "trainer.log_every_n_steps=1"]
    return [sys.executable, "-m", "kalle", "train", "lm", *words, "logger=csv", "device=cpu", "threads=1", f"out={out}", *more]


def losses(out: Path) -> dict[int, float]:
    """The loss of every step; a step that is logged twice is an error."""
    found: dict[int, float] = {}
    with (out / "csv" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row.get("train/total"):
                assert int(row["step"]) not in found, f"step {row['step']} twice"
                found[int(row["step"])] = float(row["train/total"])
    return found


def rows(out: Path) -> int:
    """How far a running training has logged."""
    table = out / "csv" / "version_0" / "metrics.csv"
    return max(losses(out), default=0) if table.is_file() else 0


def run_killed(words: list[str], out: Path, steps: int) -> list[dict[str, int]]:
    """Kill the training at random moments, resume it, and let it end; where each kill fell and where it went on from."""
    draw, kills = random.Random(SEED), []
    for number in range(KILLS):
        wanted = int(steps * (number + draw.uniform(0.5, 1.2)) / (KILLS + 1))
        process = subprocess.Popen(words, start_new_session=True)
        while process.poll() is None and rows(out) < wanted:
            time.sleep(0.2)
        time.sleep(draw.random())
        assert process.poll() is None, "the training was over before it could be killed; give more STEPS"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        newest = max(int(path.stem.split("-")[1]) for path in (out / "checkpoints").glob("step-*.ckpt"))
        kills.append({"killed_behind_step": rows(out), "resumed_from_step": newest})
    subprocess.run(words, check=True)
    return kills


def draw(whole: dict[int, float], killed: dict[int, float], kills: list[dict[str, int]], path: Path) -> None:
    """Both curves, and their difference below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
    steps = sorted(whole)
    above.plot(steps, [whole[step] for step in steps], color="tab:blue", linewidth=4, alpha=0.4, label="uninterrupted")
    above.plot(steps, [killed[step] for step in steps], color="tab:red", linewidth=0.8, label=f"killed {len(kills)} times and resumed")
    for index, kill in enumerate(kills):
        above.axvspan(kill["resumed_from_step"], kill["killed_behind_step"], color="0.85", label=None if index else "made twice")
        above.axvline(kill["killed_behind_step"], color="0.4", linestyle=":", label=None if index else "SIGKILL")
    above.set_ylabel("training loss (nats per dimension)")
    above.set_yscale("log")
    above.legend()
    below.plot(steps, [killed[step] - whole[step] for step in steps], color="black", linewidth=0.8)
    below.set(ylabel="difference", xlabel="update", ylim=(-1e-6, 1e-6))
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run both, compare to the last bit, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=Path, help="a folder that `kalle encode` wrote, such as runs/quickstart/latents")
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int, nargs="?", default=200)
    parser.add_argument("override", nargs="*", help="Hydra overrides for both trainings, for instance to make the model smaller")
    given = parser.parse_args()
    latents, out, steps, more = given.latents.absolute(), given.out.absolute(), given.steps, given.override
    whole, killed = out / "whole", out / "killed"
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(command(latents, whole, steps, more), check=True)
    kills = run_killed(command(latents, killed, steps, more), killed, steps)
    one, other = losses(whole), losses(killed)
    assert one.keys() == other.keys() == set(range(steps)), "a hole in a log"
    weights = [load_file(folder / "weights" / "lm" / "model.safetensors") for folder in (whole, killed)]
    result = {
        "steps": steps,
        "kills": kills,
        "largest_loss_difference": max(abs(one[step] - other[step]) for step in one),
        "weights_equal": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "first_loss": one[0],
        "last_loss": one[steps - 1],
        "torch": torch.__version__,
    }
    draw(one, other, kills, out / "resume.png")
    (out / "resume.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["weights_equal"] and result["largest_loss_difference"] == 0 else 1)


if __name__ == "__main__":
    main()
