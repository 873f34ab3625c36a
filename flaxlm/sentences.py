# SPDX-License-Identifier: Apache-2.0
"""Where the sentences of a text begin."""

import re

import sentencex

from flaxlm import cli

# sentencex 1.0.32 panics at "plan A\u00a0. So": it takes any white space for one byte. One for one, offsets stay.
WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")
# Its time grows with the square of the length where no spaces are (Chinese), so it gets so many characters at once, and
# some more to look ahead.
SPLITTER_WINDOW, SPLITTER_LOOKAHEAD = 4096, 100


def check_language(language: str) -> None:
    """Anything but a code would silently be split as English."""
    if not re.fullmatch("[a-z]{2,3}", language):
        cli.fail(f"--sentence_language {language}: must be a code of two or three letters: en, de, no, zh")


def split_sentences(text: str, language: str) -> list[int]:
    """Find where the sentences of a text start: character offsets, ascending, the first one 0.

    A sentence reaches to the start of the next: white space between two belongs to the first, so nothing is lost. An empty
    line ends a sentence; a single line break does not, since text may be wrapped (but the splitter knows list items).
    """
    plain = text if text.isascii() else WIDE_SPACE.sub(" ", text)
    starts, latest, position = [0], len(plain) - len(plain.lstrip()), 0
    while position < len(plain):
        end = position + SPLITTER_WINDOW
        for boundary in sentencex.get_sentence_boundaries(language, plain[position : end + SPLITTER_LOOKAHEAD]):
            visible = boundary["text"].lstrip()
            start = position + boundary["end_index"] - len(visible)
            if visible and boundary["start_index"] > 0 and latest < start < end:
                starts.append(start)
                latest = start
        position = latest if position < latest and end < len(plain) else end  # a cut sentence again, from its start
    return starts
