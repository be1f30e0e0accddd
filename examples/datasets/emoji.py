"""Build the emoji data set: pictures in several styles on one background, labelled style/subgroup.

    python examples/datasets/emoji.py --output_dir data/emoji64
    python examples/datasets/emoji.py --edition 2 --output_dir data/emoji128
    python -c "from datasets import load_dataset; print(load_dataset('data/emoji64'))"

The first edition has Fluent 3D, Noto and Twemoji at 64 pixels. The second has eight styles, drawn from SVG except for
Fluent 3D, and needs `pip install resvg-py`. The pictures come from fixed versions of npm packages, downloaded with
`npm pack` or passed as `--tarballs`. The tarballs are read in memory: nothing is unpacked to disk. The result depends
only on the arguments.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType

from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageColor
from tqdm import tqdm

from dataset_folder import check_replaceable, write_dataset_folder


@dataclass(frozen=True)
class Source:
    """One npm package of pictures."""

    style: str
    package: str
    version: str
    license: str
    # The folder of the picture files inside the tarball. Without one the package is an icon set of Iconify: SVG in
    # package/icons.json by the icons' names, and, in some sets, package/chars.json with the names by code points.
    image_dir: str | None = None
    # Icon sets without a chars.json: the packages whose names theirs follow.
    named_like: tuple[str, ...] = ()


GOOGLE = "emoji-datasource-google"  # its emoji.json has the labels
FLUENT_LICENSE = (
    "Fluent Emoji, Copyright (c) Microsoft Corporation, MIT licence (https://github.com/microsoft/fluentui-emoji)"
)
NOTO_LICENSE = "Noto Emoji, Copyright Google LLC, Apache License 2.0 (https://github.com/googlefonts/noto-emoji)"
ATTRIBUTE = (
    "whoever passes these pictures on must name the authors and the licence and say what was changed (here: "
    "composited on a plain background and resized)"
)
TWEMOJI_LICENSE = (
    "Twemoji, Copyright Twitter, Inc and other contributors, graphics under CC-BY 4.0 "
    f"(https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji): {ATTRIBUTE}"
)
FLUENT_3D = Source(
    "fluent3d",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    f"{FLUENT_LICENSE}, packaged by LobeHub, MIT licence",
    "package/assets",
)

# The first edition, of files of 64 pixels (Fluent: 256), stays as it is for the models trained on it.
SOURCES = (
    FLUENT_3D,
    Source(
        "noto",
        GOOGLE,
        "16.0.0",
        f"{NOTO_LICENSE}; packaging and emoji.json by Cal Henderson, MIT licence",
        "package/img/google/64",
    ),
    Source(
        "twemoji",
        "emoji-datasource-twitter",
        "16.0.0",
        f"{TWEMOJI_LICENSE}; packaging by Cal Henderson, MIT licence",
        "package/img/twitter/64",
    ),
)

# The second edition, for any resolution: SVG wherever there is some. Fluent's 3D pictures exist as pixels only.
# Icon sets under CC-BY-SA (OpenMoji, the first EmojiOne) are left out: the whole set would have to be shared alike.
NAMES = ("@iconify-json/noto", "@iconify-json/twemoji")
SVG_SOURCES = (
    FLUENT_3D,
    Source(
        "fluent", "@iconify-json/fluent-emoji", "1.2.7", FLUENT_LICENSE, None, ("@iconify-json/fluent-emoji-flat",)
    ),
    Source("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", FLUENT_LICENSE),
    Source("noto", "@iconify-json/noto", "1.2.9", NOTO_LICENSE),
    Source("noto-v1", "@iconify-json/noto-v1", "1.2.5", f"{NOTO_LICENSE}, the designs before 2017", None, NAMES),
    Source("twemoji", "@iconify-json/twemoji", "1.2.5", TWEMOJI_LICENSE),
    Source(
        "fxemoji",
        "@iconify-json/fxemoji",
        "1.2.2",
        "Firefox OS Emoji, Copyright Mozilla Foundation, Apache License 2.0 (https://github.com/mozilla/fxemoji)",
    ),
    Source(
        "emojione",
        "@iconify-json/emojione",
        "1.2.3",
        "EmojiOne 2, Copyright EmojiOne, graphics under CC-BY 4.0 "
        f"(https://creativecommons.org/licenses/by/4.0/, https://github.com/EmojiTwo/emojitwo): {ATTRIBUTE}",
        None,
        NAMES,
    ),
)
EDITIONS = {1: SOURCES, 2: SVG_SOURCES}
RESOLUTIONS = {1: 64, 2: 128}
WEBP_QUALITY = 85  # the second edition's training split is then 24 MB, and its edges are clean
SOURCE_OF_PACKAGE = {source.package: source for source in (*SVG_SOURCES, *SOURCES)}

# Names in fxemoji that are neither Unicode's nor short names in emoji.json, or mean another emoji there: the short
# name of what is drawn, "-" for what is left out. Its smiling cats, which are foxes, are in no table on purpose.
FXEMOJI_NAMES = """
2hearts two_hearts, americasglobe earth_americas, asiaaustraliaglobe earth_asia, europeafricaglobe earth_africa,
anguish anguished, aok ok_hand, arrowrightwardsdownwards arrow_heading_down, arrowrightwardsupwards arrow_heading_up,
anticlockwiseupwardsanddownwardsarrows arrows_counterclockwise, backwithleftwardsarrow back,
endwithleftwardsarrow end, onarrowleftright on, soonwithrightarrow soon, topwithupwardsarrow top,
ballottboxwithballott ballot_box_with_ballot, banknotedollar dollar, banknoteeuro euro, banknotepound pound,
banknoteyen yen, beachumbrella beach_with_umbrella, bellcancellation no_bell,
blackdownpointingdoublearrow arrow_double_down, blackuppointingdoublearrow arrow_double_up,
blackleftpointingarrow arrow_backward, blackrightpointingarrow arrow_forward, blackleftpointingdoublearrow rewind,
blackrightpointingdoublearrow fast_forward, downpointingsmallredtrisngle arrow_down_small,
uppointingsmallredtrisngle arrow_up_small, blackquestionmark question, blackskullcrossbones skull_and_crossbones,
blackwaving waving_black_flag, blonde person_with_blond_hair, bolt zap, bookmarktab bookmark_tabs, bow ribbon,
bowing bow, bride bride_with_veil, bunny rabbit, bunny-ears dancers, bunnyside rabbit2, cat cat, catside cat2, dog dog,
dogside dog2, tiger tiger, tigerside tiger2, mouse mouse, mouseside mouse2, pigside pig2, leopardside leopard,
dragonhead dragon_face, dragonside dragon, pigsnout pig_nose, cellphone iphone,
chartdownwardstrend chart_with_downwards_trend, chartupwardstrend chart_with_upwards_trend,
chartupwardstrendyen chart, chilipepper hot_pepper, chineseflag cn, franceflag fr, greatbritainflag gb, italianflag it,
japanflag jp, koreaflag kr, russianflag ru, spanishflag es, clock12oclock clock12, clock12thirty clock1230,
clock1oclock clock1, clock1thirty clock130, clock2oclock clock2, clock2thirty clock230, clock3oclock clock3,
clock3thirty clock330, clock4oclock clock4, clock4thirty clock430, clock5thirty clock530, clock6oclock clock6,
clock6thirty clock630, clock7oclock clock7, clockwiserightwardsleftwardscirclearrows repeat,
clockwiserightwardsleftwardscirclearrowsone repeat_one, clockwisedownupcircledarrows arrows_clockwise,
closedmailboxlowered mailbox_closed, closedmailboxraised mailbox, openmailboxlowered mailbox_with_no_mail,
openmailboxraised mailbox_with_mail, confetti confetti_ball, construct construction_worker,
construction building_construction, contact bust_in_silhouette, contact2 busts_in_silhouette,
controlknob control_knobs, crying cry, devilhorns smiling_imp,
diamondshapewithdotinside diamond_shape_with_a_dot_inside, dissapointedrelief disappointed_relieved,
doubleexclaimationmark bangbang, eightspokedasterix eight_spoked_asterisk, exclaimationquestionmark interrobang,
heavyexclaimationmarksymbol exclamation, envelopedownarrowabove envelope_with_arrow, evergreen evergreen_tree,
fallingleaf fallen_leaf, leaffluttering leaves, fishcakeswirl fish_cake, fistedhand facepunch, flexbicep muscle,
floppydisk2 floppy_disk, forkknife knife_fork_plate, frontfacingchick hatched_chick, frown person_frowning,
pout person_with_pouting_face, frownmouth frowning, girlgirl two_women_holding_hands, guyguy two_men_holding_hands,
girlguy man_and_woman_holding_hands, gma older_woman, gpa older_man, grineyes smile, grinsquint laughing,
grinsweat sweat_smile, grintears joy, grinwide grinning, grinwideeyes smiley, guapimao man_with_gua_pi_mao,
halo innocent, hampster hamster, handheldvideocamera video_camera, hands open_hands, handup raising_hand,
headmassage massage, heartarrow cupid, heartgreen green_heart, heartpurple purple_heart, heartribbon gift_heart,
heartyellow yellow_heart, heavymultiplicationsymbol heavy_multiplication_x, heavylatincross latin_cross,
heels high_heel, high5 raised_hands, highspeedtrainbulletnose bullettrain_front, index point_up,
japaneseangrymask japanese_goblin, kiss -, kissclosedeyes kissing_closed_eyes, kisseyes kissing_smiling_eyes,
keyboardandmouse keyboard, leftwritinghand writing_hand, leftmagnifyingglass mag, rightmagnifyingglass mag_right,
lockandkey closed_lock_with_key, loudlycrying sob, lowerleftpen lower_left_ballpoint_pen, lowerleftpencil pencil2,
manltepiececlock mantelpiece_clock, mansshirt shirt, medicalmask mask, mensrunner athletic_shoe,
mensshoe mans_shoe, meridianglobe globe_with_meridians, monkeyhear hear_no_evil, monkeysee see_no_evil,
monkeyspeak speak_no_evil, negativesquaredlatincaptiala a, negativesquaredlatincaptialb b,
negativesquaredlatincaptialo o2, neutral neutral_face, nogesture no_good, okgesture ok_woman,
nooneunder18symbol underage, notebookdecorativecover notebook_with_decorative_cover, oldpersonalcomputer computer,
outbox outbox_tray, perservere persevere, phonerightarrowleft calling, pinkwallet purse, poo hankey,
potablewatersystem potable_water, pouting rage, present gift, racecar racing_car, raisedhandpartfingers spock-hand,
raisedhandsfingerssplayed raised_hand_with_fingers_splayed, reminder reminder_ribbon,
reversehandmiddlefinger middle_finger, speaker3soundwaves loud_sound, speakercancellation mute,
speakeronesoundwave sound, saggitarius sagittarius, sandals sandal, screamfear scream, silhouetteohjapan japan,
sixpointedstarwithdot six_pointed_star, sleuthspy sleuth_or_spy, smallfrown slightly_frowning_face,
smallsmile slightly_smiling_face, smileeyes blush, smiletongue yum, snowmountains snow_capped_mountain,
speechbubble speech_balloon, spurtingwhale whale, whale whale2, squaredup up, stormcloud lightning,
studiomic studio_microphone, sunglasses sunglasses, sunraincloud partly_sunny_rain, sunrays sunny,
sweatsplash sweat_drops, swimming swimmer, telephonereceiver2 telephone_receiver, ten keycap_ten, tennisball tennis,
thoughtbaloon thought_balloon, tie necktie, tired tired_face, tongueout stuck_out_tongue,
tongueoutwink stuck_out_tongue_winking_eye, tongueoutwink2 stuck_out_tongue_closed_eyes, toykotower tokyo_tower,
tramcar -, triangularflagonpost triangular_flag_on_post, turban man_with_turban, up point_up_2, down point_down,
left point_left, right point_right, videocasette vhs, waitress information_desk_person,
waningbibbousmoon waning_gibbous_moon, wave ocean, waving wave, whiteexclaimationmark grey_exclamation,
whitesunsmallcloud mostly_sunny, winking wink, womansshirt womans_clothes
"""

# Code points that change how a picture is drawn but not what it shows.
VARIATION_SELECTOR = "fe0f"
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
GENDER_AND_DIRECTION = {"2640", "2642", "27a1"}
ADULTS = {"1f468", "1f469", "1f9d1"}  # man, woman, person
JOINER = "200d"

# Microsoft draws no country flags: those in the Fluent package are Noto's pictures, under Noto's licence.
NOT_OF_THE_STYLE = {("fluent3d", "country-flag")}

# Subgroups in which a mirror makes some pictures wrong in some style: letters, digits and signs (also those on shops,
# calendars, medals, letter boxes, playing cards and banknotes, and the Zzz of sleepers), flags, maps, clocks, arrows.
# Left out on purpose, since a mirrored one passes for another of its subgroup: hands, faces, vehicles, moons.
NOT_MIRRORED = {
    "alphanum",
    "arrow",
    "av-symbol",
    "award-medal",
    "country-flag",
    "currency",
    "emotion",
    "face-sleepy",
    "flag",
    "game",
    "gender",
    "keycap",
    "mail",
    "money",
    "music",
    "office",
    "other-symbol",
    "place-building",
    "place-map",
    "punctuation",
    "religion",
    "subdivision-flag",
    "time",
    "transport-sign",
    "warning",
    "zodiac",
}


@dataclass(frozen=True)
class Emoji:
    """What emoji.json says about one picture, with or without a skin tone."""

    name: str
    subgroup: str
    base: str  # normalized code points without the skin tone
    is_skin_tone: bool
    order: int


@dataclass
class Package:
    """The parts of a tarball that are needed: encoded pictures by normalized code points, and emoji.json."""

    source: Source
    version: str
    path: Path
    images: dict[str, tuple[str, bytes]]  # code points -> (member path, encoded picture or SVG)
    emoji_json: list[dict] | None
    # Of icon sets alone:
    icons: dict[str, bytes] = field(default_factory=dict)  # name -> SVG
    aliases: dict[str, str] = field(default_factory=dict)  # another name -> name
    code_points: dict[str, str] = field(default_factory=dict)  # name or other name -> code points


def normalize_code_points(code_points: str) -> str:
    """The form shared by all packages: lower case, no leading zeros, no variation selector, joined by hyphens.

    >>> normalize_code_points("0023-FE0F-20E3")
    '23-20e3'
    """
    parts = (part.lstrip("0") for part in re.split("[-_]", code_points.lower()))
    return "-".join(part for part in parts if part != VARIATION_SELECTOR)


def split_key(code_points: str) -> str:
    """The emoji that a picture belongs to when the validation split is drawn.

    Skin tones, gender signs and directions are removed and man, woman and person are one in joined sequences, because
    those pictures are near copies of each other (the runner and the man running are often the same picture): one in
    each split would make the held-out loss look better than it is.
    """
    ignored = SKIN_TONES | GENDER_AND_DIRECTION
    parts = normalize_code_points(code_points).split("-")
    if len(parts) == 1:  # the female sign and the skin tones are emoji too
        return parts[0]
    if JOINER in parts:
        parts = ["1f9d1" if part in ADULTS else part for part in parts]
    return "-".join(part for part in parts if part not in ignored and part != JOINER)


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, on every machine and in every release of Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def read_labels(emoji_json: Sequence[dict]) -> dict[str, Emoji]:
    """Map normalized code points, those of skin tones and of older spellings included, to what they show."""
    labels = {}
    for entry in emoji_json:
        base = normalize_code_points(entry["unified"])
        subgroup = re.sub("[^a-z0-9]+", "-", entry["subcategory"].lower()).strip("-")  # names safe in shells and paths
        for variant, is_skin_tone in [(entry, False)] + [(v, True) for v in entry.get("skin_variations", {}).values()]:
            emoji = Emoji(entry["name"].lower(), subgroup, base, is_skin_tone, entry["sort_order"])
            for spelling in (variant["unified"], variant.get("non_qualified")):
                if spelling:
                    labels.setdefault(normalize_code_points(spelling), emoji)
    return labels


def read_package(path: Path) -> Package:
    """Read one npm tarball into memory; ValueError if it is damaged or not one of the known packages."""
    files, tables = {}, {}
    image_dirs = {source.image_dir for source in SOURCE_OF_PACKAGE.values()}
    table_paths = {f"package/{name}.json" for name in ("package", "emoji", "icons", "chars")}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.name in table_paths:
                    tables[PurePosixPath(member.name).stem] = json.load(tar.extractfile(member))
                elif str(PurePosixPath(member.name).parent) in image_dirs:
                    files[member.name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a complete npm tarball ({error}): delete it and try again.") from error
    name = tables.get("package", {}).get("name")
    if name not in SOURCE_OF_PACKAGE:
        raise ValueError(f"{path} is package {name!r}; pass one of {', '.join(sorted(SOURCE_OF_PACKAGE))}.")
    source = SOURCE_OF_PACKAGE[name]
    package = Package(source, tables["package"]["version"], path, {}, tables.get("emoji"))
    if source.image_dir is None:
        if "icons" not in tables:
            raise ValueError(f"{path} has no package/icons.json: delete it and try again.")
        read_icons(package, tables["icons"], tables.get("chars", {}))
    for member_path in sorted(files):  # sorted: of two spellings of one emoji (00ae-fe0f, ae-fe0f) the first wins
        if str(PurePosixPath(member_path).parent) == source.image_dir:
            package.images.setdefault(
                normalize_code_points(PurePosixPath(member_path).stem), (member_path, files[member_path])
            )
    return package


def read_icons(package: Package, icons: dict, chars: dict[str, str]) -> None:
    """
    Read the icons.json and chars.json of one of Iconify's sets into `package`, without hidden icons, which the set
    has given up.
    """
    box = {key: icons[key] for key in ("left", "top", "width", "height") if key in icons}
    for name, icon in icons["icons"].items():
        if not icon.get("hidden"):
            package.icons[name] = svg_document({**box, **icon})
    for alias, changes in icons.get("aliases", {}).items():
        name = changes["parent"]
        if name not in package.icons:
            continue
        if set(changes) == {"parent"}:
            package.aliases[alias] = name
        else:  # flipped, or with a box of its own: a picture by itself
            package.icons[alias] = svg_document({**box, **icons["icons"][name], **changes})
    for code_points, name in sorted(chars.items()):
        if package.aliases.get(name, name) in package.icons:
            package.code_points[name] = normalize_code_points(code_points)
            add_icon(package, package.aliases.get(name, name), package.code_points[name])


def add_icon(package: Package, name: str, code_points: str) -> None:
    package.images.setdefault(code_points, (f"package/icons.json#{name}", package.icons[name]))


def svg_document(icon: dict) -> bytes:
    """The SVG of one of Iconify's icons: turned and flipped as it says, centred on a square.

    >>> svg_document({"body": "<path/>", "width": 20, "height": 10, "hFlip": True})[-81:].decode()
    'viewBox="0 -5 20 20"><g transform="translate(20 0) scale(-1 1)"><path/></g></svg>'
    """
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", 16), icon.get("height", 16)  # the defaults of the format
    side = max(width, height)
    transforms = []
    if icon.get("rotate"):
        transforms.append(f"rotate({90 * icon['rotate']} {left + width / 2:g} {top + height / 2:g})")
    if icon.get("hFlip"):
        transforms.append(f"translate({2 * left + width:g} 0) scale(-1 1)")
    if icon.get("vFlip"):
        transforms.append(f"translate(0 {2 * top + height:g}) scale(1 -1)")
    body = f'<g transform="{" ".join(transforms)}">{icon["body"]}</g>' if transforms else icon["body"]
    view_box = f"{left + (width - side) / 2:g} {top + (height - side) / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view_box}">{body}</svg>'
    ).encode()


def name_key(name: str) -> str:
    """One spelling for the names of an emoji that differ in case, accents, punctuation or the word for flags.

    >>> name_key("Côte d’Ivoire Flag"), name_key("flag-for-cote-divoire")
    ('flagcotedivoire', 'flagcotedivoire')
    """
    name = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode().replace("'", "")
    words = re.findall("[a-z0-9]+", name.replace("&", " and "))
    if "flag" in words:
        words = ["flag", *(word for word in words if word not in ("flag", "for", "the"))]
    return "".join(words)


def name_table(package: Package) -> dict[str, str]:
    """Map the names in an icon set with a chars.json to code points."""
    table = {name_key(name): code_points for name, code_points in package.code_points.items()}
    found = defaultdict(set)
    for name, code_points in package.code_points.items():
        found[package.aliases.get(name, name)].add(code_points)
    for name in (*package.icons, *package.aliases):
        meant = found[package.aliases.get(name, name)]
        if len(meant) == 1:  # one flag of Norway and Bouvet Island: its further names say nothing
            table.setdefault(name_key(name), *meant)
    return table


def name_icons(package: Package, packages: Sequence[Package], emoji_json: Sequence[dict]) -> None:
    """
    Find the code points of an icon set without a chars.json by the names of its icons: in the sets that it follows,
    then among Unicode's in emoji.json, then among its short names.
    """
    by_name = {other.source.package: other for other in packages}
    names, unicode_names, short_names = {}, {}, {}
    for entry in emoji_json:
        code_points = normalize_code_points(entry["unified"])
        names.setdefault(name_key(entry["name"]), code_points)
        if "-" not in code_points:
            unicode_names.setdefault(name_key(unicodedata.name(chr(int(code_points, 16)), "")), code_points)
        for short_name in entry["short_names"]:
            short_names.setdefault(name_key(short_name), code_points)
    tables = [names, unicode_names, short_names]
    for other in reversed(package.source.named_like):
        if other not in by_name:
            raise ValueError(f"{package.path} has no code points, only the names of {other}: add its tarball.")
        tables.insert(0, name_table(by_name[other]))
    if package.source.style == "fxemoji":
        pairs = (pair.split() for pair in FXEMOJI_NAMES.split(","))
        # "-" is no short name: found here, it keeps the name from being looked up in the other tables.
        tables.insert(0, {name_key(name): short_names.get(name_key(meant), "") for name, meant in pairs})
    spellings = defaultdict(list)
    for name in package.icons:
        spellings[name].append(name_key(name))
    for alias, name in package.aliases.items():
        spellings[name].append(name_key(alias))
    for name in sorted(spellings):
        code_points = next((table[key] for table in tables for key in spellings[name] if key in table), "")
        if code_points:
            add_icon(package, name, code_points)


def choose_sources(edition: int, styles: Sequence[str] | None = None) -> list[Source]:
    """The sources of an edition, or those of some of its styles."""
    return [source for source in EDITIONS[edition] if styles is None or source.style in styles]


def needed_sources(sources: Sequence[Source]) -> list[Source]:
    """The sources, and those that only give their names or labels."""
    packages = [source.package for source in sources]
    packages += [package for source in sources for package in source.named_like]
    return [SOURCE_OF_PACKAGE[package] for package in dict.fromkeys([*packages, GOOGLE])]


def fetch_tarballs(cache_dir: Path, sources: Sequence[Source] = SOURCES) -> list[Path]:
    """
    Fetch the packages with `npm pack`, which checks their checksums; those in `cache_dir` are kept. Raises
    FileNotFoundError without npm, RuntimeError if it fails.
    """
    paths = []
    for source in sources:
        path = cache_dir / f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
        paths.append(path)
        if path.is_file():
            continue
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(
                "npm is not installed: install it (Debian: apt install npm), or run `npm pack` for the packages "
                + ", ".join(f"{s.package}@{s.version}" for s in sources)
                + " on another machine and pass the files as --tarballs."
            )
        cache_dir.mkdir(parents=True, exist_ok=True)
        print(f"npm pack {source.package}@{source.version}", flush=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as workspace:  # so that a stopped download leaves no half file
            command = [npm, "pack", "--silent", "--pack-destination", workspace, f"{source.package}@{source.version}"]
            result = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
            os.replace(Path(workspace) / path.name, path)
    return paths


def import_resvg() -> ModuleType:
    """The package that draws SVG, or an ImportError that says how to install it."""
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError(
            "Drawing SVG needs resvg-py, which is not installed: pip install resvg-py, or the extra [emoji]"
        ) from error
    return resvg_py


def rasterize(svg: bytes, side: int) -> bytes:
    """Draw an SVG as a PNG of `side` pixels, transparent where it has nothing. Fonts of the system play no part."""
    return import_resvg().svg_to_bytes(svg_string=svg.decode(), width=side, height=side, skip_system_fonts=True)


def render(encoded: bytes, resolution: int, background: tuple[int, int, int]) -> Image.Image:
    """
    Decode a picture, composite it on `background`, centre it on a square and resize it; RGB.

    Compositing comes before resizing: the colour of fully transparent pixels, which is arbitrary, would otherwise
    bleed into the edges. SVG are drawn at twice the size: the mean of four pixels hides the seams between shapes.
    """
    if encoded.startswith(b"<svg"):
        encoded = rasterize(encoded, 2 * resolution)
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    canvas = canvas.convert("RGB")
    if side == resolution:
        return canvas
    if side % resolution == 0:
        return canvas.reduce(side // resolution)  # exact area average: no ringing around the hard edges of emoji
    return canvas.resize((resolution, resolution), Image.Resampling.LANCZOS)


def select_code_points(package: Package, labels: dict[str, Emoji], max_skin_tones: int) -> list[str]:
    """The package's labelled code points, with at most `max_skin_tones` skin tones of each emoji.

    Tones are ranked by a hash of their code points, so that each of the five appears equally often in the data set,
    the styles agree, and a larger cap adds pictures without changing those there.
    """
    chosen, tones = [], defaultdict(list)
    for code_points in package.images:
        emoji = labels.get(code_points)
        if emoji is not None and (package.source.style, emoji.subgroup) not in NOT_OF_THE_STYLE:
            (tones[emoji.base] if emoji.is_skin_tone else chosen).append(code_points)
    for variants in tones.values():
        chosen += sorted(variants, key=stable_fraction)[:max_skin_tones]
    return sorted(chosen, key=lambda code_points: (labels[code_points].order, code_points))


def build(
    packages: Sequence[Package],
    resolution: int = 64,
    max_skin_tones: int = 1,
    holdout: float = 0.05,
    min_images: int = 2,
    background: str = "white",
    edition: int = 1,
    styles: Sequence[str] | None = None,
    image_format: str = "png",
    quality: int = WEBP_QUALITY,
) -> tuple[dict[str, list[dict]], Features, dict]:
    """
    Make the rows of both splits (see the arguments of the command line), their features, and counts for the report.
    Raises ValueError for packages that are missing, given twice or of the other edition, or if nothing is left to
    write.
    """
    names = [package.source.package for package in packages]
    if len(set(names)) != len(names):
        raise ValueError(f"Pass each package only once, got {', '.join(str(package.path) for package in packages)}.")
    for package in packages:
        if package.source not in needed_sources(EDITIONS[edition]):
            raise ValueError(f"{package.path} is not in --edition {edition}: leave it out or pass the other edition.")
    emoji_json = next((package.emoji_json for package in packages if package.emoji_json), None)
    if emoji_json is None:
        raise ValueError("There is no emoji.json with the labels: add the tarball of emoji-datasource-google.")
    labels = read_labels(emoji_json)
    everything = packages
    packages = [package for package in everything if package.source in choose_sources(edition, styles)]
    for style in set(styles or ()) - {package.source.style for package in packages}:
        source = next(source for source in EDITIONS[edition] if source.style == style)
        raise ValueError(f"The style {style} needs the tarball of {source.package}@{source.version}.")
    for package in packages:
        if package.icons and not package.code_points:
            name_icons(package, everything, emoji_json)
    color = ImageColor.getrgb(background)[:3]
    selected = [
        (package, code) for package in packages for code in select_code_points(package, labels, max_skin_tones)
    ]

    rows, corrupt, seen, duplicates = {"train": [], "validation": []}, [], {}, Counter()
    for package, code_points in tqdm(selected, desc="emoji", unit="image"):
        member_path, encoded = package.images[code_points]
        try:
            picture = render(encoded, resolution, color)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            corrupt.append(f"{package.path.name}:{member_path}")
            tqdm.write(f"skipped {corrupt[-1]}: {error}", file=sys.stderr)
            continue
        # Some emoji share one picture (the flags of Norway and Bouvet Island): the first stands for all of them,
        # or copies of a training picture would be in the validation split.
        emoji, style = labels[code_points], package.source.style
        pixels = picture.tobytes()
        if pixels in seen:
            duplicates[seen[pixels], style] += 1
            continue
        seen[pixels] = style
        encoded = io.BytesIO()
        if image_format == "png":
            picture.save(encoded, "PNG")
        else:
            picture.save(encoded, "WEBP", quality=quality, method=6)
        split = "validation" if stable_fraction(split_key(emoji.base)) < holdout else "train"
        rows[split].append(
            {
                "image": {"bytes": encoded.getvalue(), "path": f"{style}-{code_points}.{image_format}"},
                "label": f"{style}/{emoji.subgroup}",
                "emoji": emoji.name,
                "code_point": code_points,
                "style": style,
            }
        )
        if edition > 1:
            rows[split][-1].update(subgroup=emoji.subgroup, may_mirror=emoji.subgroup not in NOT_MIRRORED)

    counts = Counter(row["label"] for row in rows["train"])
    all_names = sorted({row["label"] for split in rows.values() for row in split})
    names = [name for name in all_names if counts[name] >= min_images]
    if not names:
        raise ValueError(f"No class has {min_images} training images: lower --min_images or --holdout.")
    ids = {name: index for index, name in enumerate(names)}
    for split in rows:
        rows[split] = [{**row, "label": ids[row["label"]]} for row in rows[split] if row["label"] in ids]
    features = Features(
        image=ImageFeature(),
        label=ClassLabel(names=names),
        emoji=Value("string"),
        code_point=Value("string"),
        style=Value("string"),
    )
    if edition > 1:
        features.update(subgroup=Value("string"), may_mirror=Value("bool"))
    report = {
        "splits": {split: Counter(row["style"] for row in rows[split]) for split in rows},
        "names": names,
        "left_out": {name: counts[name] for name in all_names if name not in ids},
        "unlabelled": sum(
            len(package.icons or package.images)
            - len({path for code_points, (path, _) in package.images.items() if code_points in labels})
            for package in packages
        ),
        "corrupt": corrupt,
        "duplicates": sum(count for (first, style), count in duplicates.items() if first == style),
        "duplicates_of_styles": {pair: count for pair, count in duplicates.items() if pair[0] != pair[1]},
        "packages": packages,
        "labels": next(package for package in everything if package.emoji_json),
    }
    return rows, features, report


def describe(report: dict) -> tuple[str, str]:
    """The data set's README.md body and its LICENSES.md."""
    packages = report["packages"]
    styles = [package.source.style for package in packages]
    table = "".join(
        f"| {split} | {' | '.join(str(counts[style]) for style in styles)} | {counts.total()} |\n"
        for split, counts in report["splits"].items()
    )
    left_out = ", ".join(f"{name} ({count})" for name, count in report["left_out"].items()) or "none"
    copies = "".join(
        f"- Pictures of {style} equal to one of {first}, left out: {count}.\n"
        for (first, style), count in report["duplicates_of_styles"].items()
    )
    card = (
        f"# Emoji\n\n"
        f"| split | {' | '.join(styles)} | all |\n|---|{'---|' * (len(styles) + 1)}\n{table}\n"
        f"- Classes: {len(report['names'])}, style/subgroup, ids in order of their names.\n"
        f"- Classes left out for want of training images (with how many there were): {left_out}.\n"
        f"- Pictures equal to another one of their style, left out: {report['duplicates']}.\n"
        f"{copies}"
        f"- Pictures of emoji that emoji.json does not know, left out: {report['unlabelled']}.\n"
        f"- Corrupt pictures, skipped: {len(report['corrupt'])}{''.join(f' {path}' for path in report['corrupt'])}.\n"
        "- `validation` holds whole emoji, in all styles, skin tones and genders.\n"
        "- Licences: see LICENSES.md.\n"
    )
    licenses = "# Licences of the pictures\n\n" + "".join(
        f"- `{package.source.style}` ({package.source.package} {package.version}): {package.source.license}.\n"
        for package in packages
    )
    labels = report["labels"]
    if labels not in packages:
        origin = f"{labels.source.package} {labels.version}"
        licenses += f"- Names and subgroups ({origin}): emoji.json by Cal Henderson, MIT licence.\n"
    return card, licenses


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the folder to write; an earlier build is replaced"
    )
    parser.add_argument(
        "--tarballs", type=Path, nargs="+", help="npm tarballs to read (default: download them with `npm pack`)"
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusers_pisdm" / "npm",
        help="where to keep downloaded tarballs (default: %(default)s)",
    )
    parser.add_argument(
        "--edition",
        type=int,
        choices=sorted(EDITIONS),
        default=1,
        help="1: three styles, at most 64 pixels; 2: eight styles, drawn from SVG at any resolution (except "
        "fluent3d), with the columns subgroup and may_mirror (default: %(default)s)",
    )
    parser.add_argument(
        "--styles",
        nargs="+",
        metavar="STYLE",
        help="only these styles (default: all of the edition: "
        + "; ".join(", ".join(source.style for source in sources) for sources in EDITIONS.values())
        + ")",
    )
    parser.add_argument("--resolution", type=int, help="pixels per side (default: 64 in edition 1, 128 in edition 2)")
    parser.add_argument("--format", choices=("parquet", "imagefolder"), default="parquet")
    parser.add_argument("--image_format", choices=("png", "webp"), default="png", help="WebP is lossy, PNG is not")
    parser.add_argument("--quality", type=int, help=f"WebP quality, 0 to 100 (default: {WEBP_QUALITY})")
    parser.add_argument(
        "--max_skin_tones",
        type=int,
        default=1,
        help="skin tones to keep per emoji and style, besides the yellow one (default: %(default)s, with which a "
        "third of the pictures show people; all tones would make it 60%%, without adding new shapes)",
    )
    parser.add_argument(
        "--holdout", type=float, default=0.05, help="share of emoji held out for validation (default: %(default)s)"
    )
    parser.add_argument(
        "--min_images",
        type=int,
        default=2,
        help="leave out classes with fewer training images (default: %(default)s, which drops 6 of 294 classes; 4 "
        "would drop 23, including monkey faces and hats)",
    )
    parser.add_argument("--background", default="white", help="colour behind the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.styles or ()) - {source.style for source in EDITIONS[args.edition]})
    if unknown:
        known = ", ".join(source.style for source in EDITIONS[args.edition])
        parser.error(f"--styles {' '.join(unknown)}: --edition {args.edition} has {known}")
    if args.resolution is None:
        args.resolution = RESOLUTIONS[args.edition]
    if args.edition == 1 and args.resolution > RESOLUTIONS[1]:
        parser.error(f"--resolution {args.resolution} would upscale pictures of 64 pixels: add --edition 2")
    if args.quality is None:
        args.quality = WEBP_QUALITY
    elif args.image_format != "webp":
        parser.error("--quality is for --image_format webp")
    if not 0 <= args.quality <= 100:
        parser.error(f"--quality must be in [0, 100], got {args.quality}")
    if args.resolution < 1:
        parser.error(f"--resolution must be at least 1, got {args.resolution}")
    if args.max_skin_tones < 0:
        parser.error(f"--max_skin_tones must be at least 0, got {args.max_skin_tones}")
    if not 0 <= args.holdout < 1:
        parser.error(f"--holdout must be in [0, 1), got {args.holdout}")
    if args.min_images < 1:
        parser.error(f"--min_images must be at least 1, got {args.min_images}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        check_replaceable(args.output_dir)
        sources = choose_sources(args.edition, args.styles)
        if any(source.image_dir is None for source in sources):
            import_resvg()  # before the download
        paths = args.tarballs or fetch_tarballs(args.cache_dir, needed_sources(sources))
        packages = [read_package(path) for path in paths]
        packages.sort(key=lambda package: package.source.style)
        rows, features, report = build(
            packages,
            args.resolution,
            args.max_skin_tones,
            args.holdout,
            args.min_images,
            args.background,
            args.edition,
            args.styles,
            args.image_format,
            args.quality,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    card, licenses = describe(report)
    write_dataset_folder(args.output_dir, rows, features, card, licenses, args.format)
    print(card)
    print(licenses)
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    main()
