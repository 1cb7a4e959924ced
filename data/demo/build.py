"""Make the demo's data from the source of the Python standard library.

    python -m data.demo.build              the rows and the tokenizer that ship in data/demo/
    python -m data.demo.build corpus OUT   OUT/train.jsonl and OUT/valid.jsonl: whole modules, which
                                           the preset demo-base trains the base model on

The source is that of the interpreter which runs this; the shipped files were made by Python 3.11.7.

* Rows are documented functions: {"input": what to write, "solution": the function without its
  docstring, "source": "module:qualified name"}.
* Modules are dealt to train, valid and test by a hash of their name, for the rows and the corpus
  alike. The base model has therefore never seen a module of the valid or test rows.
* All of it is under the licence of Python (PSF-2.0, see NOTICE): modules that carry a permission
  notice of their own are left out.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from files.atomic import write_json, write_text

DEMO = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 4096
ROWS = {"train": 700, "valid": 80, "test": 80}
# Tests, programs that are not library code, installed packages, and tables in the form of code.
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "pydoc_data",
    "encodings",
    "__pycache__",
}
# "Licensed to PSF under a Contributor Agreement" is Python's licence; these are not.
OWN_LICENCE = re.compile(
    r"permission\s+(notice|is\s+(hereby\s+)?granted|to\s+use)|licensed\s+under|spdx"
    r"|all\s+rights\s+reserved|redistribut|provided\s+['\"]as[- ]is|choose between two licenses",
    re.IGNORECASE,
)
# Else one row in eight were a tkinter method of one line.
ROWS_OF_A_MODULE = 20
DOCSTRING_CHARACTERS = (20, 800)
SOLUTION_CHARACTERS = (40, 1200)


@dataclass(frozen=True)
class Module:
    """One file of the standard library: dotted name and source."""

    name: str
    source: str

    @property
    def split(self) -> str:
        """`train` (80 of 100), `valid` or `test` (10 each), by a hash of the name."""
        share = int.from_bytes(_sha256(self.name)[:8]) % 100
        return "train" if share < 80 else "valid" if share < 90 else "test"


def standard_library() -> list[Module]:
    """Return the modules of the running interpreter's standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT & set(parts) or parts[0].startswith("config-") or "_sysconfigdata" in parts[0]:
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
        source = path.read_text(encoding="utf-8")
        if source.strip() and not OWN_LICENCE.search(source):
            found.append(Module(".".join(parts), source))
    return found


def functions(module: Module) -> Iterator[dict[str, str]]:
    """Yield a row for each documented function and method of a module."""
    lines = module.source.splitlines()

    def visit(node: ast.AST, inside: tuple[str, ...]) -> Iterator[dict[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, (*inside, child.name))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                row = _row(module.name, child, inside, lines)
                if row is not None:
                    yield row

    yield from visit(ast.parse(module.source), ())


def rows() -> dict[str, list[dict[str, str]]]:
    """Return the rows of each split: a choice by hash, without repetitions, sorted by source."""
    chosen: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS}
    seen: set[str] = set()
    for module in standard_library():
        fresh = []
        for row in functions(module):
            same = {row["input"], row["solution"], row["source"]} & seen
            seen |= {row["input"], row["solution"], row["source"]}
            if not same:
                fresh.append(row)
        chosen[module.split] += _choose(fresh, ROWS_OF_A_MODULE)
    return {split: _choose(chosen[split], size) for split, size in ROWS.items()}


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE of 4,096 tokens, trained on the modules of the train split.

    As StarCoder2's: digits stand alone, `<|endoftext|>` is id 0 and the one special token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [module.source for module in standard_library() if module.split == "train"]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# In plain words, for a model that never saw a chat: README's examples of conversations are rendered
# by it.
CHAT_TEMPLATE = """\
{%- if tools %}
Tools:
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}

{% endif %}
{%- for message in messages %}
### {{ message.role | capitalize }}
{% if message.role == "assistant" %}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
{{ (call.function or call) | tojson }}
{%- endfor %}
{{ eos_token }}
{% else %}
{{ message.content }}
{% endif %}

{% endfor %}
{%- if add_generation_prompt %}
### Assistant
{% endif %}
"""


def build(folder: Path = DEMO) -> None:
    """Write the rows and the tokenizer that ship with the project into `folder`."""
    for split, chosen in rows().items():
        _write_jsonl(folder / f"{split}.jsonl", chosen)
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    write_text(base / "tokenizer.json", train_tokenizer().to_str(pretty=False) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(base / "tokenizer_config.json", settings)
    write_text(base / "chat_template.jinja", CHAT_TEMPLATE)


def build_corpus(folder: Path) -> None:
    """Write the train and valid modules, whole, as {"text", "source"} rows into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = standard_library()
    for split in ("train", "valid"):
        corpus = [
            {"text": module.source, "source": module.name}
            for module in modules
            if module.split == split
        ]
        _write_jsonl(folder / f"{split}.jsonl", corpus)


def _choose(rows: list[dict[str, str]], size: int) -> list[dict[str, str]]:
    """Return `size` rows, those with the lowest hashes, sorted by source."""
    by_hash = sorted(rows, key=lambda row: _sha256(row["source"]))
    return sorted(by_hash[:size], key=lambda row: row["source"])


def _row(
    module: str,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    inside: tuple[str, ...],
    lines: list[str],
) -> dict[str, str] | None:
    """Return a function as a row, or None where it cannot be a good one."""
    documentation = (ast.get_docstring(node) or "").strip()
    solution = _without_docstring(node, lines)
    if solution is None or not _within(documentation, DOCSTRING_CHARACTERS):
        return None
    if not _within(solution, SOLUTION_CHARACTERS):
        return None
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"{word} {node.name}({ast.unparse(node.args)}){returns}"
    where = f"class {inside[-1]} of the module {module}" if inside else f"the module {module}"
    return {
        "input": f"Write `{signature}` for {where}.\n\n{documentation}",
        "solution": solution,
        "source": f"{module}:{'.'.join((*inside, node.name))}",
    }


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """Return the function's own lines, dedented, its docstring cut out.

    None where nothing else is in the body, or where the lines cannot be cut: the docstring shares
    one with code, or dedenting changes a string.
    """
    docstring, *body = node.body
    if (
        ast.get_docstring(node) is None
        or not body
        or docstring.end_lineno is None
        or node.end_lineno is None
    ):
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    head = lines[first - 1 : docstring.lineno - 1]
    tail = lines[docstring.end_lineno : node.end_lineno]
    while tail and not tail[0].strip():
        tail = tail[1:]
    solution = textwrap.dedent("\n".join([*head, *tail])).rstrip() + "\n"
    try:
        parsed = ast.parse(solution).body
    except SyntaxError:
        return None
    node.body = body
    same = len(parsed) == 1 and ast.dump(parsed[0]) == ast.dump(node)
    node.body = [docstring, *body]
    return solution if same else None


def _within(text: str, characters: tuple[int, int]) -> bool:
    return characters[0] <= len(text) <= characters[1]


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def main(arguments: list[str]) -> int:
    """Run the command line; return its exit code."""
    if not arguments:
        build()
    elif arguments[0] == "corpus" and len(arguments) == 2:
        build_corpus(Path(arguments[1]))
    else:
        print("usage: python -m data.demo.build [corpus OUT]", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
