import pytest

from benchmarks.speed.crossover import find_crossover


TOKENS = [256, 1024, 4096, 16384]


def test_power_laws_cross_where_they_do():
    # 1e-3 L = 1e-6 L^2 at 1000 tokens: interpolation on logarithmic axes is exact.
    found = find_crossover(TOKENS, [1e-3 * n for n in TOKENS], [1e-6 * n**2 for n in TOKENS])
    assert found.faster == "from" and found.tokens == pytest.approx(1000)
    assert found.image_size == pytest.approx(16 * 1000**0.5)
    assert str(found) == "faster from 1,000 tokens (506 px) on"


def test_a_crossover_at_a_measurement():
    assert find_crossover(TOKENS, [1.0] * 4, [0.5, 1.0, 2.0, 4.0]).tokens == pytest.approx(1024)


@pytest.mark.parametrize(
    ("peer", "faster"),
    [
        ([2, 2, 2, 2], "always"),
        ([0.5, 0.5, 0.5, 0.5], "never"),
        ([2, 2, 2, 0.5], "never"),
        ([1, 1, 1, 1], "never"),
    ],
)
def test_no_crossover(peer, faster):
    found = find_crossover(TOKENS, [1.0] * 4, peer)
    assert (found.faster, found.tokens, found.image_size) == (faster, None, None)


def test_the_last_of_several_counts():
    found = find_crossover(TOKENS, [1.0] * 4, [2, 0.5, 2, 2])
    assert found.tokens == pytest.approx(2048)


def test_one_size_is_enough():
    assert find_crossover([256], [1.0], [2.0]).faster == "always"


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [([], [], "0 numbers of tokens"), ([1, 2], [1.0], "2 numbers .*, 1 times"), ([2, 1], [1.0, 1.0], "ascending")],
)
def test_wrong_arguments(tokens, seconds, message):
    with pytest.raises(ValueError, match=message):
        find_crossover(tokens, seconds, seconds)
