"""Score a run, and segment your own pictures: probes, confusion matrix, Hungarian matching, scores, pictures.

    python eval.py runs/cause-scenes-dct8-0                              # scores, per-class table, pictures
    python eval.py runs/cause-scenes-dct8-0 --images holiday/ --out segmented/

A class that occurs neither in the labels nor in the prediction has no IoU: it is listed and not averaged. Clusters are
named by the one-to-one matching that puts most pixels right (Hungarian), found on the scored set itself; the pixels of
clusters left without a class count as errors. Letters: B batch, H W pixels, h w patches, D backbone width, K code width.
"""
import common  # isort: skip  (first: it answers --help before torch is loaded)

import argparse
import importlib
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from torch import nn
from tqdm import tqdm

# ---------------------------------------------------------------- probes

class ClusterProbe(nn.Module):
    """Cosine K-means on a frozen code, learned by gradient: `.clusters` (clusters,K) holds the centres.

    code (B,K,h,w) -> loss, cosines (B,clusters,h,w). The loss is minus the mean cosine of each pixel to its nearest
    centre, so the gradient reaches only that centre. The code is detached: the probe never moves the head.
    """

    def __init__(self, width, clusters):
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(clusters, width))

    def forward(self, code):
        cosines = torch.einsum("bkhw,ck->bchw", F.normalize(code.detach(), dim=1), F.normalize(self.clusters, dim=1))
        return -cosines.amax(1).mean(), cosines


class LinearProbe(nn.Conv2d):
    """A 1x1 convolution: code (B,K,h,w) -> logits (B,classes,h,w). Give it `code.detach()`.

    It starts at zero, as a convex problem may, and so draws no random number: with or without labels, everything else
    in a run stays the same bit for bit.
    """

    def __init__(self, width, classes):
        super().__init__(width, classes, 1)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def linear_loss(logits, label):
    """Cross-entropy of logits (B,C,h,w), upsampled to label (B,H,W): the mean over all pixels with 0 <= label < C.

    With several processes it is scaled such that the average over processes is the mean over all their pixels.
    Without any labelled pixel it is 0.
    """
    label = label.where((label >= 0) & (label < logits.shape[1]), -1)
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear")
    count = common.reduce_sum((label >= 0).sum()).clamp(min=1)
    return F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") * common.world() / count


# ---------------------------------------------------------------- metric

def confusion_matrix(pred, label, clusters, classes):
    """Counts (clusters,classes) int64 of pixels by predicted cluster (rows) and label (columns).

    pred, label: integer tensors of one shape. Labels outside [0,classes) are ignored; extra clusters are kept.
    Raises ValueError for other shapes, or a prediction outside [0,clusters).
    """
    if pred.shape != label.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and label {tuple(label.shape)} should have one shape")
    valid = (label >= 0) & (label < classes)
    pred, label = pred[valid].long(), label[valid].long()
    counts = torch.bincount(pred * classes + label, minlength=clusters * classes)    # int64: float32 stops at 2^24
    if len(counts) > clusters * classes or (pred < 0).any():
        raise ValueError(f"the prediction holds a cluster outside 0..{clusters - 1}")
    return counts.view(clusters, classes)


def hungarian(confusion):
    """(clusters,classes) counts -> (clusters,) the class of each cluster, -1 = unmatched.

    The one-to-one matching with the largest number of matched pixels.
    """
    rows, columns = linear_sum_assignment(confusion.cpu().numpy(), maximize=True)
    assignment = torch.full((len(confusion),), -1)
    assignment[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return assignment


def majority(confusion):
    """(clusters,classes) counts -> (clusters,) the most frequent class of each cluster (many-to-one), -1 = empty."""
    return confusion.argmax(1).where(confusion.sum(1) > 0, -1).cpu()


def matched(confusion, assignment):
    """Counts (clusters,classes) -> (classes+1,classes) by predicted class; the last row: clusters without a class."""
    classes = confusion.shape[1]
    rows = assignment.where(assignment >= 0, classes).to(confusion.device)
    return confusion.new_zeros(classes + 1, classes).index_add_(0, rows, confusion)


def scores(confusion):
    """Scores of a confusion (classes,classes), predictions as rows; rows beyond are predictions of no class: errors.

    -> dict of miou, accuracy (0..1); iou, precision (classes,), NaN for a class in neither prediction nor labels (iou)
    or never predicted (precision); pixels (classes,) int64. miou is the mean over the classes that have an IoU.
    """
    counts = confusion.cpu().double()
    classes = counts.shape[1]
    right, pixels, predicted = counts.diagonal(), counts.sum(0), counts.sum(1)[:classes]
    iou = right / (pixels + predicted - right)                                       # 0/0 = NaN: absent from both
    return {"miou": iou.nanmean().item(), "accuracy": (right.sum() / pixels.sum()).item(), "iou": iou,
            "precision": right / predicted, "pixels": pixels.long()}


# ---------------------------------------------------------------- k-means

@torch.no_grad()
def kmeans(features, clusters, restarts=10, iterations=100, seed=0):
    """Spherical K-means: (n,D) -> centres (clusters,D) of unit length, the best of `restarts` runs by inertia.

    Starts as k-means++ does (Arthur and Vassilvitskii 2007), with the distance 1 - cosine. One run alone moves by up to
    ten points of mIoU with its start, hence the restarts. Memory: n x D and chunks of 16,384 x clusters.
    """
    x = F.normalize(features.float(), dim=1)
    if len(x) < clusters:
        raise ValueError(f"{len(x)} feature vectors are too few for {clusters} clusters")
    generator = torch.Generator().manual_seed(seed)
    best, best_fit = None, -math.inf
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
        distance = (1 - x @ centres[0]).clamp(min=0)
        for _ in range(clusters - 1):                                                # far points are likelier starts
            cumulative = distance.double().cumsum(0)
            draw = torch.rand(1, generator=generator, dtype=torch.double).to(x.device) * cumulative[-1]
            centres = torch.cat([centres, x[torch.searchsorted(cumulative, draw).clamp(max=len(x) - 1)]])
            distance = torch.minimum(distance, (1 - x @ centres[-1]).clamp(min=0))
        fit = -math.inf
        for _ in range(iterations):
            cosine, nearest = map(torch.cat, zip(*((part @ centres.T).max(1) for part in x.split(16384))))
            if cosine.sum().item() <= fit + 1e-6 * len(x):
                break
            fit = cosine.sum().item()
            sums = torch.zeros_like(centres).index_add_(0, nearest, x)
            lost = torch.bincount(nearest, minlength=clusters) == 0                  # goes to the worst served points
            sums[lost] = x[cosine.argsort()[:int(lost.sum())]]
            centres = F.normalize(sums, dim=1)
        if fit > best_fit:
            best, best_fit = centres, fit
    return best


# ---------------------------------------------------------------- prediction

def padded(images, patch):
    """images (B,3,H,W) with sides rounded up to multiples of the patch by repeating the last row and column."""
    return F.pad(images, (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch), mode="replicate")


def patch_of(model):
    return getattr(model, "patch", getattr(getattr(model, "backbone", None), "patch", 1))


def encode(model, images, flip=False):
    """images (B,3,H,W) -> code (B,K,h,w); with flip, the mean of the code and the mirrored code of the mirrored image."""
    code = model(images)
    return (code + model(images.flip(-1)).flip(-1)) / 2 if flip else code


def upsample(x, size, shape):
    """x (B,C,h,w), a map of an image of sides `shape` after padding -> (B,C,*size), the image's own part of it."""
    (height, width), (inner_height, inner_width), (outer_height, outer_width) = size, *shape
    full = round(height * outer_height / inner_height), round(width * outer_width / inner_width)
    return F.interpolate(x, full, mode="bilinear")[..., :height, :width]


def chunks(count, size, limit=2 ** 26):
    """Slices over `count` channels such that one chunk of maps of this size stays under `limit` numbers."""
    step = max(1, limit // max(1, size[0] * size[1]))
    return [slice(i, i + step) for i in range(0, count, step)]


def arg_max(maps, size, shape):
    """maps (B,C,h,w) -> (B,H,W) index of the largest channel after bilinear upsampling, with bounded memory."""
    best = index = None
    for part in chunks(maps.shape[1], (size[0] * len(maps), size[1])):
        value, place = upsample(maps[:, part], size, shape).max(1)
        place += part.start
        index = place if best is None else torch.where(value > best, place, index)
        best = value if best is None else torch.maximum(value, best)
    return index


@torch.no_grad()
def predict(model, images, size=None, flip=False, crf=False):
    """Segment images (B,3,H,W), normalised, of any size -> {"cluster": (B,*size) int64, "linear": likewise or None}.

    The code is upsampled bilinearly to `size` (default: the image's), then each pixel takes the nearest centre by cosine,
    or the largest logit. Both scores are linear in the code but for the code's length, which no arg-max over centres
    sees, so the few score maps are upsampled instead of the wide code: exactly the same arg-max.
    crf: the fully connected CRF on log-softmax(alpha * cosine) and log-softmax(logits), alpha from the model, as published.
    """
    size = tuple(size or images.shape[-2:])
    large = padded(images, patch_of(model))
    shape = images.shape[-2:], large.shape[-2:]
    code = encode(model, large, flip)
    return label_pixels(model, code.float(), images, size, shape, crf)


def label_pixels(model, code, images, size, shape, crf):
    maps = {"cluster": torch.einsum("bkhw,ck->bchw", code, F.normalize(model.cluster.clusters, dim=1))}
    if model.linear is not None:
        maps["linear"] = model.linear(code)
    if not crf:
        return {"linear": None, **{head: arg_max(scores, size, shape) for head, scores in maps.items()}}
    from crf import dense_crf
    rgb = (images * common.STD.to(images) + common.MEAN.to(images)).clamp(0, 1)
    rgb = (F.interpolate(rgb, size, mode="bilinear") * 255).round().byte()
    result = {"linear": None}
    for head, low in maps.items():
        logits = upsample(low, size, shape)
        if head == "cluster":                                                        # here the length does matter
            parts = (upsample(code[:, part], size, shape) for part in chunks(code.shape[1], size, 2 ** 24))
            length = sum(part.square().sum(1, keepdim=True) for part in parts).sqrt()
            logits = getattr(model, "alpha", 2) * logits / length.clamp(min=1e-12)
        result[head] = dense_crf(rgb, logits.log_softmax(1)).argmax(1)
    return result


# ---------------------------------------------------------------- evaluation

def batches(dataset, size, workers=0, what="evaluation"):
    """This process's share of the batches of a data set, in order: lists of items. A batch is the same for any number
    of processes, so that rounding, and with it every count, is the same too."""
    keys = [list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size)]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys[common.rank()::common.world()], collate_fn=list,
                                         num_workers=workers, worker_init_fn=common.quiet_worker,
                                         generator=torch.Generator())
    return tqdm(loader, desc=what, unit="batch", leave=False, disable=common.rank() > 0, dynamic_ncols=True)


def same_size(items):
    """Consecutive items of one size, stacked: yields batches, since some protocols keep each photo's own shape."""
    for _, group in itertools.groupby(items, key=lambda item: (item["image"].shape, item["label"].shape)):
        group = list(group)
        yield {key: torch.stack([item[key] for item in group]) if torch.is_tensor(group[0][key])
               else [item[key] for item in group] for key in group[0]}


@torch.no_grad()
def evaluate(model, dataset, device, flip=False, crf=False, batch_size=16, workers=0, watch=(), what="evaluation"):
    """Count predictions against labels over a whole data set; only counts are kept, so memory does not grow.

    -> {"cluster": (clusters,classes) int64, "linear": (classes,classes) or None, "watched": (len(watch),clusters,classes)
    the counts of single images, "failed": [(path, reason)]}, summed over processes. predictions are rows.
    A data set without labels is counted as one class, so that the row sums say how many pixels a cluster has.
    model: images (B,3,H,W) -> code (B,K,h,w), with .cluster.clusters (clusters,K), .linear (module or None), .alpha.
    """
    model.eval()
    classes, clusters = max(dataset.classes, 1), len(model.cluster.clusters)
    counts = {"cluster": torch.zeros(clusters, classes, dtype=torch.long, device=device),
              "linear": torch.zeros(classes, classes, dtype=torch.long, device=device),
              "watched": torch.zeros(len(watch), clusters, classes, dtype=torch.long, device=device)}
    place, failed = {index: i for i, index in enumerate(watch)}, []
    linear = model.linear is not None and dataset.classes > 0
    for items in batches(dataset, batch_size, workers, what):
        failed += [(item["path"], item["error"]) for item in items if item["error"]]
        for batch in same_size([item for item in items if not item["error"]]):
            label = batch["label"].to(device) if dataset.classes else torch.zeros_like(batch["label"]).to(device)
            found = predict(model, batch["image"].to(device), label.shape[-2:], flip, crf)
            counts["cluster"] += confusion_matrix(found["cluster"], label, clusters, classes)
            if linear:
                counts["linear"] += confusion_matrix(found["linear"], label, classes, classes)
            for i, index in enumerate(batch["index"]):
                if index in place:
                    counts["watched"][place[index]] = confusion_matrix(found["cluster"][i], label[i], clusters, classes)
    counts = {name: common.reduce_sum(count) for name, count in counts.items()}
    everyone = [failed]
    if common.world() > 1:
        everyone = [None] * common.world()
        dist.all_gather_object(everyone, failed)
    return {**counts, "linear": counts["linear"] if linear else None, "failed": sorted(set(sum(everyone, [])))}


class Clustered(nn.Module):
    """Any encoder, images (B,3,H,W) -> features (B,D,h,w), with given cluster centres: what `evaluate` takes."""
    linear, alpha = None, 2

    def __init__(self, encoder, patch, centres):
        super().__init__()
        self.encoder, self.patch, self.cluster = encoder, patch, ClusterProbe(*centres.T.shape)
        self.cluster.clusters.data = centres

    def forward(self, images):
        return self.encoder(images)


@torch.no_grad()
def sample_features(encoder, dataset, device, patch=1, vectors=20000, images=500, seed=0):
    """About `vectors` features (n,D) at random places of at most `images` evenly spaced images."""
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int).tolist()
    each, found = -(-vectors // len(chosen)), []
    generator = torch.Generator().manual_seed(seed)
    for index in tqdm(chosen, desc="features for k-means", leave=False, disable=common.rank() > 0, dynamic_ncols=True):
        item = dataset[index]
        if not item["error"]:
            feats = encoder(padded(item["image"][None].to(device), patch)).flatten(2)[0].T.float()   # (h*w, D)
            found.append(feats[torch.randperm(len(feats), generator=generator)[:each].to(device)])
    if not found:
        raise OSError(f"no image of {dataset.name} could be read")
    return torch.cat(found)


def fit_clusters(encoder, images, clusters, device, patch=1, seed=0):
    """An encoder with spherical K-means centres fitted on its features of (a part of) the data set `images`."""
    centres = kmeans(sample_features(encoder, images, device, patch, seed=seed), clusters, seed=seed)
    if common.world() > 1:
        dist.broadcast(centres, 0)                                                   # the same to the last bit
    return Clustered(encoder, patch, centres)


def baseline(run, encoder, images, val, clusters, patch=1):
    """K-means on encoder(images) (B,D,h,w), fitted on the train split, scored on val -> confusion (clusters,classes)."""
    with torch.no_grad():
        model = fit_clusters(encoder, images, clusters, run.device, patch, run.args.seed)
    return evaluate(model, val, run.device, batch_size=16, workers=run.args.workers or 0, what="k-means")["cluster"]


# ---------------------------------------------------------------- pictures

def distinct(count, first=()):
    """`count` colours (count,3) uint8, each as far as can be from those before it in CIELAB, the given ones included."""
    steps = np.linspace(30, 250, 8)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = to_lab(rgb)
    chosen = list(np.asarray(first, float).reshape(-1, 3)) + [np.array([0, 0, 0]), np.array([255, 255, 255])]
    distance = ((lab[:, None] - to_lab(np.array(chosen))[None]) ** 2).sum(-1).min(1)
    colours = []
    for _ in range(count):
        i = distance.argmax()
        colours.append(rgb[i])
        distance = np.minimum(distance, ((lab - lab[i]) ** 2).sum(-1)) if distance.max() > 0 else distance + 1
    return np.array(colours, np.uint8).reshape(-1, 3)


def to_lab(rgb):
    """sRGB (n,3) in 0..255 -> CIELAB (n,3), where distances are roughly those the eye sees."""
    linear = (rgb / 255) ** 2.2
    xyz = linear @ np.array([[.4339, .2126, .0178], [.3762, .7152, .1095], [.1899, .0722, .8727]])   # white = 1
    f = np.cbrt(xyz)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def font(size):
    return ImageFont.load_default(size)


def text_size(text, size):
    left, top, right, bottom = font(size).getbbox(text)
    return math.ceil(right), math.ceil(bottom)


def naming(assignment, names, palette):
    """Name and colour of every cluster -> ids (clusters,), names, palette (n,3).

    A matched cluster takes the id, name and colour of its class; the others follow behind the classes.
    """
    free = (assignment < 0).nonzero().flatten().tolist()
    ids = assignment.clone()
    ids[free] = torch.arange(len(names), len(names) + len(free))
    palette = np.asarray(palette, np.uint8).reshape(-1, 3)[:len(names)]
    return ids, [*names, *(f"cluster {k}" for k in free)], np.concatenate([palette, distinct(len(free), palette)])


def paint(ids, palette):
    """ids (H,W) -> uint8 (H,W,3); -1 black."""
    return np.concatenate([palette, np.zeros((1, 3), np.uint8)])[np.asarray(ids)]


def outline(ids):
    """(H,W) -> bool (H,W): the pixel differs from its right or lower neighbour."""
    ids, edge = np.asarray(ids), np.zeros(np.shape(ids), bool)
    edge[:, :-1] |= ids[:, 1:] != ids[:, :-1]
    edge[:-1] |= ids[1:] != ids[:-1]
    return edge


def overlay(photo, ids, palette, strength=0.5):
    """photo uint8 (H,W,3) tinted by the colours of ids (H,W), with outlines at full resolution."""
    tinted = (1 - strength) * photo + strength * paint(ids, palette)
    tinted[outline(ids)] = paint(ids, palette)[outline(ids)] * 0.4 + 153             # bright edge in the segment's hue
    return tinted.round().astype(np.uint8)


def legend(names, palette, width, size=14):
    """A picture of colour swatches with names, in columns as wide as the longest name."""
    column = max([text_size(name, size)[0] for name in names], default=0) + 2 * size + 16
    columns = max(1, min(len(names), (width - 12) // column))
    rows, step = -(-len(names) // columns), size + 10
    sheet = Image.new("RGB", (max(width, column + 12), rows * step + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, colour) in enumerate(zip(names, palette)):
        x, y = 8 + i // rows * column, 8 + i % rows * step
        draw.rectangle((x, y, x + 2 * size - 6, y + size), tuple(map(int, colour)), "black")
        draw.text((x + 2 * size, y + size // 2), name, "black", font(size), "lm")
    return sheet


def sheet(rows, titles, names, palette, captions=()):
    """Rows of uint8 pictures (H,W,3) under column titles, with a caption over each row and a legend below."""
    size = 14
    cells = [[Image.fromarray(np.asarray(cell)) for cell in row] for row in rows]
    widths = [max([row[c].width for row in cells] + [text_size(title, size)[0]]) for c, title in enumerate(titles)]
    head = 22 if captions else 6
    key = legend(names, palette, max(sum(widths) + 6 * (len(titles) + 1), 320))
    picture = Image.new("RGB", (key.width, 24 + sum(max(c.height for c in row) + head for row in cells) + key.height),
                        "white")
    draw, y = ImageDraw.Draw(picture), 24
    for c, title in enumerate(titles):
        draw.text((6 + sum(widths[:c]) + 6 * c, 12), title, "black", font(size), "lm")
    for r, row in enumerate(cells):
        if captions:
            draw.text((6, y + head // 2), shorten(captions[r], picture.width - 12, 12), "black", font(12), "lm")
        for c, cell in enumerate(row):
            picture.paste(cell, (6 + sum(widths[:c]) + 6 * c, y + head - (0 if captions else 6)))
        y += max(cell.height for cell in row) + head
    picture.paste(key, (0, y))
    return picture


def shorten(text, width, size):
    """The end of a text, if it is too long for `width` pixels: the end of a path says more than its start."""
    while text_size(text, size)[0] > width and len(text) > 4:
        text = "..." + text[4:]
    return text


def confusion_picture(confusion, names, title):
    """(classes[+1],classes) counts, predictions as rows -> a picture: labels as rows, each row normalised to 100 %."""
    classes = confusion.shape[1]
    columns = [*names, "no class"][:classes + int(len(confusion) > classes and confusion[classes:].sum() > 0)]
    counts = confusion[:len(columns)].double().cpu().T.numpy()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size, cell = (14, 42) if classes <= 12 else (13, 30)
    left = max(text_size(name, size)[0] for name in names) + text_size("100.0 %", size)[0] + 24
    top = max(text_size(name, size)[0] for name in columns) + 58
    picture = Image.new("RGB", (max(left + cell * len(columns) + 12, text_size(title, 16)[0] + 20),
                                top + cell * classes + 12), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), title, "black", font(16))
    draw.text((10, 32), "rows: true class and its share of the pixels; columns: prediction, % of the row", "black",
              font(12))
    for c, name in enumerate(columns):
        width, height = text_size(name, size)
        label = Image.new("RGB", (width + 2, height + 6), "white")
        ImageDraw.Draw(label).text((0, 0), name, "black", font(size))
        label = label.rotate(90, expand=True)
        picture.paste(label, (left + c * cell + (cell - label.width) // 2, top - label.height - 4))
    for r, name in enumerate(names):
        y = top + r * cell
        amount = f"{100 * counts[r].sum() / max(counts.sum(), 1):.1f} %"
        draw.text((left - 10, y + cell // 2), amount, "grey", font(size), "rm")
        draw.text((left - 18 - text_size("100.0 %", size)[0], y + cell // 2), name, "black", font(size), "rm")
        for c in range(len(columns)):
            x, value = left + c * cell, share[r, c]
            shade = tuple(int(255 - value * (255 - low)) for low in (8, 64, 129))   # white to dark blue
            draw.rectangle((x, y, x + cell, y + cell), shade, "red" if r == c else "lightgrey")
            if value >= 0.005:
                draw.text((x + cell / 2, y + cell / 2), f"{100 * value:.0f}", "white" if value > 0.5 else "black",
                          font(size - 1), "mm")
    return picture


def photo_of(item):
    """uint8 (H,W,3) of a normalised item."""
    rgb = (item["image"] * common.STD + common.MEAN).clamp(0, 1) * 255
    return rgb.round().byte().permute(1, 2, 0).numpy()


def fit(picture, height=240, mode=Image.Resampling.NEAREST):
    """Resize a uint8 picture (H,W,3) to this height."""
    image = Image.fromarray(picture)
    return np.asarray(image.resize((max(1, round(image.width * height / image.height)), height), mode))


def samples(models, dataset, device, indices, namings, captions=(), flip=False, crf=False):
    """A sheet: photo, ground truth (where there are labels) and one prediction per (title, model), by cluster name.

    namings: what `naming` gave for each model; the colours of the first serve the ground truth.
    """
    rows, seen = [], {}
    for index in indices:
        item = dataset[index]
        label = item["label"].where(item["label"] < max(dataset.classes, 1), -1).numpy()
        row = [fit(photo_of(item), mode=Image.Resampling.BILINEAR)]
        if dataset.classes:
            row.append(fit(paint(label, namings[0][2])))
            seen |= {i: (namings[0][1][i], namings[0][2][i]) for i in np.unique(label[label >= 0]).tolist()}
        for (_, model), (ids, names, palette) in zip(models, namings):
            found = ids[predict(model, item["image"][None].to(device), label.shape, flip, crf)["cluster"][0].cpu()].numpy()
            row.append(fit(paint(found, palette)))
            seen |= {i: (names[i], palette[i]) for i in np.unique(found).tolist()}
        rows.append(row)
    names, palette = zip(*(seen[i] for i in sorted(seen)))
    titles = ["photo", *["ground truth"] * (dataset.classes > 0), *(title for title, _ in models)]
    return sheet(rows, titles, names, palette, captions)


# ---------------------------------------------------------------- report

def table(results, names):
    """The text table of {title: scores}: per-class IoU and precision, mIoU and accuracy, in percent."""
    titles = list(results)
    width = max([len(name) for name in names] + [8])
    pixels = results[titles[0]]["pixels"]
    number = lambda x: f"{100 * x:6.1f}" if math.isfinite(x) else "     -"           # noqa: E731
    wide = max(16, *(len(title) + 2 for title in titles))
    lines = [" " * (width + 9) + "".join(f"{title:>{wide}}" for title in titles),
             f"{'':{width}} {'pixels %':>8}" + f"{'IoU  precision':>{wide}}" * len(titles)]
    for i, name in enumerate(names):
        lines.append(f"{name:{width}} {number(pixels[i].item() / max(pixels.sum().item(), 1)):>8}" + "".join(
            f"{number(r['iou'][i].item()):>{wide - 9}}   {number(r['precision'][i].item())}" for r in results.values()))
    for key, label in (("miou", "mIoU"), ("accuracy", "accuracy")):
        lines.append(f"{label:{width}} {'':>8}" + "".join(f"{number(r[key]):>{wide - 9}}{'':9}" for r in results.values()))
    absent = {title: [n for n, x in zip(names, r["iou"].tolist()) if math.isnan(x)] for title, r in results.items()}
    lines += [f"{title}: neither labelled nor predicted, not averaged: {', '.join(a)}" for title, a in absent.items() if a]
    return "\n".join(lines)


def plain(x):
    """Scores as JSON takes them: tensors as lists, NaN as null."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if torch.is_tensor(x) or isinstance(x, (list, tuple)):
        return [plain(value) for value in (x.tolist() if torch.is_tensor(x) else x)]
    return None if isinstance(x, float) and math.isnan(x) else x


def evenly(count, total):
    """`count` indices spread evenly over 0..total-1: which pictures are shown is a rule, not a choice."""
    return sorted({int((i + 0.5) * total / count) for i in range(min(count, total))})


def finish(run, model, images, val, encode=None):
    """The end of every training run: score it on val, print the table, write scores.json and the pictures.

    images: the train split, on which the baseline's K-means is fitted. encode: (B,3,H,W) -> features (B,D,h,w) for the
    baseline, default the model's backbone. Returns the exit code: 1 if some image could not be read, else 0.
    """
    if run.args.bench:
        return 0
    model.eval()
    patch, workers = patch_of(model), run.args.workers or 0
    result = evaluate(model, val, run.device, workers=workers)
    assignment = hungarian(result["cluster"]) if val.classes else torch.full((len(result["cluster"]),), -1)
    shown = {}
    if val.classes:
        shown["cluster"] = scores(matched(result["cluster"], assignment))
        if result["linear"] is not None:
            shown["linear"] = scores(result["linear"])
        raw = baseline(run, encode or model.backbone, images, val, run.args.clusters, patch)
        shown["kmeans"] = scores(matched(raw, hungarian(raw)))
    if run.rank == 0:
        write_report(run.folder, model, val, run.device, result, assignment, shown,
                     seconds=time.time() - os.path.getmtime(run.folder / "args.json"))
    return 1 if result["failed"] else 0


def write_report(folder, model, val, device, result, assignment, shown, **more):
    """Print the table; write scores.json, samples.png and confusion.png into the folder."""
    titles = {"cluster": "cluster", "linear": "linear probe", "kmeans": "K-means, raw"}
    ids, names, palette = naming(assignment, val.names, val.palette)
    print(f"{val.name} {val.split}: {len(val) - len(result['failed'])} images")
    if shown:
        print(table({titles.get(key, key): value for key, value in shown.items()}, val.names))
    else:
        print("the data set has no labels, so there are no scores; the pictures show what was found")
    for path, reason in result["failed"]:
        print(f"not scored: {path}: {reason}", file=sys.stderr)
    content = {**shown, **more, "names": val.names, "matching": assignment, "images": len(val),
               "failed": result["failed"], "versions": common.versions(torch.device(device))}
    common.write(folder / "scores.json", json.dumps(plain(content), indent=1).encode())
    samples([("prediction", model)], val, device, evenly(4, len(val)), [(ids, names, palette)]).save(
        folder / "samples.png")
    written = ["scores.json", "samples.png"]
    if shown:
        counts = matched(result["cluster"], assignment)
        confusion_picture(counts, val.names, f"{val.name}, clusters").save(folder / "confusion.png")
        written.append("confusion.png")
    print("wrote " + ", ".join(str(folder / name) for name in written))


# ---------------------------------------------------------------- runs

def load_run(folder, device="cpu", root=None, weights=None):
    """A trained run -> model (in eval mode, on the device), its options, its checkpoint.

    The model is rebuilt by the file of its method from the checkpoint's options alone. root, weights: where data and
    backbone lie on this machine, if elsewhere than at training. Raises FileNotFoundError or ValueError with one line.
    """
    checkpoint = common.load_checkpoint(folder)
    if checkpoint["method"] not in common.METHODS:
        raise ValueError(f"{folder} is a run of {checkpoint['method']!r}{common.nearest(checkpoint['method'], common.METHODS)}")
    args = argparse.Namespace(**checkpoint["args"])
    args.root, args.weights, args.out = root or args.root, weights or args.weights, str(folder)
    if checkpoint["model"] is None:
        raise ValueError(f"{folder} holds no trained model yet; continue it with --resume {folder}")
    model = importlib.import_module(checkpoint["method"]).Model(args)
    common.load_trained(model, checkpoint["model"], Path(folder) / "last.pt")
    return model.to(device).eval(), args, checkpoint
