"""What can be asked of the rows (`[data]`), a section of `train.config.schema`.

This module never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.config.rules import key


@dataclass(frozen=True)
class DataSettings:
    """Rows, and how they become tokens and labels."""

    train: str | tuple[str, ...] | None = key(
        None,
        "file, folder, glob (data/*.jsonl), or hub:owner/name[:config][:split]; or a list of these",
    )
    weights: tuple[float, ...] | None = key(
        None,
        "of a list in data.train, the share of each entry in the examples of an epoch; none: every "
        "example once",
        above=0,
    )
    valid: str | tuple[str, ...] | None = key(None, "the same, for evaluation during the run")
    test: str | tuple[str, ...] | None = key(None, "the same, for one evaluation at the end")
    split_column: str | None = key(
        None, "data.train holds all rows; this column says train, valid (validation) or test"
    )
    format: str = key(
        "text",
        "text: one field; template: prompt and completion templates over columns; "
        "completion: columns prompt and completion; messages: a chat; "
        "instruction: columns instruction, input and output in Alpaca's prompts",
        words=("text", "template", "completion", "messages", "instruction"),
    )
    text_field: str = key("text", "the column of data.format = text")
    weight_field: str | None = key(
        None,
        "a column of numbers from 0: what the loss of a training row's targets is multiplied by, "
        "before a step's mean is taken; rows of 0 are left out",
    )
    prompt_template: str | None = key(
        None,
        "the prompt, with {column} placeholders; {?column}…{/column} is a part that is left out "
        "where that column is empty or absent, {{ and }} are braces",
    )
    completion_template: str | None = key(None, "the completion, in the same way")
    system_prompt: str | None = key(
        None,
        "stands first, with a blank line; in messages it is the system turn of rows without one",
    )
    chat_template: str | None = key(
        None,
        "in place of the tokenizer's own for messages: a file, or the name of one of several that "
        "the tokenizer has; none: its own, tool_use where the row has tools",
    )
    completion_only: bool | None = key(
        None, "labels on the completion alone; none: wherever there is a prompt and a completion"
    )
    train_on: str = key(
        "all",
        "of the assistant's turns in messages: all are trained, or the last alone",
        words=("all", "last"),
    )
    append_eos: bool = key(True, "the end-of-text token after each row, trained; cut rows get none")
    max_length: int = key(
        1024, "tokens of an example", minimum=2, recommended="the least that holds your rows"
    )
    on_overflow: str = key(
        "truncate",
        "what becomes of a longer row; counted in the plan and the report",
        words=("truncate", "drop", "error", "split"),
    )
    near_duplicates: str = key(
        "keep",
        "drop: training rows that are like one before them, word for word or nearly (four fifths "
        "of their text the same, by MinHash) are left out; those that valid or test rows are like "
        "are not: lathe lint tells of them",
        words=("keep", "drop"),
    )
    batching: str = key(
        "unpadded",
        "documents end to end, padded to the longest, or padded to data.max_length: "
        "the same loss, at very different speed",
        words=("unpadded", "longest", "max_length"),
    )
    group_by_length: bool = key(False, "examples of like length in one step")
    shuffle: bool = key(True, "a new order each epoch, a function of (train.seed, epoch)")
    valid_fraction: float = key(
        0.0, "share of data.train held out where there is no valid set", minimum=0, below=1
    )
    fim_rate: float = key(
        0.0,
        "fill-in-the-middle: share of the texts (data.format=text) with a hole, by the tokenizer's "
        "own tokens; a function of (train.seed, epoch, row)",
        minimum=0,
        maximum=1,
        recommended="0.5 to 0.9",
    )
    fim_spm_rate: float = key(0.5, "share of these with the suffix first", minimum=0, maximum=1)
    fim_unit: str = key(
        "character",
        "what is cut out: characters, lines, or a node of Python's parser (else lines)",
        words=("character", "line", "syntax"),
    )
    fim_targets: str = key("all", "labels on all of it, or the middle", words=("all", "middle"))
