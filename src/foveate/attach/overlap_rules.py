"""Which recipes can act on a video that is read chunk by chunk, and which give the same as before.

The whole question stands behind the video, so while a chunk is read nobody knows it.
"""

from __future__ import annotations

from foveate.core import Method, Recipe, Stage
from foveate.core.method import overrides
from foveate.errors import AttachmentError

#: Projector stages that treat every frame for itself, whatever is around it.
PER_FRAME = frozenset({"pool"})


def chunk_recipe(recipe: Recipe | None) -> tuple[Recipe | None, list[str]]:
    """The steps that act while chunks are read, and what is not as in one go, in words.

    The frames stage has acted before. No words mean that reading in chunks changes nothing but
    rounding, or is how the system was published.

    Raises:
        AttachmentError: a step needs the whole prompt at once.
    """
    if recipe is None:
        return None, []
    notes: list[str] = []
    for step in recipe:
        acting: set[Stage] = set(step.stages) - {"frames"}
        if reason := _refused(step.method, acting):
            raise AttachmentError(
                f"{step.method.name} cannot act on a video that is read chunk by chunk: {reason}. "
                "Read it in one go (overlap=False), or take a method of the patches, encoder or "
                'cache stage, such as "quickvideo".'
            )
        name = step.method.name
        if "patches" in acting:
            notes.append(f"{name} started anew with every chunk, whose first frame was whole")
        if "encoder" in acting and overrides(step.method, "encoder_joins"):
            notes.append(f"{name} joined the frames of every chunk as a video of its own")
        if "projector" in acting and name not in PER_FRAME:
            notes.append(f"{name} shortened every chunk as a video of its own")
    steps = tuple(step for step in recipe if set(step.stages) - {"frames"})
    return (Recipe(steps, recipe.positions) if steps else None), notes


def _refused(method: Method, acting: set[Stage]) -> str:
    needs = [n for need in method.needs for n in ((need,) if isinstance(need, str) else need)]
    text = [name for name in needs if name.startswith(("text.", "paired."))]
    if "decoder" in acting:
        return "in the decoder layers it goes by the end of the prompt, which is read last"
    if "projector" in acting and text:
        return f"it reads {text[0]}, and the question stands behind the video"
    if "cache" in acting and overrides(method, "prefill"):
        return "it reads the prompt in blocks of its own"
    if "cache" in acting and (method.one_cache_choice or overrides(method, "attention_layers")):
        return "it chooses by the attention of the question, which stands behind the video"
    return ""
