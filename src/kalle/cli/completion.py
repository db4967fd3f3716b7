"""Shell completion: the script that a shell evaluates, and the words that it then asks for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from kalle.errors import UserError

COMPLETE = "--complete"
"""The scripts call ``kalle --complete WORD…`` with the words behind `kalle`, the last of them unfinished."""
SCRIPTS = {
    "bash": """_kalle() {
    local IFS=$'\\n'
    COMPREPLY=($(kalle --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _kalle kalle
""",
    "zsh": """#compdef kalle
_kalle() {
    local -a found
    found=(${(f)"$(kalle --complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -S '' -- "${(M)found[@]:#*=}"; compadd -- "${(@)found:#*=}"; else _files; fi
}
compdef _kalle kalle
""",
    "fish": """function __kalle_complete
    kalle --complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c kalle -a '(__kalle_complete)'
""",
}


def script(shell: str) -> str:
    """The script for ``shell``; a UserError for one there is none for."""
    if shell not in SCRIPTS:
        raise UserError(f"--completion: got '{shell}', expected {', '.join(SCRIPTS)}; for bash: eval \"$(kalle --completion bash)\"")
    return SCRIPTS[shell]


def candidates(words: Sequence[str]) -> list[str]:
    """Words that may stand for the last of ``words``; none where it is a file or free text."""
    from kalle.cli.main import COMMANDS, HYDRA_COMMANDS

    *before, unfinished = words or [""]
    if not before:
        found = [*COMMANDS, "--help", "--version", "--completion"]
    elif before[0] in HYDRA_COMMANDS:
        found = _keys(before)
    elif before[0] in COMMANDS:
        found = _options(before, unfinished)
    else:
        found = list(SCRIPTS) if before == ["--completion"] else []
    return [word for word in found if word.startswith(unfinished)]


def _options(before: Sequence[str], unfinished: str) -> list[str]:
    """Flags and subcommands of a command that typer runs."""
    from kalle.cli.main import typer_command

    command: Any = typer_command(before[0])
    for word in before[1:]:
        command = getattr(command, "commands", {}).get(word, command)
    flags = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")]
    return [*getattr(command, "commands", {}), *(["--help", *flags] if unfinished.startswith("-") else [])]


def _keys(before: Sequence[str]) -> list[str]:
    """The top keys of a command that Hydra composes, as KEY=."""
    from kalle.cli.hydra_entry import configs_dir

    stages = getattr(importlib.import_module(f"kalle.cli.{before[0]}"), "STAGES", ())
    if before[0] == "train" and len(before) == 1:
        return list(stages) or ["flowvae", "lm"]
    name = f"train_{before[1]}" if before[0] == "train" else before[0]
    path = configs_dir() / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    keys = [line.partition(":")[0] for line in lines if line and line[0].isalpha() and ":" in line]
    return [f"{key}=" for key in keys if key not in ("defaults", "hydra")]
