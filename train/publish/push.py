"""`python -m train.publish.push RUN [--to OWNER/NAME]`: a finished run's `final/`, to the Hub.

Nothing is ever uploaded but by this command. Of `final/` all goes but its manifest; a card on the
Hub that is not ours stays.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from files.errors import UserError, counted, note
from files.folders import CARD, MANIFEST, damage, step_of
from files.strict_json import read_json_object
from train.plan.ledger import is_hub_id
from train.process.command import CommandParser, command, run_command
from train.report.card import is_ours, write_card
from train.report.record import read_record
from train.text import size_text


def push(run: Path, to: str | None = None, *, private: bool = False) -> str:
    """Upload what a run trained, and return a sentence saying what went where.

    Args:
        run: The folder of a finished run.
        to: The Hub's `owner/name`; None takes the token's owner and the run's name.
        private: Whether nobody else may see it. One that is there already keeps its own visibility,
            so that a public one is refused.

    Raises:
        UserError: The run is not finished or its `final/` damaged, the name is none, there is no
            token, or the Hub refuses; nothing has been uploaded then.
    """
    record = read_record(run)
    final = run / "final"
    if record.status.get("state") != "finished" or not final.is_dir():
        resume = f"{command()} --resume {shlex.quote(str(run))}"
        raise UserError(
            f"{run}: is not finished ({record.outcome}), and only final/ is pushed; `{resume}` "
            "goes on"
        )
    write_card(record)
    if (problem := damage(final)) is not None:
        raise UserError(f"{problem}; what is damaged is not pushed")
    if to is not None:
        _require_name(to)
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            "there is no token of the Hub: set HF_TOKEN, or type `hf auth login`, with one that "
            "may write"
        )
    api = HfApi()
    try:
        if to is None:
            to = f"{api.whoami()['name']}/{record.name}"
            _require_name(to)
        url = api.create_repo(to, private=True if private else None, exist_ok=True)
        hidden = bool(api.model_info(to).private)
        if private and not hidden:
            raise UserError(
                f"{to}: is there already, and everybody can see it; nothing was uploaded: take "
                "another name, or make it private on the Hub"
            )
        left = [MANIFEST] + ([CARD] if _has_another_card(api, to) else [])
        _tell_of_paths(final)
        api.upload_folder(
            repo_id=to,
            folder_path=final,
            commit_message=f"{record.name}, step {step_of(final)}",
            ignore_patterns=left,
        )
    except UserError:
        raise
    except Exception as error:  # the library's HTTP layer differs by version, and so do its errors
        raise _explain(error, to) from error
    sent = [path for path in final.iterdir() if path.name not in left]
    size = size_text(sum(path.stat().st_size for path in sent))
    stays = "; the README.md that is there is not ours, and stays" if CARD in left else ""
    return (
        f"pushed {counted(len(sent), 'file')} ({size}) of {final} to {url} "
        f"({'private' if hidden else 'public'}){stays}"
    )


def _require_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    fault = "" if re.fullmatch(r"[^/]+/[^/]+", name) else "it is OWNER/NAME"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        fault = fault or (str(error).splitlines() or ["not a name"])[0].rstrip(".")
    if fault:
        raise UserError(
            f"--to {name}: no name of a repository on the Hub ({fault}); give another with --to "
            "OWNER/NAME"
        )


def _has_another_card(api: object, repository: str) -> bool:
    """Return whether a repository has a README.md that `write_card` did not write."""
    from huggingface_hub import HfApi

    assert isinstance(api, HfApi)
    if not api.file_exists(repository, CARD):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return not is_ours(Path(api.hf_hub_download(repository, CARD, local_dir=folder)))


def _tell_of_paths(final: Path) -> None:
    """Say where an adapter names its base by a folder of this machine."""
    document = final / "adapter_config.json"
    if not document.is_file():
        return
    base = str(read_json_object(document).get("base_model_name_or_path") or "")
    if not is_hub_id(base):
        note(
            f"adapter_config.json names the base by a folder of this machine, {base}: everybody "
            "who uses the adapter has to give a base of their own"
        )


def _explain(error: Exception, to: str | None) -> UserError:
    """Return one sentence for whatever the library stumbled over."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    where = to or "the Hub"
    if status == 401:
        return UserError(f"{where}: the Hub does not take the token; `hf auth login` gets another")
    if status == 403:
        return UserError(
            f"{where}: the token may not write there; take one that may, or another name with --to"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"{where}: could not be pushed ({lines[0].strip()}); try again")


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser("push", description="Upload a finished run's final/ to the Hub.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
    parser.add_argument(
        "--to",
        metavar="OWNER/NAME",
        help="the repository, made where there is none; without it the token's owner and the "
        "run's name",
    )
    parser.add_argument(
        "--private", action="store_true", help="for nobody else's eyes; else the Hub's default"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line and return its exit code."""

    def answer() -> int:
        options = parser().parse_args(arguments)
        print(push(options.run, options.to, private=options.private))
        return 0

    return run_command(answer)


if __name__ == "__main__":
    sys.exit(main())
