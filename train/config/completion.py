"""Completion of the command line in a shell: commands, their options, keys, the words of each."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from files.errors import UserError, did_you_mean
from train.config.layers import preset_names
from train.config.rules import Key
from train.config.schema import KEYS, PATH_KEYS
from train.process.command import CommandParser

SHELLS = ("bash", "zsh", "fish")
_PATHS = (*PATH_KEYS, "train.output_dir", "data.chat_template")
# What an argument takes that has no words of its own.
_FILES, _ANYTHING = ("<files>",), ("<anything>",)
_NAMES_OF_FILES = ("FILE", "FOLDER", "RUN", "OUT", "MODEL", "BASE")


@dataclass(frozen=True)
class _Command:
    """What may stand behind a command's name."""

    options: dict[str, tuple[str, ...]]  # option → the words it takes, none, or one of the above
    keys: list[str]  # settings
    files: bool  # whether files or folders may stand there

    @staticmethod
    def of(parser: CommandParser) -> _Command:
        actions = parser.actions()
        options = {
            name: _taken(action)
            for action in actions
            for name in action.option_strings
            if name.startswith("--")
        }
        free = [action for action in actions if not action.option_strings]
        sections = [str(action.metavar).partition(".key=value")[0].split()[-1] for action in free]
        return _Command(
            options,
            [key for key in KEYS if "section" in sections or key.split(".")[0] in sections],
            any(_taken(action) == _FILES for action in free),
        )


def _taken(action: argparse.Action) -> tuple[str, ...]:
    """Return the words that an argument takes; a name in capitals says that it takes files."""
    if action.nargs == 0:
        return ()
    if action.choices is not None:
        return tuple(str(choice) for choice in action.choices)
    if action.dest in ("preset", "show"):
        return tuple(preset_names())
    if action.dest == "completion":
        return SHELLS
    name = str(action.metavar or action.dest).upper()
    return _FILES if action.type is Path or name.startswith(_NAMES_OF_FILES) else _ANYTHING


def completion(shell: str, parsers: Mapping[str, CommandParser]) -> str:
    """Return a script that makes a shell complete `lathe`.

    Args:
        shell: `bash`, `zsh` or `fish`.
        parsers: The commands' names and options; `run` is what no command's name stands for.

    Raises:
        UserError: The shell is none of them.
    """
    if shell not in SHELLS:
        raise UserError(
            f"--completion {shell}: there is one for {', '.join(SHELLS)}"
            f"{did_you_mean(shell, SHELLS)}"
        )
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return write({name: _Command.of(parser) for name, parser in parsers.items()}).rstrip()


def words_of(key: Key) -> list[str]:
    """Return the words that a key takes: its own, true and false, none."""
    words = list(key.rule.words)
    words += [word for word in ("true", "false") if bool in key.scalars]
    return words + ["none"] * (key.optional and "none" not in words)


def _spellings(key: Key) -> list[str]:
    """Return how a key is typed: whole, and bare where no other section has that name."""
    alone = sum(other.name == key.name for other in KEYS.values()) == 1
    return [key.path, *([key.name] if alone else [])]


def _cases(write: str) -> list[str]:
    """Return a line of a `case` for each key that has words, and one for those that name files."""
    lines = []
    for key in KEYS.values():
        words = words_of(key)
        if words and key.path not in _PATHS:
            lines.append(f"{'|'.join(_spellings(key))}) {write.format(' '.join(words))} ;;")
    return lines


def _path_case() -> str:
    return "|".join(name for path in _PATHS for name in _spellings(KEYS[path]))


def _option_cases(commands: Mapping[str, _Command], write: str, files: str) -> list[str]:
    """Return a line of a `case` of "$command $before" for each kind of value that options take."""
    after: dict[tuple[str, ...], list[str]] = {}
    for name, command in commands.items():
        for option, taken in command.options.items():
            if taken:
                after.setdefault(taken, []).append(f'"{name} {option}"')
    lines = []
    for taken, options in after.items():
        offer = write.format("" if taken == _ANYTHING else " ".join(taken))
        lines.append(f"{'|'.join(options)}) {files if taken == _FILES else offer} ;;")
    return lines


def _bash(commands: Mapping[str, _Command]) -> str:
    files = 'compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current"); return'
    listed = [
        f'{name}) words+="{" ".join([*command.options, *(f"{key}=" for key in command.keys)])}"'
        + "; files=yes" * command.files
        + " ;;"
        for name, command in commands.items()
    ]
    lines = "\n            "
    return f"""\
# bash completion of lathe: eval "$(lathe --completion bash)"
_lathe() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before= key= prefix= words= files= command=run
    (( COMP_CWORD > 0 )) && before=${{COMP_WORDS[COMP_CWORD-1]}}
    if [[ $current == "=" ]]; then  # bash splits words at =
        key=$before current=
    elif [[ $before == "=" ]]; then
        key=${{COMP_WORDS[COMP_CWORD-2]}}
    elif [[ $current == *=* && $current != -* ]]; then
        key=${{current%%=*}} prefix=$key= current=${{current#*=}}
    fi
    COMPREPLY=()
    if [[ -n $key ]]; then
        case $key in
            {lines.join(_cases('words="{}"'))}
            {_path_case()})
                compopt -o filenames
                mapfile -t COMPREPLY < <(compgen -f -P "$prefix" -- "$current")
                return ;;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$words" -P "$prefix" -- "$current")
        return
    fi
    if (( COMP_CWORD > 1 )); then
        case ${{COMP_WORDS[1]}} in
            {"|".join(commands)}) command=${{COMP_WORDS[1]}} ;;
        esac
    else
        words="{" ".join(commands)} "
    fi
    case "$command $before" in
            {lines.join(_option_cases(commands, 'words="{}"', files))}
        *) case $command in
            {lines.join(listed)}
        esac ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    if [[ -n $files && $current != -* ]]; then
        compopt -o filenames
        mapfile -t -O ${{#COMPREPLY[@]}} COMPREPLY < <(compgen -f -- "$current")
    fi
    [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
    return 0
}}
complete -F _lathe lathe
"""


def _zsh(commands: Mapping[str, _Command]) -> str:
    listed = [
        f"({name}) compadd -- {' '.join(command.options)}"
        + (f"; compadd -S '' -- {' '.join(f'{key}=' for key in command.keys)}" * bool(command.keys))
        + "; _files" * command.files
        + " ;;"
        for name, command in commands.items()
    ]
    taken = _option_cases(commands, "compadd -- {}; return", "_files; return")
    lines = "\n        "
    return f"""\
#compdef lathe
# zsh completion of lathe, after compinit: eval "$(lathe --completion zsh)"
_lathe() {{
    local key=${{PREFIX%%=*}} command=run
    if [[ $PREFIX == *=* && $PREFIX != -* ]]; then
        compset -P '*='
        case $key in
        {lines.join(f"({line}" for line in _cases("compadd -- {}"))}
        ({_path_case()}) _files ;;
        esac
        return
    fi
    if (( CURRENT == 2 )); then
        compadd -- {" ".join(commands)}
    else
        case ${{words[2]}} in
        ({"|".join(commands)}) command=${{words[2]}} ;;
        esac
    fi
    case "$command ${{words[CURRENT-1]}}" in
        {lines.join(f"({line}" for line in taken)}
    esac
    case $command in
        {lines.join(listed)}
    esac
}}
compdef _lathe lathe
"""


def _fish(commands: Mapping[str, _Command]) -> str:
    def behind(names: list[str]) -> str:
        """Return the condition that one of these commands has been typed, or none for a run."""
        others = [name for name in commands if name not in names]
        seen = f"not __fish_seen_subcommand_from {' '.join(others)}"
        return seen if "run" in names else f"__fish_seen_subcommand_from {' '.join(names)}"

    lines = [
        "# fish completion of lathe: lathe --completion fish | source",
        f"complete -c lathe -n __fish_use_subcommand -f -a {shlex.quote(' '.join(commands))}",
    ]
    for name, command in commands.items():
        if not command.files and not command.keys:
            lines.append(f"complete -c lathe -n {shlex.quote(behind([name]))} -f")
        for option, taken in command.options.items():
            line = f"complete -c lathe -n {shlex.quote(behind([name]))} -l {option[2:]}"
            words = "" if taken in (_FILES, _ANYTHING) else " ".join(taken)
            takes = "" if not taken else " -r" if taken == _FILES else " -x"
            lines.append(line + takes + (f" -a {shlex.quote(words)}" if words else ""))
    for key in KEYS.values():
        takers = behind([name for name, command in commands.items() if key.path in command.keys])
        values = [] if key.path in _PATHS else words_of(key)
        given = shlex.quote(" ".join(f"{key.path}={value}" for value in values or [""]))
        doc = shlex.quote(key.rule.doc.replace("\n", " "))
        lines.append(f"complete -c lathe -n {shlex.quote(takers)} -a {given} -d {doc}")
    return "\n".join(lines) + "\n"
