"""Token ids -> the text of each token. Knows the run's tokenizer.json and the library that reads it, nothing else.

Called by `rollouts.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

MOST_UNFINISHED = 16
"""Tokens in a row that end no character. Characters have four bytes at most: a longer row never becomes one."""


class TokenText:
    """A run's tokenizer, or none (yet): then ids are shown in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer: Tokenizer | None = None
        self._unreadable = False

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer. A file that cannot be read as one is said once, and counts as none."""
        if self._tokenizer is None and not self._unreadable and self._path.exists():
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_file(str(self._path))
            except Exception as error:  # the library raises nothing narrower
                self._unreadable = True
                log.warning("%s: found no tokenizer in it, ids are shown: %s", self._path, error)
        return self._tokenizer is not None

    def text(self, ids: Sequence[int]) -> str:
        """All tokens as one text, special tokens included; ids with spaces between them where there is no tokenizer."""
        if not self.known:
            return " ".join(map(str, ids))
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; joined, they are `text`. Each one's id where there is no tokenizer.

        A token that ends within a character is "", and the character stands with the token that completes it. Bytes
        that never become a character are shown as U+FFFD with the last of them.
        """
        if not self.known:
            return [str(id_) for id_ in ids]
        from tokenizers.decoders import DecodeStream

        assert self._tokenizer is not None
        pieces: list[str] = []
        stream, unfinished = DecodeStream(skip_special_tokens=False), 0
        for place, id_ in enumerate(ids):
            piece = stream.step(self._tokenizer, id_)
            unfinished = 0 if piece is not None else unfinished + 1
            if unfinished and (unfinished == MOST_UNFINISHED or place == len(ids) - 1):
                piece = self.text(ids[place + 1 - unfinished : place + 1])
                stream, unfinished = DecodeStream(skip_special_tokens=False), 0
            pieces.append(piece or "")
        return pieces
