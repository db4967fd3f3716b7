"""Speak a Seed-TTS list with test-time training (table 2 of the paper, KALL-E (TTT)): learn the prompt of a line, then say its text.

    python recipes/seed_tts_eval/adapted.py seedtts_testset/en/meta.lst MODEL runs/adapted --language en --full

writes OUT/ID.wav for `kalle evaluate kind=wavs`. As in the paper, every line is learnt anew, with the transcript of the prompt and the text
of the line as the context. The seed of an item is the one that `kalle evaluate kind=synthesis` gives it: both say it from the same noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kalle import Kalle
from kalle.adaptation.adapt import DEFAULT_STEPS, AdaptOptions, adapt
from kalle.audio import write_audio
from kalle.cli.stages import recipe_main
from kalle.errors import UserError
from kalle.evaluation.test_list import TestListConfig, read_test_list
from kalle.progress import counting_bar
from kalle.seeds import item_seed


def speak(given: argparse.Namespace) -> None:
    """Write a wav for each line that has none yet; a line whose prompt is missing is named, and has none."""
    items = read_test_list(TestListConfig(given.list, min_words=0, language=given.language, limit=given.limit)).items
    kalle = Kalle.from_pretrained(given.model, given.device)
    options = AdaptOptions(mode="full" if given.full else "lora", steps=given.steps, seed=given.seed)
    left = [(index, item) for index, item in enumerate(items) if not (given.out / f"{item.file_stem}.wav").is_file()]
    missed = 0
    with counting_bar("learn and speak", len(left)) as bar:
        for index, item in left:
            try:
                if item.prompt_text is None:
                    raise UserError("a prompt without its transcript, expected utt|prompt_text|prompt_wav|infer_text; correct the line")
                prompt = item.prompt_audio(kalle.sample_rate)
                learnt = adapt(kalle, prompt, item.prompt_text, options=options, target_text=item.text, language=item.language)
                speech = kalle.synthesize(item.text, learnt.voice, seed=item_seed(given.seed, index))
            except UserError as error:
                missed += 1
                print(f"{item.id}: {error}", file=sys.stderr)
                continue
            finally:
                bar.advance()
            if len(speech.audio):
                write_audio(given.out / f"{item.file_stem}.wav", speech.audio, speech.sample_rate)
    print(f"{len(items) - missed} of {len(items)} lines spoken in {given.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("model", help="weight folder or hub id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--language", required=True, help="of the list, such as en")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--full", action="store_true", help="learn all weights, as in the paper, in place of low-rank factors")
    parser.add_argument("--limit", type=int, help="the first so many lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    sys.exit(recipe_main(lambda: speak(given), given.out))
