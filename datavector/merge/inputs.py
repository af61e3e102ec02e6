"""What a merge is made of: each hospital's vector file, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeInput:
    """One hospital's part of a merge.

    Attributes:
        path: the vector file.
        digest: "sha256:<hex>" of the file, or "" where nobody has computed it. It decides what is random (DARE) and,
            where sums are not exact, the order; without it the order given counts.
        samples: training images, the weight of methods that weigh.
        fisher: file of the diagonal Fisher information, in the vector's layout, where the hospital sent one.
        regmean: file of the layers' input Gram matrices, where the hospital sent one.
    """

    path: Path
    digest: str = ""
    samples: int = 1
    fisher: Path | None = None
    regmean: Path | None = None
