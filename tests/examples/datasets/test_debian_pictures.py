import debian_pictures
import pytest
from PIL import Image


def test_pictures_become_white_squares_by_class(tmp_path, capsys):
    stamps = tmp_path / "unpacked/usr/share/tuxpaint/stamps"
    for folder, colour in (("food/fruit", "red"), ("food/fruit/cartoon", "lime"), ("plants/flowers", "blue")):
        (stamps / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (40, 20), colour).save(stamps / folder / "same.png")  # one name in two folders of a class
    arguments = ["stamps", "--unpacked", str(tmp_path / "unpacked"), "--output_dir", str(tmp_path / "out")]
    debian_pictures.main(arguments)
    found = {path.parent.name + "/" + path.stem: path for path in (tmp_path / "out").glob("*/*.png")}
    assert sorted(found) == ["food-fruit/cartoon-same", "food-fruit/fruit-same", "plant-flower/flowers-same"]
    with Image.open(found["food-fruit/cartoon-same"]) as image:
        assert (image.size, image.getpixel((64, 64)), image.getpixel((64, 5))) == ((128, 128), (0, 255, 0), (255,) * 3)
    with pytest.raises(SystemExit, match=r"error: .*exists"):  # nothing is overwritten
        debian_pictures.main(arguments)


def test_an_empty_folder_says_what_to_unpack(tmp_path):
    with pytest.raises(SystemExit, match="has none of the pictures: unpack the package"):
        debian_pictures.main(["stamps", "--unpacked", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
