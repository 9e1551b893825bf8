"""Names of entities in texts: the longest match on tokens, by hash. Knows no Ray and no model."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rayemb.curate.sentences import tokens


@dataclass
class NameTable:
    """Entities by number, and the tokens of their names. Several entities may share a name."""

    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # what an encoder reads: the name, and the description if any
    by_name: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    longest: int = 0

    @classmethod
    def of(cls, entries: Iterable[tuple[str, str, str]]) -> "NameTable":
        """The table of (id, name, description). An id may come several times, under its other names."""
        table = cls()
        number: dict[str, int] = {}
        for entity, name, description in entries:
            key = tuple(tokens(name))
            if not key:
                continue
            if entity not in number:
                number[entity] = len(table.ids)
                table.ids.append(entity)
                table.texts.append(f"{name}: {description}" if description else name)
            known = table.by_name.setdefault(key, [])
            if number[entity] not in known:
                known.append(number[entity])
            table.longest = max(table.longest, len(key))
        return table

    def mentions(self, text: str) -> list[int]:
        """The entities that the text names, each once, in the order of their first mention.

        At each token the longest name wins, and the search goes on behind it: "red heart" is not also "heart".
        """
        words = tokens(text)
        found: dict[int, None] = {}
        at = 0
        while at < len(words):
            for length in range(min(self.longest, len(words) - at), 0, -1):
                entities = self.by_name.get(tuple(words[at : at + length]))
                if entities:
                    found.update(dict.fromkeys(entities))
                    at += length
                    break
            else:
                at += 1
        return list(found)


def confidence(cosine: float) -> float:
    """A cosine as a confidence in [0, 1]."""
    return min(1.0, max(0.0, (1 + cosine) / 2))


def accepted(confidence: float, threshold: float) -> bool:
    """Whether a confidence passes: threshold 0 keeps all, 1 keeps none, and between them what is above it."""
    return threshold == 0 or confidence > threshold
