"""Texts to sentences and clauses, in languages with and without spaces. Knows no Ray and no model."""

import re
import unicodedata

# A full stop after one of these ends no sentence ...
_ABBREVIATIONS = (
    "mr mrs ms dr prof sr sra srta jr st ste mme mlle hrn vs etc e.g i.e eg ie cf approx inc ltd dept gen col lt sgt "
    "capt rev hon gov sen jan feb aug sept oct nov dec a.m p.m u.s u.k z.b d.h u.a bzw usw ggf vgl evtl inkl p.ex "
    "av bd env ud uds vd т.е т.д т.п г гг ул им"
)
# ... and after these none if a number follows: "no. 7", but "she said no."
_NUMBERED = "no nr nos p pp fig figs abb vol art sec ch ca pág págs стр рис"
ABBREVIATIONS, NUMBERED = frozenset(_ABBREVIATIONS.split()), frozenset(_NUMBERED.split())
_CLOSERS = "\"'”’»)\\]』」）"
# Ends of sentences: with a space behind them (. ! ? and the Arabic and Indic ones), or without (Chinese, Japanese).
_SPACED = re.compile(rf"[.!?…؟।۔]+[{_CLOSERS}]*(?=\s|$)")
_DENSE = re.compile(rf"[。！？｡]+[{_CLOSERS}]*")
_NEWLINES = re.compile(r"\s*[\r\n]+\s*|\s+[•·▪]\s+")
_CLAUSES = re.compile(r"\s*[;；؛]\s*|\s+[–—]\s+|\s*[,，、،]\s*")
# Letters of scripts that put no space between words: each is a token of its own.
_DENSE_LETTER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_DENSE_LETTER}]|[^\W_{_DENSE_LETTER}]+")


def tokens(text: str) -> list[str]:
    """Words of a text, case and Unicode form made equal; where words are not spaced (Chinese, Thai, ...), letters."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, stripped. Abbreviations, initials and numbers ("3.5", "3. Mai") end none."""
    found = []
    for line in _NEWLINES.split(text):
        start = 0
        ends = sorted([m.end() for m in _SPACED.finditer(line) if _ends(line, m)] + _all_ends(line))
        for end in [*ends, len(line)]:
            if part := line[start:end].strip():
                found.append(part)
            start = end
    return found


def clauses(sentence: str, min_words: int) -> list[str]:
    """The sentence cut at semicolons, dashes and commas, wherever both sides keep `min_words` words or more."""
    parts: list[str] = []
    start = 0
    for match in _CLAUSES.finditer(sentence):
        left, right = sentence[start : match.start()], sentence[match.end() :]
        # "1,5" and "1,000" are numbers.
        number = match.group() == "," and right[:1].isdigit()
        if not number and len(tokens(left)) >= min_words and len(tokens(right)) >= min_words:
            parts.append(left.strip())
            start = match.end()
    return [*parts, sentence[start:].strip()]


def sub_captions(text: str, *, limit: int, min_words: int, by_clause: bool, max_overlap: float) -> list[str]:
    """At most `limit` sentences (or clauses) of `text`, in order, none with fewer than `min_words` words.

    One that shares more than `max_overlap` of its words with an earlier one (Jaccard, of the sets) is left out.
    """
    kept: list[str] = []
    seen: list[set[str]] = []
    for sentence in sentences(text):
        for part in clauses(sentence, min_words) if by_clause else [sentence]:
            words = tokens(part)
            own = set(words)
            if len(words) < min_words or any(len(own & other) > max_overlap * len(own | other) for other in seen):
                continue
            kept.append(part)
            seen.append(own)
            if len(kept) == limit:
                return kept
    return kept


def _all_ends(line: str) -> list[int]:
    return [match.end() for match in _DENSE.finditer(line)]


def _ends(line: str, match: re.Match[str]) -> bool:
    """Whether what looks like the end of a sentence is one."""
    if not match.group().startswith(".") or match.group().startswith(".."):
        return True
    following = line[match.end() :].lstrip()
    if not following:
        return True
    if following[0].islower():  # a new sentence has a capital, where its script has any
        return False
    word = (line[: match.start()].split() or [""])[-1].lstrip("(\"'“‘«[¿¡").casefold()
    if word in ABBREVIATIONS or (word in NUMBERED and following[0].isdigit()):
        return False
    # Initials; and an ordinal of German, Danish, ... or the number of a list: "J. S. Bach", "am 3. Mai", "1. A cat".
    return not re.fullmatch(r"([^\W\d]\.)*[^\W\d]|\d{1,2}", word)
