"""The chat templates that a tokenizer's files hold, and which of them a conversation takes.

Most models have one. Some have several, by name: `tool_use` beside `default`, in a list in
tokenizer_config.json or, as transformers 5 writes them, in files of a folder beside
chat_template.jinja. Which one is taken is transformers' rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from files.errors import UserError, did_you_mean
from files.strict_json import parse_json_object

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
# transformers' folder of the others: `tool_use.jinja`.
NAMED_FOLDER = "additional_chat_templates"
MAX_BYTES = 8 * 2**20


def named_files(folder: Path) -> list[str]:
    """Return the files of named templates below a tokenizer's folder, as POSIX paths, sorted."""
    return sorted(f"{NAMED_FOLDER}/{path.name}" for path in (folder / NAMED_FOLDER).glob("*.jinja"))


def in_one_folder(files: Mapping[str, bytes], folder: Path) -> dict[str, bytes]:
    """Return a tokenizer's files with the named templates in tokenizer_config.json.

    transformers reads them there as well, and the folders of a run have no folders in them.

    Raises:
        UserError: As `read_templates`, or tokenizer_config.json is not a JSON object.
    """
    if not any("/" in name for name in files):
        return dict(files)
    settings = parse_json_object(files.get(SETTINGS_FILE, b"{}"), str(folder / SETTINGS_FILE))
    templates = read_templates(files, settings, folder)
    settings["chat_template"] = [
        {"name": name, "template": source} for name, source in templates.items()
    ]
    flat = {name: text for name, text in files.items() if "/" not in name and name != TEMPLATE_FILE}
    flat[SETTINGS_FILE] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    return flat


def read_templates(
    files: Mapping[str, bytes], settings: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """Return name → source of a tokenizer's templates; one without a name is `default`.

    Files are preferred to `chat_template` of tokenizer_config.json, as in transformers.

    Args:
        files: The tokenizer's files, name → content.
        settings: The content of tokenizer_config.json.
        folder: Where they lie, for messages.

    Raises:
        UserError: A file is not UTF-8, or `chat_template` is neither text nor a list of them.
    """
    found = {}
    for name, content in files.items():
        if name == TEMPLATE_FILE:
            found["default"] = _text(content, folder / name)
        elif name.startswith(f"{NAMED_FOLDER}/"):
            found[Path(name).stem] = _text(content, folder / name)
    if found:
        return found
    given = settings.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    try:
        named = {entry["name"]: entry["template"] for entry in given}
    except (KeyError, TypeError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise UserError(
            f"{folder / SETTINGS_FILE}: chat_template must be text or a list of "
            "{name, template} objects"
        )
    return named


def overriding(asked: str, templates: Mapping[str, str], where: str) -> str:
    """Return the source of the template that `data.chat_template` asks for.

    Args:
        asked: A file, or the name of one of `templates`.
        templates: The tokenizer's, name → source.
        where: The tokenizer's folder, for messages.

    Raises:
        UserError: It is neither, or the file cannot be read.
    """
    path = Path(asked).expanduser()
    if path.is_file():
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise UserError(
                f"data.chat_template={asked}: cannot be read: {error.strerror}"
            ) from None
        if len(content) > MAX_BYTES:
            raise UserError(f"data.chat_template={asked}: larger than any chat template")
        return _text(content, path)
    if asked in templates:
        return templates[asked]
    there = ", ".join(sorted(templates)) or "none"
    raise UserError(
        f"data.chat_template={asked}: neither a file nor one of the templates of the tokenizer in "
        f"{where} (it has: {there}){did_you_mean(asked, templates)}"
    )


def chosen_name(templates: Mapping[str, str], has_tools: bool, where: str) -> str:
    """Return the name of the template for a conversation: `tool_use` with tools, else `default`.

    The only one there is is taken whatever its name.

    Raises:
        UserError: There is no template, or there are several and none fits.
    """
    if has_tools and "tool_use" in templates:
        return "tool_use"
    if "default" in templates:
        return "default"
    if len(templates) == 1:
        return next(iter(templates))
    if templates:
        raise UserError(
            f"the tokenizer in {where} has the chat templates {', '.join(sorted(templates))} and "
            "no default: name one as data.chat_template"
        )
    raise UserError(
        f"the tokenizer in {where} has no chat template, which messages need: put a "
        f"{TEMPLATE_FILE} beside tokenizer.json, name a file as data.chat_template, or use "
        "data.format=template"
    )


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
