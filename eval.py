"""Score a run and put it to use: probes, metric, K-means, prediction, evaluation, pictures.

    python eval.py RUN                                     scores, per-class table, pictures
    python eval.py RUN --clusters 6 12 20                  other numbers of clusters, no training
    python eval.py RUN RUN RUN                             a table of runs, mean over seeds
    python eval.py RUN --images holiday --out segmented    your own pictures
    python eval.py --arch vits8 --data coco27 --root DIR   raw backbone: K-means and linear probe
"""
import argparse
import collections
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
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

import common
import data
from crf import dense_crf

# ---------------------------------------------------------------- probes
class ClusterProbe(nn.Module):
    """Cosine K-means on a frozen code, by gradient: `.clusters` (clusters,K) are the centres.
    code (B,K,h,w) -> loss, cosines (B,clusters,h,w). The loss is minus the mean cosine of a pixel
    to its nearest centre, the only one that moves. The code is detached: the head never moves."""
    def __init__(self, width, clusters):
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(clusters, width))

    def forward(self, code):
        code = F.normalize(code.detach(), dim=1)
        centres = F.normalize(self.clusters, dim=1)
        cosines = torch.einsum("bkhw,ck->bchw", code, centres)
        return -cosines.amax(1).mean(), cosines


class LinearProbe(nn.Conv2d):
    """A 1x1 convolution: code (B,K,h,w) -> logits (B,classes,h,w). Give it `code.detach()`.
    It starts at zero, as a convex problem may, and draws no random number: with or without labels
    everything else in a run stays the same bit for bit."""
    def __init__(self, width, classes):
        super().__init__(width, classes, 1)

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def linear_loss(logits, label):
    """Mean cross-entropy of logits (B,C,h,w), upsampled to label (B,H,W), over labels in [0,C).
    0 without any. The mean over several processes is that over all their pixels."""
    label = label.where((label >= 0) & (label < logits.shape[1]), -1)
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear")
    count = common.reduce_sum((label >= 0).sum()).clamp(min=1)
    total = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
    return total * common.world() / count


def probe_losses(model, code, label):
    """Losses of model.cluster and model.linear on code.detach() (B,K,h,w), label (B,H,W).
    -> two scalars, 0 for a probe that the model does not have or train."""
    code = code.detach().float()
    zero = code.new_zeros((), requires_grad=True)
    cluster = model.cluster(code)[0] if model.cluster.clusters.requires_grad else zero
    linear = linear_loss(model.linear(code), label) if model.linear is not None else zero
    return cluster, linear


# ---------------------------------------------------------------- metric and K-means
def confusion_matrix(pred, label, clusters, classes):
    """Counts (clusters,classes) int64 of pixels by predicted cluster (rows) and label (columns).
    pred, label: integer tensors of one shape. Labels outside [0,classes) are ignored, extra
    clusters kept. ValueError: other shapes, or a prediction outside [0,clusters).
    >>> confusion_matrix(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, -1]), 2, 2)
    tensor([[0, 1],
            [2, 0]])"""
    if pred.shape != label.shape:
        raise ValueError(f"prediction {tuple(pred.shape)}, label {tuple(label.shape)}: "
                         "expected one shape")
    valid = (label >= 0) & (label < classes)
    pred, label = pred[valid].long(), label[valid].long()
    if len(pred) and (pred.min() < 0 or pred.max() >= clusters):
        raise ValueError(f"the prediction holds a cluster outside 0..{clusters - 1}")
    counts = torch.bincount(pred * classes + label, minlength=clusters * classes)  # exact: int64
    return counts.view(clusters, classes)


def hungarian(confusion):
    """(clusters,classes) counts -> (clusters,) the class of each cluster, -1 = unmatched.
    The one-to-one matching with the largest number of matched pixels; one of three is left over:
    >>> hungarian(torch.tensor([[0, 5], [9, 0], [8, 4]]))
    tensor([ 1,  0, -1])"""
    rows, columns = map(torch.from_numpy, linear_sum_assignment(confusion.cpu(), maximize=True))
    return torch.full((len(confusion),), -1).scatter(0, rows, columns)


def majority(confusion):
    """(clusters,classes) counts -> (clusters,) most frequent class of each, -1 = empty."""
    return confusion.argmax(1).where(confusion.sum(1) > 0, -1).cpu()


def matched(confusion, assignment):
    """Counts by cluster -> (classes+1,classes) by predicted class; last: clusters without one."""
    classes = confusion.shape[1]
    rows = assignment.where(assignment >= 0, classes).to(confusion.device)
    return confusion.new_zeros(classes + 1, classes).index_add_(0, rows, confusion)


def scores(confusion):
    """Scores of a confusion (classes,classes), predictions as rows; more rows are of no class.
    -> dict of miou, accuracy (0..1); iou, precision (classes,), NaN for a class in neither
    prediction nor labels (iou), never predicted (precision); pixels (classes,) int64.
    >>> found = scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))  # the third is nowhere
    >>> found["iou"].tolist(), found["miou"], found["accuracy"]
    ([0.75, 0.8, nan], 0.775, 0.875)"""
    counts = confusion.cpu().double()
    right, pixels = counts.diagonal(), counts.sum(0)
    predicted = counts.sum(1)[:len(pixels)]
    iou = right / (pixels + predicted - right)  # 0/0 = NaN: absent from both
    return {"miou": iou.nanmean().item(), "accuracy": (right.sum() / pixels.sum()).item(),
            "iou": iou, "precision": right / predicted, "pixels": pixels.long()}


@torch.no_grad()
def kmeans(features, clusters, restarts=10, iterations=100, seed=0):
    """Spherical K-means: (n,D) -> unit centres (clusters,D), the best of `restarts` by inertia.
    Starts as k-means++ (Arthur and Vassilvitskii 2007), with the distance 1 - cosine. One run alone
    moves by ten points of mIoU with its start. ValueError: fewer vectors than clusters."""
    x = F.normalize(features.float(), dim=1)
    if len(x) < clusters:
        raise ValueError(f"{len(x)} feature vectors are too few for {clusters} clusters")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
        distance = (1 - x @ centres[0]).clamp(min=0)
        for _ in range(clusters - 1):  # far points are likelier starts
            cumulative = distance.double().cumsum(0)
            draw = torch.rand(1, generator=generator, dtype=torch.double).to(x.device)
            place = torch.searchsorted(cumulative, draw * cumulative[-1]).clamp(max=len(x) - 1)
            centres = torch.cat([centres, x[place]])
            distance = torch.minimum(distance, (1 - x @ centres[-1]).clamp(min=0))
        quality = -math.inf
        for _ in range(iterations):
            parts = [(part @ centres.T).max(1) for part in x.split(16384)]
            cosine, nearest = map(torch.cat, zip(*parts))
            if cosine.sum().item() <= quality + 1e-6 * len(x):
                break
            quality = cosine.sum().item()
            sums = torch.zeros_like(centres).index_add_(0, nearest, x)
            lost = torch.bincount(nearest, minlength=clusters) == 0  # to the worst served points
            sums[lost] = x[cosine.topk(int(lost.sum()), largest=False).indices]
            centres = F.normalize(sums, dim=1)
        found.append((quality, centres))
    return max(found, key=lambda x: x[0])[1]


# ---------------------------------------------------------------- prediction
def patch_of(model):
    return getattr(model, "patch", getattr(getattr(model, "backbone", None), "patch", 1))


def encode(model, images, flip=False, tile=None):
    """images (B,3,H,W) of any size -> code (B,K,h,w) of whole patches: last pixels are repeated.
    flip: the mean with the mirrored code of the mirrored image. tile: in overlapping squares of
    that many pixels, blended, for images whose attention would not fit into memory."""
    patch = patch_of(model)
    extra = (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch)
    images = F.pad(images, extra, mode="replicate")
    if flip:
        code, mirrored = (encode(model, x, tile=tile) for x in (images, images.flip(-1)))
        return (code + mirrored.flip(-1)) / 2
    height, width = images.shape[-2:]
    if not tile or max(height, width) <= tile:
        return model(images).float()
    tops, rows = tiles(height, tile, patch)
    lefts, columns = tiles(width, tile, patch)
    total = None
    for top, left in itertools.product(tops, lefts):
        code = model(images[..., top:top + rows, left:left + columns]).float()
        h, w = code.shape[-2:]
        cell = rows // h  # pixels per cell of the code
        hat = torch.outer(*(torch.bartlett_window(n + 2, False)[1:-1] for n in (h, w))).to(code)
        code = torch.cat([code, torch.ones_like(code[:, :1])], 1) * hat  # little at a cut
        if total is None:
            total = code.new_zeros(*code.shape[:2], height // cell, width // cell)
        total[..., top // cell:, left // cell:][..., :h, :w] += code
    return total[:, :-1] / total[:, -1:]


def tiles(side, tile, patch):
    """Starts and length of one side's tiles, in whole patches; they overlap by a quarter."""
    length = min(side, max(tile // patch, 4) * patch)
    step = length // patch * 3 // 4 * patch or patch
    return [*range(0, side - length, step), side - length], length


def upsample(x, size, shape, patch):
    """x (B,C,h,w), whole patches of an image of sides `shape` -> the image's part (B,C,*size)."""
    full = [round(n * (side + -side % patch) / side) for n, side in zip(size, shape)]
    return F.interpolate(x, full, mode="bilinear")[..., :size[0], :size[1]]


def arg_max(maps, size, shape, patch, limit=2 ** 26):
    """maps (B,C,h,w) -> (B,*size) arg-max over channels after `upsample`, in bounded memory."""
    step = max(1, limit // (len(maps) * size[0] * size[1]))
    best, index = maps.new_full((), -math.inf), 0
    for start in range(0, maps.shape[1], step):
        value, place = upsample(maps[:, start:start + step], size, shape, patch).max(1)
        index = torch.where(value > best, place + start, index)
        best = torch.maximum(value, best)
    return index


def probes_of(model):
    """The probes that a model brings -> {"cluster": probe} and, where it has one, "linear"."""
    found = {"linear": model.linear, "cluster": model.cluster}
    return {name: probe for name, probe in found.items() if probe is not None}


@torch.no_grad()
def predict(model, images, size=None, flip=False, crf=False, tile=None, probes=None):
    """Segment normalised images (B,3,H,W) of any size -> {name of the probe: (B,*size) int64}.
    The code is upsampled bilinearly to `size` (default: the image's), then each pixel takes the
    nearest centre by cosine, or the largest logit. Both are linear in the code but for its length,
    which no arg-max sees: the few score maps are upsampled in place of the wide code.
    probes: {name: ClusterProbe, or what gives logits}, default `probes_of(model)`. flip, tile: of
    `encode`. crf: on log-softmax(model.alpha * cosine) and log-softmax(logits), as published."""
    size, probes = tuple(size or images.shape[-2:]), probes or probes_of(model)
    code, found = encode(model, images, flip, tile), {}  # (B,K,h,w)
    sides = size, images.shape[-2:], patch_of(model)
    if crf:
        rgb = (images * common.STD.to(images) + common.MEAN.to(images)).clamp(0, 1)
        rgb = (F.interpolate(rgb, size, mode="bilinear") * 255).byte()  # truncated, as published
        one = 1 if rgb.device.type == "cpu" else len(rgb)  # a CPU's cache holds one image
    for name, probe in probes.items():
        if cosine := hasattr(probe, "clusters"):
            low = F.conv2d(code, F.normalize(probe.clusters, dim=1)[..., None, None])
        else:
            low = probe(code)
        if not crf:
            found[name] = arg_max(low, *sides)
            continue
        logits = upsample(low, *sides)
        if cosine:  # here the length does matter
            square = sum(upsample(x, *sides).square().sum(1, True) for x in code.split(8, 1))
            logits = getattr(model, "alpha", 2) * logits / square.sqrt().clamp(min=1e-12)
        parts = zip(rgb.split(one), logits.log_softmax(1).split(one))
        found[name] = torch.cat([dense_crf(a, b).argmax(1) for a, b in parts])
    return found


def segment_image(model, image, crf=False, flip=False, size=None, tile=None, probes=None):
    """Segment a picture in memory, uint8 (H,W,3) or a Pillow image -> ids (H,W) int64 numpy.
    The same as `eval.py RUN --images` gives for that file. size: shorter side that the network
    sees, 0 as it is, None as the run was scored. probes: as in `predict`; then {name: ids}."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is uint8 (H,W,3), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    picture = resized = data.as_rgb(image)
    if size := model.eval_size if size is None else size:
        scale = min(size / min(picture.size), 8 * size / max(picture.size))  # a strip stays small
        sides = [max(1, round(side * scale)) for side in picture.size]
        resized = picture.resize(sides, Image.Resampling.BILINEAR)
    x = (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - common.MEAN) / common.STD
    x = x[None].to(model.cluster.clusters.device)
    found = predict(model.eval(), x, picture.size[::-1], flip, crf, tile,
                    probes or {"cluster": model.cluster})
    if probes:
        return {name: ids[0].cpu().numpy() for name, ids in found.items()}
    return model.named[0][found["cluster"][0].cpu()].numpy()


# ---------------------------------------------------------------- evaluation
def batches(dataset, size, workers=0, what="evaluation", order=None):
    """This process's share of the batches of a data set, in order, as lists of items.
    A batch, and with it every count, is the same for any number of processes. order: these items
    instead, all of them in every process."""
    indices = range(len(dataset)) if order is None else order
    keys = [indices[i:i + size] for i in range(0, len(indices), size)]
    keys = keys[common.rank()::common.world()] if order is None else keys
    loader = common.data_loader(dataset, workers, batch_sampler=keys, collate_fn=list)
    return tqdm(loader, what, leave=False, disable=common.rank() > 0, dynamic_ncols=True)


def same_size(items):
    """Readable items of one size as batches: some protocols keep each photo's own shape."""
    readable = [item for item in items if not item["error"]]
    for _, group in itertools.groupby(readable, lambda x: (x["image"].shape, x["label"].shape)):
        yield torch.utils.data.default_collate(list(group))


@torch.no_grad()
def evaluate(model, dataset, device, flip=False, crf=False, batch_size=16, workers=0,
             what="evaluation", probes=None):
    """Count predictions against labels over a whole data set; only counts are kept.
    -> {name of each probe: (clusters,classes) int64, predictions as rows; "labelled": number of
    images with a label; "failed": [(path, reason)]}, summed over processes. probes: of `predict`.
    model: images (B,3,H,W) -> code (B,K,h,w), with .cluster and .linear (module or None)."""
    model.eval()
    classes, labelled, failed = dataset.classes, torch.zeros((), device=device).long(), []
    probes = probes or probes_of(model)
    for module in (model, *probes.values()) if common.world() > 1 else ():
        for x in module.state_dict().values():  # on a GPU sums may differ in the last bit
            dist.broadcast(x, 0)
    counts = {name: torch.zeros(len(getattr(probe, "clusters", range(classes))), classes,
                                dtype=torch.long, device=device) for name, probe in probes.items()}
    for items in batches(dataset, batch_size, workers, what):
        failed += [(item["path"], item["error"]) for item in items if item["error"]]
        for batch in same_size(items):
            label = batch["label"].to(device)
            labelled += (label >= 0).flatten(1).any(1).sum()
            found = predict(model, batch["image"].to(device), label.shape[-2:], flip, crf,
                            probes=probes)
            for name, pred in found.items():
                counts[name] += confusion_matrix(pred, label, len(counts[name]), classes)
    counts = {name: common.reduce_sum(count) for name, count in counts.items()}
    everyone = [failed] * common.world()
    if common.world() > 1:
        dist.all_gather_object(everyone, failed)
    failed = sorted(set(sum(everyone, [])))
    return {**counts, "labelled": common.reduce_sum(labelled).item(), "failed": failed}


def tell(what, failed):
    """A line for each image [(path, reason)] that was not "scored", ... -> exit code."""
    for path, reason in failed:
        common.say(f"not {what}: {path}: {reason}")
    return 1 if failed else 0


class Clustered(nn.Module):
    """Any encoder, images (B,3,H,W) -> features (B,D,h,w), with probes, as `evaluate` takes it."""
    def __init__(self, encoder, patch, cluster, linear=None):
        super().__init__()
        self.encoder, self.patch = encoder, patch
        self.cluster, self.linear = cluster, linear

    def forward(self, images):
        return self.encoder(images)


@torch.no_grad()
def sample_points(encoder, dataset, device, points, images, seed=0, workers=0):
    """Features of `points` random cells of each of `images` evenly spaced images of a data set.
    -> features (n,D), labels at the cells' centres (n,) with -1 = none. Interpolated pixels,
    mixtures at borders, would cost the baseline six points of mIoU on the scenes."""
    found, generator, patch = [], torch.Generator().manual_seed(seed), patch_of(encoder)
    for [item] in batches(dataset, 1, workers, "features", evenly(images, len(dataset))):
        if item["error"]:
            continue
        image, label = item["image"], item["label"]
        feats = encode(encoder, image[None].to(device))[0]  # (D,h,w)
        sides = zip(label.shape, image.shape[1:])  # the label's part of the padding
        down, right = (round(true * (-side % patch) / side) for true, side in sides)
        label = F.pad(label, (0, right, 0, down), value=-1)[None, None].float()
        label = F.interpolate(label, feats.shape[1:], mode="nearest-exact").flatten().long()
        cell = torch.randint(len(label), (points,), generator=generator)
        found.append((feats.flatten(1)[:, cell].T, label[cell].to(device)))
    if not found:
        raise OSError(f"no image of {dataset.name} could be read")
    return tuple(map(torch.cat, zip(*found)))


def clusterings(encoder, dataset, device, numbers, seed=0, images=1000, workers=0):
    """K-means on an encoder's features of a data set. numbers: {name: number of centres}
    -> {name: ClusterProbe, if there are labels with .classes, by majority}, features (n,D) of at
    most CELLS of an image, 2^17 in all, labels (n,) with -1 = none"""
    images = min(images, len(dataset))
    points = max(1, min(common.CELLS, 2 ** 17 // images))
    features, labels = sample_points(encoder, dataset, device, points, images, seed, workers)
    probes = {}
    for name, number in numbers.items():
        centres = kmeans(features, number, seed=seed)
        probes[name] = ClusterProbe(*centres.T.shape)
        probes[name].clusters.data = centres
        if (labels >= 0).any():
            nearest = torch.cat([(x @ centres.T).argmax(1) for x in features.split(16384)])
            counts = confusion_matrix(nearest, labels, number, dataset.classes)
            probes[name].classes = majority(counts)
    return probes, features, labels


def fit_linear(encoder, dataset, device, features, labels, seed=0, workers=0, steps=100):
    """A LinearProbe on a frozen encoder's features, fitted on a whole data set in bounded memory.
    It starts as the linear discriminant of sampled cells, features (n,D), labels (n,), -1 = none,
    and goes on by STEGO's recipe in whole passes, `steps` at least: 16 images a step, Adam at 5e-3,
    here falling to 0, cross-entropy of logits upsampled to the labels. The problem is convex."""
    x, y = features[labels >= 0], labels[labels >= 0]
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, one_hot = (x - mean) / deviation, F.one_hot(y, dataset.classes).float()
    means = one_hot.T @ x / one_hot.sum(0)[:, None].clamp(min=1)  # (C,D) of the classes
    within = (x - means[y]).T.cov(correction=0) + 1e-4 * torch.eye(x.shape[1], device=x.device)
    weight = torch.linalg.solve(within, means.T).T
    probe = LinearProbe(len(mean), dataset.classes).to(device)
    probe.weight.data[:, :, 0, 0] = weight
    probe.bias.data = one_hot.mean(0).clamp(min=1e-6).log() - (weight * means).sum(1) / 2
    mean, deviation = mean[:, None, None], deviation[:, None, None]
    adam = torch.optim.Adam(probe.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(seed)
    passes = range(-(-16 * steps // len(dataset)))
    order = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in passes]).tolist()
    loader = batches(dataset, 16, workers, "linear probe", order)
    for step, items in enumerate(loader):
        adam.param_groups[0]["lr"] = 5e-3 * (1 - step / len(loader))
        for batch in same_size(items):
            image, label = batch["image"].to(device), batch["label"].to(device)
            with torch.no_grad():
                code = (encode(encoder, image) - mean) / deviation
            logits = upsample(probe(code), label.shape[1:], image.shape[2:], patch_of(encoder))
            adam.zero_grad()
            linear_loss(logits, label).backward()
            adam.step()
    probe.weight.data /= deviation  # for features as they come
    probe.bias.data -= (probe.weight.data * mean).sum((1, 2, 3))
    return probe


def baseline(run, encoder, images, val, clusters, patch=1):
    """K-means on encoder(images) (B,D,h,w) of the train split -> (clusters,classes) on val."""
    model = Clustered(encoder, patch, None)
    probes, *_ = clusterings(model, images, run.device, {"kmeans": clusters}, run.args.seed,
                             workers=run.args.workers)
    model.cluster = probes["kmeans"]
    return evaluate(model, val, run.device, workers=run.args.workers, what="k-means")["cluster"]


# ---------------------------------------------------------------- pictures
# each is a `stack` of others, down to `box`, a line of text
FONT = ImageFont.load_default(13)
# each as far as can be from all before it, from black, grey and white, in CIELAB; none is dark
COLOURS = data.rgb("""
    9b1efa 1efa1e fa1e1e dabb1e fa1e9b 1efabb 1e7cfa 3d7c1e fa7c7c 1ebbfa fa9bfa 9b5c1e 9bda3d
    bbbb7c 7c5c9b 1e9b7c bb1ebb fa7c1e fa1e5c 1efafa 1eda5c da9bbb 7c5cfa 9b5c5c fabb9b 9bdabb
    bbbbfa 9bda7c bb3d7c 1e7c9b 7c7c1e fa1efa fa9b5c bb7cfa 3d9bfa 9bdafa da5c3d 5c7c5c fada7c""")


def distinct(count, taken=()):
    """`count` colours (count,3) uint8 that are unlike `taken` (n,3), as long as there are some."""
    pool = np.concatenate([COLOURS, data.colours(count + 255)])
    taken = np.reshape(taken, (-1, 3)).astype(int)
    free = [colour for colour in pool if (abs(taken - colour).sum(1) > 60).all()]
    return np.array((free + list(pool))[:count], np.uint8).reshape(-1, 3)


def naming(assignment, names=(), palette=()):
    """Id, name and colour of every cluster -> ids (clusters,), names, palette (n,3).
    A matched cluster takes those of its class; the others follow behind the classes."""
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
    edge = np.diff(ids, axis=0, append=ids[-1:]) != 0
    edge |= np.diff(ids, axis=1, append=ids[:, -1:]) != 0
    tinted = np.where(edge[..., None], 0.4 * colour + 153, 0.5 * colour + 0.5 * photo)
    return tinted.round().astype(np.uint8)


def photo_of(item):
    """uint8 (H,W,3) of a normalised item."""
    rgb = (item["image"] * common.STD + common.MEAN).clamp(0, 1) * 255
    return rgb.round().byte().permute(1, 2, 0).numpy()


def thumbnail(picture, height, smooth=False):
    """uint8 (H,W,3), or int32 ids (H,W) -> Pillow picture of this height."""
    image = Image.fromarray(picture)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return image.resize((max(1, round(image.width * height / image.height)), height), how)


def box(text, width=None, colour=(255, 255, 255)):
    """A line of text on a colour, `width` pixels wide, or as wide as the text."""
    width = width or math.ceil(FONT.getbbox(text)[2]) + 8
    picture = Image.new("RGB", (width, 26), tuple(map(int, colour)))
    ink = "white" if np.dot(colour, (0.3, 0.6, 0.1)) < 128 else "black"
    ImageDraw.Draw(picture).text((4, 13), text, ink, FONT, "lm")
    return picture


def stack(pictures, down=False, gap=4):
    """Pictures side by side, or one below the other, on white."""
    sizes = np.reshape([picture.size for picture in pictures], (-1, 2)).astype(int) + gap
    places = (sizes.cumsum(0) - sizes) * ((0, 1) if down else (1, 0))
    whole = Image.new("RGB", (places + sizes).max(0, initial=1).tolist(), "white")
    for picture, place in zip(pictures, places.tolist()):
        whole.paste(picture, tuple(place))
    return whole


def titled(pictures):
    """{title: picture} side by side, the titles above."""
    return stack([stack([box(title), x], down=True) for title, x in pictures.items()])


def legend(ids, names, palette, width=640):
    """The names of ids on their colours, as many beside each other as fit; -1 is not labelled."""
    texts = [[*names, "not labelled"][i] for i in ids]
    column = max((box(text).width for text in texts), default=1)
    boxes = [box(text, column, colour) for text, colour in zip(texts, paint(ids, palette))]
    count = max(1, width // (column + 4))
    rows = [stack(boxes[i:i + count]) for i in range(0, len(boxes), count)]
    return stack(rows, down=True)


def confusion_picture(confusion, names, title):
    """Counts (classes[+1],classes), predictions as rows -> labels as rows, in % of the row."""
    columns = [*names, "no class"][:len(names) + int(confusion[len(names):].sum() > 0)]
    counts = confusion[:len(columns)].double().cpu().T.numpy()
    texts = [f"{name}  {x:.1%}" for name, x in zip(names, counts.sum(1) / counts.sum().clip(1))]
    left = max(box(text).width for text in texts + columns)
    heads = [box(name, left).rotate(90, expand=True) for name in columns]
    rows = [stack([box("", left), *heads])]
    for text, row in zip(texts, counts / counts.sum(1, keepdims=True).clip(1)):
        blue = [255 - x * np.array([247, 191, 126]) for x in row]  # the more, the darker
        cells = [box(f"{100 * x:.0f}" if x >= 0.005 else "", 26, y) for x, y in zip(row, blue)]
        rows.append(stack([box(text, left), *cells]))
    note = "rows: true class and its share of the pixels; columns: prediction, % of the row"
    return stack([box(title), box(note), *rows], down=True)


def samples(model, dataset, device, indices):
    """Photo, ground truth where there are labels, and prediction as model.named says; a legend."""
    rows, seen, (ids, names, palette) = [], set(), model.named
    for item in map(dataset.__getitem__, indices):
        found = predict(model, item["image"][None].to(device), item["label"].shape)["cluster"][0]
        maps = {"ground truth": item["label"]} if dataset.classes else {}
        maps["prediction"] = ids[found.cpu()]
        row = {title: thumbnail(paint(x, palette), 240) for title, x in maps.items()}
        rows.append(titled({"photo": thumbnail(photo_of(item), 240, smooth=True), **row}))
        seen.update(*(x.unique().tolist() for x in maps.values()))
    return stack([*rows, legend(sorted(seen), names, palette)], down=True)


def small(photo, ids, count):
    """photo (H,W,3), ids (H,W) -> both at a height of 120, share of each of `count` ids."""
    shares = np.bincount(ids.ravel(), minlength=count) / ids.size
    ids = np.asarray(thumbnail(ids.astype(np.int32), 120)).astype(np.int16)
    return np.asarray(thumbnail(photo, 120, smooth=True)), ids, shares


def overview(entries, names, palette):
    """[`small`] -> per id name, share and the pictures in which it covers most; all shares."""
    shares = np.reshape([x for *_, x in entries], (-1, len(names)))
    mean, rows = shares.sum(0) / max(len(entries), 1), []
    for k in np.argsort(-mean, kind="stable"):
        best = [entries[i] for i in np.argsort(-shares[:, k])[:5] if shares[i, k] > 0]
        cells = [overlay(photo, (ids == k).astype(int), [(255, 255, 255), palette[k]])
                 for photo, ids, _ in best]
        text = f"id {k}: {names[k]}, {mean[k]:.1%} of all pictures"
        rows += [box(text, 640, palette[k]), stack([Image.fromarray(x) for x in cells])]
    return stack(rows, down=True), mean


def write_png(path, picture):
    picture.save(buffer := io.BytesIO(), "PNG")
    common.write(path, buffer.getbuffer())


# ---------------------------------------------------------------- scores.json and tables
TITLES = {"linear": "linear probe", "kmeans": "K-means, raw"}


def rows_of(result, val, probes=None, suffix=""):
    """What `evaluate` counted -> {title: scores}, nothing without labels.
    probes: {name: probe}, whose .classes stand in place of a majority on val itself."""
    rows = {}
    counted = {name: x for name, x in result.items() if val.classes and torch.is_tensor(x)}
    for name, counts in counted.items():
        linear = name.startswith("linear")
        rows[name + suffix] = scores(counts if linear else matched(counts, hungarian(counts)))
        if not linear and len(counts) != val.classes:  # many-to-one: ViCE's cluster model
            classes = getattr((probes or {}).get(name), "classes", majority(counts))
            rows[f"{name}, majority{suffix}"] = scores(matched(counts, classes))
    return rows


def seal(content):
    """A hash of all that a scores.json holds, by which it is known to be whole and ours."""
    text = json.dumps({**content, "seal": ""}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def saved_scores(path):
    """What a scores.json holds, {} where there is none. ValueError: it is not as we wrote it."""
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        saved = json.loads(path.read_bytes())
        if saved["seal"] == seal(saved):
            return saved
    raise ValueError(f"{path} is damaged, or older than its seal; delete it and run python "
                     f"eval.py {path.parent}")


def percent(x):
    return "-" if x is None else f"{100 * x:.1f}"


def aligned(lines):
    """Lists of cells -> text; the first column is flush left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
                     for line in lines)


def score_table(rows, names):
    """{title: row of scores.json} -> text: IoU of each class, mIoU and accuracy, in percent."""
    pixels = next(iter(rows.values()))["pixels"]
    columns = [[n / max(sum(pixels), 1) for n in pixels], *(row["iou"] for row in rows.values())]
    lines = [["IoU, %", "pixels", *(TITLES.get(key, key) for key in rows)]]
    lines += [[name, *map(percent, cells)] for name, *cells in zip(names, *columns)]
    for name in ("mIoU", "accuracy"):
        lines.append([name, "", *(percent(row[name.lower()]) for row in rows.values())])
    return aligned(lines) + "\n-: in neither labels nor prediction, not averaged"


def runs_table(found):
    """[(folder, options, rows)] -> a line per run, then mean and deviation over the seeds."""
    local = {"seed", "root", "cache_features", *common.ONLY_TYPED}
    columns = list(dict.fromkeys(key for *_, rows in found for key in rows))
    lines = [["mIoU / accuracy, %", *(TITLES.get(key, key) for key in columns)]]
    groups = collections.defaultdict(dict)  # {options but the seed: {seed: numbers}}
    for folder, args, rows in found:
        cells = [rows.get(key, {"miou": None, "accuracy": None}) for key in columns]
        lines.append([folder, *(f"{percent(x['miou'])} / {percent(x['accuracy'])}" for x in cells)])
        numbers = 100 * np.array([(x["miou"], x["accuracy"]) for x in cells], float)
        kind = json.dumps({k: v for k, v in vars(args).items() if k not in local}, sort_keys=True)
        if args.seed in groups[kind]:
            common.say(f"{folder} has the seed of another run: it does not count in the mean")
        groups[kind].setdefault(args.seed, numbers)
    for runs in (list(runs.values()) for runs in groups.values() if len(runs) > 1):
        both = zip(np.mean(runs, 0), np.std(runs, 0, ddof=1))
        cells = [f"{m[0]:.1f} ± {d[0]:.1f} / {m[1]:.1f} ± {d[1]:.1f}" for m, d in both]
        lines.append([f"mean of {len(runs)} seeds", *cells])
    return aligned(lines)


def evenly(count, total):
    """`count` indices spread evenly over 0..total-1: what is shown is a rule, not a choice."""
    count = min(count, total)
    return [int((i + 0.5) * total / count) for i in range(count)]


def finish(run, model, images, val, encode=None, more=None):
    """The end of every training run: score on val, write scores.json and pictures, print the table.
    images: the train split, on which clusters are refitted where args.probe is "kmeans", and the
    baseline's K-means. encode: (B,3,H,W) -> features (B,D,h,w) for the baseline, default the
    backbone. more: further counts, named as by `evaluate`. -> exit code: 1: unreadable images."""
    if run.args.bench:
        return 0
    images.read_images = True  # cached features may have left it off
    if getattr(run.args, "probe", None) == "kmeans":
        # a probe that learns online drops small classes: a centre that never wins never moves
        probes, *_ = clusterings(model.eval(), images, run.device, {"kmeans": run.args.clusters},
                                 run.args.seed, workers=run.args.workers)
        model.cluster.load_state_dict(probes["kmeans"].state_dict())
    run.keep(model=model)
    run.save(done=True)
    seconds = time.time() - os.path.getmtime(run.folder / "args.json") if run.rank == 0 else 0
    result = evaluate(model, val, run.device, workers=run.args.workers)
    if val.classes:
        raw = baseline(run, encode or model.backbone, images, val, run.args.clusters,
                       patch_of(model))
        result |= {"kmeans": raw, **(more or {})}
    found = {**rows_of(result, val), "seconds": seconds}
    write_report(run.folder, model, val, result, found, sorted({*images.paths, *val.paths}))
    return tell("scored", result["failed"])


def write_report(folder, model, val, result, found, paths, prefix=""):
    """Process 0 writes scores.json and pictures, then prints the table -> its rows.
    found: rows and what else scores.json shall hold; what it held of the same weights and data
    stays. paths: the photos that overview.png chooses from where there are no labels."""
    if common.rank() > 0:
        return {}
    counts = result.get("cluster", result.get("kmeans"))  # the latter of a raw backbone
    device = model.cluster.clusters.device
    assignment = hungarian(counts)
    model.named = ids, names, palette = naming(assignment, val.names, val.palette)
    model.eval_size = val.size
    path = folder / f"{prefix}scores.json"
    how = [val.split, val.size, val.protocol, val.names]
    what = {"weights": common.digest(model), "scored": seal({"how": how, "files": val.files()})}
    before = saved_scores(path)
    before = before if what.items() <= before.items() else {}
    content = {**before, **found, "images": len(val), "labelled": result["labelled"],
               "failed": result["failed"], "classes": val.names, "names": names,
               "palette": palette, "matching": ids, **what, "versions": common.versions(device)}
    text = json.dumps(content, default=lambda x: x.tolist())
    content = json.loads(text, parse_constant=lambda name: None)  # NaN is no JSON
    content["seal"] = seal(content)
    common.write(path, json.dumps(content, indent=1).encode())
    pictures = {"samples.png": samples(model, val, device, evenly(4, len(val)))}
    if val.classes:
        title = f"{val.name} {val.split}: clusters, named by Hungarian matching"
        pictures["confusion.png"] = confusion_picture(matched(counts, assignment), val.names, title)
    else:
        photos = (data.attempt(data.read_image, paths[i])[0] for i in evenly(100, len(paths)))
        entries = [small(np.array(x), segment_image(model, x), len(names)) for x in photos if x]
        pictures["overview.png"] = overview(entries, names, palette)[0]
    for name, picture in pictures.items():
        write_png(folder / (prefix + name), picture)
    rows = {key: x for key, x in content.items()
            if isinstance(x, dict) and "iou" in x and key in {*found, "kmeans"}}
    print(f"\n{val.name} {val.split}: {len(val) - len(result['failed'])} images, "
          f"{result['labelled']} of them with labels")
    print(score_table(rows, val.names) if rows
          else "no labels, hence no scores; overview.png shows what was found")
    print("wrote " + ", ".join(str(folder / (prefix + x)) for x in ["scores.json", *pictures]))
    return rows


# ---------------------------------------------------------------- runs
def load_run(folder, device="cpu", weights=None):
    """A trained run -> model (in eval mode, on the device), its options, its checkpoint.
    The model is `Model` of METHOD.py beside this file, ours or your own, made from the checkpoint's
    options alone. weights: where those of the backbone lie, if elsewhere than at training. It has
    .eval_size and .named, what `naming` gave when it was scored. FileNotFoundError, ValueError."""
    checkpoint = common.load_checkpoint(folder)
    path, method = Path(folder) / "last.pt", checkpoint["method"]
    own = {file.stem for file in Path(__file__).parent.glob("*.py")}
    module = importlib.import_module(method) if method in own else None
    if not hasattr(module, "Model"):
        raise ValueError(f"{path} is a run of {method!r}; no such file beside eval.py has a Model")
    args = argparse.Namespace(**common.check_args(module.arguments(), checkpoint["args"], folder))
    args.weights, args.out = weights or args.weights, str(folder)
    try:
        bare = argparse.Namespace(**{**vars(args), "weights": "none"})
        with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):
            common.load_trained(module.Model(bare), checkpoint["model"])  # before memory is taken
        model = module.Model(args)
        common.load_trained(model, checkpoint["model"])
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} makes no {method}.Model: {error!r}") from None
    backbone = common.digest(model.backbone) if hasattr(model, "backbone") else ""
    common.differences(checkpoint, backbone)
    found = saved_scores(Path(folder) / "scores.json")
    model.eval_size = getattr(args, "eval_size", args.size)
    model.named = naming(torch.full((len(model.cluster.clusters),), -1))
    if found.get("weights") == common.digest(model):
        palette = np.array(found["palette"], np.uint8)
        model.named = torch.tensor(found["matching"]), found["names"], palette
    return model.to(device).eval(), args, checkpoint


def open_run(folder, options, device):
    """A run, or without a folder the raw backbone of --arch, as `load_run` gives it."""
    if folder:
        return load_run(folder, device, options.weights)
    backbone = common.load_backbone(options.arch, options.weights, options.depth).to(device)
    name = options.data or "scenes"
    args = argparse.Namespace(data=name, root=None, protocol=None, seed=options.seed,
                              size=96 if name == "scenes" else 320)
    return Clustered(backbone, backbone.patch, None), args, {"done": True}


def load_data(options, args, split, model):
    """The data set that a run is scored on: its own, unless --data names another."""
    size, patch = options.size or getattr(args, "eval_size", args.size), patch_of(model)
    same = options.data in (None, *common.DATA)  # several sets may lie in one root
    protocol = options.protocol or (None if options.data else args.protocol)
    protocol = "native" if protocol == "square" else protocol  # ViCE trains on squares alone
    return data.load(options.data or args.data, options.root or (args.root if same else None),
                     split, size=-(-size // patch) * patch, protocol=protocol)


def score_run(folder, options, device):
    """`python eval.py RUN`, or without a folder --arch -> options of the run, its rows, exit code.
    --clusters are fitted on the codes of the train split; on another data set, and for a raw
    backbone, a linear model as well, ViCE's own for a run of ViCE or with --filters. Where a run is
    scored in another way than by itself, the files' names say so."""
    model, args, checkpoint = open_run(folder, options, device)
    val, probes = load_data(options, args, options.split, model), {}
    other = options.data not in (None, args.data)
    fresh = other or not folder  # there are no probes for these classes
    parts = val.name * other, val.split * (val.split != "val"), options.size, options.protocol
    prefix = "".join(f"{part}-" for part in parts if part)
    raw = "-".join(map(str, filter(None, ["runs/raw", val.name, options.arch, options.depth])))
    out = Path(folder or options.out or raw)
    saved_scores(out / f"{prefix}scores.json")  # a damaged one is refused before the work
    held = {path.name.rpartition("-")[2] for path in out.glob("*")}  # names without a prefix
    if not folder and held and ("last.pt" in held or "scores.json" not in held):
        raise ValueError(f"{out} holds a trained run or other files; take another --out")
    if not fresh and len({args.classes, val.classes} - {0}) > 1:
        raise ValueError(f"{folder} was trained with {args.classes} classes, now the labels of "
                         f"{val.name} have {val.classes}")
    if not checkpoint["done"]:
        common.say(f"{folder} has not been trained to its end, its clusters are not final; go on "
                   f"with: python {checkpoint['method']}.py --resume {folder}")
    if not fresh and options.split == "val":
        common.differences(checkpoint, val=val.files())
    fit = folder and getattr(importlib.import_module(checkpoint["method"]), "fit_linear", None)
    if options.filters and not fit:
        raise ValueError(f"--filters: {checkpoint['method']}.py has no linear model with filters")
    counts = options.clusters or [val.classes or 27] * fresh
    numbers = {f"{n} clusters" if folder or n != counts[0] else "kmeans": n for n in counts}
    if numbers or options.filters:
        train = load_data(options, args, "train", model)
        images = 1000 if folder else len(train)  # the raw linear probe's start, too
        probes, codes, labels = clusterings(model, train, device, numbers, args.seed, images,
                                            options.workers)
    if options.filters or other and fit:
        filters = options.filters or args.filters
        probes[f"linear, {filters} filters"] = fit(model, train, filters, args)
    elif fresh and (labels >= 0).any():
        probes["linear" + ", fitted here" * other] = fit_linear(
            model, train, device, codes, labels, args.seed, options.workers)
    own = probes_of(model)  # raw backbone: none
    if other:  # the run's linear probe knows other classes
        own.pop("linear", None)
    probes = own | probes
    if not folder:
        model.cluster = probes["kmeans"]
    result, rows = {}, {}
    for flip, crf in sorted({(False, False), (options.flip, options.crf)}):
        suffix = " + flip" * flip + " + CRF" * crf
        found = evaluate(model, val, device, flip, crf, options.batch_size, options.workers,
                         suffix[3:] or "evaluation", probes)
        result = result or found
        rows |= rows_of(found, val, probes, suffix)
    paths = (val if val.classes else load_data(options, args, "all", model)).paths
    rows = write_report(out, model, val, result, rows, paths, prefix)
    return args, rows, tell("scored", result["failed"])


# ---------------------------------------------------------------- your own pictures
def list_inputs(paths, out):
    """Files and folders -> {name of its result without suffix: file}, subfolders kept.
    a.jpg and a.png beside each other give a.jpg.png and a.png.png, legend.jpg gives legend.jpg.png.
    ValueError, FileNotFoundError: no image; two of one name; OUT is no folder of our results."""
    found, several = [], sum(Path(path).is_dir() for path in paths) > 1
    for path in map(Path, paths):
        if path.is_dir():
            at = Path(path.resolve().name if several else "")
            found += [(path / name, at / name) for name in data.list_images(path)]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise FileNotFoundError(f"--images {path} does not exist")
    if not found:
        raise FileNotFoundError(f"no image in {', '.join(map(str, paths))}")
    foreign = out.exists() and any(out.iterdir()) and not (out / ".segmented").exists()
    if foreign or any(out.resolve() in file.resolve().parents for file, _ in found):
        raise ValueError(f"{out} holds other files: results need a folder of their own, a new one")
    stems = collections.Counter(name.with_suffix("") for _, name in found)
    stems.update(map(Path, ("legend", "overview", "contact")))  # taken
    inputs = {str(name if stems[name.with_suffix("")] > 1 else name.with_suffix("")): file
              for file, name in found}
    if len({*inputs, *(f"{name}_overlay" for name in inputs)}) < 2 * len(found):
        raise ValueError("two images would have one result; take fewer --images at a time")
    return inputs


def segment(folder, options, device):
    """`python eval.py RUN --images PATH... --out DIR`: segment files and folders -> exit code.
    Per image NAME.png, a palette PNG whose values are ids, and NAME_overlay.png; legend.png,
    legend.txt (id, name, share of the pixels), overview.png and contact.png. Several --clusters:
    contact.png and overviews alone. An unreadable file is listed, and the exit code is 1."""
    if not options.out:
        raise ValueError("--images needs --out DIR, where the results go")
    out, inputs = Path(options.out), list_inputs(options.images, Path(options.out))
    model, args, _ = load_run(folder, device, options.weights)
    probes, named = {"clusters": model.cluster}, {"clusters": model.named}
    if options.head == "linear":
        names = saved_scores(Path(folder) / "scores.json").get("classes")
        if model.linear is None or not names:
            raise ValueError(f"{folder} was trained or scored without labels; drop --head linear")
        probes["clusters"] = model.linear
        named["clusters"] = range(len(names)), names, model.named[2][:len(names)]
    if options.clusters:
        if options.head == "linear" or options.names and len({*options.clusters}) > 1:
            raise ValueError("--clusters goes without --head linear, and several without --names")
        numbers = {f"{n} clusters": n for n in sorted(options.clusters)}
        train = load_data(options, args, "train", model)
        probes = clusterings(model, train, device, numbers, args.seed)[0]
        named = {key: naming(torch.full((n,), -1)) for key, n in numbers.items()}
    several, (key, (ids, names, palette)) = len(named) > 1, list(named.items())[-1]
    if options.names:
        given = data.read_lines(Path(options.names))
        if len(given) != len(names):
            raise ValueError(f"{options.names} holds {len(given)} names for {len(names)} ids")
        named[key] = ids, given, palette
    if len(names) > 256:
        raise ValueError(f"a palette PNG holds 256 ids, these are {len(names)}")
    common.write(out / ".segmented", b"")  # from now on it may be written over
    failed, rows, entries = [], [], {key: [] for key in named}
    shown, kept = (evenly(n, len(inputs)) for n in (12, 1000))
    size = 0 if options.tile and options.size is None else options.size
    for number, (name, file) in enumerate(tqdm(inputs.items(), "segmentation", leave=False)):
        picture, error = data.attempt(data.read_image, str(file))
        if error:
            failed.append((file, error))
            continue
        maps = segment_image(model, picture, options.crf, options.flip, size, options.tile, probes)
        row = {"photo": np.array(picture)}
        for key, (ids, names, palette) in named.items():
            found = np.asarray(ids)[maps[key]]
            row[key] = overlay(row["photo"], found, palette)
            if number in kept:
                entries[key].append(small(row["photo"], found, len(names)))
        if number in shown:
            rows.append(titled({title: thumbnail(x, 160, smooth=True) for title, x in row.items()}))
        if several:
            continue
        result, tinted = Image.fromarray(found.astype(np.uint8)), Image.fromarray(row[key])
        result.putpalette(palette.tobytes())  # "L" becomes "P": the values stay
        write_png(out / f"{name}.png", result)
        if options.legend:
            below = legend(np.unique(found), names, palette, tinted.width)
            tinted = stack([tinted, below], down=True)
        write_png(out / f"{name}_overlay.png", tinted)
    for key, (_, names, palette) in named.items():
        end = "-" + key.split()[0] if several else ""
        picture, shares = overview(entries[key], names, palette)
        write_png(out / f"overview{end}.png", picture)
    rows.append(legend(range(len(names)), names, palette))
    write_png(out / "contact.png", stack(rows, down=True))
    if not several:
        lines = list(zip(range(256), names, 100 * shares))
        text = "".join(f"{k}\t{name}\t{x:.2f} %\n" for k, name, x in lines)
        common.write(out / "legend.txt", text.encode())
        texts = [f"{k}: {name}, {x:.1f} %" for k, name, x in lines]
        write_png(out / "legend.png", legend(range(len(names)), texts, palette))
    print(f"segmented {len(inputs) - len(failed)} of {len(inputs)} images into {out}; look at "
          + ("contact.png" if several else "overview.png, and name the ids with --names FILE"))
    return tell("segmented", failed)


# ---------------------------------------------------------------- a look inside
@torch.no_grad()
def embed(folder, options, device):
    """Write the code of every image of a split as NAME.npy, float32 (K,h,w) -> exit code."""
    model, args, _ = open_run(folder, options, device)
    dataset = load_data(options, args, options.split, model)
    root, failed = os.path.commonpath([os.path.dirname(path) for path in dataset.paths]), []
    for [item] in batches(dataset, 1, what="embedding"):
        if item["error"]:
            failed.append((item["path"], item["error"]))
            continue
        buffer = io.BytesIO()
        np.save(buffer, encode(model, item["image"][None].to(device))[0].cpu().numpy())
        name = os.path.relpath(item["path"], root) + ".npy"
        common.write(Path(options.embed) / name, buffer.getbuffer())
    print(f"wrote {len(dataset) - len(failed)} codes (K,h,w) to {options.embed}")
    return tell("embedded", failed)


def principal_colours(x):
    """Map (K,h,w) -> uint8 (h,w,3): its first three principal components as red, green, blue."""
    pixels = x.flatten(1).T - x.mean((1, 2))  # (n,K)
    rgb = pixels @ torch.linalg.svd(pixels, full_matrices=False)[2][:3].T
    low, high = rgb.quantile(torch.tensor([0.02, 0.98]), 0)
    rgb = 255 * ((rgb - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return rgb.byte().view(*x.shape[1:], 3).numpy()


@torch.no_grad()
def path_picture(folder, options, device):
    """One image at every station from file to score, features and code in `principal_colours`."""
    model, args, _ = load_run(folder, device, options.weights)
    if not hasattr(model, "backbone"):
        raise ValueError("--path shows the way through a frozen backbone; this run has none")
    dataset, (ids, names, palette) = load_data(options, args, options.split, model), model.named
    item = dataset[len(dataset) // 2]
    if item["error"]:
        raise ValueError(f"{item['path']} cannot be drawn: {item['error']}")
    image, label = item["image"][None].to(device), item["label"]
    feats, code = (encode(x, image)[0].cpu() for x in (model.backbone, model))
    found = predict(model, image)["cluster"][0].cpu()
    stations = {"image": (item["image"], photo_of(item)),
                "features": (feats, principal_colours(feats)),
                "code": (code, principal_colours(code)),
                "clusters": (found, paint(found, distinct(len(ids)))),
                "classes": (found, paint(ids[found], palette)),
                "ground truth": (label, paint(label, palette))}
    row = {f"{title} {'x'.join(map(str, x.shape))}": thumbnail(picture, 180)
           for title, (x, picture) in stations.items()}
    seen = np.unique(np.concatenate([ids[found], label], None))
    file = Path(options.out or folder) / "path.png"
    write_png(file, stack([titled(row), legend(seen, names, palette, 1000)], down=True))
    print(f"wrote {file}")
    return 0


# ---------------------------------------------------------------- the authors' checkpoints
OFFICIAL = {  # published name -> ours, by prefix; what has no place in our models stays behind
    "stego": {"net.cluster1.0.": "head.linear.", "net.cluster2.": "head.mlp.",
              "cluster_probe.": "cluster.", "linear_probe.": "linear."},
    "hp": {"cluster1.0.": "head.linear.", "cluster2.": "head.mlp.",
           "ema_model1.0.": "momentum.linear.", "ema_model2.": "momentum.mlp.",
           "linear_model_state_dict.": "linear.", "cluster_model_state_dict.": "cluster."},
    "cause": {"head.": "student.", "head_ema.": "teacher.", "codebook": "codebook",
              "projection_head.f.": "projection.", "projection_head_ema.f.": "teacher_projection.",
              "linear.f.": "linear.", "cluster_probe": "cluster.clusters"}}


def read_official(method, files):
    """A published checkpoint's tensors under our names; those inside CAUSE's heads keep theirs."""
    found = {}
    for content in map(common.read_tensors, files):
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        for key, x in content.items():  # HP: one dictionary per module
            parts = x.items() if isinstance(x, dict) else ()
            found |= {key: x, **{f"{key}.{name}": y for name, y in parts}}
    found = {re.sub(r"^(net_model_state_dict\.|module\.)*", "", str(key)): x
             for key, x in found.items() if torch.is_tensor(x)}
    return {new + key[len(old):]: x.clone().float() for old, new in OFFICIAL[method].items()
            for key, x in found.items() if key.startswith(old)}


def import_official(options):
    """`python eval.py --official METHOD FILE... --data NAME --arch A --out RUN`: published weights.
    stego: the Lightning .ckpt; hp: ckpt.pth; cause: segment_*.pth cluster_*.pth of one training.
    The backbone stays in the file of stego and hp. ValueError says what does not fit."""
    method, *files = options.official
    if method not in OFFICIAL or not (files and options.data and options.out):
        raise ValueError(f"--official takes a method ({', '.join(OFFICIAL)}) and its files; with "
                         "--data and --arch, what they were trained on, and --out RUN")
    folder, module = Path(options.out), importlib.import_module(method)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another --out")
    tensors = read_official(method, files)
    words = ["--data", options.data, "--arch", options.arch, "--out", options.out]
    args, cause = common.parse(module.arguments, module.PRESETS, words), method == "cause"
    module.schedule(args, 1)  # steps for epochs: any will do
    args.root, args.weights = options.root, options.weights
    try:
        args.classes, args.code_dim = tensors["linear.weight"].shape[:2]
        args.clusters = len(tensors["cluster.clusters"])
        if cause:
            args.head = "tr" if "student.query_pos" in tensors else "mlp"
            args.size = args.eval_size = 322 if args.arch.endswith("14") else 320
            args.codes = len(tensors["codebook"])
            args.projection_dim = len(tensors["projection.weight"])
            args.heads = 12 if args.arch in ("vits8", "vits16") else None  # as its authors built it
        elif not args.weights:
            args.weights = os.path.abspath(files[0])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{', '.join(files)} holds no probes of {method}: no {error}") from None
    model = module.Model(args)
    for name in ("student", "teacher") if cause else ():
        head = {key[8:]: tensors.pop(key) for key in list(tensors) if key.startswith(name + ".")}
        module.load_published_head(head, getattr(model, name))
    own = common.trained(model)
    for key, x in own.items():
        if key.startswith(("student.", "teacher.")):  # filled in above
            tensors[key] = x
        if key.startswith(("head.mlp.", "projection")):  # a linear head; HP's Z is not saved
            tensors.setdefault(key, torch.zeros_like(x))
        if key in tensors and tensors[key].numel() == x.numel():
            tensors[key] = tensors[key].view_as(x)  # 1x1 convolutions as matrices
    common.load_trained(model, {key: x for key, x in tensors.items() if key in own})
    common.save({"method": method, "args": vars(args), "model": common.trained(model), "state": {},
                 "phase": 0, "step": 0, "done": True, "rng": [], "log": 0, "images": {},
                 "backbone": common.digest(model.backbone)}, folder / "last.pt")
    print(f"wrote {folder}; score it with: python eval.py {folder} --root DIR --flip --crf")
    return 0


# ---------------------------------------------------------------- command line
SCORING = "data root split protocol size weights batch_size workers crf flip clusters"
COMMANDS = {  # option that says what is done -> what else it uses, beside --device
    "official": "data arch out root weights",
    "images": "runs out root weights size crf flip tile clusters names head legend",
    "embed": "runs data root split protocol size weights arch depth",
    "path": "runs out data root split protocol size weights",
    "arch": "depth seed out " + SCORING,
    "runs": "filters " + SCORING}


def arguments():
    p, number = common.Parser(__doc__), common.number
    p.add_argument("runs", nargs="*", metavar="RUN", help="run folders; several are compared")
    add = p.group("scoring")
    add("--crf", False, "also with the fully connected CRF", action="store_true")
    add("--flip", False, "also with the code averaged over the mirrored image", action="store_true")
    add("--clusters", None, "also K-means with N centres on the code; where N is not the number of "
        "classes, also by majority of train labels", type=number(2), nargs="+", metavar="N")
    add("--filters", None, "vice: also a linear model of L filters", type=number(), metavar="L")
    add("--data", None, "score on this data set, with probes fitted on its train split")
    add("--root", None, "where the data lies, if not where it lay at training", metavar="DIR")
    add("--split", "val", "val, train, ...")
    add("--protocol", None, "how images are resized and cropped, if not as at training")
    add("--size", None, "shorter side at which the network sees an image, if not as at training; "
        "with --images, 0 leaves images as they are", type=number(0, 8192), metavar="PIXELS")
    add = p.group("your own pictures")
    add("--images", None, "segment these files and folders", nargs="+", metavar="PATH")
    add("--out", None, "where results go; of --images: a new folder, or results", metavar="DIR")
    add("--tile", None, "at full size, in tiles of N pixels; try 512", type=number(32), metavar="N")
    add("--names", None, "a name per line for ids 0, 1, ...", metavar="FILE")
    add("--head", "cluster", "which probe", choices=("cluster", "linear"))
    add("--legend", False, "a legend below every overlay", action="store_true")
    add = p.group("a look inside")
    add("--embed", None, "write the code of every image of --split as .npy (K,h,w)", metavar="DIR")
    add("--path", False, "picture of one image at every station, with shapes", action="store_true")
    add("--official", None, "turn a published checkpoint into the run --out: stego FILE, hp FILE, "
        "or cause SEGMENT CLUSTER; with --data and --arch", nargs="+", metavar=("METHOD", "FILE"))
    add = p.group("backbone, machine")
    add("--arch", None, "without RUN: score the raw backbone, by K-means and linear probe")
    add("--weights", None, "backbone weights, if not where they lay", metavar="FILE|none")
    add("--depth", None, "with --arch: the first K blocks", type=number(), metavar="K")
    add("--seed", 0, "of K-means, with --arch", low=0)
    add("--batch-size", 16, "images at a time")
    add("--device", None, "cuda, cpu; else the accelerator if there is one")
    add("--workers", 0, "processes that read images", low=0)
    return p


def run(options):
    """What the options ask for -> exit code. ValueError where some are lacking, or not used."""
    defaults = vars(arguments().parse_args([]))
    given = {key for key, x in vars(options).items() if x != defaults[key]} - {"device"}
    command = next((key for key in COMMANDS if key in given), "runs")
    unused = given - {command, *COMMANDS[command].split()}
    if bool(options.runs) == bool(options.arch) or len(options.runs) > 1 and command != "runs":
        raise ValueError("what is scored or used is a RUN, or --arch A for a raw backbone; "
                         "--help lists all")
    if unused:
        what = "scoring a RUN" if command == "runs" else common.flag(command)
        raise ValueError(f"{what} does not use {', '.join(map(common.flag, sorted(unused)))}")
    if command == "official":
        return import_official(options)
    device, folder = common.start_processes(options.device), (options.runs or [None])[0]
    use = {"images": segment, "embed": embed, "path": path_picture}.get(command)
    if use:
        return use(folder, options, device)
    found = [score_run(folder, options, device) for folder in options.runs or [None]]
    if common.rank() == 0 and len(found) > 1:
        print("\n" + runs_table([(folder, *x[:2]) for folder, x in zip(options.runs, found)]))
    return max(code for *_, code in found)


if __name__ == "__main__":
    common.command(lambda: run(arguments().parse_args()))
