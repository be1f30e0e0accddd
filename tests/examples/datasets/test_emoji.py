"""examples/datasets/emoji.py on small tarballs made from the real pictures in tests/data."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

import dataset_folder
import emoji


ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "tests" / "data" / "fluent3d"
SCRIPT = ROOT / "examples" / "datasets" / "emoji.py"


TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
IMAGE_DIRS = {source.package: source.image_dir for source in emoji.SOURCES}
GOOGLE, TWITTER, FLUENT = "emoji-datasource-google", "emoji-datasource-twitter", "@lobehub/fluent-emoji-3d"


def picture_bytes(picture: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    return buffer.getvalue()


def recolored(path: Path, shift: int) -> Image.Image:
    """The picture of `path` with its colours rotated, so that each style and tone has pictures of its own."""
    return Image.fromarray(np.roll(np.asarray(Image.open(path).convert("RGB")), shift, axis=2) // (1 + shift // 3))


def real_pictures() -> dict[str, Path]:
    """Code points of pictures without skin tones -> files."""
    files = {path.stem: path for path in sorted(PICTURES.glob("*/*.png"))}
    return {stem: path for stem, path in files.items() if not any(tone in stem for tone in TONES)}


def emoji_json() -> list[dict]:
    entries = []
    for order, (stem, path) in enumerate(real_pictures().items()):
        parts = stem.upper().split("-")
        tones = {
            tone.upper(): {"unified": "-".join([parts[0], tone.upper(), *parts[1:]]), "non_qualified": None}
            for tone in TONES
        }
        entries.append(
            {
                "name": f"PICTURE {stem.upper()}",
                # Real entries of some symbols end in FE0F, as files do in one package and not in the other.
                "unified": f"{stem.upper()}-FE0F" if stem == "2764" else stem.upper(),
                "non_qualified": "2764" if stem == "2764" else None,
                "subcategory": "sport & play" if path.parent.name == "sport" else path.parent.name,
                "sort_order": order,
                "skin_variations": tones if path.parent.name == "person-role" else {},
            }
        )
    return entries


def default_images(package: str) -> dict[str, bytes]:
    """File name -> content: every real picture, and five tones of those with tones, in the package's own format."""
    shift = list(IMAGE_DIRS).index(package)
    suffix, format = (".webp", "WEBP") if package == FLUENT else (".png", "PNG")
    images = {}
    for stem, path in real_pictures().items():
        name = "2764-fe0f" if stem == "2764" and package == FLUENT else stem
        images[name + suffix] = picture_bytes(recolored(path, shift), format)
        if path.parent.name == "person-role":
            for index, tone in enumerate(TONES):
                parts = stem.split("-")
                name = "-".join([parts[0], tone, *parts[1:]])
                images[name + suffix] = picture_bytes(recolored(path, shift + 3 * (index + 1)), format)
    return images


def write_tarball(
    folder: Path, package: str, images: dict[str, bytes] | None = None, members: dict[str, bytes] | None = None
) -> Path:
    """An npm tarball as `npm pack` names it; `members` are added under their full names."""
    source = emoji.SOURCE_OF_PACKAGE[package]
    contents = {"package/package.json": json.dumps({"name": package, "version": source.version}).encode()}
    if package != FLUENT:
        contents["package/emoji.json"] = json.dumps(emoji_json()).encode()
    for name, content in (default_images(package) if images is None else images).items():
        contents[f"{source.image_dir}/{name}"] = content
    contents.update(members or {})
    path = folder / f"{package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tarballs")
    return [write_tarball(folder, package) for package in (FLUENT, GOOGLE, TWITTER)]


@pytest.fixture(scope="module")
def packages(tarballs) -> list[emoji.Package]:
    return [emoji.read_package(path) for path in tarballs]


def run_main(output_dir: Path, tarballs: list[Path], *arguments: str) -> None:
    emoji.main(["--output_dir", str(output_dir), "--tarballs", *map(str, tarballs), *arguments])


def code_points(rows: dict[str, list[dict]]) -> set[tuple[str, str]]:
    return {(row["style"], row["code_point"]) for split in rows.values() for row in split}


def test_parquet_has_labels_names_and_pictures(tarballs, tmp_path, capsys):
    run_main(tmp_path / "emoji", tarballs, "--holdout", "0.3", "--min_images", "1")
    data = load_dataset(str(tmp_path / "emoji"), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train", "validation"}
    names = data["train"].features["label"].names
    assert names == sorted(names)
    assert "fluent3d/sport-play" in names  # "sport & play" would need quotes in a shell
    rows = {(row["style"], row["code_point"]): row for split in data.values() for row in split}
    files = real_pictures()
    for shift, style in enumerate(("fluent3d", "noto", "twemoji")):
        row = rows[style, "1f98a"]
        assert (names[row["label"]], row["emoji"]) == (f"{style}/animal-mammal", "picture 1f98a")
        assert row["image"].mode == "RGB"
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(recolored(files["1f98a"], shift)))
        assert names[rows[style, "2764"]["label"]] == f"{style}/heart"  # 2764-fe0f in one package, 2764 in the others
    printed = capsys.readouterr().out
    for text in (printed, (tmp_path / "emoji" / "LICENSES.md").read_text()):
        assert "Microsoft" in text and "Apache License 2.0" in text and "CC-BY 4.0" in text
    assert f"Classes: {len(names)}" in printed


def test_imagefolder_has_the_same_ids(tarballs, tmp_path):
    run_main(tmp_path / "parquet", tarballs, "--resolution", "16")
    run_main(tmp_path / "folder", tarballs, "--resolution", "16", "--format", "imagefolder")
    parquet = load_dataset(str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache"))
    folder = load_dataset(str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))
    names = parquet["train"].features["label"].names
    assert folder["train"].features["label"].names == [name.replace("/", "_") for name in names]
    for split in parquet:
        expected = {(row["label"], np.asarray(row["image"]).tobytes()) for row in parquet[split]}
        assert {(row["label"], np.asarray(row["image"]).tobytes()) for row in folder[split]} == expected


def test_the_first_edition_is_what_models_were_trained_on(packages):
    """Rows, ids, pixels and columns, as they were before there was a second edition."""
    rows, features, _ = emoji.build(packages, resolution=16, holdout=0.3)
    assert list(features) == ["image", "label", "emoji", "code_point", "style"]
    digest = hashlib.sha256()
    for split in rows:
        for row in rows[split]:
            columns = {name: value for name, value in row.items() if name != "image"}
            digest.update(repr((split, row["image"]["path"], columns)).encode())
            digest.update(Image.open(io.BytesIO(row["image"]["bytes"])).tobytes())
    assert digest.hexdigest() == "2321ae7414a281dbbb1ff7bb1ce7a4a537e2bd2458abbca20c715f0eb0bcc452"


@pytest.mark.parametrize(
    ("spelling", "normalized"),
    [
        ("2764-FE0F", "2764"),
        ("00a9-fe0f", "a9"),
        ("0023-FE0F-20E3", "23-20e3"),
        ("1F9D1-200D-2695-FE0F", "1f9d1-200d-2695"),
        ("1f3f4-e0067_e0062", "1f3f4-e0067-e0062"),
    ],
)
def test_normalize_code_points(spelling, normalized):
    assert emoji.normalize_code_points(spelling) == normalized


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("1f3c3", "1f3c3-200d-2642-fe0f", True),  # runner, man running
        ("1f3c3", "1f3c3-1f3fd-200d-2640-fe0f-200d-27a1-fe0f", True),  # a woman with a tone, facing right
        ("1f468-200d-1f680", "1f469-1f3ff-200d-1f680", True),  # man and woman astronaut
        ("1f468-200d-1f680", "1f468-200d-1f692", False),  # astronaut, firefighter
        ("1f1f3-1f1f4", "1f1f3-1f1f1", False),  # two flags
        ("2640", "2642", False),  # the signs by themselves
        ("1f3fb", "1f3ff", False),  # the tones by themselves
    ],
)
def test_split_key_joins_near_copies_only(first, second, same):
    assert (emoji.split_key(first) == emoji.split_key(second)) is same


def test_an_emoji_is_in_one_split_in_all_styles_and_tones(packages):
    rows, _, _ = emoji.build(packages, resolution=16, max_skin_tones=5, holdout=0.3, min_images=1)
    splits, members = defaultdict(set), defaultdict(set)
    for split in rows:
        for row in rows[split]:
            splits[emoji.split_key(row["code_point"])].add(split)
            members[emoji.split_key(row["code_point"])].add((row["style"], row["code_point"]))
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "validation"}
    assert max(len(found) for found in members.values()) == 18  # three styles of one emoji and its five tones


def test_holdout_takes_about_the_share_asked_for_and_grows_with_it():
    keys = [f"{number:x}" for number in range(0x1F300, 0x1F300 + 4000)]
    held = {share: {key for key in keys if emoji.stable_fraction(key) < share} for share in (0.05, 0.2)}
    assert held[0.05] < held[0.2]
    assert abs(len(held[0.05]) / len(keys) - 0.05) < 0.015  # 4 standard deviations
    # Fixed for good: another value would move emoji between the splits of a model that is already trained.
    assert emoji.stable_fraction("1f600") == pytest.approx(0.18967, abs=1e-5)


def test_no_holdout_makes_no_validation_split(tarballs, tmp_path):
    run_main(tmp_path / "emoji", tarballs, "--resolution", "16", "--holdout", "0")
    assert set(load_dataset(str(tmp_path / "emoji"), cache_dir=str(tmp_path / "cache"))) == {"train"}


def test_skin_tones_are_capped_alike_in_all_styles(packages):
    found = {}
    for cap in (0, 1, 2, 9):
        rows, _, _ = emoji.build(packages, resolution=16, max_skin_tones=cap, holdout=0, min_images=1)
        found[cap] = code_points(rows)
        tones = defaultdict(set)
        for style, code in found[cap]:
            for tone in TONES:
                if tone in code:
                    tones[style, code.replace(f"{tone}-", "")].add(tone)
        assert len(tones) == (6 if cap else 0)  # two emoji with tones in three styles
        assert all(len(kept) == min(cap, 5) for kept in tones.values())
        for (_, code), kept in tones.items():
            assert kept == tones["noto", code]
    assert found[0] < found[1] < found[2] < found[9]


def test_all_five_skin_tones_are_kept_about_equally_often():
    entries = []
    for number in range(0x1F400, 0x1F400 + 500):
        tones = {tone: {"unified": f"{number:X}-{tone}"} for tone in TONES}
        entries.append(
            {
                "name": "X",
                "unified": f"{number:X}",
                "subcategory": "x",
                "sort_order": number,
                "skin_variations": tones,
            }
        )
    labels = emoji.read_labels(entries)
    package = emoji.Package(emoji.SOURCES[0], "1.1.0", Path("x.tgz"), dict.fromkeys(labels, ("", b"")), None)
    kept = emoji.select_code_points(package, labels, max_skin_tones=1)
    assert len(kept) == 1000
    for tone in TONES:
        assert 60 < sum(tone in code for code in kept) < 140  # 100 +- 4.5 standard deviations


def test_corrupt_pictures_are_skipped_and_named(tarballs, tmp_path, capsys):
    images = default_images(GOOGLE)
    images["1f98a.png"] = images["1f98a.png"][:500]
    images["1f34c.png"] = b"not a picture"
    tarball = write_tarball(tmp_path, GOOGLE, images)
    run_main(tmp_path / "emoji", [tarballs[0], tarball], "--resolution", "16")
    rows = load_dataset(str(tmp_path / "emoji"), cache_dir=str(tmp_path / "cache"))
    found = {(row["style"], row["code_point"]) for split in rows.values() for row in split.remove_columns("image")}
    assert ("noto", "1f98a") not in found and ("fluent3d", "1f98a") in found and ("noto", "1f43c") in found
    output = capsys.readouterr()
    for name in ("1f98a.png", "1f34c.png"):
        assert f"{tarball.name}:{IMAGE_DIRS[GOOGLE]}/{name}" in output.err
    assert "Corrupt pictures, skipped: 2" in output.out


def test_small_classes_are_left_out_and_ids_follow_names(packages):
    _, features, report = emoji.build(packages, resolution=16, holdout=0, min_images=5)
    # person-role has two emoji, each with one tone: four pictures
    assert [name for name in report["left_out"] if "person-role" in name] == list(report["left_out"])
    assert set(report["left_out"].values()) == {4}
    assert features["label"].names == sorted(features["label"].names)
    _, features, _ = emoji.build(packages, resolution=16, holdout=0, min_images=4)
    assert "fluent3d/person-role" in features["label"].names
    with pytest.raises(ValueError, match="No class has 99 training images: lower --min_images"):
        emoji.build(packages, resolution=16, min_images=99)


def test_equal_pictures_of_a_style_are_kept_once(tmp_path):
    images = default_images(GOOGLE)
    images["1f98a.png"] = images["1f436.png"]
    package = emoji.read_package(write_tarball(tmp_path, GOOGLE, images))
    rows, _, report = emoji.build([package], resolution=16, holdout=0)
    assert report["duplicates"] == 1
    assert ("noto", "1f436") in code_points(rows) and ("noto", "1f98a") not in code_points(rows)


def test_country_flags_of_the_fluent_package_are_not_fluent(tarballs, tmp_path):
    entries = emoji_json() + [
        {"name": "FLAG", "unified": "1F1F3-1F1F4", "subcategory": "country-flag", "sort_order": 999}
    ]
    picture = real_pictures()["1f98a"].read_bytes()
    fluent = write_tarball(tmp_path, FLUENT, {"1f1f3-1f1f4.webp": picture})
    labels = {"package/emoji.json": json.dumps(entries).encode()}
    google = write_tarball(tmp_path, GOOGLE, {"1f1f3-1f1f4.png": picture}, labels)
    rows, features, _ = emoji.build([emoji.read_package(path) for path in (fluent, google)], holdout=0, min_images=1)
    assert features["label"].names == ["noto/country-flag"]
    assert code_points(rows) == {("noto", "1f1f3-1f1f4")}


def test_transparent_pixels_do_not_bleed_into_edges():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., :3] = (255, 0, 255)  # the colour under full transparency, which no viewer shows
    rgba[:, 31:] = (0, 0, 0, 255)
    rgba[:, :2] = (0, 0, 0, 128)
    encoded = picture_bytes(Image.fromarray(rgba))
    white = np.asarray(emoji.render(encoded, 32, (255, 255, 255)))
    assert np.ptp(white, axis=2).max() == 0  # only greys
    assert (white[:, 1:15] == 255).all() and (white[:, 16:] == 0).all()
    assert np.abs(white[:, 0].astype(int) - 127).max() <= 1
    assert np.abs(white[:, 15].astype(int) - 128).max() <= 1  # the mean of a white and a black pixel
    red = np.asarray(emoji.render(encoded, 32, (255, 0, 0)))
    assert (red[:, 1:15] == (255, 0, 0)).all()


def test_pictures_are_centred_on_a_square_and_brought_to_size():
    tall = picture_bytes(Image.new("RGBA", (32, 64), "black"))
    square = np.asarray(emoji.render(tall, 64, (255, 255, 255)))
    assert square.shape == (64, 64, 3)
    assert (square[:, :16] == 255).all() and (square[:, 16:48] == 0).all() and (square[:, 48:] == 255).all()
    for resolution in (8, 24, 64, 96):
        assert emoji.render(tall, resolution, (255, 255, 255)).size == (resolution, resolution)


def test_a_rerun_gives_the_same_bytes(tarballs, tmp_path):
    contents = []
    for _ in range(2):
        run_main(tmp_path / "emoji", tarballs, "--resolution", "16", "--holdout", "0.3")
        contents.append({path: path.read_bytes() for path in (tmp_path / "emoji").rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4
    run_main(tmp_path / "other_order", tarballs[::-1], "--resolution", "16", "--holdout", "0.3")
    for path, content in contents[0].items():
        assert (tmp_path / "other_order" / path.relative_to(tmp_path / "emoji")).read_bytes() == content


def test_a_stopped_run_leaves_the_old_data_set(tarballs, tmp_path, monkeypatch):
    run_main(tmp_path / "emoji", tarballs, "--resolution", "16")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def stop(self, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset_folder.Dataset, "to_parquet", stop)
    with pytest.raises(KeyboardInterrupt):
        run_main(tmp_path / "emoji", tarballs, "--resolution", "8")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["notes.txt", "README.md"])
def test_a_folder_of_other_things_is_not_replaced(tarballs, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("years of work")
    with pytest.raises(SystemExit, match=r"mine exists and is not a data set.*--output_dir"):
        run_main(tmp_path / "mine", tarballs)
    assert (tmp_path / "mine" / name).read_text() == "years of work"


def test_tar_members_are_not_unpacked(tmp_path):
    picture = real_pictures()["1f98a"].read_bytes()
    names = ("../evil.png", str(tmp_path / "evil.png"), f"{IMAGE_DIRS[GOOGLE]}/../evil.png")
    (tmp_path / "tarballs").mkdir()
    tarball = write_tarball(tmp_path / "tarballs", GOOGLE, members=dict.fromkeys(names, picture))
    run_main(tmp_path / "out" / "emoji", [tarball], "--resolution", "16")
    assert not list(tmp_path.rglob("evil*"))


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"npm is not installed.*emoji-datasource-google@16\.0\.0.*--tarballs"):
        emoji.main(["--output_dir", str(tmp_path / "emoji"), "--cache_dir", str(tmp_path / "cache")])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_npm_fetches_once_and_its_errors_are_shown(tarballs, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\necho $5 >> {tmp_path}/calls\ncp {tarballs[0].parent}/*.tgz $4\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    arguments = ["--output_dir", str(tmp_path / "emoji"), "--cache_dir", str(tmp_path / "cache"), "--resolution", "8"]
    emoji.main(arguments)
    emoji.main(arguments)
    calls = (tmp_path / "calls").read_text().split()
    assert calls == [f"{source.package}@{source.version}" for source in emoji.SOURCES]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(path.name for path in tarballs)

    npm.write_text("#!/bin/sh\necho 'E404 not in this registry' >&2\nexit 1\n")
    with pytest.raises(SystemExit, match="E404 not in this registry"):
        emoji.main([*arguments, "--cache_dir", str(tmp_path / "empty")])
    assert not list((tmp_path / "empty").iterdir())


def test_bad_tarballs_are_named(tarballs, tmp_path):
    truncated = tmp_path / "truncated.tgz"
    truncated.write_bytes(tarballs[1].read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"truncated\.tgz is not a complete npm tarball"):
        emoji.read_package(truncated)
    truncated.write_bytes(b"<html>502 Bad Gateway</html>")
    with pytest.raises(ValueError, match=r"truncated\.tgz is not a complete npm tarball"):
        emoji.read_package(truncated)
    other = write_tarball(tmp_path, GOOGLE, members={"package/package.json": b'{"name": "left-pad"}'})
    with pytest.raises(ValueError, match=r"is package 'left-pad'.*@iconify-json/emojione, "):
        emoji.read_package(other)
    with pytest.raises(SystemExit, match=r"No such file.*missing\.tgz"):
        run_main(tmp_path / "emoji", [tmp_path / "missing.tgz"])


def test_tarballs_that_do_not_make_a_set_are_refused(packages):
    with pytest.raises(ValueError, match=r"no emoji\.json.*add the tarball of emoji-datasource-google"):
        emoji.build(packages[:1])
    with pytest.raises(ValueError, match="each package only once"):
        emoji.build([packages[1], packages[1]])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--resolution", "0"),
        ("--max_skin_tones", "-1"),
        ("--holdout", "1"),
        ("--min_images", "0"),
        ("--format", "zip"),
    ],
)
def test_bad_options_are_named(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        emoji.parse_args(["--output_dir", str(tmp_path), option, value])
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err


def test_an_unknown_background_is_named(tarballs, tmp_path):
    with pytest.raises(SystemExit, match="unknown color specifier: 'whiite'"):
        run_main(tmp_path / "emoji", tarballs, "--background", "whiite")
    assert not (tmp_path / "emoji").exists()


def test_the_script_runs_from_any_folder_and_shows_a_progress_bar(tarballs, tmp_path):
    command = [sys.executable, str(SCRIPT), "--output_dir", "emoji", "--tarballs", *map(str, tarballs)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stderr
    assert result.stdout.rstrip().endswith("Wrote emoji")
    assert (tmp_path / "emoji" / "data" / "train-00000-of-00001.parquet").is_file()
