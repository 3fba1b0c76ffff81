"""Names that are not known, answered with those that were meant."""

import difflib
from collections.abc import Sequence
from typing import Final

_MOST: Final = 3
_NEAR: Final = 0.6


def did_you_mean(got: str, known: Sequence[str]) -> str:
    """The known names that begin with what was got, or are nearly it, as a question; "" where there are none.

    >>> did_you_mean("A100", ["a100-40gb", "a100-80gb", "t4"])
    " Did you mean 'a100-40gb' or 'a100-80gb'?"
    """
    low = got.strip().lower()
    near = [name for name in known if len(low) > 1 and name.startswith(low)]
    near = near or difflib.get_close_matches(low, known, n=_MOST, cutoff=_NEAR)
    return f" Did you mean {' or '.join(map(repr, near[:_MOST]))}?" if near else ""
