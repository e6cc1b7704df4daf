r"""Patterns of names, ``re:`` in a checkpoint's tables and in ``--ignore``, matched in linear time. Pure Python.

Checkpoints come from strangers, and Python's ``re`` takes exponential time for patterns such as ``(a*)*b``. What is
read here is the part of its syntax that names need, with the same meaning: literals, ``.``, classes ``[a-z]``, escapes
such as ``\d \w \s \.``, groups, ``|``, the quantifiers ``* + ? {m,n}`` (lazy ones too), and ``^ $ \A \Z \b \B``.
All states that a pattern can be in go through the name together (Thompson's construction), so that a name of length L
takes at most L times the pattern's states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

LONGEST_PATTERN = 1000
"""Characters of a pattern."""
MOST_STATES = 2000
"""Of a pattern, repetitions counted as often as they are repeated."""
MOST_DEPTH = 30
"""Groups within each other."""
_KNOWN_MOVES = 5000
"""Of a pattern that are remembered, at most."""

_START, _END, _LAST_LINE, _WORD_BEFORE, _WORD_AFTER = 1, 2, 4, 8, 16
"""What an assertion can see of a place in a name."""


class PatternError(ValueError):
    """A pattern is none, uses what is not read here, or is too large; the message says which and what to do."""


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": _is_word,
    "s": str.isspace,
    "D": lambda character: not character.isdecimal(),
    "W": lambda character: not _is_word(character),
    "S": lambda character: not character.isspace(),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_ASSERTIONS: dict[str, Callable[[int], bool]] = {
    "^": lambda seen: bool(seen & _START),
    r"\A": lambda seen: bool(seen & _START),
    "$": lambda seen: bool(seen & (_END | _LAST_LINE)),
    r"\Z": lambda seen: bool(seen & _END),
    r"\b": lambda seen: bool(seen & _WORD_BEFORE) != bool(seen & _WORD_AFTER),
    r"\B": lambda seen: bool(seen & _WORD_BEFORE) == bool(seen & _WORD_AFTER),
}


class _Part(NamedTuple):
    """A piece of a pattern, and how many states it becomes.

    ``one`` takes a character that ``test`` holds for; ``assert`` takes none where ``test`` holds for the place;
    ``all`` and ``any`` are sequences and alternatives; ``repeat`` is its only part, ``least`` to ``most`` times (None
    for any number).
    """

    kind: Literal["one", "assert", "all", "any", "repeat"]
    size: int
    test: Callable[..., bool] | None = None
    parts: tuple[_Part, ...] = ()
    least: int = 0
    most: int | None = None


class Pattern:
    """A pattern of names.

    Args:
        text: the pattern, without ``re:``.

    Raises:
        PatternError: it is none, uses what is not read here, or is too large.
    """

    def __init__(self, text: str) -> None:
        self._tests: list[Callable[..., bool] | None] = []
        self._is_assertion: list[bool] = []
        self._next: list[tuple[int, ...]] = []
        parser = _Parser(text)
        part = parser.parse()
        self._asserts = parser.asserts
        self._last = self._add(None, ())
        self._first = frozenset((self._build(part, self._last),))
        self._moves: dict[tuple[frozenset[int], int, str], frozenset[int]] = {}

    def fullmatch(self, name: str) -> bool:
        """Return whether the pattern holds for the whole of a name."""
        states = self._first
        for place, character in enumerate(name):
            seen = self._look(name, place) if self._asserts else 0
            key = (states, seen, character)
            found = self._moves.get(key)
            if found is None:
                if len(self._moves) >= _KNOWN_MOVES:
                    self._moves.clear()
                found = self._moves[key] = self._move(states, seen, character)
            states = found
            if not states:
                return False
        return self._last in self._reach(states, self._look(name, len(name)))

    def _move(self, states: Iterable[int], seen: int, character: str) -> frozenset[int]:
        """Return the states after a character."""
        after: set[int] = set()
        for state in self._reach(states, seen):
            test = self._tests[state]
            if test is not None and not self._is_assertion[state] and test(character):
                after.update(self._next[state])
        return frozenset(after)

    def _reach(self, states: Iterable[int], seen: int) -> set[int]:
        """Return these states and all that they lead to without a character, at a place where this is ``seen``."""
        found, todo = set(states), list(states)
        while todo:
            state = todo.pop()
            test = self._tests[state]
            if test is None or (self._is_assertion[state] and test(seen)):
                new = [follower for follower in self._next[state] if follower not in found]
                found.update(new)
                todo.extend(new)
        return found

    @staticmethod
    def _look(name: str, place: int) -> int:
        """Return what assertions can see before the character at ``place``."""
        end = len(name)
        seen = (_START if place == 0 else 0) | (_END if place == end else 0)
        seen |= _LAST_LINE if place == end - 1 and name[place] == "\n" else 0
        seen |= _WORD_BEFORE if place > 0 and _is_word(name[place - 1]) else 0
        return seen | (_WORD_AFTER if place < end and _is_word(name[place]) else 0)

    def _add(self, test: Callable[..., bool] | None, followers: tuple[int, ...], assertion: bool = False) -> int:
        self._tests.append(test)
        self._is_assertion.append(assertion)
        self._next.append(followers)
        return len(self._tests) - 1

    def _build(self, part: _Part, after: int) -> int:
        """Add the states of a part that leads to the state ``after``; return the first of them."""
        if part.kind in ("one", "assert"):
            return self._add(part.test, (after,), part.kind == "assert")
        if part.kind == "all":
            for piece in reversed(part.parts):
                after = self._build(piece, after)
            return after
        if part.kind == "any":
            return self._add(None, tuple(self._build(piece, after) for piece in part.parts))
        (piece,) = part.parts
        if part.most is None:
            loop = self._add(None, ())
            self._next[loop] = (self._build(piece, loop), after)
            after = loop
        else:
            end = after
            for _ in range(part.most - part.least):
                after = self._add(None, (self._build(piece, after), end))
        for _ in range(part.least):
            after = self._build(piece, after)
        return after


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_PATTERN:
            raise PatternError(f"it has {len(text)} characters, more than {LONGEST_PATTERN}; write several patterns")
        self.text, self.place, self.depth, self.asserts = text, 0, 0, False

    def parse(self) -> _Part:
        """Return the whole pattern."""
        part = self._alternatives()
        if self.place < len(self.text):
            raise PatternError(f"unbalanced parenthesis at position {self.place}")
        return part

    def _peek(self) -> str:
        return self.text[self.place : self.place + 1]

    def _take(self, what: str) -> bool:
        """Step over ``what`` if it comes next; return whether it did."""
        if self.text.startswith(what, self.place):
            self.place += len(what)
            return True
        return False

    def _alternatives(self) -> _Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _sized("any", parts, 1)

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while (following := self._peek()) and following not in "|)":
            part = self._atom()
            parts.append(self._repeated(part))
        return _sized("all", parts)

    def _atom(self) -> _Part:
        start = self.place
        character = self.text[self.place]
        self.place += 1
        if character in "*+?" or (character == "{" and self._bounds(start) is not None):
            raise PatternError(f"nothing to repeat at position {start}")
        if character == "(":
            return self._group(start)
        if character == "[":
            return _one(self._class(start))
        if character == "\\":
            return self._escape(start)
        if character in "^$":
            return self._assertion(character)
        return _one(_not_newline if character == "." else character.__eq__)

    def _assertion(self, name: str) -> _Part:
        self.asserts = True
        return _Part("assert", 1, _ASSERTIONS[name])

    def _group(self, start: int) -> _Part:
        if self._take("?"):
            named = self._take("P<")
            if named:
                name, mark, _ = self.text[self.place :].partition(">")
                if not mark or not name.isidentifier():
                    raise PatternError(f"bad name of a group at position {start}")
                self.place += len(name) + 1
            elif not self._take(":"):
                what = {"=": "lookahead", "!": "lookahead", "<": "lookbehind", ">": "an atomic group"}
                what |= {"P": "a backreference", "#": "a comment", "(": "a condition"}
                raise _unread(what.get(self._peek(), "flags"), start)
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise PatternError(f"more than {MOST_DEPTH} groups within each other; write several patterns")
        part = self._alternatives()
        self.depth -= 1
        if not self._take(")"):
            raise PatternError(f"missing ), unterminated group at position {start}")
        return part

    def _escape(self, start: int) -> _Part:
        letter = self._peek()
        if letter in ("A", "Z", "b", "B") and letter:
            self.place += 1
            return self._assertion("\\" + letter)
        found = self._escaped(start)
        return _one(found.__eq__ if isinstance(found, str) else found)

    def _escaped(self, start: int) -> str | Callable[[str], bool]:
        """Return the character, or the test of a class, that stands after a backslash."""
        letter = self._peek()
        self.place += 1
        if not letter:
            raise PatternError("bad escape (end of pattern)")
        if letter in _CLASSES:
            return _CLASSES[letter]
        if letter in _CONTROLS:
            return _CONTROLS[letter]
        digits = {"x": 2, "u": 4}.get(letter)
        if digits is not None:
            code = self.text[self.place : self.place + digits]
            if len(code) < digits or not all(digit in "0123456789abcdefABCDEF" for digit in code):
                raise PatternError(f"incomplete escape \\{letter}{code} at position {start}")
            self.place += digits
            return chr(int(code, 16))
        if letter in "0123456789":
            raise _unread("a backreference or an octal number", start)
        if letter.isascii() and letter.isalpha():
            raise PatternError(f"bad escape \\{letter} at position {start}")
        return letter

    def _class(self, start: int) -> Callable[[str], bool]:
        """Return the test of a class; its bracket was read."""
        negated = self._take("^")
        singles: set[str] = set()
        ranges: list[tuple[str, str]] = []
        tests: list[Callable[[str], bool]] = []
        first = True
        while first or not self._take("]"):
            first = False
            low = self._member(start)
            if self._peek() == "-" and self.text[self.place + 1 : self.place + 2] not in ("]", ""):
                self.place += 1
                high = self._member(start)
                if not isinstance(low, str) or not isinstance(high, str) or low > high:
                    raise PatternError(f"bad character range in the class at position {start}")
                ranges.append((low, high))
            elif isinstance(low, str):
                singles.add(low)
            else:
                tests.append(low)

        def holds(character: str) -> bool:
            inside = character in singles or any(low <= character <= high for low, high in ranges)
            return (inside or any(test(character) for test in tests)) != negated

        return holds

    def _member(self, start: int) -> str | Callable[[str], bool]:
        character = self._peek()
        if not character:
            raise PatternError(f"unterminated character set at position {start}")
        place = self.place
        self.place += 1
        if character != "\\":
            return character
        if self._take("b"):
            return "\b"
        return self._escaped(place)

    def _repeated(self, part: _Part) -> _Part:
        """Return a part with the quantifier that follows it, if one does."""
        start = self.place
        bounds = self._quantifier()
        if bounds is None:
            return part
        if part.kind == "assert":
            raise PatternError(f"nothing to repeat at position {start}")
        if self._take("+"):
            raise _unread("a possessive quantifier", start)
        self._take("?")  # lazy: which way is tried first does not change what matches
        again = self.place
        if self._quantifier() is not None:
            raise PatternError(f"multiple repeat at position {again}")
        least, most = bounds
        times = least + 1 if most is None else most
        size = _checked(times * (part.size + 1) + 1)
        return _Part("repeat", size, None, (part,), least, most)

    def _quantifier(self) -> tuple[int, int | None] | None:
        """Step over a quantifier; return its bounds, or None where there is none."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        return self._bounds(self.place)

    def _bounds(self, start: int) -> tuple[int, int | None] | None:
        """Step over ``{m,n}`` at ``start``; return both, or None where that is plain text."""
        text, end, _ = self.text[start : start + 20].partition("}")
        least, comma, most = text[1:].partition(",")
        plain = all(number == "" or (number.isascii() and number.isdigit()) for number in (least, most))
        if not text.startswith("{") or not end or not plain or not (least or comma):
            return None
        bounds = int(least or 0), int(most) if most else None if comma else int(least)
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise PatternError(f"min repeat greater than max repeat at position {start}")
        self.place = start + len(text) + 1
        return bounds


def _not_newline(character: str) -> bool:
    return character != "\n"


def _one(test: Callable[[str], bool]) -> _Part:
    return _Part("one", 1, test)


def _sized(kind: Literal["all", "any"], parts: list[_Part], own: int = 0) -> _Part:
    return _Part(kind, _checked(own + sum(part.size for part in parts)), None, tuple(parts))


def _checked(size: int) -> int:
    if size > MOST_STATES:
        raise PatternError(f"with its repetitions it is larger than {MOST_STATES}; repeat less, or use * or +")
    return size


def _unread(what: str, place: int) -> PatternError:
    return PatternError(
        f"{what} at position {place}, which patterns of names may not have; write it with literals, classes, groups, | "
        f"and the quantifiers * + ? {{m,n}}, or name the layers one by one"
    )
