"""Speak a text with the flags of the KALL-E release: --target_text, --prompt_text, --prompt_wav_path."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kalle.cli.main import script_main

FLAGS = {
    "--prompt-text": "--prompt_text",
    "--prompt-audio": "--prompt_wav_path",
    "(text)": "(--prompt_text)",
    " max_seconds": " --max_seconds",
}
"""Flags of `kalle say` and parameters of the library, which messages name, and what they are called here."""
CKPT = Path(__file__).resolve().parents[1] / "ckpt"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The release's flags, and those it lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target_text", required=True, help="what to say")
    parser.add_argument("--prompt_text", help="what is said in the prompt recording, word for word")
    parser.add_argument("--prompt_wav_path", type=Path, help="recording whose voice to speak in; without one the model makes up a voice")
    parser.add_argument(
        "--model", type=Path, help="weight folder (default: the released files in ckpt/, converted once to ckpt/kalle-release)"
    )
    parser.add_argument("--ckpt", type=Path, default=CKPT, help="folder of the released files")
    parser.add_argument(
        "--output", type=Path, default=Path("output.wav"), help="file to write, in the format of its suffix (default: output.wav)"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same speech")
    parser.add_argument("--max_seconds", type=float, help="length cap; by default what slow speech of the text does not reach")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="of the backbone: auto, float32, bfloat16 or float16")
    parser.add_argument(
        "--release-exact",
        action="store_true",
        help="do everything as the release does, its oddities included: slower, and the sound is not that of the frames fed back",
    )
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Speak; a UserError for every mistake."""
    given = parse(arguments)
    from kalle.cli.say import Told, check_say_output, speak_to_file
    from kalle.cli.speaking import check_before_loading, choose_voice
    from kalle.convert.release import release_folder

    check_say_output(given.output)
    check_before_loading(given.target_text, given.prompt_wav_path, given.prompt_text, None)
    model = given.model or release_folder(given.ckpt)
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.options import GenerationOptions
    from kalle.synthesis.release_compat import OURS, ReleaseCompatibility

    # The precision of the release is rounded to from fp32.
    dtype = "float32" if given.release_exact and given.dtype == "auto" else given.dtype
    kalle = Kalle.from_pretrained(model, given.device, dtype)
    voice = choose_voice(kalle, given.prompt_wav_path, given.prompt_text, None)
    compatibility = ReleaseCompatibility.release() if given.release_exact else OURS
    options = GenerationOptions(seed=given.seed, max_seconds=given.max_seconds, compatibility=compatibility)
    speak_to_file(kalle, given.target_text, Told(given.output), voice, options)


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code, as ``script_main`` describes."""
    return script_main(lambda: run(arguments), "interrupted; run the same command again", FLAGS)


if __name__ == "__main__":
    sys.exit(main())
