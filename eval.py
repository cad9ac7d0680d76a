"""Score a run, and segment your own pictures: probes, confusion matrix, Hungarian matching, scores, pictures.

    python eval.py RUN                                      scores, per-class table, pictures
    python eval.py RUN RUN RUN --markdown                   runs side by side, mean and deviation over seeds
    python eval.py --arch vits8 --data coco27 --root DIR    a raw backbone: K-means and linear probe
    python eval.py RUN --images holiday --out segmented     your own pictures

A class that occurs neither in the labels nor in the prediction has no IoU: it is listed and not averaged.
Clusters are named by the one-to-one matching that puts most pixels right (Hungarian), found on the scored set
itself; pixels of clusters left without a class count as errors.

The method is in the first third (probes, metric, k-means, prediction, evaluation); pictures, your own images
and the command line follow. Letters: B batch, H W pixels, h w patches, D backbone width, K code width, C
classes.
"""
import common

import argparse
import collections
import importlib
import io
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

import data
from crf import dense_crf

# ---------------------------------------------------------------- probes

class ClusterProbe(nn.Module):
    """Cosine K-means on a frozen code, learned by gradient: `.clusters` (clusters,K) holds the centres.

    code (B,K,h,w) -> loss, cosines (B,clusters,h,w). The loss is minus the mean cosine of each pixel to its
    nearest centre, so the gradient reaches only that centre. The code is detached: the probe never moves the
    head."""

    def __init__(self, width, clusters):
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(clusters, width))

    def forward(self, code):
        code, centres = F.normalize(code.detach(), dim=1), F.normalize(self.clusters, dim=1)
        cosines = torch.einsum("bkhw,ck->bchw", code, centres)
        return -cosines.amax(1).mean(), cosines


class LinearProbe(nn.Conv2d):
    """A 1x1 convolution: code (B,K,h,w) -> logits (B,classes,h,w). Give it `code.detach()`.

    It starts at zero, as a convex problem may, and so draws no random number: with or without labels,
    everything else in a run stays the same bit for bit."""

    def __init__(self, width, classes):
        super().__init__(width, classes, 1)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def linear_loss(logits, label):
    """Mean cross-entropy of logits (B,C,h,w), upsampled to label (B,H,W), over pixels with 0 <= label < C.

    With several processes it is scaled such that the mean over processes is the mean over all their pixels.
    Without any labelled pixel it is 0."""
    label = label.where((label >= 0) & (label < logits.shape[1]), -1)
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear")
    count = common.reduce_sum((label >= 0).sum()).clamp(min=1)
    return F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") * common.world() / count


# ---------------------------------------------------------------- metric

def confusion_matrix(pred, label, clusters, classes):
    """Counts (clusters,classes) int64 of pixels by predicted cluster (rows) and label (columns).

    pred, label: integer tensors of one shape. Labels outside [0,classes) are ignored; extra clusters are
    kept. Raises ValueError for other shapes, or a prediction outside [0,clusters).

    Two clusters, two classes, four pixels, of which the last has no label:
    >>> confusion_matrix(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, -1]), clusters=2, classes=2)
    tensor([[0, 1],
            [2, 0]])
    """
    if pred.shape != label.shape:
        raise ValueError(f"prediction {tuple(pred.shape)}, label {tuple(label.shape)}: expected one shape")
    valid = (label >= 0) & (label < classes)
    pred, label = pred[valid].long(), label[valid].long()
    if len(pred) and (pred.min() < 0 or pred.max() >= clusters):
        raise ValueError(f"the prediction holds a cluster outside 0..{clusters - 1}")
    # int64: float32 stops at 2^24
    counts = torch.bincount(pred * classes + label, minlength=clusters * classes)
    return counts.view(clusters, classes)


def hungarian(confusion):
    """(clusters,classes) counts -> (clusters,) the class of each cluster, -1 = unmatched.

    The one-to-one matching with the largest number of matched pixels; one of three clusters is left over:
    >>> hungarian(torch.tensor([[0, 5], [9, 0], [8, 4]]))
    tensor([ 1,  0, -1])
    """
    rows, columns = linear_sum_assignment(confusion.cpu().numpy(), maximize=True)
    assignment = torch.full((len(confusion),), -1)
    assignment[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return assignment


def majority(confusion):
    """(clusters,classes) counts -> (clusters,) the most frequent class of each, many-to-one; -1 = empty."""
    return confusion.argmax(1).where(confusion.sum(1) > 0, -1).cpu()


def matched(confusion, assignment):
    """Counts by cluster -> (classes+1,classes) by predicted class; the last row: clusters without one."""
    classes = confusion.shape[1]
    rows = assignment.where(assignment >= 0, classes).to(confusion.device)
    return confusion.new_zeros(classes + 1, classes).index_add_(0, rows, confusion)


def scores(confusion):
    """Scores of a confusion (classes,classes), predictions as rows; more rows are predictions of no class.

    -> dict of miou, accuracy (0..1); iou, precision (classes,), NaN for a class in neither prediction nor
    labels (iou) or never predicted (precision); pixels (classes,) int64. miou is the mean over the classes
    that have an IoU.

    >>> found = scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))       # the third class occurs nowhere
    >>> found["iou"].tolist(), found["miou"], found["accuracy"]
    ([0.75, 0.8, nan], 0.775, 0.875)
    """
    counts = confusion.cpu().double()
    classes = counts.shape[1]
    right, pixels, predicted = counts.diagonal(), counts.sum(0), counts.sum(1)[:classes]
    iou = right / (pixels + predicted - right)  # 0/0 = NaN: absent from both
    return {"miou": iou.nanmean().item(), "accuracy": (right.sum() / pixels.sum()).item(), "iou": iou,
            "precision": right / predicted, "pixels": pixels.long()}


# ---------------------------------------------------------------- k-means

@torch.no_grad()
def kmeans(features, clusters, restarts=10, iterations=100, seed=0):
    """Spherical K-means: (n,D) -> unit centres (clusters,D), the best of `restarts` runs by inertia.

    Starts as k-means++ does (Arthur and Vassilvitskii 2007), with the distance 1 - cosine. One run alone
    moves by up to ten points of mIoU with its start, hence the restarts. Memory: n x D and 16,384 x clusters.
    """
    x = F.normalize(features.float(), dim=1)
    if len(x) < clusters:
        raise ValueError(f"{len(x)} feature vectors are too few for {clusters} clusters")
    generator = torch.Generator().manual_seed(seed)
    best, best_fit = None, -math.inf
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
        distance = (1 - x @ centres[0]).clamp(min=0)
        for _ in range(clusters - 1):  # far points are likelier starts
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
            lost = torch.bincount(nearest, minlength=clusters) == 0  # goes to the worst served points
            if lost.any():
                sums[lost] = x[cosine.topk(int(lost.sum()), largest=False).indices]
            centres = F.normalize(sums, dim=1)
        if fit > best_fit:
            best, best_fit = centres, fit
    return best


# ---------------------------------------------------------------- prediction

def padded(images, patch):
    """images (B,3,H,W), sides rounded up to multiples of the patch by repeating the last row and column."""
    return F.pad(images, (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch), mode="replicate")


def patch_of(model):
    return getattr(model, "patch", getattr(getattr(model, "backbone", None), "patch", 1))


def encode(model, images, flip=False, tile=None):
    """images (B,3,H,W) of any size -> code (B,K,h,w), which covers the `padded` images.

    flip: the mean of the code and the mirrored code of the mirrored image. tile: in overlapping squares of
    that many pixels, blended, for images whose attention would not fit into memory."""
    patch, total, weight = patch_of(model), None, None
    images = padded(images, patch)
    if flip:
        return (encode(model, images, tile=tile) + encode(model, images.flip(-1), tile=tile).flip(-1)) / 2
    height, width = images.shape[-2:]
    if not tile or max(height, width) <= tile:
        return model(images).float()
    (tops, rows), (lefts, columns) = (tile_positions(side, tile, patch) for side in (height, width))
    for top, left in itertools.product(tops, lefts):
        code = model(images[..., top:top + rows, left:left + columns]).float()
        cell = rows // code.shape[-2]  # pixels per cell of the code
        ramp = tile_ramp(top, rows, height, tile, cell)[:, None] * tile_ramp(left, columns, width, tile, cell)
        if total is None:
            total = code.new_zeros(*code.shape[:2], height // cell, width // cell)
            weight = code.new_zeros(height // cell, width // cell)
        place = (..., slice(top // cell, (top + rows) // cell), slice(left // cell, (left + columns) // cell))
        total[place] += code * ramp.to(code)
        weight[place] += ramp.to(code)
    return total / weight


def tile_positions(side, tile, patch):
    """Starts (multiples of the patch) and length of the tiles of one side, which overlap by a quarter."""
    length = min(side, max(tile // patch, 4) * patch)
    last = side - length
    count = -(-last // max(patch, length * 3 // 4)) + 1
    return sorted({last * i // max(count - 1, 1) // patch * patch for i in range(count)} | {last}), length


def tile_ramp(start, length, side, tile, cell):
    """Weight of each cell along one side of a tile: 0 at a cut, where context is missing, a ramp, then 1."""
    x = (torch.arange(length // cell) + 0.5) * cell
    left = x if start else torch.full_like(x, math.inf)
    right = length - x if start + length < side else torch.full_like(x, math.inf)
    margin = min(tile, length) / 16
    return ((torch.minimum(left, right) - margin) / (2 * margin)).clamp(1e-6, 1)


def upsample(x, size, shape):
    """x (B,C,h,w), map of an image of sides `shape` (before, after padding) -> image part (B,C,*size)."""
    full = [round(side * outer / inner) for side, inner, outer in zip(size, *shape)]
    return F.interpolate(x, full, mode="bilinear")[..., :size[0], :size[1]]


def chunks(count, size, limit=2 ** 26):
    """Slices over `count` channels such that one chunk of maps of this size stays under `limit` numbers."""
    step = max(1, limit // max(1, size[0] * size[1]))
    return [slice(i, i + step) for i in range(0, count, step)]


def arg_max(maps, size, shape):
    """maps (B,C,h,w) -> (B,H,W) arg-max over channels after bilinear upsampling, with bounded memory."""
    best = index = None
    for part in chunks(maps.shape[1], (size[0] * len(maps), size[1])):
        value, place = upsample(maps[:, part], size, shape).max(1)
        place += part.start
        index = place if best is None else torch.where(value > best, place, index)
        best = value if best is None else torch.maximum(value, best)
    return index


@torch.no_grad()
def predict(model, images, size=None, flip=False, crf=False, tile=None):
    """Segment normalised images (B,3,H,W) of any size -> {"cluster": (B,*size) int64, "linear": ... or None}.

    The code is upsampled bilinearly to `size` (default: the image's), then each pixel takes the nearest
    centre by cosine, or the largest logit. Both scores are linear in the code but for the code's length,
    which no arg-max over centres sees: the few score maps are upsampled instead of the wide code, with the
    same result.
    flip, tile: see `encode`. crf: the fully connected CRF on log-softmax(alpha * cosine), with the model's
    alpha, and on log-softmax(logits), as published."""
    size = tuple(size or images.shape[-2:])
    large = padded(images, patch_of(model))
    shape = images.shape[-2:], large.shape[-2:]
    code = encode(model, large, flip, tile)                                                   # (B,K,h,w)
    maps = {"cluster": torch.einsum("bkhw,ck->bchw", code, F.normalize(model.cluster.clusters, dim=1))}
    if model.linear is not None:
        maps["linear"] = model.linear(code)
    result = {"linear": None}
    if not crf:
        return result | {head: arg_max(low, size, shape) for head, low in maps.items()}
    rgb = (images * data.STD.to(images) + data.MEAN.to(images)).clamp(0, 1)
    rgb = (F.interpolate(rgb, size, mode="bilinear") * 255).round().byte()
    for head, low in maps.items():
        logits = upsample(low, size, shape)
        if head == "cluster":  # here the length does matter
            parts = (upsample(code[:, part], size, shape) for part in chunks(code.shape[1], size, 2 ** 24))
            length = sum(part.square().sum(1, keepdim=True) for part in parts).sqrt()
            logits = getattr(model, "alpha", 2) * logits / length.clamp(min=1e-12)
        one = 1 if rgb.device.type == "cpu" else len(rgb)  # a CPU's cache holds one image
        result[head] = torch.cat([dense_crf(a, b).argmax(1) for a, b in
                                  zip(rgb.split(one), logits.log_softmax(1).split(one))])
    return result


# ---------------------------------------------------------------- evaluation

def progress(items, what, unit):
    return tqdm(items, what, unit=unit, leave=False, disable=common.rank() > 0, dynamic_ncols=True)


def batches(dataset, size, workers=0, what="evaluation"):
    """This process's share of the batches of a data set, in order, as lists of items.

    A batch is the same for any number of processes, so that rounding, and with it every count, is too."""
    keys = [list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=keys[common.rank()::common.world()], collate_fn=list, num_workers=workers,
        worker_init_fn=common.quiet_worker, generator=torch.Generator())  # its own: ours stays untouched
    return progress(loader, what, "batch")


def same_size(items):
    """Consecutive items of one size as batches: some protocols keep each photo's own shape."""
    for _, group in itertools.groupby(items, key=lambda item: (item["image"].shape, item["label"].shape)):
        yield torch.utils.data.default_collate(list(group))


@torch.no_grad()
def evaluate(model, dataset, device, flip=False, crf=False, batch_size=16, workers=0, watch=(),
             what="evaluation"):
    """Count predictions against labels over a whole data set; only counts are kept, so memory does not grow.

    -> {"cluster": (clusters,classes) int64, "linear": (classes,classes) or None, "watched":
    (len(watch),clusters,classes) the counts of single images, "failed": [(path, reason)]}, summed over
    processes. predictions are rows. A data set without labels is counted as one class, so that the row sums
    say how many pixels a cluster has. model: images (B,3,H,W) -> code (B,K,h,w), with .cluster.clusters
    (clusters,K), .linear (module or None), .alpha."""
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
            label = batch["label"].to(device)
            label = label if dataset.classes else torch.zeros_like(label)
            found = predict(model, batch["image"].to(device), label.shape[-2:], flip, crf)
            counts["cluster"] += confusion_matrix(found["cluster"], label, clusters, classes)
            if linear:
                counts["linear"] += confusion_matrix(found["linear"], label, classes, classes)
            for pred, true, index in zip(found["cluster"], label, batch["index"].tolist()):
                if index in place:
                    counts["watched"][place[index]] = confusion_matrix(pred, true, clusters, classes)
    counts = {name: common.reduce_sum(count) for name, count in counts.items()}
    return {**counts, "linear": counts["linear"] if linear else None, "failed": collect(failed)}


def collect(failed):
    """[(path, reason)] of this process -> those of all processes, sorted."""
    everyone = [failed]
    if common.world() > 1:
        everyone = [None] * common.world()
        dist.all_gather_object(everyone, failed)
    return sorted(set(sum(everyone, [])))


class Clustered(nn.Module):
    """Any encoder, images (B,3,H,W) -> features (B,D,h,w), with given centres: what `evaluate` takes."""
    def __init__(self, encoder, patch, centres):
        super().__init__()
        self.linear, self.alpha = None, 2
        self.encoder, self.patch, self.cluster = encoder, patch, ClusterProbe(*centres.T.shape)
        self.cluster.clusters.data = centres

    def forward(self, images):
        return self.encoder(images)


@torch.no_grad()
def sample_points(encoder, dataset, device, patch=1, points=160, images=128, seed=0):
    """Features of random cells of the feature map of at most `images` evenly spaced images of a data set.

    -> features (n,points,D), labels at the cells' centres (n,points) with -1 = none, mean features of the
    images (n,D). Cells and not interpolated pixels: mixtures at borders would cost the baseline six points of
    mIoU on the scenes."""
    found, generator = [], torch.Generator().manual_seed(seed)
    for index in progress(evenly(images, len(dataset)), "features", "image"):
        item = dataset[index]
        if item["error"]:
            continue
        feats = encoder(padded(item["image"][None].to(device), patch))[0].float()  # (D, h, w)
        label = item["label"]
        rows, columns = (((torch.arange(n) + 0.5) * (-side % patch + side) / n).long() for n, side in
                         zip(feats.shape[1:], label.shape))  # pixel at the centre of each cell
        rows, columns = rows[rows < label.shape[0]], columns[columns < label.shape[1]]
        cell = torch.randint(len(rows) * len(columns), (points,), generator=generator)
        y, x = cell // len(columns), cell % len(columns)
        found.append((feats[:, y, x].T, label[rows[y], columns[x]].to(device), feats.mean((1, 2))))
    if not found:
        raise OSError(f"no image of {dataset.name} could be read")
    return tuple(map(torch.stack, zip(*found)))


def fit_probes(encoder, images, clusters, device, patch=1, seed=0, linear=False):
    """An encoder with probes fitted on its features of the data set `images` (a sample of it).

    -> `Clustered` with spherical K-means centres and, on request, a linear probe; counts (clusters,classes)
    of the sampled cells by cluster and label, or None without labels."""
    features, labels, _ = sample_points(encoder, images, device, patch, seed=seed)
    features, labels = features.flatten(0, 1), labels.flatten()
    model = Clustered(encoder, patch, kmeans(features, clusters, seed=seed))
    labelled = bool((labels >= 0).any())
    if linear and labelled:
        model.linear = fit_linear(features, labels, images.classes)
    if common.world() > 1:  # the same to the last bit
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
    nearest = (features @ model.cluster.clusters.T).argmax(1)
    return model, confusion_matrix(nearest, labels, clusters, images.classes) if labelled else None


@torch.no_grad()
def refit_clusters(run, model, images):
    """Move a trained model's cluster centres to spherical K-means of its codes on the train split `images`.

    No label is read. Probes that learn online drop small classes, since a centre that never wins never moves;
    all five methods may end with this step, and say so where the paper does not. The checkpoint is rewritten.
    """
    images.read_images = True  # cached features may have left it off
    model.eval()
    codes = sample_points(model, images, run.device, patch_of(model), seed=run.args.seed)[0].flatten(0, 1)
    model.cluster.clusters.data.copy_(kmeans(codes, len(model.cluster.clusters), seed=run.args.seed))
    run.save()


def fit_linear(features, labels, classes):
    """features (n,D), labels (n,), -1 = none -> LinearProbe, by logistic regression with L-BFGS."""
    features, labels = features[labels >= 0], labels[labels >= 0]
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / deviation
    probe = LinearProbe(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ probe.weight[:, :, 0, 0].T + probe.bias, labels)
        loss = loss + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    weight = probe.weight.data[:, :, 0, 0] / deviation  # for features as they come
    probe.bias.data -= weight @ mean
    probe.weight.data = weight[:, :, None, None]
    return probe


def baseline(run, encoder, images, val, clusters, patch=1):
    """K-means on encoder(images) (B,D,h,w) of the train split -> confusion (clusters,classes) on val."""
    model, _ = fit_probes(encoder, images, clusters, run.device, patch, run.args.seed)
    return evaluate(model, val, run.device, workers=run.args.workers or 0, what="k-means")["cluster"]


# ---------------------------------------------------------------- pictures

def distinct(count, first=()):
    """`count` colours (count,3) uint8, each as far as can be in CIELAB from all before it and `first`."""
    rgb = np.linspace(30, 250, 8)[np.indices((8, 8, 8)).reshape(3, -1).T]                     # (512,3)
    lab, taken = to_lab(rgb), np.concatenate([np.reshape(first, (-1, 3)), [[0] * 3, [255] * 3]])
    distance = ((lab[:, None] - to_lab(taken)) ** 2).sum(-1).min(1)
    colours = []
    for _ in range(count):
        i = distance.argmax()
        colours.append(rgb[i])
        distance = np.minimum(distance, ((lab - lab[i]) ** 2).sum(-1)) if distance.max() > 0 else distance + 1
    return np.array(colours, np.uint8).reshape(-1, 3)


def to_lab(rgb):
    """sRGB (n,3) in 0..255 -> CIELAB (n,3), where distances are roughly those the eye sees."""
    xyz = (rgb / 255) ** 2.2 @ np.array(  # white = 1
        [[.4339, .2126, .0178], [.3762, .7152, .1095], [.1899, .0722, .8727]])
    f = np.cbrt(xyz)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def font(size):
    return ImageFont.load_default(size)


def text_width(text, size):
    return math.ceil(font(size).getbbox(text)[2])


def naming(assignment, names, palette):
    """Name and colour of every cluster -> ids (clusters,), names, palette (n,3).

    A matched cluster takes the id, name and colour of its class; the others follow behind the classes."""
    free = (assignment < 0).nonzero().flatten().tolist()
    ids = assignment.clone()
    ids[free] = torch.arange(len(names), len(names) + len(free))
    palette = np.asarray(palette, np.uint8).reshape(-1, 3)[:len(names)]
    palette = np.concatenate([palette, distinct(len(free), palette)])
    return ids, [*names, *(f"cluster {k}" for k in free)], palette


def paint(ids, palette):
    """ids (H,W) -> uint8 (H,W,3); -1 black."""
    return np.concatenate([palette, np.zeros((1, 3), np.uint8)])[np.asarray(ids)]


def overlay(photo, ids, palette):
    """photo uint8 (H,W,3) tinted by the colours of ids (H,W), with outlines at full resolution."""
    colour = paint(ids, palette)
    edge = (np.diff(ids, axis=0, append=ids[-1:]) != 0) | (np.diff(ids, axis=1, append=ids[:, -1:]) != 0)
    tinted = np.where(edge[..., None], 0.4 * colour + 153, 0.5 * colour + 0.5 * photo)  # edges: same hue
    return tinted.round().astype(np.uint8)


def legend(names, palette, width, size=14):
    """A picture of colour swatches with names, in columns as wide as the longest name."""
    column = max((text_width(name, size) for name in names), default=0) + 2 * size + 16
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
    """Rows of pictures as `fit` gives them under column titles, captions over the rows, a legend below."""
    widths = [max(text_width(title, 14), *(cell.width for cell in column))
              for title, column in zip(titles, zip(*rows))]
    *lefts, width = itertools.accumulate((w + 6 for w in widths), initial=6)
    head, gap = (22, 0) if captions else (0, 6)
    key = legend(names, palette, max(width, 320))
    height = 24 + sum(head + max(cell.height for cell in row) + gap for row in rows)
    picture = Image.new("RGB", (key.width, height + key.height), "white")
    draw, y = ImageDraw.Draw(picture), 24
    for x, title in zip(lefts, titles):
        draw.text((x, 12), title, "black", font(14), "lm")
    for row, text in zip(rows, captions or [""] * len(rows)):
        while text_width(text, 12) > picture.width - 12:  # the end of a path says more than its start
            text = "..." + text[4:]
        draw.text((6, y + 11), text, "black", font(12), "lm")
        for x, cell in zip(lefts, row):
            picture.paste(cell, (x, y + head))
        y += head + max(cell.height for cell in row) + gap
    picture.paste(key, (0, y))
    return picture


def confusion_picture(confusion, names, title,
                      note="rows: true class and its share of the pixels; columns: prediction, % of the row"):
    """Counts (classes[+1],classes), predictions as rows -> a picture: labels as rows, in % of the row."""
    classes = confusion.shape[1]
    columns = [*names, "no class"][:classes + int(len(confusion) > classes and confusion[classes:].sum() > 0)]
    counts = confusion[:len(columns)].double().cpu().T.numpy()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size, cell = (14, 42) if classes <= 12 else (13, 30)
    amount = text_width("100.0 %", size)  # as wide as any share of the pixels
    left = max(text_width(name, size) for name in names) + amount + 24
    top = max(text_width(name, size) for name in columns) + 58
    width = max(left + cell * len(columns) + 12, text_width(title, 16) + 24, text_width(note, 12) + 24)
    picture = Image.new("RGB", (width, top + cell * classes + 12), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), title, "black", font(16))
    draw.text((10, 32), note, "black", font(12))
    upwards = ImageFont.TransposedFont(font(size), Image.Transpose.ROTATE_90)
    for c, name in enumerate(columns):
        _, ascent, width, height = map(math.ceil, font(size).getbbox(name))
        x = left + c * cell + (cell - 6 - height) // 2 + ascent
        draw.text((x, top - 4 - width), name, "black", upwards)
    for r, name in enumerate(names):
        y = top + r * cell
        text = f"{100 * counts[r].sum() / max(counts.sum(), 1):.1f} %"
        draw.text((left - 10, y + cell // 2), text, "grey", font(size), "rm")
        draw.text((left - 18 - amount, y + cell // 2), name, "black", font(size), "rm")
        for c in range(len(columns)):
            x, value = left + c * cell, share[r, c]
            shade = tuple(int(255 - value * (255 - low)) for low in (8, 64, 129))  # white to dark blue
            draw.rectangle((x, y, x + cell, y + cell), shade, "lightgrey")
            if value >= 0.005:
                ink = "white" if value > 0.5 else "black"
                draw.text((x + cell / 2, y + cell / 2), f"{100 * value:.0f}", ink, font(size - 1), "mm")
    for r in range(classes):  # last: the frames stay whole
        x, y = left + r * cell, top + r * cell
        draw.rectangle((x, y, x + cell, y + cell), None, "red")
    return picture


def photo_of(item):
    """uint8 (H,W,3) of a normalised item."""
    rgb = (item["image"] * data.STD + data.MEAN).clamp(0, 1) * 255
    return rgb.round().byte().permute(1, 2, 0).numpy()


def fit(picture, height=240, mode=Image.Resampling.NEAREST):
    """uint8 (H,W,3) -> Pillow picture of this height."""
    image = Image.fromarray(picture)
    return image.resize((max(1, round(image.width * height / image.height)), height), mode)


def samples(models, dataset, device, indices, namings, captions=()):
    """A sheet of photo, ground truth (where there are labels) and one prediction per (title, model).

    namings: what `naming` gave for each model; the colours of the first serve the ground truth."""
    rows, seen = [], {}
    for index in indices:
        item = dataset[index]
        row = [fit(photo_of(item), mode=Image.Resampling.BILINEAR)]
        maps = [(item["label"], namings[0])] * (dataset.classes > 0)
        for (_, model), named in zip(models, namings):
            found = predict(model, item["image"][None].to(device), item["label"].shape)["cluster"][0].cpu()
            maps.append((named[0][found], named))
        for ids, (_, names, palette) in maps:
            row.append(fit(paint(ids, palette)))
            entries = [*zip(names, palette), ("not labelled", (0, 0, 0))]  # the last: -1
            seen |= {i: entries[i] for i in ids.unique().tolist()}
        rows.append(row)
    names, palette = zip(*(seen[i] for i in sorted(seen, key=lambda i: (i < 0, i))))
    titles = ["photo", *["ground truth"] * (dataset.classes > 0), *(title for title, _ in models)]
    return sheet(rows, titles, names, palette, captions)


# ---------------------------------------------------------------- report

def table(results, names):
    """The text table of {title: scores}: per-class IoU and precision, mIoU and accuracy, in percent."""
    if len(results) > 4:  # as wide as a terminal
        parts = list(results.items())
        return table(dict(parts[:4]), names) + "\n\n" + table(dict(parts[4:]), names)
    left, wide = max(8, *map(len, names)), max(16, *(len(title) + 2 for title in results))
    pixels = next(iter(results.values()))["pixels"].tolist()

    def percent(x):
        return f"{100 * x:6.1f}" if math.isfinite(x) else "     -"

    def line(name, share, cells):
        return f"{name:{left}} {share:>8}" + "".join(f"{cell:>{wide}}" for cell in cells)
    lines = [line("", "", results), line("", "pixels %", ["IoU  precision"] * len(results))]
    for i, name in enumerate(names):
        cells = [f"{percent(r['iou'][i].item())}   {percent(r['precision'][i].item())}"
                 for r in results.values()]
        lines.append(line(name, percent(pixels[i] / max(sum(pixels), 1)), cells))
    lines += [line(name, "", [percent(r[key]) + " " * 9 for r in results.values()])
              for name, key in (("mIoU", "miou"), ("accuracy", "accuracy"))]
    for title, r in results.items():
        absent = [name for name, x in zip(names, r["iou"].tolist()) if math.isnan(x)]
        if absent:
            lines.append(f"{title}: neither labelled nor predicted, not averaged: {', '.join(absent)}")
    return "\n".join(lines)


def plain(x):
    """Scores as JSON takes them: tensors as lists, NaN as null."""
    return json.loads(json.dumps(x, default=torch.Tensor.tolist), parse_constant=lambda name: None)


def evenly(count, total):
    """`count` indices spread evenly over 0..total-1: which pictures are shown is a rule, not a choice."""
    count = min(count, total)
    return [int((i + 0.5) * total / count) for i in range(count)]


def finish(run, model, images, val, encode=None):
    """The end of every training run: score it on val, print the table, write scores.json and the pictures.

    images: the train split, on which the baseline's K-means is fitted. encode: (B,3,H,W) -> features
    (B,D,h,w) for the baseline, default the model's backbone. Returns the exit code: 1 if some image could not
    be read, else 0."""
    if run.args.bench:
        return 0
    images.read_images = True  # the baseline looks at them again
    seconds = time.time() - os.path.getmtime(run.folder / "args.json") if run.rank == 0 else None
    result = evaluate(model, val, run.device, workers=run.args.workers or 0, watch=evenly(200, len(val)))
    shown = heads(result, val)
    if val.classes:
        raw = baseline(run, encode or model.backbone, images, val, run.args.clusters, patch_of(model))
        shown["kmeans"] = scores(matched(raw, hungarian(raw)))
    report(run.folder, model, val, run.device, result, shown, seconds=seconds)
    return 1 if result["failed"] else 0


def heads(result, val, suffix=""):
    """What `evaluate` counted -> {"cluster": scores, "linear": scores}, as far as there are labels."""
    shown = {}
    if val.classes:
        shown["cluster" + suffix] = scores(matched(result["cluster"], hungarian(result["cluster"])))
        if len(result["cluster"]) > val.classes:
            shown["majority" + suffix] = scores(matched(result["cluster"], majority(result["cluster"])))
        if result["linear"] is not None:
            shown["linear" + suffix] = scores(result["linear"])
    return shown


TITLES = {"majority": "majority vote", "linear": "linear probe", "kmeans": "K-means, raw"}


def report(folder, model, val, device, result, shown, prefix="", **more):
    """Process 0 prints the table of `shown`, writes scores.json, samples, best_and_worst and confusion.png.

    -> what `naming` gave."""
    assignment = hungarian(result["cluster"]) if val.classes else torch.full((len(result["cluster"]),), -1)
    named = ids, names, palette = naming(assignment, val.names, val.palette)
    if common.rank() > 0:
        return named
    print(f"\n{val.name} {val.split}, {len(val) - len(result['failed'])} images")
    print(table({TITLES.get(key, key): value for key, value in shown.items()}, val.names) if shown else
          "no labels, hence no scores; the pictures show what was found")
    for path, reason in result["failed"]:
        data.say(f"not scored: {path}: {reason}")
    content = {**shown, **more, "images": len(val), "failed": result["failed"], "classes": val.names,
               "names": names, "palette": palette.tolist(), "matching": ids,
               "versions": common.versions(torch.device(device))}
    path = folder / f"{prefix}scores.json"
    content = {**saved_scores(path), **plain(content)}  # a method's own rows and other variants stay
    folder.mkdir(parents=True, exist_ok=True)
    common.write(path, json.dumps(content, indent=1).encode())
    pictures = {"samples.png": samples([("prediction", model)], val, device, evenly(4, len(val)), [named])}
    if shown:
        right = torch.stack([matched(counts, assignment).diagonal().sum() for counts in result["watched"]])
        share = (right / result["watched"].sum((1, 2))).cpu()
        watched = evenly(len(share), len(val))
        order = [i for i in share.argsort(descending=True).tolist() if share[i].isfinite()]
        order = order if len(order) < 6 else order[:3] + order[-3:]
        if order:                                                 # else no labelled pixel was scored
            pictures["best_and_worst.png"] = samples(
                [("prediction", model)], val, device, [watched[i] for i in order], [named],
                [f"{100 * share[i]:.1f} % right: {val[watched[i]]['path']}" for i in order])
        pictures["confusion.png"] = confusion_picture(
            matched(result["cluster"], assignment), val.names,
            f"{val.name} {val.split}: clusters, named by Hungarian matching")
    for name, picture in pictures.items():
        write_png(folder / (prefix + name), picture)
    print("wrote " + ", ".join(str(folder / (prefix + name)) for name in ["scores.json", *pictures]))
    return named


def saved_scores(path):
    """What a scores.json holds, {} where there is none."""
    try:
        saved = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is damaged; delete it and run python eval.py {path.parent}")
    return saved


def saved_naming(saved):
    """What `naming` gave when a run was scored, from its scores.json."""
    return torch.tensor(saved["matching"]), saved["names"], np.array(saved["palette"], np.uint8)


def write_png(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    common.write(path, buffer.getbuffer())


# ---------------------------------------------------------------- runs

def load_run(folder, device="cpu", root=None, weights=None):
    """A trained run -> model (in eval mode, on the device), its options, its checkpoint.

    The model is rebuilt by the file of its method from the checkpoint's options alone. root, weights: where
    data and backbone lie on this machine, if elsewhere than at training. Raises FileNotFoundError or
    ValueError with one line."""
    checkpoint = common.load_checkpoint(folder)
    if checkpoint["method"] not in common.METHODS:
        raise ValueError(f"{folder}: {checkpoint['method']!r} is none of {', '.join(common.METHODS)}")
    if checkpoint["model"] is None:
        raise ValueError(f"{folder} holds no trained model yet; continue it with --resume {folder}")
    try:
        args = argparse.Namespace(**checkpoint["args"])
        args.root, args.weights, args.out = root or args.root, weights or args.weights, str(folder)
        model = importlib.import_module(checkpoint["method"]).Model(args)
    except (ValueError, OSError):
        raise
    except Exception as error:                                    # options missing, or of no sense
        raise ValueError(f"{folder}/last.pt: its options make no model of {checkpoint['method']}.py "
                         f"({data.describe(error)}); it is damaged or not ours") from None
    common.load_trained(model, checkpoint["model"], Path(folder) / "last.pt")
    if checkpoint["state"] and not (Path(folder) / "scores.json").exists():
        data.say(f"{folder} has not been trained to its end, its clusters are not final; go on with: "
                 f"python {checkpoint['method']}.py --resume {folder}")
    return model.to(device).eval(), args, checkpoint


def open_run(folder, options, device):
    """-> model, its options; without a folder, the raw backbone of --arch and what options it needs."""
    if folder:
        return load_run(folder, device, None if options.data else options.root, options.weights)[:2]
    name = options.data or "scenes"
    args = argparse.Namespace(data=name, root=None, protocol=None, size=96 if name == "scenes" else 320)
    return common.load_backbone(options.arch, options.weights, options.depth).to(device), args


def load_data(options, args, split, model):
    """The data set that a run is scored on: its own, unless --data names another."""
    patch = patch_of(model)
    name, size = options.data or args.data, options.size or getattr(args, "eval_size", args.size)
    protocol = options.protocol or (None if options.data else args.protocol)
    size = -(-size // patch) * patch
    return data.load(name, options.root or args.root, split, size=size, protocol=protocol)


def score_run(folder, options, device):
    """`python eval.py RUN` -> options of the run, scores, exit code, (model, val, naming).

    Writes into the run's folder, beside its own scores.json where it is scored in another way."""
    model, args = open_run(folder, options, device)
    val = load_data(options, args, options.split, model)
    other = options.data not in (None, args.data)
    if other:  # its classes are not the run's
        model.linear = None
    unusual = val.name * other, options.split * (options.split != "val"), options.size, options.protocol
    prefix = "".join(f"{value}-" for value in unusual if value)
    count = dict(workers=options.workers, batch_size=options.batch_size)
    result = evaluate(model, val, device, watch=evenly(200, len(val)), **count)
    shown = heads(result, val)
    if options.flip or options.crf:
        suffix = " + flip" * options.flip + " + CRF" * options.crf
        more = evaluate(model, val, device, options.flip, options.crf, what=suffix[3:], **count)
        shown |= heads(more, val, suffix)
    if val.classes and (options.clusters or other):
        train = load_data(options, args, "train", model)
        clusters = options.clusters or val.classes
        shown |= fitted_on_code(model, train, val, device, clusters, other, args.seed, count)
    before = saved_scores(Path(folder) / "scores.json")
    if before.get("kmeans") and not prefix:  # measured when training ended
        shown["kmeans"] = {key: torch.from_numpy(np.array([math.nan if x is None else x for x in value]))
                           if isinstance(value, list) else math.nan if value is None else value
                           for key, value in before["kmeans"].items()}
    named = report(Path(folder), model, val, device, result, shown, prefix, seconds=before.get("seconds"))
    return args, shown, 1 if result["failed"] else 0, (model, val, named)


def fitted_on_code(model, train, val, device, clusters, linear, seed, count):
    """K-means, and a linear probe on request, fitted on the code of the train split and scored on val."""
    fitted, votes = fit_probes(model, train, clusters, device, patch_of(model), seed, linear)
    result = evaluate(fitted, val, device, what="k-means on the code", **count)
    shown = heads(result, val, " fitted here")
    if clusters != val.classes:  # many-to-one: ViCE's cluster model
        classes = majority(result["cluster"] if votes is None else votes)
        shown.pop("majority fitted here", None)
        shown[f"{clusters} clusters, Hungarian"] = shown.pop("cluster fitted here")
        shown[f"{clusters} clusters, majority"] = scores(matched(result["cluster"], classes))
    return shown


def score_backbone(options, device):
    """`python eval.py --arch A --data D`: K-means and linear probe on raw features, the baseline."""
    backbone, args = open_run(None, options, device)
    train, val = (load_data(options, args, split, backbone) for split in ("train", options.split))
    clusters = options.clusters or val.classes or 27
    model, _ = fit_probes(backbone, train, clusters, device, backbone.patch, options.seed, linear=True)
    result = evaluate(model, val, device, options.flip, options.crf, options.batch_size, options.workers,
                      watch=evenly(200, len(val)))
    shown = {"kmeans" if key == "cluster" else key: value for key, value in heads(result, val).items()}
    report(Path(options.out or f"runs/raw-{val.name}-{options.arch}"), model, val, device, result, shown)
    return 1 if result["failed"] else 0


def compare(folders, found, markdown):
    """One line per run, and mean and deviation over the seeds of one configuration -> the table as text."""
    local = "seed out device workers resume save_every cache_features root compile json".split()
    groups = collections.defaultdict(list)
    for folder, (args, shown) in zip(folders, found):
        kind = json.dumps({k: v for k, v in vars(args).items() if k not in local}, sort_keys=True)
        groups[kind].append((str(folder), shown))
    columns = list(dict.fromkeys(key for _, shown in found for key in shown))
    rows = [["mIoU / accuracy, %", *(TITLES.get(key, key) for key in columns)]]
    for runs in groups.values():
        cells = [[shown.get(key, {"miou": math.nan, "accuracy": math.nan}) for key in columns]
                 for _, shown in runs]
        numbers = 100 * np.array([[(cell["miou"], cell["accuracy"]) for cell in row] for row in cells])
        rows += [[folder, *(f"{a:.1f} / {b:.1f}" for a, b in row)] for (folder, _), row in zip(runs, numbers)]
        if len(runs) > 1:
            both = zip(numbers.mean(0), numbers.std(0, ddof=1))
            rows.append([f"mean of {len(runs)} seeds",
                         *(f"{m[0]:.1f} ± {d[0]:.1f} / {m[1]:.1f} ± {d[1]:.1f}" for m, d in both)])
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def side_by_side(folders, scored, path, device):
    """A picture with a column per run: the same four photos, where the runs share a data set."""
    models, sets, named = zip(*scored)
    if len({(val.name, len(val)) for val in sets}) > 1:
        print("the runs are on different data sets, so there is no picture side by side")
        return
    models = [(Path(folder).name, model) for folder, model in zip(folders, models)]
    write_png(path, samples(models, sets[-1], device, evenly(4, len(sets[-1])), named))
    print(f"wrote {path}")


# ---------------------------------------------------------------- the authors' checkpoints

# published name -> ours, by prefix; what has no place in our models stays behind
STEGO_HEAD = {"cluster1.0.": "head.linear.", "cluster2.": "head.mlp."}
OFFICIAL = {
    "stego": {**{"net." + a: b for a, b in STEGO_HEAD.items()}, "net.model.": "backbone.",
              "cluster_probe.": "cluster.", "linear_probe.": "linear."},
    "hp": {**STEGO_HEAD, "ema_model1.0.": "momentum.linear.", "ema_model2.": "momentum.mlp.",
           "model.": "backbone.", "linear_model_state_dict.": "linear.",
           "cluster_model_state_dict.": "cluster."},
    "cause": {"head_ema.": "head_ema.", "head.": "head.", "codebook": "codebook", "linear.f.": "linear.",
              "cluster_probe": "cluster.clusters", "projection_head.f.": "projection.",
              "projection_head_ema.f.": "teacher_projection."},
}


def import_official(options):
    """`python eval.py --official METHOD FILE... --data NAME --out RUN`: a published checkpoint as a run.

    stego: the Lightning .ckpt; hp: ckpt.pth; cause: segment_*.pth cluster_*.pth of one training, with --arch.
    """
    method, *files = options.official
    if method not in OFFICIAL or not files:
        raise ValueError(f"--official takes a method ({', '.join(OFFICIAL)}) and its file or files")
    if not options.data or not options.out:
        raise ValueError("--official needs --data, what the checkpoint was trained on, and --out RUN")
    folder, tensors = Path(options.out), {}
    if (folder / "last.pt").exists():
        raise ValueError(f"{folder} already holds a run; choose another --out")
    for file in files:
        content = common.read_tensors(file)
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        nested = {f"{key}.{name}": tensor for key, part in content.items() if isinstance(part, dict)
                  for name, tensor in part.items()}  # HP: one dictionary per module
        for key, value in {**content, **nested}.items():
            key = str(key).removeprefix("net_model_state_dict.").removeprefix("module.")
            old = next((old for old in OFFICIAL[method] if key.startswith(old)), None)
            if torch.is_tensor(value) and old is not None:
                tensors[OFFICIAL[method][old] + key[len(old):]] = value.clone().float()
    backbone = {key[9:]: tensors.pop(key) for key in list(tensors) if key.startswith("backbone.")}
    module = importlib.import_module(method)
    if not {"linear.weight", "cluster.clusters"} <= set(tensors):
        raise ValueError(f"{', '.join(files)} holds no probes of {method}; is it a checkpoint of {method}?")
    arch = options.arch
    if backbone:
        shape = backbone.get("patch_embed.proj.weight", torch.empty(0)).shape
        if len(shape) != 4 or shape[0] not in (384, 768):
            raise ValueError(f"{', '.join(files)}: its backbone is no ViT-S or ViT-B of DINO")
        arch = {384: "vits", 768: "vitb"}[shape[0]] + str(shape[3])
    elif not arch:
        raise ValueError("the file holds no backbone: name it with --arch (vits8, dinov2_vitb14, ...)")
    args = common.parse(module.arguments, module.PRESETS, ["--data", options.data, "--arch", arch])
    args.classes, args.code_dim = tensors["linear.weight"].shape[:2]
    args.clusters, args.root, args.out = len(tensors["cluster.clusters"]), options.root, options.out
    args.weights = str(folder / "backbone.pth") if backbone else options.weights
    if method == "cause":
        heads = {key: tensors.pop(key) for key in list(tensors) if key.startswith(("head.", "head_ema."))}
        queries, size = heads.get("head.query_pos", torch.empty(0)), 322 if arch.endswith("14") else 320
        args.head, args.size, args.eval_size = "tr" if len(queries) else "mlp", size, size
        args.codes, args.projection_dim = len(tensors["codebook"]), len(tensors["projection.weight"])
        if arch in ("vits8", "vits16"):
            args.heads = 12  # as the authors built DINO's ViT-S
    model = module.Model(argparse.Namespace(**{**vars(args), "weights": "none"}))
    if method == "cause":
        module.load_published_head(heads, model.teacher)  # takes head_ema. where it is
        module.load_published_head({k: v for k, v in heads.items() if k.startswith("head.")}, model.student)
        tensors |= {key: value for key, value in common.trained(model).items()
                    if key.startswith(("teacher.", "student.")) and key not in tensors}
    own = common.trained(model)
    for key, value in own.items():
        if key not in tensors and key.startswith(("head.mlp.", "project")):
            tensors[key] = torch.zeros_like(value)  # a linear head; HP's Z is not saved
        if key in tensors and tensors[key].numel() == value.numel():
            tensors[key] = tensors[key].view_as(value)  # 1x1 convolutions as matrices
    tensors = {key: value for key, value in tensors.items() if key in own}
    common.load_trained(model, tensors, ", ".join(files))
    folder.mkdir(parents=True, exist_ok=True)
    if backbone:
        common.save(backbone, folder / "backbone.pth")
        common.load_backbone(arch, args.weights)  # complete, or one line says what not
    common.write(folder / "args.json", json.dumps(vars(args), indent=1).encode())
    common.save({"method": method, "args": vars(args), "model": common.trained(model), "phase": 0, "step": 0,
                 "state": {}, "rng": common.get_rng()}, folder / "last.pt")
    print(f"wrote {folder}; score it with: python eval.py {folder} --root DIR --flip --crf")
    return 0


# ---------------------------------------------------------------- your own pictures

def list_inputs(paths, out):
    """Files and folders -> [(file, name of its result without suffix)], subfolders kept.

    a.jpg and a.png beside each other give a.jpg.png and a.png.png. Raises FileNotFoundError where a path is
    missing, ValueError where a result would replace an input."""
    found, several, out = [], sum(Path(path).is_dir() for path in paths) > 1, out.resolve()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"--images {path} does not exist")
        if path.is_file():
            found.append((path, Path(path.name)))
            continue
        for name in map(Path, data.list_images(path)):
            if out == path.resolve() or out not in (path / name).resolve().parents:  # results are no inputs
                found.append((path / name, Path(path.resolve().name) / name if several else name))
    if not found:
        raise FileNotFoundError(f"no image in {', '.join(map(str, paths))}")
    stems = collections.Counter(name.with_suffix("") for _, name in found)
    found = [(file, name if stems[name.with_suffix("")] > 1 else name.with_suffix(""))
             for file, name in found]
    results = collections.Counter((out / f"{name}{end}.png").resolve() for _, name in found
                                  for end in ("", "_overlay"))
    inputs = {file.resolve() for file, _ in found}
    for path, count in results.items():
        if count > 1 or path in inputs:
            raise ValueError(f"{path} would be written {'twice' if count > 1 else 'over an input'}; "
                             f"choose another --out, or fewer --images at a time")
    return found


def read_picture(path, size):
    """Any image file -> normalised image (3,h,w), its shorter side `size` (0: as it is), RGB uint8 (H,W,3).

    The longer side is held at eight times `size`, so that a thin strip does not fill the memory."""
    picture = data.read_image(str(path))
    small = picture
    if size:
        scale = min(size / min(picture.size), 8 * size / max(picture.size))
        sides = [max(1, round(side * scale)) for side in picture.size]
        small = picture.resize(sides, Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    return (image - data.MEAN) / data.STD, np.array(picture)


@torch.no_grad()
def segment(folder, options, device):
    """`python eval.py RUN --images PATH... --out DIR`: segment files and folders -> exit code.

    Per image NAME.png, a palette PNG whose values are ids, and NAME_overlay.png; legend.png and legend.txt
    (id, name, share of the pixels). An unreadable file is listed, and the exit code is 1."""
    if not options.out:
        raise ValueError("--images needs --out DIR, where the results go")
    out, inputs = Path(options.out), list_inputs(options.images, Path(options.out))
    model, args = open_run(folder, options, device)
    ids, names, palette = label_names(folder, model, options)
    size = getattr(args, "eval_size", args.size) if options.size is None else options.size
    counts, failed = torch.zeros(len(names), dtype=torch.long, device=device), []
    for file, name in progress(inputs[common.rank()::common.world()], "segmentation", "image"):
        try:
            image, photo = read_picture(file, size)
        except Exception as error:  # Pillow raises nearly anything, and the other files must go on
            failed.append((str(file), data.describe(error)))
            continue
        image, shape = image[None].to(device), photo.shape[:2]
        found = predict(model, image, shape, options.flip, options.crf, options.tile)
        found = ids.to(device)[found[options.head][0]]  # (H, W)
        counts += torch.bincount(found.flatten(), minlength=len(names))
        found = found.byte().cpu().numpy()
        picture = Image.fromarray(found)
        picture.putpalette(palette.tobytes())  # "L" becomes "P": the values stay
        write_png(out / f"{name}.png", picture)
        write_png(out / f"{name}_overlay.png", Image.fromarray(overlay(photo, found, palette)))
    counts, failed = common.reduce_sum(counts), collect(failed)
    if common.rank() == 0:
        share = (100 * counts / counts.sum().clamp(min=1)).tolist()
        entries = [f"{k}: {name}, {x:.1f} %" for k, (name, x) in enumerate(zip(names, share))]
        write_png(out / "legend.png", legend(entries, palette, 640))
        lines = [f"{k}\t{name}\t{x:.2f} %\n" for k, (name, x) in enumerate(zip(names, share))]
        common.write(out / "legend.txt", "".join(lines).encode())
        for path, reason in failed:
            data.say(f"not segmented: {path}: {reason}")
        done = len(inputs) - len(failed)
        print(f"segmented {done} of {len(inputs)} images into {out}; legend.png there names the colours")
    return 1 if failed else 0


def label_names(folder, model, options):
    """ids of the head's outputs, names, palette: as found when the run was scored, else cluster numbers."""
    saved = saved_scores(Path(folder) / "scores.json")
    if saved:
        ids, names, palette = saved_naming(saved)
    else:
        ids, names, palette = naming(torch.full((len(model.cluster.clusters),), -1), [], [])
    if options.head == "linear":
        if model.linear is None or not saved.get("classes"):
            raise ValueError(f"{folder} was trained or scored without labels; drop --head linear")
        names = saved["classes"]
        ids, palette = torch.arange(len(names)), palette[:len(names)]
    if options.names:
        given = data.read_lines(Path(options.names))
        if len(given) != len(names):
            raise ValueError(f"{options.names} holds {len(given)} names, but the run has {len(names)} ids")
        names = given
    if len(names) > 256:
        raise ValueError(f"a palette PNG holds 256 ids, the run has {len(names)}")
    return ids, names, palette


# ---------------------------------------------------------------- a look inside

@torch.no_grad()
def embed(model, dataset, folder, device):
    """Write the code of every image of a data set as NAME.npy, float32 (K,h,w); subfolders are kept."""
    root, failed = os.path.commonpath([os.path.dirname(path) for path in dataset.paths]), []
    for [item] in batches(dataset, 1, what="embedding"):
        if item["error"]:
            failed.append((item["path"], item["error"]))
            continue
        code = encode(model, item["image"][None].to(device))[0]
        path = Path(folder) / (os.path.relpath(item["path"], root) + ".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, code.cpu().numpy())
    failed = collect(failed)
    if common.rank() == 0:
        for path, reason in failed:
            data.say(f"not embedded: {path}: {reason}")
        print(f"wrote {len(dataset) - len(failed)} codes to {folder}, one array (K,h,w) per image")
    return 1 if failed else 0


@torch.no_grad()
def principal_colours(maps):
    """Maps (K,h,w) -> uint8 (h,w,3) each: their first three principal components in common, as R, G, B."""
    pixels = torch.cat([m.flatten(1) for m in maps], 1).T                             # (n,K)
    mean = pixels.mean(0)
    axes = torch.linalg.eigh((pixels - mean).T @ (pixels - mean))[1].flip(1)[:, :3]   # (K,3), largest first
    low, high = ((pixels[::len(pixels) // 100_000 + 1] - mean) @ axes).quantile(torch.tensor([0.02, 0.98]), 0)
    return [(255 * ((((m.permute(1, 2, 0) - mean) @ axes) - low) / (high - low).clamp(min=1e-9)).clamp(0, 1))
            .byte().numpy() for m in maps]


@torch.no_grad()
def principal_picture(model, dataset, device):
    """Photos beside the first three principal components of their code as red, green, blue (ViCE, fig. 5)."""
    items = [dataset[index] for index in evenly(6, len(dataset))]
    codes = [encode(model, item["image"][None].to(device)) for item in items]
    codes = [F.interpolate(code, item["label"].shape, mode="bilinear")[0].cpu()
             for code, item in zip(codes, items)]
    rows = [[fit(photo_of(item), mode=Image.Resampling.BILINEAR), fit(rgb)]
            for item, rgb in zip(items, principal_colours(codes))]
    return sheet(rows, ["photo", "first three principal components"], [], np.zeros((0, 3)))


@torch.no_grad()
def path_picture(model, item, named, device):
    """One image at every station from file to score, with shapes: features and codes as principal components.

    named: what `naming` gives. model: a run with a backbone; `item` of a data set."""
    ids, names, palette = named
    image = item["image"][None].to(device)
    feats = model.backbone(padded(image, patch_of(model)))[0].cpu()
    code, found = encode(model, image)[0].cpu(), predict(model, image)["cluster"][0].cpu()
    stations = [("image", item["image"], photo_of(item)), ("features", feats, principal_colours([feats])[0]),
                ("code", code, principal_colours([code])[0]),
                ("clusters", found, paint(found, distinct(len(ids)))),
                ("classes", found, paint(ids[found], palette)),
                ("ground truth", item["label"], paint(item["label"], palette))]
    seen = sorted({*ids[found].unique().tolist(), *item["label"].unique().tolist()} - {-1})
    row = [fit(picture, 180) for _, _, picture in stations]
    titles = [f"{title} {'x'.join(map(str, x.shape))}" for title, x, _ in stations]
    return sheet([row], titles, [names[i] for i in seen], palette[seen])


def neighbors(means, k):
    """Mean features (n,D) -> (n,k) the most similar other images."""
    cosines = F.normalize(means, dim=1) @ F.normalize(means, dim=1).T
    return cosines.fill_diagonal_(-math.inf).topk(min(k, len(means) - 1), 1).indices


def confused(features, labels, means, classes, k=7, share=0.1):
    """Which classes the strongest correspondences between neighbouring images join (STEGO A.6, figure 10).

    features (n,P,D), labels (n,P), means (n,D) from `sample_points` -> counts (classes,classes) of the
    strongest `share` of all point pairs between each image (columns) and its k nearest neighbours (rows)."""
    counts = torch.zeros(classes, classes, dtype=torch.long, device=features.device)
    for i, others in enumerate(neighbors(means, k)):
        for j in others:
            cosines = F.normalize(features[i], dim=1) @ F.normalize(features[j], dim=1).T  # (P, P)
            strong = cosines >= cosines.flatten().topk(max(1, int(share * cosines.numel()))).values[-1]
            a, b = (x[strong] for x in torch.broadcast_tensors(labels[i][:, None], labels[j][None]))
            counts += confusion_matrix(b[b >= 0], a[b >= 0], classes, classes)
    return counts


def precision_recall(features, labels, partner):
    """Cosines of point pairs as predictors of "same class" (STEGO, figure 3).

    features (n,P,D), labels (n,P), partner (n,): the image that each is paired with, for instance itself
    -> recall (m,), precision (m,), average precision."""
    features = F.normalize(features, dim=-1)
    cosines = torch.einsum("npd,nqd->npq", features, features[partner])
    usable = (labels >= 0)[:, :, None] & (labels >= 0)[partner][:, None]
    usable &= ~(torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device) & (
        partner == torch.arange(len(partner), device=partner.device))[:, None, None])  # a point with itself
    same = (labels[:, :, None] == labels[partner][:, None])[usable]
    hits = same[cosines[usable].argsort(descending=True)].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
    recall = hits / hits[-1].clamp(min=1)
    return recall, precision, (precision * recall.diff(prepend=recall.new_zeros(1))).sum().item()


def curve_picture(curves, title, size=420):
    """{name: (recall, precision, average precision)} -> a picture of the curves."""
    colours, left, top = distinct(len(curves)), 56, 62
    picture = Image.new("RGB", (size + left + 34, size + top + 56 + 22 * len(curves)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), title, "black", font(15))
    draw.text((10, 36), "precision", "black", font(13))
    draw.text((left + size / 2, top + size + 30), "recall", "black", font(13), "mm")
    place = lambda x, y: (left + x * size, top + (1 - y) * size)
    for i in range(6):
        draw.line([place(i / 5, 0), place(i / 5, 1)], "lightgrey")
        draw.line([place(0, i / 5), place(1, i / 5)], "lightgrey")
        draw.text((left + i / 5 * size, top + size + 12), f"{i / 5:.1f}", "black", font(12), "mm")
        draw.text((left - 8, top + (1 - i / 5) * size), f"{i / 5:.1f}", "black", font(12), "rm")
    for i, (name, (recall, precision, average)) in enumerate(curves.items()):
        at = torch.searchsorted(recall, torch.linspace(0.005, 1, 200).to(recall)).clamp(max=len(recall) - 1)
        colour, y = tuple(colours[i].tolist()), top + size + 56 + 22 * i
        draw.line([place(*xy) for xy in zip(recall[at].tolist(), precision[at].tolist())], colour, 3)
        draw.line([(left, y), (left + 30, y)], colour, 4)
        draw.text((left + 38, y), f"{name}: average precision {average:.3f}", "black", font(13), "lm")
    return picture


def look_inside(options, device):
    """--embed, --pca, --path, --neighbors, --pr-curve: on one split, of a run or of a raw backbone."""
    run = options.runs[0] if options.runs else None
    model, args = open_run(run, options, device)
    backbone = getattr(model, "backbone", None) or model
    folder = Path(options.out or run or f"runs/raw-{Path(args.data).name}-{options.arch}")
    val, code = load_data(options, args, options.split, model), 0

    def write(name, picture):
        write_png(folder / name, picture)
        print(f"wrote {folder / name}")
    if options.embed:
        code = embed(model, val, options.embed, device)
    if options.pca:
        write("pca.png", principal_picture(model, val, device))
    if options.path:
        saved = saved_scores(Path(run) / "scores.json") if run else {}
        if not saved or model is backbone:
            raise ValueError("--path needs a run with a frozen backbone, scored before by python eval.py RUN")
        item = val[evenly(1, len(val))[0]]
        write("path.png", path_picture(model, item, saved_naming(saved), device))
    if not options.neighbors and not options.pr_curve:
        return code
    if not val.classes or len(val) < 2:
        raise ValueError(f"--neighbors and --pr-curve take a data set with labels and two images or more; "
                         f"{val.name} has {len(val)}, with {val.classes} classes")
    features, labels, means = sample_points(backbone, val, device, patch_of(model), points=100)
    if (labels < 0).all():
        raise ValueError(f"{val.name}: no pixel of its labels has a class, so there is nothing to compare")
    if options.neighbors:
        counts = confused(features, labels, means, val.classes)
        print(f"{100 * counts.diagonal().sum() / counts.sum().clamp(min=1):.1f} % of the strongest tenth of "
              f"correspondences between {len(means)} images and their neighbours join pixels of one class")
        off = (counts / counts.sum(0, keepdim=True).clamp(min=1)).fill_diagonal_(0).cpu()
        for at in off.flatten().argsort(descending=True)[:8].tolist():
            b, a = divmod(at, val.classes)
            print(f"  {val.names[a]} with {val.names[b]}: {100 * off[b, a]:.1f} % of its correspondences")
        write("neighbors.png", confusion_picture(
            counts, val.names, f"{val.name}: classes joined by the strongest correspondences of neighbours",
            "rows: class in the image and its share; columns: class of the joined point, % of the row"))
    if options.pr_curve:
        points, curves = {"backbone": (features, labels)}, {}
        if model is not backbone:
            points["trained head"] = sample_points(model, val, device, patch_of(model), points=100)[:2]
        itself, near = torch.arange(len(means), device=means.device), neighbors(means, 1)[:, 0]
        for name, (features, labels) in points.items():  # the same pairs for both
            curves[f"{name}, within an image"] = precision_recall(features, labels, itself)
            curves[f"{name}, image and nearest neighbour"] = precision_recall(features, labels, near)
        for name, (_, _, average) in curves.items():
            print(f"average precision {average:.3f}  {name}")
        write("pr_curve.png", curve_picture(curves, f"{val.name}: cosine as predictor of the same class"))
    return code


# ---------------------------------------------------------------- command line

def arguments():
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                      allow_abbrev=False)
    p.add_argument("runs", nargs="*", metavar="RUN", help="run folders; several are compared")
    whole, add = common.whole, p.add_argument_group("scoring").add_argument
    add("--crf", action="store_true", help="also with the fully connected CRF")
    add("--flip", action="store_true", help="also with the code averaged over the mirrored image")
    add("--clusters", type=whole(1), metavar="N", help="also K-means with N centres on the code; where N is "
        "not the number of classes, by Hungarian (the rest is wrong) and by majority vote of train labels")
    add("--data", metavar="NAME|DIR",
        help="score on this data set, with probes fitted anew on its train split")
    add("--root", metavar="DIR", help="where the data lies, if not where it lay at training")
    add("--split", default="val", help="default: val")
    add("--protocol", help="how images are resized and cropped; default: as at training")
    add("--size", type=whole(0), metavar="PIXELS", help="shorter side at which the network sees an image; "
        "default: as it was scored; with --images, 0 leaves images as they are")
    add("--markdown", action="store_true", help="print the comparison as a Markdown table")
    add = p.add_argument_group("your own pictures").add_argument
    add("--images", nargs="+", metavar="PATH", help="segment these files and folders; needs --out")
    add("--out", metavar="DIR", help="where results go; else into the first run folder")
    add("--tile", type=whole(32), metavar="PIXELS",
        help="in overlapping tiles, for images that do not fit into memory; try 512 with --size 0")
    add("--names", metavar="FILE", help="a name per line for ids 0, 1, ...")
    add("--head", choices=("cluster", "linear"), default="cluster", help="which probe")
    add = p.add_argument_group("a look inside (a run, or --arch and --data)").add_argument
    add("--embed", metavar="DIR", help="write the code of every image as .npy (K,h,w)")
    add("--pca", action="store_true", help="picture of the code's three principal components")
    add("--path", action="store_true", help="picture of one image at every station, with shapes")
    add("--neighbors", action="store_true", help="which classes the backbone's correspondences between "
        "neighbouring images confuse: judges a backbone without training")
    add("--pr-curve", action="store_true",
        help="correspondences as predictors of the same class: precision and recall")
    add = p.add_argument_group("the authors' checkpoints").add_argument
    add("--official", nargs="+", metavar=("METHOD", "FILE"), help="turn a published checkpoint into the run "
        "folder --out: stego FILE, hp FILE, or cause SEGMENT CLUSTER; with --data, for cause with --arch")
    add = p.add_argument_group("backbone, machine").add_argument
    add("--arch", help="without RUN: score the raw backbone, by K-means and linear probe")
    add("--weights", metavar="FILE|none", help="backbone weights, if not where they lay")
    add("--depth", type=whole(1), metavar="K", help="with --arch: the first K blocks")
    add("--seed", type=whole(0), default=0, help="of K-means")
    add("--batch-size", type=whole(1), default=16, help="images at a time")
    add("--device", help="default: the accelerator if there is one")
    add("--workers", type=whole(0), default=0, help="processes that read images")
    return p


def run(options):
    if options.official:
        return import_official(options)
    if not options.runs and not options.arch:
        raise ValueError("give a run folder, or --arch and --data for a raw backbone; python eval.py --help")
    if options.runs and options.arch:
        raise ValueError("a run brings its own backbone: give either RUN or --arch")
    device = common.start_processes(options.device)
    if options.images:
        if len(options.runs) != 1:
            raise ValueError("--images needs exactly one RUN")
        return segment(options.runs[0], options, device)
    if options.embed or options.pca or options.path or options.neighbors or options.pr_curve:
        return look_inside(options, device)
    if not options.runs:
        return score_backbone(options, device)
    found = [score_run(folder, options, device) for folder in options.runs]
    if common.rank() == 0 and (len(found) > 1 or options.markdown):
        print("\n" + compare(options.runs, [(args, shown) for args, shown, *_ in found], options.markdown))
    if common.rank() == 0 and len(found) > 1:
        path = Path(options.out or options.runs[0]) / "side_by_side.png"
        side_by_side(options.runs, [scored for *_, scored in found], path, device)
    return max(code for _, _, code, _ in found)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")             # a file's name may be no text
    try:
        sys.exit(run(arguments().parse_args()))
    except (ValueError, OSError, ArithmeticError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit(common.report(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
