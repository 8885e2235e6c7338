"""A word-level tokenizer for the world's language, in the format of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.world.questions import plural
from foveate.world.vocabulary import (
    COLORS,
    COUNTS,
    DIGITS,
    DIRECTIONS,
    REGIONS,
    SHAPES,
    SIZES,
    TASKS,
    TEXTURES,
    TIMES,
    WORDS,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END, USER, ANSWER, IMAGE, VIDEO = (
    "<pad>",
    "<unk>",
    "<eos>",
    "<user>",
    "<answer>",
    "<image>",
    "<video>",
)
SPECIAL = (PAD, UNKNOWN, END, USER, ANSWER, IMAGE, VIDEO)
_GRAMMAR = """
? , . ! : ; ' a an the is are of on at in there this that it do does and or not with without to
what which where when how who many color shape object objects number word sign way thing things
move moves moving still stay stays come comes first last before after flash flashes appear appears
disappear disappears new gone end start says clip video picture frame describe see shown show
must may never contain contains allowed forbidden safe unsafe rule rules yes no more fewer than
"""
#: Words by number; new ones go to the end, so that weights stay valid.
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *SPECIAL,
            *_GRAMMAR.split(),
            *SHAPES,
            *(plural(shape) for shape in SHAPES),
            *COLORS,
            *TEXTURES,
            *SIZES,
            *DIGITS,
            *WORDS,
            *(region for row in REGIONS for region in row),
            *DIRECTIONS,
            *TIMES,
            *COUNTS,
            *TASKS,
        ]
    )
)
#: One user turn with pictures and a question, then the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<answer> {% else %}<user> {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<{{ part['type'] }}> "
    "{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: one word or punctuation mark a token, lower case; unknown words are `<unk>`.

    Example:
        >>> tokenizer = make_tokenizer()
        >>> tokenizer.tokenize("Where is the red star?")
        ['where', 'is', 'the', 'red', 'star', '?']
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    inner.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?,.!:;']"), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ANSWER, IMAGE, VIDEO],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
