"""What a row weighs in the loss of a step: a number in a column of its own (`data.weight_field`).

It multiplies the loss of every target that is made of the row, whatever its format: of all its
pieces, of all its turns that are trained. The 0 or 1 beside a single message is another thing: it
says whether that message has targets at all (`data/spans.py`). So are the weights of sources: they
say how often their rows are drawn (`data/mixture.py`).
"""

from __future__ import annotations

import re

from data.packed import kind_of_rows
from data.row_files import kind_of, missing_field
from data.source import Row
from files.errors import UserError, shown

# Far beyond any use, and what a step's targets weigh together stays finite.
_MOST = 1e30
# In CSV every value is text.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def row_weight(row: Row, field: str) -> float:
    """Return the number in a row's `field`.

    Raises:
        UserError: It is not there, or is no number from 0 to 1e30; the row's place is named.
    """
    if field not in row.values:
        raise missing_field(field, list(row.values), row.where)
    value = row.values[field]
    if isinstance(value, str) and _is_csv(row.where) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        known = isinstance(value, int | float | str) and not isinstance(value, bool)
        said = f"{kind_of(value)} ({shown(value)})" if known else kind_of(value)
        raise UserError(
            f'{row.where}: field "{field}" is {said}; data.weight_field names a column of numbers '
            "from 0 (the row is left out) to 1e30: fill it in or drop the row"
        )
    return float(value)


def _is_csv(where: str) -> bool:
    return kind_of_rows(where.rpartition(":")[0]) == ".csv"
