"""Whether a model's reply is the right answer: the one rule that every cell is judged by.

1. A lead-in is dropped on both sides: "The answer is", "Answer:", "It is".
2. Reply, answer and options are normalised: Unicode compatibility forms, lower case, no
   punctuation, no articles (a, an, the), number words as digits (one = 1), single spaces.
3. Without options the reply must equal the answer. Where the answer is yes or no, the reply's first
   word counts.
4. With options the reply must choose the right one: by a bare letter or one with punctuation ("B",
   "(b)", "B. red"; only where options were offered with letters), by being its text, or by holding
   its text and that of no other option. An option inside a longer one ("red" in "dark red") is not
   held twice. A reply that chooses nothing is wrong.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

LETTERS = string.ascii_uppercase
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
_LEAD_IN = re.compile(
    r"^\W*(?:(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\s*(?:is\b|:)"
    r"|it\s+is\b|it's\b|assistant\s*:)\s*:?\s*",
    re.IGNORECASE,
)
_LETTER = re.compile(r"^\s*(?:\(([A-Za-z])\)|([A-Za-z])(?=\s*(?:[.:,)]|$)))")
#: A letter in front of an option, as some data sets write it.
PREFIX = re.compile(r"^\s*\(?([A-Za-z])[.:)]\s+")


def normalise(text: str) -> str:
    """Text as it is compared.

    Example:
        >>> normalise("The  Red, square."), normalise("Three o'clock"), normalise("A-B 1.5")
        ('red square', '3 oclock', 'b 1.5')
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\w)['\u2019](?=\w)", "", text)
    # A point or comma between digits belongs to the number.
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]|_", " ", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    # Where nothing but articles is left ("A"), they are the answer.
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def is_correct(
    reply: str, answer: str, options: Sequence[str] = (), lettered: bool = False
) -> bool:
    """Whether the reply is the answer, by the rule in the head of this module.

    Args:
        reply: what the model wrote.
        answer: the right answer; one of `options` where there are some.
        options: the texts to choose from, if any.
        lettered: whether they were offered with letters.

    Example:
        >>> is_correct("The answer is Two.", "2"), is_correct("Yes, it does", "yes")
        (True, True)
        >>> is_correct("(b)", "red", ["blue", "red"], lettered=True)
        True
        >>> is_correct("red or blue", "red", ["blue", "red"])
        False
    """
    if options:
        chosen = choose(reply, options, lettered)
        return chosen is not None and normalise(options[chosen]) == normalise(answer)
    said, wanted = (normalise(_without_lead_in(text)) for text in (reply, answer))
    if wanted in ("yes", "no"):
        return said.split(" ")[0] == wanted
    return said == wanted


def choose(reply: str, options: Sequence[str], lettered: bool = False) -> int | None:
    """The option that a reply names, or None when it names none or several.

    Example:
        >>> choose("a dark red square", ["red", "dark red", "blue"])
        1
    """
    text = _without_lead_in(reply)
    letter = _LETTER.match(text) if lettered else None
    if letter is not None:
        index = LETTERS.index((letter[1] or letter[2]).upper())
        if index < len(options):
            return index
    said, texts = normalise(text), [normalise(_without_lead_in(option)) for option in options]
    if said in texts:
        return texts.index(said)
    return _held(said, texts)


def _held(said: str, texts: Sequence[str]) -> int | None:
    """The only option whose words are in the reply, the longest options first."""
    rest, found = f" {said} ", []
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        words = f" {texts[index]} "
        if texts[index] and words in rest:
            found.append(index)
            rest = rest.replace(words, " | ")
    return found[0] if len(found) == 1 else None


def _without_lead_in(text: str) -> str:
    """The text itself where nothing is left behind a lead-in."""
    return _LEAD_IN.sub("", text.strip(), count=1) or text


def offer(question: str, options: Sequence[str]) -> str:
    """The question followed by lettered options, as LLaVA-1.5 was evaluated (arXiv 2310.03744).

    Example:
        >>> print(offer("What colour?", ["red", "blue"]))
        What colour?
        A. red
        B. blue
        Answer with the option's letter from the given choices directly.
    """
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    hint = "Answer with the option's letter from the given choices directly."
    return "\n".join([question, *lines, hint])


def reads_letters(tokenizer: Any) -> bool:
    """Whether a tokenizer knows all words that options are offered with.

    That of a small model may not, and such a model could make nothing of the offer.

    Args:
        tokenizer: of transformers.

    Example:
        >>> from foveate.world.tokenizer import make_tokenizer
        >>> reads_letters(make_tokenizer())
        False
    """
    return tokenizer.unk_token_id not in tokenizer(offer("", ("", ""))).input_ids


def without_letters(options: Sequence[str]) -> list[str]:
    """Options without the letters that some data sets write in front of them.

    Example:
        >>> without_letters(["A. red", "B. blue"]), without_letters(["A. red", "C. blue"])
        (['red', 'blue'], ['A. red', 'C. blue'])
    """
    found = [PREFIX.match(option) for option in options]
    for index, match in enumerate(found):
        if match is None or match[1].upper() != LETTERS[index] or not options[index][match.end() :]:
            return list(options)
    return [option[match.end() :] for option, match in zip(options, found, strict=True) if match]
