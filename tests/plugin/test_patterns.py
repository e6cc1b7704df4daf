"""Patterns of names mean what Python's ``re`` means by them, in linear time."""

from __future__ import annotations

import pickle
import random
import re
import time
import warnings

import pytest

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.names import MOST_PATTERNS, Keys
from vllm_milo.patterns import Pattern, PatternError

ASSERTIONS = ("^", "$", r"\b", r"\B", r"\A", r"\Z")
ATOMS = (
    *("a", "b", "c", r"\.", "1", "_", "-", ".", "{", "{a}", r"\n", r"\x61"),
    *(r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[ab]", "[^a]", "[a-c1]", r"[\d.]", "[]a]", "[^]b-]", r"[\w-]"),
)
QUANTIFIERS = ("*", "+", "?", "{2}", "{1,2}", "{0,}", "{,2}", "*?", "+?", "??", "{1,3}?")


def random_pattern(rng: random.Random, depth: int = 0) -> str:
    """Return alternatives of sequences of atoms, groups and assertions."""
    return "|".join(random_sequence(rng, depth) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def random_sequence(rng: random.Random, depth: int) -> str:
    text = ""
    for _ in range(rng.randrange(4)):
        kind = rng.random()
        if kind < 0.08:
            text += rng.choice(ASSERTIONS)
            continue
        group = rng.choice(("({})", "(?:{})"))
        text += group.format(random_pattern(rng, depth + 1)) if kind < 0.3 and depth < 3 else rng.choice(ATOMS)
        text += rng.choice(QUANTIFIERS) if rng.random() < 0.4 else ""
    return text


def test_random_patterns_match_what_re_matches():
    rng = random.Random(1)
    matched = 0
    for _ in range(3000):
        pattern = random_pattern(rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = re.compile(pattern)
        found = Pattern(pattern)
        for _ in range(6):
            name = "".join(rng.choice("aabbc1._-\n") for _ in range(rng.randrange(7)))
            if not name and r"\B" in pattern:
                continue  # before Python 3.14 it does not hold in an empty text
            matched += found.fullmatch(name)
            assert found.fullmatch(name) is bool(expected.fullmatch(name)), (pattern, name)
    assert matched > 1000


def test_random_text_is_refused_where_re_refuses_it():
    """Whatever is read here is a pattern of Python's, too."""
    rng = random.Random(2)
    refused = 0
    for _ in range(5000):
        pattern = "".join(rng.choice("ab(()[]\\{},12^$|*+?:.d-") for _ in range(rng.randrange(9)))
        try:
            Pattern(pattern)
        except PatternError:
            refused += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    assert 1000 < refused < 4500


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        (r".*\.gate$", "model.layers.0.mlp.gate", True),
        (r".*\.gate$", "model.layers.0.mlp.gate_proj", False),
        ("gate", "mlp.gate", False),
        (r".*\.layers\.\d+\.self_attn\..*", "model.layers.12.self_attn.q_proj", True),
        (rf".*\.{re.escape('mlp.experts-x y')}", "model.mlp.experts-x y", True),
        (r"(?P<layer>model)\.[a-z_]+", "model.lm_head", True),
        (r"\w+", "größe", True),
        (r"\d", "٣", True),
    ],
)
def test_patterns_of_names(pattern: str, name: str, matches: bool):
    assert Pattern(pattern).fullmatch(name) is matches
    assert pickle.loads(pickle.dumps(Keys([f"re:{pattern}"]))).find(name) == (f"re:{pattern}" if matches else None)


@pytest.mark.parametrize(
    "pattern",
    ["(a*)*b", "(a+)+b", "((a*)*)*b", "(a|aa)+b", "(a|a?)+b", "(.*)*(.*)*(.*)*x", "(a?){200}a{200}b", "(.+)+[A-Z]$"],
)
def test_patterns_that_take_re_for_ever(pattern: str):
    start = time.monotonic()
    assert not Pattern(pattern).fullmatch("a" * 5000)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "a backreference or an octal number at position 3, which patterns of names may not have; write it"),
        ("(?P<x>a)(?P=x)", "a backreference at position 8"),
        ("a(?=b)", "lookahead at position 1"),
        ("(?!a)b", "lookahead"),
        ("(?<=a)b", "lookbehind"),
        ("(?i)a", "flags"),
        ("(?>a)", "an atomic group"),
        ("a++", "a possessive quantifier"),
        ("(?#x)", "a comment"),
        ("(", r"missing \), unterminated group"),
        ("a)", "unbalanced parenthesis"),
        ("[a", "unterminated character set"),
        ("[b-a]", "bad character range"),
        ("*", "nothing to repeat"),
        ("^*", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("a{3,1}", "min repeat greater than max repeat"),
        ("\\", "bad escape"),
        (r"\q", r"bad escape \\q"),
        (r"\x6", "incomplete escape"),
        ("a" * 1001, "it has 1001 characters, more than 1000; write several"),
        ("a{99999999}", "is larger than 2000; repeat less"),
        ("(((a{100}){100}){100}){100}", "is larger than 2000"),
        ("(" * 100 + ")" * 100, "more than 30 groups within each other"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str):
    with pytest.raises(PatternError, match=message):
        Pattern(pattern)
    with pytest.raises(CheckpointError, match=rf"is not a regular expression of names: .*{message}"):
        MiLoFormat(ignore=(f"re:{pattern}",))


def test_tables_with_many_patterns_are_refused():
    with pytest.raises(CheckpointError, match=f"{MOST_PATTERNS + 1} patterns, more than {MOST_PATTERNS}"):
        MiLoFormat(ignore=tuple(f"re:{number}" for number in range(MOST_PATTERNS + 1)))


def test_formats_can_be_sent_to_other_processes():
    fmt = MiLoFormat(ignore=(r"re:.*\.gate$",))
    assert fmt.ignores("a.gate")
    assert pickle.loads(pickle.dumps(fmt)).ignores("a.gate")
