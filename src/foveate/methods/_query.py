"""Which objects a question is about, in a language model's own words."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

#: Three steps in one answer; the wording is ours, the steps are QuoTA's.
PROMPT = """Question: {question}
Think in three steps and write one line for each.
Step 1: is it necessary to see physical objects to answer the question? Write yes or no.
Step 2: list the objects that the question is about.
Step 3: keep those that are physical entities, as a Python list of strings; write null if there \
are none.
Answer in the form
Step 1: ...
Step 2: ...
Step 3: ..."""
_MOST = 32


def decouple_query(question: str, generate: Callable[[str], str]) -> tuple[str, ...]:
    """The physical objects that have to be seen to answer a question.

    Args:
        question: in words.
        generate: gives a language model's answer to a text, e.g. `AskingScorer.generate`.

    Returns:
        Objects in lower case, each once; () where none is needed or the answer cannot be read: then
        frames are scored by the question itself.

    Example:
        >>> decouple_query("Who rides?", lambda text: "Step 1: Yes\\nStep 3: ['Bike', 'rider']")
        ('bike', 'rider')

    Source: QuoTA (arXiv 2503.08689), query decoupling.
    """
    return parse_objects(generate(PROMPT.format(question=question)))


def parse_objects(answer: str) -> tuple[str, ...]:
    """The list behind "step 3:" of an answer whose "step 1:" says yes, as literals only.

    Example:
        >>> parse_objects("Step 1: yes. Step 3: ['a cup', 'a cup']"), parse_objects("step 3: [1]")
        (('a cup',), ())
    """
    lowered = answer.lower()
    start = lowered.rfind("step 3:")
    if start < 0 or not re.search(r"step 1:\W*yes\b", lowered):
        return ()
    found = re.search(r"\[[^\[\]]*\]", lowered[start:])
    try:
        entries = ast.literal_eval(found.group()) if found else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ()
    named = [entry.strip() for entry in entries if isinstance(entry, str) and entry.strip()]
    return tuple(dict.fromkeys(named))[:_MOST]
