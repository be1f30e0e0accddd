import pytest

from diffusers_pisdm.utils import names
from diffusers_pisdm.utils.names import LONGEST, nearest_name, show_name


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


def test_the_nearest_name():
    assert nearest_name("Tabby kat", ["dog", "tabby cat", "horse"]) == "tabby cat"
    assert nearest_name("?", []) is None


def test_long_names_are_compared_by_their_beginnings(monkeypatch):
    compared = []
    get_close_matches = names.difflib.get_close_matches

    def spy(word, possibilities, **options):
        compared.extend([word, *possibilities])
        return get_close_matches(word, possibilities, **options)

    monkeypatch.setattr(names.difflib, "get_close_matches", spy)
    long = ["cat" + "x" * 16_000, "dog" + "y" * 16_000]
    assert nearest_name("dog" + "z" * 16_000, long) == long[1]
    assert max(map(len, compared)) <= LONGEST
