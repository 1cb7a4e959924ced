"""Some rows of the embedding, trained beside adapters: PEFT's `trainable_token_indices`.

Legend: M tokens · V vocabulary · H hidden size · n trained rows

A file holds the trained rows themselves, not what they changed by. A head that is tied to the
embedding reads them too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.errors import UserError

ROWS = "trainable_tokens_delta"


class TokenRows(nn.Module):
    """An embedding some of whose rows are trained, in the place of an `nn.Embedding`.

    `weight` is the very parameter of the embedding that it replaces, under its old name, and frozen
    as it is; `trainable_tokens_delta` (n, H) stands in for its rows, in fp32 (fp64 beside fp64).

    Attributes:
        token_indices: (n,) the rows.
        plain: The embedding it replaced, alone in a tuple so that it is no submodule.
    """

    token_indices: Tensor
    places: Tensor  # (V,) each row's place among the trained ones, -1 where it is none

    def __init__(self, embedding: nn.Embedding, indices: Sequence[int]):
        super().__init__()
        self.weight = embedding.weight
        rows = torch.tensor(list(indices), device=self.weight.device)
        places = torch.full((len(self.weight),), -1, device=self.weight.device)
        places[rows] = torch.arange(len(rows), device=rows.device)
        self.register_buffer("token_indices", rows, persistent=False)
        self.register_buffer("places", places, persistent=False)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.trainable_tokens_delta = nn.Parameter(self.weight.detach()[rows].to(wide))
        self.plain = (embedding,)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of tokens, (M,) → (M, H), in the weight's type."""
        x = F.embedding(ids, self.weight)
        place = self.places[ids]
        trained = F.embedding(place.clamp(min=0), self.trainable_tokens_delta)
        return torch.where((place >= 0).unsqueeze(-1), trained.to(x.dtype), x)

    def table(self) -> Tensor:
        """Return the whole of it, (V, H), as a tied head reads it."""
        rows = self.trainable_tokens_delta.to(self.weight.dtype)
        return self.weight.index_copy(0, self.token_indices, rows)


def train_rows(model: nn.Module, indices: Sequence[int], whole: Sequence[str]) -> None:
    """Let some rows of a model's one embedding be trained.

    Args:
        model: The base model; without indices nothing is done.
        indices: The rows.
        whole: Names of the modules that are trained whole.

    Raises:
        UserError: There is no embedding, or more than one; a row is not there, or given twice; or
            the embedding is trained whole.
    """
    if not indices:
        return
    key, owner = "lora.trainable_token_indices", type(model).__name__
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if len(found) != 1:
        raise UserError(f"{key}: {owner} has {len(found)} embeddings, and rows are those of one")
    ((name, embedding),) = found.items()
    size = len(embedding.weight)
    if wrong := [index for index in indices if not 0 <= index < size]:
        raise UserError(f"{key}: {wrong[0]} is no row of {name}, which has 0 to {size - 1}")
    if len(set(indices)) < len(indices):
        raise UserError(f"{key}: a row is given twice; give each once")
    if name in whole:
        raise UserError(
            f"{key}: {name} is trained whole (lora.modules_to_save), its rows with it; give one of "
            "the two"
        )
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, TokenRows(embedding, indices))


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Return the embedding some of whose rows are trained, by name; empty where there is none."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TokenRows)}


@torch.no_grad()
def merge_rows(model: nn.Module) -> None:
    """Write trained rows into their embedding, rounded to its dtype, and put it back.

    Raises:
        UserError: A row is not finite there.
    """
    for name, rows in token_rows(model).items():
        table = rows.table()
        if not table[rows.token_indices].isfinite().all():
            raise UserError(f"{name}: a trained row is not finite in {table.dtype}")
        rows.weight.copy_(table)
        (plain,) = rows.plain
        plain.weight = rows.weight
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
