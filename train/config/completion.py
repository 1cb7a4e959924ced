"""Completion of the command line in a shell: commands, options, keys, and the words of each key."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from files.errors import UserError, did_you_mean
from train.config.layers import preset_names
from train.config.rules import Key
from train.config.schema import KEYS, PATH_KEYS

SHELLS = ("bash", "zsh", "fish")
_PATHS = (*PATH_KEYS, "train.output_dir", "data.chat_template")


def completion(shell: str, commands: Sequence[str], options: Sequence[str]) -> str:
    """Return a script that makes a shell complete `lathe`.

    Args:
        shell: `bash`, `zsh` or `fish`.
        commands: The commands' names, `run` left out.
        options: The options of a run.

    Raises:
        UserError: The shell is none of them.
    """
    if shell not in SHELLS:
        raise UserError(
            f"--completion {shell}: there is one for {', '.join(SHELLS)}"
            f"{did_you_mean(shell, SHELLS)}"
        )
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return write(["run", *commands], list(options)).rstrip()


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


def _bash(commands: list[str], options: list[str]) -> str:
    cases = "\n            ".join(_cases('words="{}"'))
    return f"""\
# bash completion of lathe: eval "$(lathe --completion bash)"
_lathe() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before= key= prefix= words=
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
            {cases}
            {_path_case()})
                compopt -o filenames
                mapfile -t COMPREPLY < <(compgen -f -P "$prefix" -- "$current")
                return ;;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$words" -P "$prefix" -- "$current")
        return
    fi
    case $before in
        --preset|--show) words="{" ".join(preset_names())}" ;;
        --completion) words="{" ".join(SHELLS)}" ;;
        --config|--resume|--run|--adapter|--model|--base|--data|--to|--out)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return ;;
        *)
            if (( COMP_CWORD > 1 )); then
                case ${{COMP_WORDS[1]}} in
                    {"|".join(name for name in commands if name not in ("run", "show-data"))})
                        compopt -o filenames
                        mapfile -t COMPREPLY < <(compgen -f -- "$current")
                        return ;;
                esac
            else
                words="{" ".join(commands)}"
            fi
            words="$words {" ".join(options)} {" ".join(f"{path}=" for path in KEYS)}" ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
    return 0
}}
complete -F _lathe lathe
"""


def _zsh(commands: list[str], options: list[str]) -> str:
    cases = "\n            ".join(f"({line}" for line in _cases("compadd -- {}"))
    return f"""\
#compdef lathe
# zsh completion of lathe, after compinit: eval "$(lathe --completion zsh)"
_lathe() {{
    local key=${{PREFIX%%=*}}
    if [[ $PREFIX == *=* && $PREFIX != -* ]]; then
        compset -P '*='
        case $key in
            {cases}
            ({_path_case()}) _files ;;
        esac
        return
    fi
    case ${{words[CURRENT-1]}} in
        (--preset|--show) compadd -- {" ".join(preset_names())}; return ;;
        (--completion) compadd -- {" ".join(SHELLS)}; return ;;
        (--config|--resume|--run|--adapter|--model|--base|--data|--to|--out) _files; return ;;
    esac
    if (( CURRENT == 2 )); then
        compadd -- {" ".join(commands)}
    else
        case ${{words[2]}} in
            ({"|".join(name for name in commands if name not in ("run", "show-data"))})
                _files; return ;;
        esac
    fi
    compadd -- {" ".join(options)}
    compadd -S '' -- {" ".join(f"{path}=" for path in KEYS)}
}}
compdef _lathe lathe
"""


def _fish(commands: list[str], options: list[str]) -> str:
    lines = [
        "# fish completion of lathe: lathe --completion fish | source",
        f"complete -c lathe -n __fish_use_subcommand -f -a {shlex.quote(' '.join(commands))}",
        *(f"complete -c lathe -l {option.removeprefix('--')}" for option in options),
        f"complete -c lathe -l preset -x -a {shlex.quote(' '.join(preset_names()))}",
    ]
    for key in KEYS.values():
        values = [] if key.path in _PATHS else words_of(key)
        given = " ".join(f"{key.path}={value}" for value in values or [""])
        doc = shlex.quote(key.rule.doc.replace("\n", " "))
        lines.append(f"complete -c lathe -a {shlex.quote(given)} -d {doc}")
    return "\n".join(lines) + "\n"
