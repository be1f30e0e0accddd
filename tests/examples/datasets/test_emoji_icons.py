"""The second edition of examples/datasets/emoji.py, on small tarballs in the layout of Iconify's icon sets."""

import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

import emoji


ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "tests" / "data" / "fluent3d"


PACKAGES = {source.style: source.package for source in emoji.SVG_SOURCES}
STYLES = sorted(PACKAGES)
WHITE = (255, 255, 255)
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")

# name in emoji.json, code points, short name, subcategory, name in the icon sets, name in fxemoji
EMOJI = (
    ("FOX FACE", "1F98A", "fox_face", "animal-mammal", "fox", "foxface"),
    ("CAT", "1F408", "cat2", "animal-mammal", "cat", "catside"),
    ("CAT FACE", "1F431", "cat", "animal-mammal", "cat-face", "cat"),
    ("HEAVY BLACK HEART", "2764-FE0F", "heart", "heart", "red-heart", "heavyblackheart"),
    ("WHITE LEFT POINTING BACKHAND INDEX", "1F448", "point_left", "hand-single-finger", "pointing-left", "left"),
    ("WHITE RIGHT POINTING BACKHAND INDEX", "1F449", "point_right", "hand-single-finger", "pointing-right", "right"),
    ("KEYCAP 1", "0031-FE0F-20E3", "one", "keycap", "keycap-1", "keycap1"),
    ("Côte d’Ivoire Flag", "1F1E8-1F1EE", "flag-ci", "country-flag", "flag-for-cote-divoire", "cotedivoireflag"),
    ("MAN DANCING", "1F57A", "man_dancing", "person-activity", "man-dancing", "mandancing"),
)


def emoji_json() -> list[dict]:
    return [
        {
            "name": name,
            "unified": code_points,
            "short_names": [short_name],
            "subcategory": subcategory,
            "sort_order": order,
            "skin_variations": {tone: {"unified": f"{code_points}-{tone}"} for tone in TONES}
            if name == "MAN DANCING"
            else {},
        }
        for order, (name, code_points, short_name, subcategory, *_) in enumerate(EMOJI)
    ]


def drawing(style: str, number: int) -> str:
    """An SVG with a gradient, a curve and a mark at the left: unlike any other, and unlike its mirror image."""
    red, green = 20 * STYLES.index(style), 15 * number
    return (
        '<linearGradient id="a"><stop offset="0" stop-color="#00f"/><stop offset="1" stop-color="#0ff"/>'
        f'</linearGradient><circle cx="16" cy="16" r="14" fill="rgb({red},{green},90)"/>'
        '<path d="M4 16 Q10 4 14 16 Z" fill="url(#a)"/>'
    )


def icon_set(style: str) -> dict[str, dict]:
    """icons.json, and chars.json of the sets that have one, with a skin tone, an alias and a hidden icon."""
    icons, chars = {}, {}
    for number, (_, code_points, *_, name, fxemoji_name) in enumerate(EMOJI):
        name = fxemoji_name if style == "fxemoji" else name
        icons[name] = {"body": drawing(style, number)}
        chars[code_points.lower().replace("-fe0f", "")] = name
    for tone, word in zip(TONES, ("light", "medium-light", "medium", "medium-dark", "dark"), strict=True):
        name = f"man-dancing-{word}-skin-tone"
        icons[name] = {"body": drawing(style, 10).replace("90)", f"{int(tone[-1], 16) * 8})")}
        chars[f"1f57a-{tone.lower()}"] = name
    icons["old-fox"] = {"body": drawing(style, 11), "hidden": True}
    aliases = {"fox-face": {"parent": "fox"}, "older-fox": {"parent": "old-fox"}}
    content = {"prefix": style, "width": 32, "height": 32, "icons": icons, "aliases": aliases}
    return {"icons": content, "chars": chars if style in ("noto", "twemoji", "fluent-flat") else {}}


def write_tarball(folder: Path, package: str, **tables: dict | list) -> Path:
    source = emoji.SOURCE_OF_PACKAGE[package]
    tables = {"package": {"name": package, "version": source.version}, **tables}
    contents = {f"package/{name}.json": json.dumps(table).encode() for name, table in tables.items()}
    if package == PACKAGES["fluent3d"]:
        for path in sorted(PICTURES.glob("*/*.png")):
            if path.stem in ("1f98a", "2764"):
                contents[f"{source.image_dir}/{path.stem}.webp"] = path.read_bytes()
    path = folder / f"{package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_icon_set(folder: Path, style: str) -> Path:
    return write_tarball(folder, PACKAGES[style], **icon_set(style))


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("icons")
    paths = [write_icon_set(folder, style) for style in STYLES if style != "fluent3d"]
    return [
        *paths,
        write_tarball(folder, PACKAGES["fluent3d"]),
        write_tarball(folder, emoji.GOOGLE, emoji=emoji_json()),
    ]


@pytest.fixture(scope="module")
def packages(tarballs) -> list[emoji.Package]:
    return [emoji.read_package(path) for path in tarballs]


def run_main(output_dir: Path, tarballs: list[Path], *arguments: str) -> None:
    emoji.main(
        ["--edition", "2", "--output_dir", str(output_dir), "--tarballs", *map(str, tarballs)]
        + ["--min_images", "1", *arguments]
    )


def load(folder: Path) -> dict:
    return load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))


def pixels(svg: str | bytes, side: int = 32) -> np.ndarray:
    return np.asarray(emoji.render(svg.encode() if isinstance(svg, str) else svg, side, WHITE)).astype(int)


def test_eight_styles_have_labels_pictures_and_the_columns_for_mirroring(tarballs, tmp_path, capsys):
    run_main(tmp_path / "emoji", tarballs, "--holdout", "0")
    data = load(tmp_path / "emoji")["train"]
    names = data.features["label"].names
    assert names == sorted(names)
    assert data.column_names == ["image", "label", "emoji", "code_point", "style", "subgroup", "may_mirror"]
    rows = {(row["style"], row["code_point"]): row for row in data}
    assert {style for style, _ in rows} == set(STYLES)
    for style in STYLES:
        row = rows[style, "1f98a"]
        assert row["image"].size == (128, 128) and row["image"].mode == "RGB"
        assert (row["emoji"], row["subgroup"]) == ("fox face", "animal-mammal")
        assert names[row["label"]] == f"{style}/animal-mammal"
        if style != "fluent3d":
            drawn = np.asarray(row["image"])[90, 64]  # in the circle, below the mark
            np.testing.assert_allclose(drawn, (20 * STYLES.index(style), 0, 90), atol=1)
    for (_, code_point), row in rows.items():
        assert row["may_mirror"] is (code_point not in ("31-20e3", "1f1e8-1f1ee"))  # a keycap and a flag
    licenses = (tmp_path / "emoji" / "LICENSES.md").read_text()
    for text in ("Microsoft", "Google", "Mozilla", "Twitter", "EmojiOne", "emoji.json by Cal Henderson"):
        assert text in licenses
    assert licenses.count("whoever passes these pictures on must name the authors") == 2  # Twemoji and EmojiOne
    printed = capsys.readouterr().out
    assert f"Classes: {len(names)}" in printed and licenses in printed


def test_no_picture_is_under_a_share_alike_licence():
    for source in (*emoji.SOURCES, *emoji.SVG_SOURCES):
        assert "BY-SA" not in source.license
        assert re.search("MIT|Apache License 2.0|CC-BY 4.0", source.license)
        assert re.fullmatch(r"\d+\.\d+\.\d+", source.version)


def test_icons_without_code_points_are_found_by_name(packages):
    rows, _, report = emoji.build(packages, 16, holdout=0, min_images=1, edition=2, max_skin_tones=5)
    found = {}
    for row in rows["train"]:
        found.setdefault(row["style"], set()).add(row["code_point"])
    everything = {emoji.normalize_code_points(code_points) for _, code_points, *_ in EMOJI}
    tones = {f"1f57a-{tone.lower()}" for tone in TONES}
    for style in ("noto", "fluent-flat", "twemoji"):  # with a chars.json
        assert found[style] == everything | tones
    for style in ("fluent", "noto-v1", "emojione"):  # by the names in those, which know tones, and flags by emoji.json
        assert found[style] == everything | tones
    # fxemoji has Unicode's names and some of its own: "cat" is the face, "left" a hand. It has no tones, and writes
    # this flag in one word.
    assert found["fxemoji"] == everything - {"1f1e8-1f1ee"}
    assert report["unlabelled"] == 6  # of fxemoji: the flag and five tones; hidden icons are not counted
    assert report["corrupt"] == []


def test_the_names_of_fxemoji_are_read_one_by_one():
    pairs = [pair.split() for pair in emoji.FXEMOJI_NAMES.split(",")]
    assert all(len(pair) == 2 for pair in pairs)
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names)
    assert dict(pairs)["wave"] == "ocean" and dict(pairs)["tramcar"] == "-"


def test_a_drawing_marked_as_broken_is_left_out(tmp_path):
    entries = [*emoji_json(), {**emoji_json()[0], "name": "TRAM CAR", "unified": "1F68B", "short_names": ["tram_car"]}]
    tables = icon_set("fxemoji")
    tables["icons"]["icons"]["tramcar"] = {"body": drawing("fxemoji", 12)}
    paths = [
        write_tarball(tmp_path, PACKAGES["fxemoji"], icons=tables["icons"]),
        write_tarball(tmp_path, emoji.GOOGLE, emoji=entries),
    ]
    rows, _, _ = emoji.build([emoji.read_package(path) for path in paths], 16, holdout=0, min_images=1, edition=2)
    assert "1f98a" in {row["code_point"] for row in rows["train"]}
    assert "1f68b" not in {row["code_point"] for row in rows["train"]}


def test_two_flags_of_one_drawing_do_not_share_their_names(tmp_path):
    tables = icon_set("twemoji")
    tables["icons"]["aliases"]["flag-clipperton"] = {"parent": "flag-for-cote-divoire"}
    tables["icons"]["aliases"]["flag-of-somewhere"] = {"parent": "flag-for-cote-divoire"}
    tables["chars"]["1f1e8-1f1f5"] = "flag-clipperton"
    table = emoji.name_table(emoji.read_package(write_tarball(tmp_path, PACKAGES["twemoji"], **tables)))
    assert table["flagclipperton"] == "1f1e8-1f1f5" and table["flagcotedivoire"] == "1f1e8-1f1ee"
    assert "flagofsomewhere" not in table
    assert table["foxface"] == table["fox"] == "1f98a"
    assert "olderfox" not in table and "oldfox" not in table


@pytest.mark.parametrize(
    ("spellings", "key"),
    [
        (("Côte d’Ivoire Flag", "flag-for-cote-divoire", "flag-cote-d'ivoire"), "flagcotedivoire"),
        (("flag-for-flag-united-kingdom", "United Kingdom Flag"), "flagunitedkingdom"),
        (("E-MAIL SYMBOL", "e-mail-symbol", "emailsymbol"), "emailsymbol"),
        (("Trinidad & Tobago Flag", "flag-trinidad-and-tobago"), "flagtrinidadandtobago"),
    ],
)
def test_spellings_of_a_name_meet(spellings, key):
    assert {emoji.name_key(spelling) for spelling in spellings} == {key}


def test_an_icon_is_flipped_turned_and_shifted_as_iconify_says():
    body = '<rect x="2" y="2" width="4" height="12" fill="#f00"/><rect x="2" y="2" width="12" height="2" fill="#00f"/>'
    base = {"body": body, "width": 16, "height": 16}
    plain = pixels(emoji.svg_document(base))
    assert tuple(plain[16, 8]) == (255, 0, 0) and tuple(plain[16, 24]) == WHITE
    np.testing.assert_array_equal(pixels(emoji.svg_document({**base, "hFlip": True})), plain[:, ::-1])
    np.testing.assert_array_equal(pixels(emoji.svg_document({**base, "vFlip": True})), plain[::-1])
    np.testing.assert_array_equal(pixels(emoji.svg_document({**base, "rotate": 1})), np.rot90(plain, -1))
    both = pixels(emoji.svg_document({**base, "hFlip": True, "rotate": 3}))
    np.testing.assert_array_equal(both, np.rot90(plain[:, ::-1], -3))  # flipped first, then turned
    moved = {**base, "body": f'<g transform="translate(-7 30)">{body}</g>', "left": -7, "top": 30}
    np.testing.assert_array_equal(pixels(emoji.svg_document(moved)), plain)
    np.testing.assert_array_equal(pixels(emoji.svg_document({**moved, "hFlip": True})), plain[:, ::-1])


def test_an_icon_that_is_no_square_is_centred_and_whole():
    tall = pixels(emoji.svg_document({"body": '<rect width="8" height="16"/>', "width": 8, "height": 16}))
    assert (tall[:, :8] == 255).all() and (tall[:, 8:24] == 0).all() and (tall[:, 24:] == 255).all()
    wide = {"body": '<rect x="3" y="5" width="16" height="4"/>', "left": 3, "top": 5, "width": 16, "height": 4}
    wide = pixels(emoji.svg_document(wide))
    assert (wide[:12] == 255).all() and (wide[12:20] == 0).all() and (wide[20:] == 255).all()


def test_an_alias_that_flips_is_a_picture_by_itself(tmp_path):
    tables = icon_set("noto")
    del tables["icons"]["icons"]["pointing-right"]
    tables["icons"]["aliases"]["pointing-right"] = {"parent": "pointing-left", "hFlip": True}
    package = emoji.read_package(write_tarball(tmp_path, PACKAGES["noto"], **tables))
    left, right = (pixels(package.images[code][1]) for code in ("1f448", "1f449"))
    np.testing.assert_allclose(right, left[:, ::-1], atol=8)  # curves are drawn in steps
    assert np.abs(right - left).max() > 100


def test_edges_take_the_background_and_shapes_that_meet_have_no_seam():
    svg = emoji.svg_document(
        {
            "body": '<rect x="-1" y="-1" width="8.5" height="18"/><rect x="7.5" y="-1" width="9.5" height="18"/>',
            "width": 16,
            "height": 16,
        }
    )
    assert pixels(svg, 32).max() == 0
    disc = emoji.svg_document({"body": '<circle cx="8" cy="8" r="6" fill="#000"/>', "width": 16, "height": 16})
    for background in (WHITE, (255, 0, 0)):
        picture = np.asarray(emoji.render(disc, 24, background)).astype(int)
        assert (picture[0] == background).all() and (picture[12, 12] == 0).all()
        assert (picture <= np.array(background)).all()
        if background == WHITE:
            assert np.ptp(picture, axis=2).max() == 0  # only greys


def test_pictures_equal_across_styles_are_kept_once_and_counted(tmp_path, capsys):
    tables = icon_set("noto")
    tables["icons"]["icons"]["fox"] = icon_set("fluent-flat")["icons"]["icons"]["fox"]
    paths = [
        write_tarball(tmp_path, PACKAGES["noto"], **tables),
        write_icon_set(tmp_path, "fluent-flat"),
        write_tarball(tmp_path, emoji.GOOGLE, emoji=emoji_json()),
    ]
    run_main(tmp_path / "emoji", paths, "--resolution", "16", "--holdout", "0")
    kept = {(row["style"], row["code_point"]) for row in load(tmp_path / "emoji")["train"]}
    assert ("fluent-flat", "1f98a") in kept and ("noto", "1f98a") not in kept
    printed = capsys.readouterr().out
    assert "Pictures of noto equal to one of fluent-flat, left out: 1.\n" in printed
    assert "Pictures equal to another one of their style, left out: 0.\n" in printed


def test_a_drawing_that_is_no_svg_is_skipped_and_named(tmp_path, capsys):
    tables = icon_set("noto")
    tables["icons"]["icons"]["fox"] = {"body": "<circle"}
    noto = write_tarball(tmp_path, PACKAGES["noto"], **tables)
    run_main(
        tmp_path / "emoji", [noto, write_tarball(tmp_path, emoji.GOOGLE, emoji=emoji_json())], "--resolution", "16"
    )
    output = capsys.readouterr()
    assert f"skipped {noto.name}:package/icons.json#fox" in output.err
    assert "Corrupt pictures, skipped: 1" in output.out


def test_subgroups_that_are_not_mirrored_are_spelled_like_labels():
    for subgroup in emoji.NOT_MIRRORED:
        assert re.fullmatch("[a-z]+(-[a-z]+)*", subgroup)
    assert {"alphanum", "arrow", "country-flag", "keycap", "time", "zodiac"} <= emoji.NOT_MIRRORED
    assert not {"face-smiling", "animal-mammal", "heart", "hands", "transport-ground"} & emoji.NOT_MIRRORED


def test_webp_is_smaller_at_lower_quality_and_close_to_the_png(tarballs, tmp_path):
    chosen = ["--styles", "noto", "--holdout", "0"]
    run_main(tmp_path / "png", tarballs, *chosen)
    run_main(tmp_path / "high", tarballs, *chosen, "--image_format", "webp", "--quality", "90")
    run_main(tmp_path / "low", tarballs, *chosen, "--image_format", "webp", "--quality", "10")
    pictures, sizes = {}, {}
    for name in ("png", "high", "low"):
        parquet = tmp_path / name / "data" / "train-00000-of-00001.parquet"
        sizes[name] = parquet.stat().st_size
        pictures[name] = [row["image"] for row in load(tmp_path / name)["train"]]
    assert sizes["low"] < sizes["high"]
    assert {picture.format for picture in pictures["png"]} == {"PNG"}
    assert {picture.format for picture in pictures["high"]} == {"WEBP"}
    for exact, high in zip(pictures["png"], pictures["high"], strict=True):
        difference = np.asarray(exact).astype(int) - np.asarray(high.convert("RGB"))
        assert 0 < np.abs(difference).mean() < 3


def test_webp_folders_have_files_of_that_kind(tarballs, tmp_path):
    run_main(
        tmp_path / "emoji", tarballs, "--styles", "noto", "--image_format", "webp", "--format", "imagefolder",
        "--resolution", "16", "--holdout", "0",
    )  # fmt: skip
    files = [path for path in (tmp_path / "emoji" / "data").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".webp"}
    assert Image.open(files[0]).format == "WEBP"
    assert len(load(tmp_path / "emoji")["train"]) == len(files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_format", "webp", "--quality", "101"], r"--quality must be in \[0, 100\], got 101"),
        (["--image_format", "webp", "--quality", "-1"], r"--quality must be in \[0, 100\], got -1"),
        (["--quality", "50"], "--quality is for --image_format webp"),
        (["--image_format", "gif"], "--image_format"),
        (["--edition", "3"], "--edition"),
        (["--resolution", "128"], "--resolution 128 .*64 pixels: add --edition 2"),
        (["--styles", "noto", "openmoji"], "--styles openmoji: --edition 1 has fluent3d, noto, twemoji"),
        (["--edition", "2", "--styles", "wingdings"], "--styles wingdings: --edition 2 has fluent3d, fluent, "),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        emoji.parse_args(["--output_dir", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_resolutions_and_quality_have_defaults(tmp_path):
    old = emoji.parse_args(["--output_dir", str(tmp_path)])
    assert (old.edition, old.styles, old.resolution, old.image_format) == (1, None, 64, "png")
    new = emoji.parse_args(["--output_dir", str(tmp_path), "--edition", "2", "--image_format", "webp"])
    assert (new.resolution, new.quality) == (128, emoji.WEBP_QUALITY)


def test_without_resvg_the_message_comes_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    arguments = ["--output_dir", str(tmp_path / "emoji"), "--edition", "2", "--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(SystemExit, match=r"resvg-py.* not installed: pip install resvg-py"):
        emoji.main(arguments)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="npm is not installed"):  # fluent3d alone needs no resvg
        emoji.main([*arguments, "--styles", "fluent3d"])


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_only_the_packages_of_the_styles_are_fetched(tarballs, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\necho $5 >> {tmp_path}/calls\ncp {tarballs[0].parent}/*.tgz $4\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    emoji.main(
        ["--output_dir", str(tmp_path / "emoji"), "--cache_dir", str(tmp_path / "cache"), "--resolution", "8"]
        + ["--min_images", "1", "--edition", "2", "--styles", "fluent", "fxemoji"]
    )
    calls = [call.rpartition("@")[0] for call in (tmp_path / "calls").read_text().split()]
    # fluent-flat for its names, Google's package for the labels
    assert calls == [PACKAGES["fluent"], PACKAGES["fxemoji"], PACKAGES["fluent-flat"], emoji.GOOGLE]
    assert {row["style"] for row in load(tmp_path / "emoji")["train"]} == {"fluent", "fxemoji"}


def test_missing_tarballs_are_named(packages):
    by_package = {package.source.package: package for package in packages}
    google, fluent = by_package[emoji.GOOGLE], by_package[PACKAGES["fluent"]]
    with pytest.raises(ValueError, match=r"The style noto needs the tarball of @iconify-json/noto@1\.2\.9"):
        emoji.build([google], edition=2, styles=["noto"])
    with pytest.raises(ValueError, match="names of @iconify-json/fluent-emoji-flat: add its tarball"):
        emoji.build([google, fluent], edition=2)


def test_tarballs_of_the_other_edition_are_refused(packages, tmp_path):
    with pytest.raises(ValueError, match=r"fluent-emoji-1.* is not in --edition 1"):
        emoji.build(packages[1:2], edition=1)
    twitter = write_tarball(tmp_path, "emoji-datasource-twitter", emoji=emoji_json())
    with pytest.raises(ValueError, match=r"emoji-datasource-twitter-16.* is not in --edition 2"):
        emoji.build([emoji.read_package(twitter)], edition=2)
    empty = write_tarball(tmp_path, PACKAGES["noto"])
    with pytest.raises(ValueError, match=r"has no package/icons\.json"):
        emoji.read_package(empty)


def test_a_rerun_gives_the_same_bytes(tarballs, tmp_path):
    contents = []
    for name, paths in (("a", tarballs), ("b", tarballs[::-1])):
        run_main(tmp_path / name, paths, "--resolution", "16", "--holdout", "0.3", "--image_format", "webp")
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_whole_emoji_are_held_out_in_all_styles(packages):
    rows, _, _ = emoji.build(packages, 16, max_skin_tones=5, holdout=0.3, min_images=1, edition=2)
    keys = {split: {emoji.split_key(row["code_point"]) for row in rows[split]} for split in rows}
    assert keys["train"] and keys["validation"] and not keys["train"] & keys["validation"]
