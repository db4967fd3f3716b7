"""Items a minute, CPU seconds and memory of the default metrics of `kalle evaluate`, by one or more checkouts on the same list, in turns.

    git worktree add ../old d2503fc
    python scripts/scoring_speed.py ../old . --items 48

The list is the embedded English recordings and copies of them under noise; memory is the largest sum of PSS over the processes, which Linux
tells. The numbers that were scored are printed, too: they must not differ.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from kalle.audio import read_audio
from kalle.evaluation.test_list import read_test_list

CORPUS = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "corpus" / "transcripts.jsonl"
RATE_HZ = 16000
NOISE = 0.05
SHOWN = ("wer_utt_mean", "wer_corpus", "sim", "duration_ratio")
RUN = "import sys; from kalle.cli.main import run; sys.argv[0] = 'kalle'; sys.exit(run())"


def noisy_copies(folder: Path) -> None:
    """ID.wav for every recording of the list, under noise of a twentieth of its power."""
    generator = np.random.default_rng(0)
    for item in read_test_list(CORPUS).items:
        assert item.audio_path is not None, "the corpus has recordings"
        audio = read_audio(item.audio_path, RATE_HZ)
        noise = generator.standard_normal(len(audio)) * np.sqrt(NOISE * np.square(audio).mean())
        soundfile.write(folder / f"{item.file_stem}.wav", 0.7 * (audio + noise), RATE_HZ)


def pss_mb(root: int) -> float:
    """The sum of the proportional set sizes of process ``root`` and all below it, in MB; 0 for those that have ended."""
    children, total_kb = [root], 0
    while children:
        process = Path("/proc") / str(children.pop())
        try:
            (line,) = (line for line in (process / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
            total_kb += int(line.split()[1])
            children += map(int, " ".join(path.read_text() for path in process.glob("task/*/children")).split())
        except (OSError, ValueError):
            continue
    return total_kb / 1000


def name_of(word: str) -> str:
    """``word`` without the temporary folder that it names."""
    return f"{word.split('=')[0]}=…" if "/" in word else word


def measured(checkout: Path, wavs: Path, out: Path, items: int, more: list[str]) -> str:
    """A line of the table for one checkout."""
    words = ["evaluate", "kind=wavs", f"wavs={wavs}", f"testset={CORPUS}", f"testset.limit={items}", f"out={out}", *more]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve() / "src")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", RUN, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, pss_mb(process.pid))
        time.sleep(0.25)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{checkout}: kalle evaluate ended with {process.returncode}")
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    summary = json.loads((out / "results.json").read_text())["summary"]["wavs"]
    scores = ", ".join(f"{name} {summary[name]['value']:.6f}" for name in SHOWN if name in summary)
    cells = [
        " ".join([str(checkout), *map(name_of, more)]),
        f"{seconds:.1f}",
        f"{60 * items / seconds:.1f}",
        f"{user:.1f} + {system:.1f}",
        f"{peak:.0f}",
        scores,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, help="folders with src/kalle")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--known", action="store_true", help="once more by the last checkout, with the scores of the recordings")
    parser.add_argument("--more", nargs="*", default=[], help="more words for kalle evaluate")
    given = parser.parse_args()
    print("| checkout | seconds | items a minute | CPU seconds, user + system | peak memory, MB | scores |", "|---" * 6 + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        (wavs := Path(folder) / "wavs").mkdir()
        noisy_copies(wavs)
        for repeat in range(given.repeats):
            for index, checkout in enumerate(given.checkouts):
                print(measured(checkout, wavs, Path(folder) / f"out{index}-{repeat}", given.items, given.more), flush=True)
            if given.known:
                known = [*given.more, f"recordings={Path(folder) / f'out{len(given.checkouts) - 1}-{repeat}'}"]
                print(measured(given.checkouts[-1], wavs, Path(folder) / f"known-{repeat}", given.items, known), flush=True)
