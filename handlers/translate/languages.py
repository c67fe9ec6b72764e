"""Which translator speaks which language. Pure."""

from __future__ import annotations

from sessions.refusal import Refusal

DEFAULT = "m2m100"
OPUS = "opus-mt"
ENGLISH = "en"
# Fan et al., "Beyond English-Centric Multilingual Machine Translation" (arXiv 2010.11125), table 1.
# fmt: off
M2M100 = frozenset({
    "af", "am", "ar", "ast", "az", "ba", "be", "bg", "bn", "br", "bs", "ca", "ceb", "cs", "cy", "da", "de", "el",
    "en", "es", "et", "fa", "ff", "fi", "fr", "fy", "ga", "gd", "gl", "gu", "ha", "he", "hi", "hr", "ht", "hu",
    "hy", "id", "ig", "ilo", "is", "it", "ja", "jv", "ka", "kk", "km", "kn", "ko", "lb", "lg", "ln", "lo", "lt",
    "lv", "mg", "mk", "ml", "mn", "mr", "ms", "my", "ne", "nl", "no", "ns", "oc", "or", "pa", "pl", "ps", "pt",
    "ro", "ru", "sd", "si", "sk", "sl", "so", "sq", "sr", "ss", "su", "sv", "sw", "ta", "th", "tl", "tn", "tr",
    "uk", "ur", "uz", "vi", "wo", "xh", "yi", "yo", "zh", "zu",
})
# fmt: on


def translator_of(language: str, translator: str) -> str:
    """The model that translates English into a language, by the name that ``fastsd models get`` takes.

    Args:
        language: its code, such as ``de``.
        translator: the setting: ``m2m100``, ``opus-mt`` (one model a language), or a name.
    """
    return f"{OPUS}-{ENGLISH}-{language}" if translator == OPUS else translator


def known_language(language: str, translator: str) -> None:
    """Check that a translator speaks a language, as far as that is known.

    Raises:
        Refusal: it does not.
    """
    if translator == DEFAULT and language not in M2M100:
        advice = "Write codes like de, fr, zh in languages: of fastsd.yaml."
        raise Refusal("language", f"m2m100 does not speak {language!r}.", advice)
