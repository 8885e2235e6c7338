"""Answers, captions and policies hold in the pixels; words are those of the tokenizer."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from world_solver import Thing, solve, things

from foveate.world import (
    POLICIES,
    TASKS,
    Policy,
    Question,
    Sample,
    World,
    policies_of,
    questions_of,
    sample_scene,
)
from foveate.world.tokenizer import SPECIAL, VOCABULARY, make_tokenizer
from foveate.world.vocabulary import COLORS, SHAPES, TIMES

CLIPS = 160


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    world = World(3, "val", size=56, per_task=None)
    return list(itertools.islice(world, CLIPS))


def answers(question: Question, found: list[Thing]) -> bool:
    """Whether the masks give a single answer, and that of the question."""
    try:
        return solve(question, found) == question.answer
    except ValueError:  # not exactly one thing fits
        return False


# -- questions ------------------------------------------------------------------------------------


def test_masks_alone_give_the_same_answers(samples: list[Sample]) -> None:
    agreed: Counter[str] = Counter()
    missed = []
    for sample in samples:
        found = things(sample)
        for question in sample.questions:
            if answers(question, found):
                agreed[question.task] += 1
                continue
            # A handful of clips in ten thousand hide a whole thing just when it is asked about.
            hidden_TK = sample.truth.present_TK & (sample.truth.areas_TK == 0)
            assert hidden_TK.any(), (sample.name, question)
            missed.append(question)
    assert agreed.keys() == TASKS.keys() and min(agreed.values()) >= 30, agreed
    assert len(missed) <= agreed.total() / 1000, missed


def test_masks_alone_give_the_same_answers_in_wide_frames_with_more_time() -> None:
    world = World(4, "val", size=(48, 84), frames=24, per_task=None)
    for sample in itertools.islice(world, 30):
        found = things(sample)
        for question in sample.questions:
            assert answers(question, found), (sample.name, question)


def test_questions_are_closed_and_name_their_sprites(samples: list[Sample]) -> None:
    for sample in samples:
        sprites = sample.scene.sprites
        for question in sample.questions:
            assert question.answer in question.options
            assert len(set(question.options)) == len(question.options) >= 2
            assert question.chance == 1 / len(question.options)
            assert question.about and all(sprites[one - 1].id == one for one in question.about)
            assert question.text == question.text.lower() and question.text.endswith("?")


def test_names_in_questions_are_unique_in_the_clip(samples: list[Sample]) -> None:
    for sample in samples:
        looks = {(one.shape, one.color) for one in sample.scene.sprites if one.kind == "shape"}
        assert (
            len({shape for shape, _ in looks}) == len({color for _, color in looks}) == len(looks)
        )


def test_per_task_limits_the_questions() -> None:
    scenes = [sample_scene(f"limit/{index}", 16) for index in range(40)]
    for scene in scenes:
        everything = Counter(one.task for one in questions_of(scene))
        for limit in (1, 2):
            limited = Counter(one.task for one in questions_of(scene, per_task=limit))
            assert limited == {task: min(n, limit) for task, n in everything.items()}


# -- captions -------------------------------------------------------------------------------------


def test_captions_tell_what_happens(samples: list[Sample]) -> None:
    for sample in samples:
        caption = sample.caption
        sentences = caption.removesuffix(" .").split(" . ")
        shapes = {one.shape for one in sample.scene.sprites if one.kind == "shape"}
        signs = [one.text for one in sample.scene.sprites if one.kind == "sign"]
        assert len(sentences) == len(shapes) + len(signs)
        for text in signs:
            assert sentences[-1] == f"a sign says {text}"
        for question in sample.questions:
            # The answer to whatever the clip asks stands in the sentence about the same thing.
            first = sample.scene.sprites[question.about[0] - 1]
            if question.task == "direction":
                assert f"{first.color} {first.shape} moves {question.answer}" in caption
            elif question.task == "where":
                assert f"{first.color} {first.shape} stays at the {question.answer}" in caption
            elif question.task == "count":
                assert re.search(rf"\b{question.answer} small {first.color} {first.shape}", caption)
            elif question.task == "needle":
                assert f"{first.color} {first.shape} flashes" in caption


def test_captions_tell_clips_apart() -> None:
    captions = {sample.caption for sample in itertools.islice(World(size=16), 300)}
    assert len(captions) > 290


# -- policies -------------------------------------------------------------------------------------


def breaks(policy: Policy, sample: Sample) -> bool:
    """Whether a clip breaks a rule, from the rule's words and the drawn masks alone."""
    found = things(sample)
    shapes = [one for one in found if one.kind == "shape" and one.seen]
    words = re.findall(r"[\w-]+", policy.text)
    named = [one for one in shapes if {one.shape, one.color} & set(words)]
    frames = len(sample.masks_THW)

    def middle_third(index: int) -> str:
        thing = named[index]
        return TIMES[int((thing.seen[0] + thing.seen[-1] + 1) / 2 / frames * 3)]

    def place() -> tuple[float, float]:
        x, y = named[0].middle(int(named[0].area_T.argmax()))
        return x, y

    if policy.name in ("color", "shape"):
        return bool(named)
    if policy.name == "required":
        return not named
    if policy.name == "pair":
        return any({one.shape, one.color} <= set(words) for one in shapes)
    if policy.name == "sign":
        return any(one.text == words[2] for one in found if one.kind == "sign" and one.seen)
    if policy.name == "count":
        return sum(f"{one.shape}s" in words or f"{one.shape}es" in words for one in shapes) > int(
            words[3]
        )
    if policy.name == "place":
        x, y = place()
        names = ("top", "", "bottom")[int(y * 3)], ("left", "", "right")[int(x * 3)]
        return ("-".join(filter(None, names)) or "center") == words[-1]
    if policy.name == "motion":
        swept = named[0].mask_THW.any(0).nonzero()
        moves = max(float(axis.max() - axis.min()) for axis in swept) / 56 > 0.33
        return moves == (words[-1] == "move")
    if policy.name == "time":
        return middle_third(0) == words[-1]
    if policy.name == "order":
        first, second = (next(o for o in shapes if o.shape == words[i]) for i in (1, -1))
        return first.seen[0] < second.seen[0]
    assert policy.name == "flash"
    return any(len(one.seen) <= 2 for one in shapes)


def test_masks_alone_give_the_same_verdicts(samples: list[Sample]) -> None:
    agreed: Counter[tuple[str, bool]] = Counter()
    for sample in samples:
        for policy in sample.policies:
            assert breaks(policy, sample) == policy.violated, (sample.name, policy)
            agreed[policy.name, policy.violated] += 1
    expected = set(itertools.product(POLICIES, (False, True)))
    assert agreed.keys() == expected and min(agreed.values()) >= 8, agreed


def test_evidence_is_where_the_violation_shows(samples: list[Sample]) -> None:
    for sample in samples:
        for policy in sample.policies:
            assert policy.verdict == ("unsafe" if policy.violated else "safe")
            if policy.frames is None:
                assert not policy.violated or policy.name == "required"
                continue
            assert policy.violated and policy.about
            first, last = policy.frames
            areas = sample.truth.areas_TK[:, [one - 1 for one in policy.about]].sum(1)
            outside = [frame for frame in range(16) if not first <= frame <= last]
            assert areas[first : last + 1].any() and not areas[outside].any()


def test_policies_are_balanced_and_their_words_say_nothing() -> None:
    verdicts: dict[str, Counter[bool]] = {name: Counter() for name in POLICIES}
    texts: dict[str, Counter[bool]] = {}
    for index in range(4000):
        for policy in policies_of(sample_scene(f"balance/{index}", 16)):
            verdicts[policy.name][policy.violated] += 1
            texts.setdefault(policy.text, Counter())[policy.violated] += 1
    for name, counts in verdicts.items():
        total = counts.total()
        assert total > 800 and abs(counts[True] / total - 0.5) < 2.5 / total**0.5, (name, counts)
    # Squared deviations of the texts from a fair coin, in units of what chance gives.
    common = [counts for counts in texts.values() if counts.total() >= 20]
    deviations = [(2 * one[True] - one.total()) ** 2 / one.total() for one in common]
    assert len(common) > 100
    assert abs(sum(deviations) / len(common) - 1) < 5 * (2 / len(common)) ** 0.5


def test_short_clips_ask_no_policy_about_flashes_that_visits_could_be() -> None:
    names = {
        policy.name
        for index in range(200)
        for scene in [sample_scene(f"short/{index}", 6)]
        if scene.having("visit")
        for policy in policies_of(scene)
    }
    assert "flash" not in names and "order" in names


def test_policies_can_be_chosen() -> None:
    scene = sample_scene("chosen", 16)
    assert policies_of(scene) == policies_of(scene)
    assert [one.name for one in policies_of(scene, names=("pair", "color"))] == ["pair", "color"]
    assert policies_of(scene, names=("color",))[0] in policies_of(scene)
    some = policies_of(scene, number=2)
    assert len(some) == 2 and set(some) <= set(policies_of(scene))
    with pytest.raises(ValueError, match="unknown policy 'taste'; choose from color, shape"):
        policies_of(scene, names=("taste",))
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        policies_of(scene, number=0)


# -- words ----------------------------------------------------------------------------------------


def test_every_text_of_the_world_is_in_the_vocabulary() -> None:
    tokenizer = make_tokenizer()
    unknown = tokenizer.unk_token_id
    texts: set[str] = set()
    for sample in itertools.islice(World(size=16, per_task=None), 300):
        texts |= {sample.caption, *(policy.text for policy in sample.policies)}
        texts |= {policy.verdict for policy in sample.policies}
        for question in sample.questions:
            texts |= {question.text, *question.options}
    for text in sorted(texts):
        assert unknown not in tokenizer(text)["input_ids"], text


def test_answers_are_single_tokens() -> None:
    tokenizer = make_tokenizer()
    answers = {*SHAPES, *COLORS, *TIMES, "top-left", "moving", "still", "7", "owl", "safe"}
    assert all(len(tokenizer.tokenize(answer)) == 1 for answer in answers)


def test_the_vocabulary_is_frozen() -> None:
    """Weights know words by number: new words go to the end, none moves."""
    assert VOCABULARY[:7] == SPECIAL and len(set(VOCABULARY)) == len(VOCABULARY) == 171
    some = {"?": 7, "circle": 99, "red": 115, "cat": 139, "needle": 169}
    assert {word: VOCABULARY.index(word) for word in some} == some


def test_chats_become_the_prompts_that_models_are_trained_on() -> None:
    tokenizer = make_tokenizer()
    content = [{"type": "video"}, {"type": "text", "text": "Where is the red star?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<user> <video> Where is the red star? <answer>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "<user> <video> where is the red star ? <answer>"
    answered = [
        {"role": "user", "content": "what flashes?"},
        {"role": "assistant", "content": "ring"},
    ]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    assert text == "<user> what flashes? <answer> ring <eos> "
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id]) == ["<eos>"]
    assert tokenizer.tokenize("where is zanzibar?")[-2:] == ["<unk>", "?"]
