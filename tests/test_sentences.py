# SPDX-License-Identifier: Apache-2.0
"""Where the sentences of a text begin."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flaxlm.sentences import split_sentences

# Language, sentences, white space between them.
SENTENCES = [
    ("en", ["Dr. Smith paid $3.50 to Mr. Jones.", '"Really?"', "She left at 5 p.m. yesterday!"], "  "),
    ("en", ["A wrapped\nline ends no sentence.", "An empty one does", "even without a full stop"], "\n\n"),
    ("de", ["Das gilt z.B. für Dr. Müller.", "Am 3. Mai kam er.", "Schön!"], " "),
    ("no", ["Dette er bl.a. en setning.", "Hva nå?", "Ærlig talt, så så."], " "),
    ("zh", ["我爱你。", "你好吗？", "很好！"], ""),
    ("ja", ["これは文です。", "次の文です。"], "\u3000"),
    ("hi", ["यह एक वाक्य है।", "यह दूसरा है।"], " "),
    ("ru", ["Это предложение.", "А это — другое!"], "\t"),
]


@pytest.mark.parametrize("language, sentences, space", SENTENCES)
def test_split_sentences(language, sentences, space):
    text = " " + space.join(sentences) + " \n"
    starts = split_sentences(text, language)
    found = [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert "".join(found) == text
    assert [sentence.strip() for sentence in found] == sentences
    assert all(not sentence[0].isspace() for sentence in found[1:])


LANGUAGES = ["en", "de", "no", "nb", "fr", "es", "ru", "zh", "ja", "hi", "ar", "hy", "am", "my", "th", "fi", "xx"]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("aIZé.!?…。।\u0589 \n\r\t\u00a0\u2028\u3000\"'“”«»()-1🙂\u0301") | st.text(),
    language=st.sampled_from(LANGUAGES),
)
@example(text="plan A\u00a0. So it is.", language="en")  # these panic in the splitter of sentencex 1.0.32
@example(text="x A\u3000. B", language="zh")
@example(text="", language="en")
@example(text="\n\n A. B", language="en")
def test_split_any_text(text, language):
    starts = split_sentences(text, language)
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert all(not text[start].isspace() and not text[:start].isspace() for start in starts[1:])


def test_long_texts_are_split_like_short_ones():
    """The splitter gets a long text in parts; what it finds does not tell."""
    for language, sentence in (
        ("en", "Mr. Smith went on, e.g. to town. "),
        ("zh", "我爱你，你好吗？"),
        ("de", "So war's am 3. Mai. "),
    ):
        starts = split_sentences(sentence * 3000, language)
        assert starts == list(range(0, 3000 * len(sentence), len(sentence)))
    text = "word " * 3000 + "end. Start " + "word " * 3000
    assert split_sentences(text, "en") == [0, text.index("Start")]
