import pytest
from PIL import Image

from diffusers_pisdm.utils.messages import cause_of, count_of, show_duration, show_range, show_size


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.042, "0.042 s"),
        (1, "1 s"),
        (9.96, "10 s"),
        (85, "85 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (725, "12 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (11520, "3.2 h"),
        (71 * 3600, "71 h"),
        (15 * 86400, "15 days"),
    ],
)
def test_times_have_the_unit_that_people_use(seconds, shown):
    assert show_duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "thing", "shown"), [(1, "class", "1 class"), (0, "class", "0 classes"), (2000, "step", "2,000 steps")]
)
def test_counts_agree_with_what_they_count(count, thing, shown):
    assert count_of(count, thing) == shown


def test_a_librarys_error_is_told_in_whole_words_with_its_cause():
    error = OSError("Cannot load it. Please check out the root cause in the stacktrace above.")
    assert cause_of(error) == str(error)
    error.__cause__ = OSError("No route\n to host")
    assert cause_of(error) == "No route to host"
    assert cause_of(ValueError("one two three"), width=10) == "one two …"


def test_sizes_are_width_by_height_and_a_range_of_one_number_is_that_number():
    assert show_size(*Image.new("L", (64, 32)).size) == "64x32"
    assert (show_range(3, 2000), show_range(4, 4)) == ("3 to 2,000", "4")
