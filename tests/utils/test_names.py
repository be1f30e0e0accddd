import pytest

from diffusers_pisdm.utils import names
from diffusers_pisdm.utils.names import LONGEST, did_you_mean, names_with, show_name, similar_names


def test_plain_names_are_shown_as_they_are():
    for name in ("fluent3d/animal-mammal", "chien, toutou", "日本語", "l'été"):
        assert show_name(name) == name


@pytest.mark.parametrize("odd", ["a\nb", "\x1b[31mred", "\u202egnp", "a\u200fb", "a\x00b", "\ud800"])
def test_odd_names_are_shown_as_escapes(odd):
    shown = show_name(odd)
    assert shown.isprintable() and "\\" in shown


def test_long_names_lose_their_middle():
    shown = show_name("begin" + "x" * 16_000 + "end")
    assert shown.startswith("begin") and shown.endswith("end") and len(shown) == LONGEST + 1


def test_names_that_contain_a_word_come_before_those_spelled_like_it():
    known = ["dog", "cast iron", "eduCation", "b/wildcats", "a/cap", "b/cup"]
    assert similar_names("cat", known) == ["eduCation", "b/wildcats", "cast iron"]
    assert similar_names("Cat", [*known, "tiger cat"]) == ["tiger cat", "eduCation", "b/wildcats", "cast iron"]
    assert similar_names("mamal", ["a/mammal", "dog", "b/animal-mammal"]) == ["a/mammal", "b/animal-mammal"]  # words
    assert similar_names("Tabby kat", ["dog", "tabby cat", "horse"]) == ["tabby cat"]  # a whole name
    assert similar_names("xyz", ["dog", "sly"]) == similar_names("nope", ["hand-open", "dog"]) == []
    assert similar_names("?", []) == []
    assert names_with("CAT", known) == ["eduCation", "b/wildcats"]


def test_suggestions_end_somewhere():
    assert did_you_mean("zzz", ["cat", "zodiac"]) == did_you_mean("1.5", ["cat 1", "alphanum"]) == ""
    assert did_you_mean("ct", ["cat", "dog"]) == "Did you mean 'cat'?"
    assert did_you_mean("cat", ["cat 1", "cat 2", "dog"]) == "Did you mean 'cat 1' or 'cat 2'?"
    many = [f"cat {i}" for i in range(12)]
    assert did_you_mean("cat", many).endswith(" 'cat 7' or one of 4 more?")


def test_long_names_are_compared_by_their_beginnings(monkeypatch):
    compared = []
    get_close_matches = names.difflib.get_close_matches

    def spy(word, possibilities, **options):
        compared.extend([word, *possibilities])
        return get_close_matches(word, possibilities, **options)

    monkeypatch.setattr(names.difflib, "get_close_matches", spy)
    long = ["cat" + "x" * 16_000, "dog" + "y" * 16_000]
    assert similar_names("dog" + "y" * 70 + "z" * 16_000, long) == [long[1]]
    assert max(map(len, compared)) <= LONGEST
