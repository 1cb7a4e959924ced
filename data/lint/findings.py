"""What can be found in rows, in words, and the rows it was found in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# Kind → what is said of the rows, in the order of the report. `{limit}` is data.max_length.
PROBLEMS = {
    "unreadable": "cannot be read or rendered: a run ends there",
    "too_long": "are longer than data.max_length={limit}, which data.on_overflow=error refuses",
    "no_target": "have nothing to train: no answer, or none that is trained",
    "empty_answer": "have an empty answer: nothing but the EOS is trained",
    "dropped": "are dropped: longer than data.max_length={limit}",
    "cut_before_answer": "are cut at data.max_length={limit} before their trained part begins",
    "answer_cut": "lose the end of what is trained, and its EOS, at data.max_length={limit}",
    "eos_untrained": "do not end with a trained EOS: the model does not learn to stop there",
    "untrained_turns": "have answers of which the chat template leaves nothing to train",
    "answer_unfinished": "have an answer that was cut off before it came here",
    "leaked": "of valid or test stand in another set too, word for word",
    "leaked_nearly": "of valid or test are nearly a row of another set",
    "duplicate": "stand in the same set before, word for word",
    "near_duplicate": "are nearly a row of the same set that stands before them",
    "wrong_set": "say in a column of their own that they are of another set",
    "mojibake": "hold UTF-8 that was read as Windows-1252 or Latin-1",
    "replacement_character": "hold U+FFFD, where a decoder met bytes that it could not read",
    "byte_order_mark": "hold a byte order mark (U+FEFF) within their text",
    "nul": "hold NUL characters",
    "control_character": "hold control characters",
    "invisible_character": "hold characters of no width, or that turn the direction of writing",
    "mixed_line_endings": "end their lines in more than one way",
    "other_line_endings": "end their lines in another way than most rows do",
    "aws_access_key": "hold an AWS access key",
    "aws_secret_key": "hold an AWS secret key",
    "github_token": "hold a GitHub token",
    "gitlab_token": "hold a GitLab token",
    "hugging_face_token": "hold a Hugging Face token",
    "openai_or_anthropic_key": "hold a key of OpenAI's or Anthropic's form",
    "google_api_key": "hold a Google API key",
    "slack_token": "hold a Slack token",
    "stripe_key": "hold a live key of Stripe's",
    "json_web_token": "hold a JSON web token",
    "private_key": "hold a private key",
    "password_in_url": "hold a password in a URL",
    "email_address": "hold an e-mail address",
    "ip_address": "hold what reads as a public IP address",
}
# What is worth knowing and spoils nothing.
NOTES = {
    "example_email_address": "hold an e-mail address at a domain that is kept for examples",
    "merged_prompts": "have a completion that begins inside a token of the prompt",
    "weightless": "weigh 0 (data.weight_field): a run leaves them out",
}
# Places that are kept of each finding; all are counted.
MOST_PLACES = 1000


@dataclass(frozen=True)
class Place:
    """A row in which something was found.

    Attributes:
        set: `train`, `valid` or `test`.
        row: Its number in its set, from 0, None for one that cannot be read.
        source: `FILE:LINE`.
        detail: What was found, secrets masked.
    """

    set: str
    row: int | None
    source: str
    detail: str = ""


@dataclass
class Found:
    """How often something was found, and where: the first thousand places."""

    count: int = 0
    places: list[Place] = field(default_factory=list)


class Findings:
    """Everything that was found, by kind."""

    def __init__(self) -> None:
        self._found: dict[str, Found] = {}

    def add(self, kind: str, place: Place) -> None:
        """Count a row; one row is counted once for a kind."""
        found = self._found.setdefault(kind, Found())
        found.count += 1
        if len(found.places) < MOST_PLACES:
            found.places.append(place)

    def __iter__(self) -> Iterator[tuple[str, Found]]:
        """Yield what was found, in the order of the report."""
        return ((kind, self._found[kind]) for kind in (*PROBLEMS, *NOTES) if kind in self._found)

    @property
    def problems(self) -> int:
        """How many kinds of problem were found."""
        return sum(kind in PROBLEMS for kind in self._found)
