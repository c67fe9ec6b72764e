"""The words that a picture is taught with. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

# Short, and next to meaningless to CLIP: a name that none of its training texts used.
_RARE = (
    "zwx",
    "ohwx",
    "qxv",
    "vzq",
    "xjz",
    "jqx",
    "zxk",
    "wqz",
    "kxv",
    "qzj",
    "vxw",
    "xqk",
    "zvj",
    "jzw",
    "wxj",
    "kqz",
)
# How a subject is asked for, as trained and somewhere else; {} is token and noun.
TEMPLATES = ("a photo of {}", "a painting of {}")
# The world of the miniatures knows no photos and no paintings.
WORLD_TEMPLATES = ("a {}", "a {} on a blue background")
# What cameras, phones and messengers call every picture.
_NO_NAMES = re.compile(
    r"^(img|image|dsc[nf]?|dcim|pxl|mvimg|photo|picture|pic|foto|bild|screenshot|scan|file|unnamed|download|crop|"
    r"whatsapp image.*|signal.*|fb|received|original|p|n|)$",
    re.IGNORECASE,
)


def spoken_stem(source: str) -> str:
    """A picture's name as words: its stem without digits and ``()-``, ``_`` as spaces (the ancestor's rule)."""
    stem = re.sub(r"[0-9()\-]", "", PurePosixPath(source).stem.replace("_", " "))
    return " ".join(stem.split())


def instance_token(sources: Sequence[str], session: str) -> str:
    """The token of a session: what its pictures' names have in common, else a rare one of its own.

    Args:
        sources: the pictures' paths.
        session: the identity of the session, any text; the same one gets the same token.
    """
    stems = {spoken_stem(source).casefold() for source in sources}
    common = stems.pop() if len(stems) == 1 else ""
    if common and not _NO_NAMES.match(common):
        return common
    return _RARE[sum(session.encode()) % len(_RARE)]


def head_noun(phrase: str) -> str:
    """The noun of a grounded phrase: "a small black dog with a ball" is a dog. English; empty where there is none."""
    before = re.split(r"\b(?:with|of|in|on|at|by|from|for|and|that|which|who|wearing|holding)\b|,", phrase.casefold())[
        0
    ]
    words = re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", before)
    return "" if not words or words[-1] in ("a", "an", "the", "it", "this", "that") else words[-1]


def subject_of(instance: str, noun: str, source: str) -> str:
    """Token and noun of one picture: "zwx dog"; for ``filename`` the picture's own name counts as token."""
    token = spoken_stem(source) or "picture" if instance == "filename" else instance
    return f"{token} {noun}".strip()


def training_prompt(
    instance: str, noun: str, concept: str, source: str, caption: str | None, *, templates: Sequence[str] = TEMPLATES
) -> str:
    """What a picture is trained with.

    Args:
        instance: the token, or ``filename``.
        noun: the class; may be empty.
        concept: object, face or style.
        source: the picture's path.
        caption: its caption where it shall be used.
        templates: the base's; the first is what it is trained with.
    """
    subject = subject_of(instance, noun, source)
    text = " ".join((caption or "").split())
    if text and re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text, re.IGNORECASE):
        return text  # it names the subject already: once is enough
    if concept == "style":
        return f"{text}, in the style of {subject}" if text else f"a picture in the style of {subject}"
    return f"{subject}, {text}" if text else templates[0].format(subject)


def class_prompt(noun: str, concept: str) -> str:
    """What a class picture is drawn and trained with: the prompt without the token."""
    if concept == "style" or not noun:
        return "a picture"
    return f"a photo of {with_article(noun)}"


def with_article(noun: str) -> str:
    """Such as: an owl."""
    return f"{'an' if noun[0].casefold() in 'aeiou' else 'a'} {noun}"


def sample_prompts(
    instance: str, noun: str, concept: str, sources: Sequence[str], *, templates: Sequence[str] = TEMPLATES
) -> tuple[str, ...]:
    """What samples show when train.yaml says nothing: the subject as trained, and somewhere else."""
    subjects = [subject_of(instance, noun, source) for source in sources] if instance == "filename" else []
    distinct = list(dict.fromkeys(subjects)) or [subject_of(instance, noun, "")]
    if concept == "style":
        return (f"a house in the style of {distinct[0]}", f"a portrait in the style of {distinct[0]}")
    if len(distinct) > 1:
        return tuple(templates[0].format(subject) for subject in distinct[:4])
    return tuple(template.format(distinct[0]) for template in templates)
