"""ViCE: visual concepts by swapped prediction of superpixels (Karlsson et al., arXiv 2111.12460).

An image is cut into superpixels (SLIC), and square views around one point of it show some of them
together. A CNN embeds every pixel; a superpixel is the mean embedding of its pixels. Sinkhorn's
optimal transport assigns the first view's superpixels to prototypes, and the other views, which
see them with other context, scale and colour, must predict that assignment. Then the network is
frozen, and clusters and a linear model are fitted on it. No label reaches the network.

    python vice.py                                   # generated scenes, from random weights
    python vice.py --data camvid --root DIR --weights resnet18.pth
    python vice.py --data coco27 --root DIR          # Table 1; --accumulate 8 where memory is short
    python vice.py --data cityscapes19 --root DIR    # Table 1; from scratch with --weights none
    python vice.py --data coco27 --root DIR --decoder deeplab --arch resnet50  # Table 3, or ...152
    python vice.py --data cityscapes19 --root DIR --decoder deeplab            # Table 3, or ...101
    python eval.py RUN --filters 27 --clusters 128   # L, and C by majority, of Tables 1 and 8
    python eval.py RUN --data cityscapes19 --root DIR                          # Table 9
    Table 2: --region-size 10, --regions grid --region-size 1 or 10, --mask 0; 4: --regions grid.
    Tables 5, 6: --view-size --mask --prototypes --queue --views --code-dim --beta. Other decoders
    of 2 and 4, and 11 (fine-tuning with labels): no command. 8, COCO: --arch resnet50.

One thread of a CPU, torch 2.14, mIoU in percent (before: the same network untrained). Scenes, seeds
0 to 2, 96 CPU-seconds: clusters 33.8 +- 0.5 (before 21.1), linear model 68.2 +- 1.0 (before 62.0).
CamVid, three stages of an ImageNet-supervised ResNet-18: clusters 21.8 +- 0.6 (before 17.1), linear
32.4 +- 0.6 (before 37.5: so short a training costs what ImageNet's labels had taught). Not run, the
paper: COCO 19.7 (C = 128), 25.5 (L = 256), Cityscapes 21.5, 31.6. A worker needs 18 ms for an item
of 5 x 256 x 256 whose superpixels it knows, else 66; a batch of 32 has 52 MB.

    paper                                 here
    X, A: image, its superpixels          picture (3,H,W), regions (H,W) by `slic`
    (x,y)* a content-rich point           drawn from `content`
    M views, beta; random masking         `make_views`, --views, --beta; `mask_views`
    f_theta, Z: D numbers a pixel         `Network`, maps (views,K,h,w), h = H/4; --code-dim is K
    I mutual regions, vectors z*          `resize_regions`, `embed_regions`
    C, the paper's K concepts             model.prototypes (prototypes,K)
    scores s* (eq. 3), assignment q       z @ prototypes.T, `sinkhorn`
    loss (eq. 4, algorithm 3)             `swapped_prediction_loss`

Departures of the published code, followed here, from the paper:
    a region is its mean, then made unit (the paper: the mean of unit vectors)
    beta 0.5 to 1.5 (text: 2); prototypes 27 with FPN (text: 128); regions 20 pixels (Table 2: 10)
    "25 %" bounds the sides of the noise; touched superpixels become noise and are no targets
    the queue holds embeddings, not scores, and joins from step 313; 5,000 a GPU, in all 160,000
    one mean over all regions (eq. 4: per image, and over M); Cityscapes has 19 classes (text: 27)
Ours from the published code:
    trained on COCO's curated list (49,629) and Cityscapes' train split (2,975) for as many steps;
    theirs on 241,690 (unlabelled ones, too) and on all 5,000, val and test too
    DeepLab's configurations take one pixel for a region and add a coherence loss: not built, so
    their numbers come from another loss; their images have 500 pixels or more, here COCO's 480
    the queue fills from step 0, without random vectors; prototypes are unit from the start
    superpixel 0 is kept; labels and noise are resized by one rule
    batch statistics over all processes (published: a node's four), on a CPU over each alone
    --accumulate: Sinkhorn, batch statistics, the mean of the loss and the log see a part at a time
    one order of colour changes a step; clusters fitted on 20 pixels an image (theirs: not released)
    as many clusters as classes are matched one to one (the paper: by majority)
    scenes and camvid: distortion at 0.4 (at full strength 26, not 34 mIoU on scenes), narrow beta,
    12 or 8 x 3 views a step (4 x 5 did not learn), the linear model fitted on sampled pixels
"""
import copy
import math
import mmap

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy import ndimage
from torch import nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import rgb_to_grayscale as grey  # (n,1,H,W)

import common
import data
import eval


# ---------------------------------------------------------------- superpixels and views

def slic(image, region_size=20, ruler=10, iterations=5):
    """SLIC superpixels, K-means of colour and place in a window around each centre, pixel for pixel
    OpenCV's: uint8 RGB (H,W,3) -> labels (H,W), numpy or torch. Connectivity is not enforced, as
    published: a label may lie in pieces."""
    # BGR; the blur's sigma is 4 (84 88 84 / 256) by accident: a border flag was passed in its place
    pixels = blur(np.asarray(image)[..., ::-1], 84, 88).astype(np.float32)
    centres = np.concatenate(seeds(pixels, region_size), 1)  # (seeds,5): colour, x, y
    weight = np.float32((region_size / ruler) ** 2)
    shape, count = pixels.shape[:2], len(centres)
    points = np.stack([*np.moveaxis(pixels, -1, 0), *np.indices(shape, np.float32)[::-1]])
    labels = np.zeros(shape, np.int64)  # a pixel that no window reaches keeps its label
    for _ in range(iterations):
        best = np.full(shape, np.inf, np.float32)
        for seed, centre in enumerate(centres):
            down, across = (slice(max(0, int(at) - region_size), max(0, int(at) + region_size))
                            for at in centre[:2:-1])
            square = (points[:, down, across] - centre[:, None, None]) ** 2
            distance = square[:3].sum(0) + square[3:].sum(0) / weight
            closer = distance < best[down, across]
            np.copyto(best[down, across], distance, where=closer)
            np.copyto(labels[down, across], seed, where=closer)
        sums = np.stack([np.bincount(labels.ravel(), x, count) for x in points.reshape(5, -1)], 1)
        size = np.bincount(labels.ravel(), minlength=count).clip(1)
        centres = sums.astype(np.float32) / size.astype(np.float32)[:, None]
    return torch.from_numpy(labels) if torch.is_tensor(image) else labels


def seeds(pixels, step):
    """Colours (seeds,3), places (seeds,2) as (x,y): a grid, moved to flatter diagonal pixels."""
    H, W, _ = pixels.shape
    nx, ny = max(1, int(0.5 + W / step)), max(1, int(0.5 + H / step))
    x, y = np.meshgrid(*(np.arange(n) * (step + int((length - step * n) / n)) + step // 2
                         for n, length in ((nx, W), (ny, H))))
    inside = (x < W) & (y < H)
    place, count = np.zeros((nx * ny, 2), int), inside.sum()
    place[:count] = np.stack([x[inside], y[inside]], 1)
    dx, dy = (ndimage.correlate1d(pixels, [-1, 0, 1], axis, mode="mirror") for axis in (1, 0))
    edge = np.pad((dx * dx + dy * dy).sum(-1), 1, constant_values=np.inf)
    around = np.array([[0, -1, -1, 0, 1, 1, 1, 0, -1], [0, 0, -1, -1, -1, 0, 1, 1, 1]]).T  # (x,y)
    x, y = (place[:, None] + around + 1).transpose(2, 0, 1)  # (seeds,9)
    move = around[edge[y, x].argmin(1)]
    moved = move.all(1)  # OpenCV moves only if both x and y change
    place[moved] += move[moved]
    colour = pixels[place[:, 1], place[:, 0]]
    colour[count:][~moved[count:]] = 0  # seeds outside become black ones at (0,0)
    return colour, place.astype(np.float32)


def blur(image, edge, middle):
    """uint8 (H,W,C) with the kernel (edge, middle, edge) / 256 both ways, borders mirrored."""
    for axis in (0, 1):
        image = ndimage.correlate1d(image, [edge, middle, edge], axis, np.int32, "mirror")
    return image + 2 ** 15 >> 16


def grid(H, W, step):
    """Squares (H,W) instead of superpixels, for comparison; step 1 makes every pixel a region."""
    scale = (int(H * W / step ** 2) / (H * W)) ** 0.5
    rows, columns = max(1, int(scale * H)), max(1, int(scale * W))
    return np.arange(H)[:, None] * rows // H * columns + np.arange(W) * columns // W


def content(picture):
    """uint8 RGB (H,W,3) -> probability (H,W) of being the point that all views show: high on edges.
    Canny's, a pixel thicker downwards (published: a 3x3 dilation that acts as 2x1), blurred."""
    grey = (blur(picture, 64, 128) @ np.array([0.299, 0.587, 0.114])).round()
    dx, dy = (ndimage.sobel(grey, axis, mode="nearest") for axis in (1, 0))
    m = dx * dx + dy * dy
    at = np.lib.stride_tricks.sliding_window_view(np.pad(m, 1), m.shape)  # (3,3,H,W): neighbours
    falling, rising = np.maximum(at[0, 2], at[2, 0]), np.maximum(at[0, 0], at[2, 2])
    peak = m > np.where(dx * dy < 0, falling, rising)
    tan = 0.41421356  # of 22.5 degrees: an edge has one of four directions
    peak = np.where(abs(dy) < tan * abs(dx), (m > at[1, 0]) & (m >= at[1, 2]), peak)
    peak = np.where(abs(dx) < tan * abs(dy), (m > at[0, 1]) & (m >= at[2, 1]), peak)
    weak, strong = peak & (m > 10 ** 2), peak & (m > 50 ** 2)
    edge = ndimage.binary_propagation(strong, np.ones((3, 3)), weak)
    edge[1:] |= edge[:-1].copy()
    p = blur(edge[..., None] * np.uint8(255), 64, 128)[..., 0] / 255 + 0.005
    return p / p.sum()


def clip_centre(x, y, width, height, W, H):
    """Move a centre so that its rectangle lies in the image; if too large, it starts at 0."""
    x, y = min(int(x), int(W - width / 2)), min(int(y), int(H - height / 2))
    return max(x, math.ceil(width / 2)), max(y, math.ceil(height / 2))


def near(centre, s, i, others, angle, radius):
    """Centre of view i + 1, of side s, in a sector of its own around view 0's; draws in [0,1]."""
    t, r = math.pi / 2 - 2 * math.pi / others * (i + angle), s / 2 * radius
    return centre[0] + int(r * math.cos(t)), centre[1] + int(r * math.sin(t))


def mask_rectangle(s, side, largest, turn, radius, width, height):
    """Noise rectangle (x0,y0,x1,y1) in a crop of side s, from four draws in [0,1].
    It is placed as if the crop had the side of the finished view: published."""
    width, height = int(largest * s * width), int(largest * s * height)
    r, t = side / 2 * radius, 2 * math.pi * turn
    x, y = side / 2 + r * math.cos(t), side / 2 + r * math.sin(t)
    x, y = clip_centre(x, y, width, height, side, side)
    return x - width // 2, y - height // 2, x + width // 2, y + height // 2


def place_views(centres, sizes):
    """Centres (x,y), sides -> boxes (views,4) as x0 y0 x1 y1; the rectangle (4,) that all show."""
    (x, y), half = np.array(centres).T, np.array(sizes) / 2
    boxes = np.stack([x - half, y - half, x + half, y + half], 1).astype(int)  # towards zero
    half = half.astype(int)
    return boxes, np.array([(x - half).max(), (y - half).max(), (x + half).min(), (y + half).min()])


def crop(x, box):
    """Any (C,H,W) -> (C,y1-y0,x1-x0), 0 outside."""
    x0, y0, x1, y1 = box.tolist()
    return v2.functional.crop(x, y0, x0, y1 - y0, x1 - x0)


def mask_views(crops, shared, rectangles, count, spared=None, rng=None):
    """crops: labels [(s,s)], shared (views,4): their common rectangle -> bool (views,count+1):
    which of the ids 0, ..., count-1, -1 are noise in a view, (count+1,): which stay common to all.
    A region that a view's rectangle touches becomes noise there and is common no more; a random
    quarter of the common ones is spared. One that touches padding makes all padding noise."""
    ids = np.r_[:count, -1]
    x0, y0, x1, y1 = shared[0]
    kept = np.isin(ids, crops[0][y0:y1, x0:x1]) & (ids >= 0)
    if spared is None:
        spared = rng.choice(kept.nonzero()[0], kept.sum() // 4, replace=False)
    noise = np.stack([np.isin(ids, labels[y0:y1, x0:x1])
                      for labels, (x0, y0, x1, y1) in zip(crops, np.maximum(rectangles, 0))])
    noise[:, spared] = False
    return noise, kept & ~noise.any(0)


def resize_regions(crops, shared, kept, side):
    """crops [(s,s)], shared (views,4), kept (count+1,) -> (views,side,side), nearest; which of the
    kept ids all views still show in `shared`, (count+1,)."""
    ids, steps, views = np.r_[:len(kept) - 1, -1], np.arange(side), []
    for labels, (x0, y0, x1, y1) in zip(crops, shared * side):
        a, b = labels.shape
        view = labels[steps * a // side][:, steps * b // side]  # rounded down as OpenCV does
        part = view[y0 // a:y1 // a, x0 // b:x1 // b] if views else view  # published: view 0 whole
        kept = kept & np.isin(ids, part)
        views.append(view)
    return np.stack(views), kept


def make_views(picture, regions, rng, args):
    """uint8 (3,H,W), regions (H,W) -> views uint8 (views,3,side,side), regions (views,side,side).
    Ids become 0, 1, ... for the regions that all views show, -1 for none, -2 for noise."""
    def von_mises(peak, n=None):
        return (rng.vonmises(peak, 2, n) + math.pi) / (2 * math.pi)  # likeliest 0.5, or 0.75
    (H, W), side, count = regions.shape, args.view_size, int(regions.max()) + 1
    y, x = divmod(rng.choice(H * W, p=content(picture.permute(1, 2, 0).numpy()).ravel()), W)
    sizes = rng.uniform(*sorted(args.beta), args.views) * side
    centres = [clip_centre(x, y, sizes[0], sizes[0], W, H)]
    for i, s in enumerate(sizes[1:]):
        x, y = near(centres[0], s, i, args.views - 1, von_mises(0), von_mises(math.pi / 2))
        centres.append(clip_centre(x, y, s, s, W, H))
    boxes, rectangle = place_views(centres, sizes)
    shared, ids = rectangle - boxes[:, [0, 1, 0, 1]], torch.from_numpy(regions)[None] + 1
    crops = [crop(ids, box)[0].numpy() - 1 for box in boxes]
    masks = [mask_rectangle(s, side, args.mask, rng.random(), *von_mises(math.pi / 2, 3))
             for s in sizes]
    noise, kept = mask_views(crops, shared, masks, count, rng=rng)
    labels, kept = resize_regions(crops, shared, kept, side)
    numbers, views = np.where(kept, kept.cumsum() - 1, -1), []
    for i, (box, hidden) in enumerate(zip(boxes, noise)):
        view = v2.functional.resize(crop(picture, box), [side, side], InterpolationMode.BICUBIC)
        labels[i] = np.where(hidden, -2, numbers)[labels[i]]
        if rng.random() < 0.5:
            view, labels[i] = view.flip(-1), labels[i, :, ::-1].copy()
        views.append(view)
    return torch.stack(views), labels


# ---------------------------------------------------------------- model

class FPN(nn.Module):
    """Maps of the stages -> (B,K,h,w): 1x1 convolutions, upsampled and added from the top. PiCIE's;
    torchvision's FeaturePyramidNetwork has nearest upsampling and 3x3 convolutions besides."""
    def __init__(self, widths, K):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, K, 1) for width in widths)

    def forward(self, maps):
        x = self.lateral[-1](maps[-1])
        for conv, m in list(zip(self.lateral, maps))[-2::-1]:
            x = conv(m) + F.interpolate(x, m.shape[2:], mode="bilinear")
        return x


def separable(c_in, c_out, dilation=1):
    """Depth-wise 3x3, then 1x1; ReLU stands before BN in both halves, as published."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, 1, dilation, dilation, groups=c_in, bias=False), nn.ReLU(),
        nn.BatchNorm2d(c_in),
        nn.Conv2d(c_in, c_out, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(c_out))


class DeepLab(nn.Module):
    """DeepLabV3+: an atrous pyramid on the last stage, refined by the first -> (B,K,h,w).
    torchvision's ASPP has full convolutions, ReLU after BN, and dropout."""
    def __init__(self, widths, K):
        super().__init__()
        top = widths[-1]
        self.one, self.pool = (Conv2dNormActivation(top, 256, 1) for _ in range(2))
        self.low = Conv2dNormActivation(widths[0], 48, 1)
        self.atrous = nn.ModuleList(separable(top, 256, dilation) for dilation in (12, 24, 36))
        self.merge = Conv2dNormActivation(5 * 256, 256, 3, activation_layer=None)  # no ReLU
        self.decode = nn.Sequential(separable(304, 256), separable(256, 256), nn.Conv2d(256, K, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.bias, 1e-4)

    def forward(self, maps):
        x, low = maps[-1], self.low(maps[0])
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.merge(torch.cat([self.one(x), *(branch(x) for branch in self.atrous), pooled], 1))
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
        return self.decode(torch.cat([low, x], 1))


class Network(nn.Module):
    """Images (B,3,H,W) -> raw embeddings (B,K,H/4,W/4): a ResNet at stride 8, then a decoder.
    resnet: torchvision's, of whose four stages it keeps the first `depth`. The last two's strides
    become dilations, also in their first 3x3, where torchvision's option halves them."""
    def __init__(self, resnet, decoder, K, depth=None):
        super().__init__()
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList(getattr(resnet, f"layer{k}") for k in range(1, 5))[:depth]
        for stage, dilation in zip(self.stages[2:], (2, 4)):
            for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
                conv.stride = 1, 1
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = dilation, dilation
        widths = [width * resnet.layer1[0].expansion for width in (64, 128, 256, 512)]
        self.decoder = {"fpn": FPN, "deeplab": DeepLab}[decoder](widths[:depth], K)

    def forward(self, x):
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return self.decoder(maps[1:])


def linear_model(K, filters, classes):
    """Linear model of L filters: (B,K,H,W) -> (B,classes,H,W). The paper calls it a 1x1
    convolution; the published code has two with BN between them."""
    return nn.Sequential(nn.Conv2d(K, filters, 1, bias=False), nn.BatchNorm2d(filters),
                         nn.Conv2d(filters, classes, 1))


class Model(nn.Module):
    """Images (B,3,H,W) -> unit embeddings (B,K,H,W); .linear and .cluster are fitted afterwards."""
    alpha = 10  # the CRF gets log-softmax(cosine / tau)

    def __init__(self, args, weights="none"):
        super().__init__()
        resnet, K = load_resnet(args.arch, weights), args.code_dim
        self.network = Network(resnet, args.decoder, K, args.depth)
        self.prototypes = nn.Parameter(F.normalize(nn.Linear(K, args.prototypes).weight.data))
        self.cluster = eval.ClusterProbe(K, args.clusters)
        self.linear = linear_model(K, args.filters, args.classes) if args.classes else None

    def forward(self, images):
        x = self.network(images).float().contiguous(memory_format=torch.channels_last)
        x = F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=True)
        return F.normalize(x)


# ---------------------------------------------------------------- loss

def region_mean(embedding, regions, count):
    """Mean raw embedding of each region: (K,H,W), ids (H,W), negative = none -> (count,K)."""
    inside = regions >= 0
    ids = regions[inside]
    sums = embedding.new_zeros(count, len(embedding)).index_add(0, ids, embedding[:, inside].T)
    return sums / torch.bincount(ids, minlength=count).clamp(min=1)[:, None]


def embed_regions(maps, regions, count):
    """Regions' unit vectors z*: maps (views,K,h,w), ids (views,H,W) -> (views,count,K)."""
    whole = (F.interpolate(m[None], regions.shape[1:], mode="bilinear", align_corners=True)[0]
             for m in maps)  # (K,H,W), one by one
    vectors = [region_mean(m, ids, count) for m, ids in zip(whole, regions)]
    return F.normalize(torch.stack(vectors), dim=-1)


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Scores s* (regions,prototypes) -> assignment q, SwAV's optimal transport: rows sum to 1, and
    the prototypes get, nearly, the same total. Give it the regions of all processes.

    Both rows prefer the first prototype; the one that minds less gets the second:
    >>> sinkhorn(torch.tensor([[0.9, 0.0], [0.6, 0.5]])).round()
    tensor([[1., 0.],
            [0., 1.]])"""
    Q = ((scores - scores.max()) / epsilon).exp()
    Q /= Q.sum()
    for _ in range(iterations):
        Q = Q + 1e-12 * (Q.sum(0) == 0).any()  # a prototype that nothing comes near
        Q = Q / Q.sum(0) / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / len(Q)
    return Q * len(Q)


def swapped_prediction_loss(scores, assignment, tau=0.1):
    """Eq. 4: scores s* (views,regions,prototypes) of the other views are to predict the assignment
    (regions,prototypes) that the first view got -> scalar, one mean over all regions."""
    return -(assignment * F.log_softmax(scores / tau, -1)).sum(-1).mean()


# ---------------------------------------------------------------- training

class Views(torch.utils.data.Dataset):
    """Item: "image" (views,3,side,side) uint8, "regions" (views,side,side) int16, or int32 where
    they may be many, index, path, error. Superpixels of square images are computed once, for as
    many as 8.6 GB of shared memory hold. ValueError: 100 images without a common region."""
    def __init__(self, images, args):
        self.images, self.args = images, args
        square = args.regions == "slic" and images.protocol not in ("whole", "native")
        shape = min(len(images), 2 ** 32 // args.size ** 2) * square, args.size, args.size
        memory = mmap.mmap(-1, 2 * math.prod(shape) + 1)  # zeros, taken page by page
        self.cache = np.ndarray(shape, np.int16, memory)  # labels + 1

    def __reduce__(self):  # where workers are not forked, each has a cache of its own
        return Views, (self.images, self.args)

    def __len__(self):
        return len(self.images)

    def regions(self, i, picture):
        """Region of every pixel, (H,W)."""
        if self.args.regions == "grid":
            return grid(*picture.shape[1:], self.args.region_size)
        if i < len(self.cache) and self.cache[i, -1, -1]:  # the last to be written
            return self.cache[i] - 1
        labels = slic(picture.permute(1, 2, 0).numpy(), self.args.region_size, self.args.ruler)
        if i < len(self.cache) and labels.max() < 2 ** 15 - 1:
            self.cache[i] = labels + 1
        return labels

    def __getitem__(self, i):
        for _ in range(100):
            picture, error = data.attempt(self.images.picture, i)
            item = {"index": i, "path": self.images.paths[i], "error": error}
            if error:
                return item
            rng = np.random.default_rng(torch.randint(2 ** 62, ()).item())
            views, regions = make_views(picture, self.regions(i, picture), rng, self.args)
            if regions.max() >= 0:
                few = self.args.view_size * self.args.beta[1] < 128 * self.args.region_size
                kind = np.int16 if few else np.int32
                return {**item, "image": views, "regions": torch.from_numpy(regions.astype(kind))}
            i = torch.randint(len(self), ()).item()  # no region that all views show: another image
        raise ValueError("100 images have no region that all views show; lower --region-size")


class LARS(torch.optim.Optimizer):
    """SGD that scales each tensor's gradient to the length trust * |parameter|, or, if either is
    zero, takes a plain step without decay. Biases and BN as the rest (published)."""
    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust=0.001):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
            momenta = [self.state[p]["momentum"] for p in params]
            gradients, decay = [p.grad for p in params], group["weight_decay"]
            length, steepness = (torch.stack(torch._foreach_norm(x)) for x in (params, gradients))
            scaled, rate = (length > 0) & (steepness > 0), group["trust"] * length
            rate = torch.where(scaled, rate / (steepness + decay * length + 1e-8), 1.0)
            rate, decay = torch.stack([rate, decay * scaled * rate]).tolist()
            torch._foreach_mul_(momenta, group["momentum"])  # 25 calls, not 1,304
            torch._foreach_add_(momenta, torch._foreach_mul(gradients, rate))
            torch._foreach_add_(momenta, torch._foreach_mul(params, decay))
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


def learning_rate(step, total, lr, warmup=0.02):
    """From lr / 16 to lr in the share `warmup` of the steps, then the run's cosine to lr / 1000."""
    t = step / total
    if t < warmup:
        return lr / 16 + (lr - lr / 16) * t / warmup
    return lr / 1000 + 0.5 * (lr - lr / 1000) * (1 + math.cos(math.pi * t))


def augment(images, regions, args, run):
    """images (B,views,3,H,W), regions (B,views,H,W) of `Views` -> (views,B,3,H,W), distorted,
    normalised, with noise; (views,B,H,W)."""
    regions, shape = regions.long(), images.shape
    x, draw = images.flatten(0, 1).float() / 255, run.rand(math.prod(shape[:2]), 11)
    x = distort(x, args.colour, args.blur, draw)
    x = ((x - common.MEAN.to(x)) / common.STD.to(x)).view(shape)
    noise = 2 * torch.rand(shape, generator=run.shared, device=run.device) - 1
    x = torch.where(regions[:, :, None] == -2, noise, x)  # last, as published
    return x.transpose(0, 1), regions.transpose(0, 1)


def train(args):
    if args.cache_features:
        raise ValueError("--cache-features: ViCE trains its network; leave it out")
    images = data.load(args.data, args.root, "train", size=args.size, protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    whole = data.load(args.data, args.root, "train", size=args.eval_size, protocol=val.protocol)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    run = common.Run("vice", args, images, val)
    if args.batch_size % (run.world * args.accumulate):
        raise ValueError(f"--accumulate {args.accumulate} does not divide the images of a process")
    model = Model(args, args.weights).to(run.device).train()
    untrained = copy.deepcopy(model)  # for comparison
    if run.world > 1 and run.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    queue = torch.zeros(args.queue, args.code_dim, device=run.device)
    trained = [*model.network.parameters(), model.prototypes]
    optimizer = LARS(trained, args.lr, weight_decay=args.weight_decay)
    run.keep(model=model, optimizer=optimizer, queue=queue)
    for step, batch in run.loop("network", Views(images, args), args.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.zero_grad(set_to_none=True)
        for part in zip(*(batch[x].chunk(args.accumulate) for x in ("image", "regions"))):
            views, regions = augment(*part, args, run)  # (views,B,...)
            with run.autocast():  # all views at once: they share batch statistics
                maps = model.network(views.flatten(0, 1)).float()
            counts = common.gather(regions[0].flatten(1).amax(1) + 1)  # regions of each image
            most = int(counts.max())
            z = embed_regions_folded(maps, regions.flatten(0, 1), most)
            z = z.unflatten(0, regions.shape[:2])  # (views,B,most,K)
            real = torch.arange(most, device=run.device) < counts[:, None]  # (images,most)
            everyone = common.gather(z[0].detach())[real]  # (all regions,K)
            before = counts[:run.rank * z.shape[1]].sum()
            z = z[1:, real.chunk(run.world)[run.rank]]  # (views-1,own regions,K)
            past = queue[queue.any(1)] if step >= args.queue_start else queue[:0]
            scores = torch.cat([everyone, past]) @ model.prototypes.detach().T
            assignment = sinkhorn(scores)[before:][:z.shape[1]]
            loss = swapped_prediction_loss(z @ model.prototypes.T, assignment)
            loss = loss * z.shape[1] * run.world / len(everyone)  # their mean: over all regions
            (loss / args.accumulate).backward()
            queue.copy_(torch.cat([everyone, queue])[:len(queue)])  # the oldest leave
        run.log(loss=loss, regions=len(everyone) / len(counts))
        if step < args.freeze:
            model.prototypes.grad = None
        optimizer.step()
        model.prototypes.data.copy_(F.normalize(model.prototypes.data))
    if args.bench:
        return 0
    model.eval()
    some = min(len(whole), args.probe_images)
    pixels = max(args.probe_pixels, 10 * args.clusters // some)  # of few images, more of each
    points, _ = eval.sample_points(model, whole, run.device, pixels, some, args.seed, args.workers)
    model.cluster.clusters.data.copy_(eval.kmeans(points, args.clusters, seed=args.seed))
    rows = {}
    if val.classes:
        for m in (model, untrained):
            m.linear = fit_linear(m, whole, args.filters, args)
        rows["linear, untrained"] = eval.evaluate(untrained, val, run.device)["linear"]
        rows["K-means, colours"] = eval.baseline(run, nn.AvgPool2d(8), whole, val, args.clusters, 8)
    return eval.finish(run, model, whole, val, encode=untrained, more=rows)


def load_resnet(arch, weights):
    """ResNet. weights: a file, None: torchvision's, "none": random. ValueError: they do not fit."""
    net = getattr(torchvision.models, arch)()
    net.fc = nn.Identity()
    if weights is None:
        url = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url  # NAME-SHA256.pth
        weights = common.fetch(f"{url} {url.removesuffix('.pth')[-8:]}", arch)
    if weights != "none":
        common.load_weights(net, weights, arch)
    return net


def fit_linear(model, images, filters, args):
    """A linear model of so many filters (L) on the frozen network. images: a train split."""
    torch.manual_seed(args.seed)
    model.eval()
    linear = linear_model(args.code_dim, filters, images.classes).to(model.prototypes.device)
    optimizer = torch.optim.SGD(linear.parameters(), 0.01, 0.9, weight_decay=5e-4)
    batches = whole_images if args.probe_batch else random_pixels
    for step, (z, label) in enumerate(batches(model, images, args)):
        optimizer.param_groups[0]["lr"] = 1e-4 + 0.0099 * (1 - step / args.probe_steps) ** 0.9
        optimizer.zero_grad(set_to_none=True)
        eval.linear_loss(linear(z), label).backward()
        optimizer.step()
    return linear.eval()


def whole_images(model, images, args):
    """Embeddings (B,K,H,W), labels (B,H,W) of random images, distorted and flipped as published."""
    device = model.prototypes.device
    mean, std = common.MEAN.to(device), common.STD.to(device)
    changes = dict(brightness=0.125), dict(contrast=0.5), dict(saturation=0.5), dict(hue=0.1)
    change = v2.Compose([*(v2.RandomApply([v2.ColorJitter(**x)]) for x in changes),
                         v2.RandomHorizontalFlip()])
    order = torch.randint(len(images), (args.probe_steps * args.probe_batch,)).tolist()
    for items in eval.batches(images, args.probe_batch, args.workers, "linear model", order):
        pairs = []
        for item in items:  # of any size
            x, label = item["image"].to(device) * std + mean, item["label"].to(device) + 1
            label = v2.functional.resize(torchvision.tv_tensors.Mask(label), x.shape[1:])
            x, label = change(x, label)
            pairs.append(((x - mean) / std, label))
        size = [max(x.shape[side] for x, _ in pairs) for side in (1, 2)]
        x, label = (torch.stack([v2.functional.crop(x, 0, 0, *size) for x in each])  # 0 outside
                    for each in zip(*pairs))
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            z = model(x)
        yield z, label - 1


def random_pixels(model, images, args):
    """(1,K,4096,1), (1,4096,1) of a fixed sample: for runs of minutes, whose few steps on whole
    images would end 3 mIoU lower."""
    z, label = eval.sample_points(model, images, model.prototypes.device, args.probe_pixels,
                                  args.probe_images, args.seed, args.workers)
    z, label = z[label >= 0], label[label >= 0]
    for _ in range(args.probe_steps * bool(len(label))):
        rows = torch.randint(len(label), (4096,)).to(z.device)
        yield z[rows].T[None, ..., None], label[rows][None, :, None]


# ---------------------------------------------------------------- fast forms: the same numbers

def embed_regions_folded(maps, regions, count):
    """Equals embed_regions in 1/30 of the time, without the maps (K,H,W): a region's sum is linear
    in the cells of the map, and a pixel weighs on the four that it would be interpolated from."""
    (views, _, h, w), (H, W), dtype = maps.shape, regions.shape[1:], maps.dtype
    if count >= h * w:  # tiny regions: the weights would be larger than the maps
        return embed_regions(maps, regions, count)
    v, i, j = (regions >= 0).nonzero(as_tuple=True)
    ids = (v * count + regions[v, i, j]) * h * w
    y, x = i.to(dtype) * (h - 1) / max(H - 1, 1), j.to(dtype) * (w - 1) / max(W - 1, 1)
    y0, x0 = y.long(), x.long()
    weights = torch.zeros(views * count * h * w, dtype=dtype, device=maps.device)
    for down, fy in ((0, 1 - (y - y0)), (1, y - y0)):
        for right, fx in ((0, 1 - (x - x0)), (1, x - x0)):
            cell = (y0 + down).clamp(max=h - 1) * w + (x0 + right).clamp(max=w - 1)
            weights.index_add_(0, ids + cell, fy * fx)
    return F.normalize(weights.view(views, count, h * w) @ maps.flatten(2).mT, dim=-1)


def distort(x, strength, blur, draw):
    """SimCLR's colour distortion, then blur: views (n,3,H,W) in [0,1], draw (n,11) uniform numbers.
    Equals torchvision's ColorJitter, RandomGrayscale and GaussianBlur on view after view, in 70
    calls instead of 48,600 for 160 views; but the four changes have one order, the first row's."""
    jitter = 0.8 * strength * (draw[:, :1] < 0.8) * (2 * draw[:, 1:5] - 1)  # 0: as it is
    light, contrast, saturation, hue = jitter.T[..., None, None, None]  # (n,1,1,1) each
    changes = (lambda x: x * (1 + light),
               lambda x: x + contrast * (x - grey(x).mean((1, 2, 3), keepdim=True)),
               lambda x: x + saturation * (x - grey(x)),
               lambda x: turn_hue(x, hue / 4))
    for k in draw[0, 5:9].argsort().tolist():
        x = changes[k](x).clamp(0, 1)
    x = torch.where(draw[:, 9, None, None, None] < 0.2 * strength, grey(x), x)
    if not blur:
        return x
    sigma = torch.where(draw[:, 10] < blur, 0.1 + 1.9 * draw[:, 10] / blur, 0.01)  # 0.01: none
    steps = torch.arange(13, device=x.device) - 6
    kernel = (-0.5 * (steps / sigma[:, None]) ** 2).softmax(1).repeat_interleave(3, 0)  # (3n,13)
    y = F.pad(x, (6, 6, 6, 6), mode="reflect").flatten(0, 1)[None]  # (1,3n,H+12,W+12)
    y = F.conv2d(y, kernel[:, None, None], groups=len(kernel))
    return F.conv2d(y, kernel[:, None, :, None], groups=len(kernel)).view(x.shape)


def turn_hue(x, turn):
    """Colours (n,3,H,W) in [0,1] with their hue turned by the share `turn` of the circle."""
    r, g, b = x.split(1, 1)
    high, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    hue = torch.where(g == high, 2 * chroma + b - r, 4 * chroma + r - g)
    hue = torch.where(r == high, g - b, hue) / chroma.clamp(min=1e-12)  # 0 to 6
    k = (hue + 6 * turn + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


# ---------------------------------------------------------------- command line

def arguments():
    p = common.parser(__doc__)
    p.set_defaults(arch="resnet18", size=320, steps=7552, batch_size=32, lr=0.08)
    arch, depth = p._option_string_actions["--arch"], p._option_string_actions["--depth"]
    arch.choices = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    arch.help = "the network to train; a larger one pays on COCO"
    depth.help, depth.type = "first K of its four stages; the last costs most", common.number(1, 4)
    add = p.group("ViCE")
    add("--decoder", "fpn", "deeplab for large images", choices=("fpn", "deeplab"))
    add("--code-dim", 128, "width K of an embedding; 32 costs the paper 1.5 mIoU")
    add("--views", 5, "views of an image", low=2)
    add("--view-size", 256, "side of a view; a step costs its square", low=16, metavar="PIXELS")
    add("--beta", (0.5, 1.5), "least and largest side of a crop over the view's", low=0.05, high=10)
    add("--regions", "slic", "superpixels, or squares", choices=("slic", "grid"))
    add("--region-size", 20, "mean side of a region; 1 with grid: pixels", metavar="PIXELS")
    add("--ruler", 10.0, "how compact superpixels are; the larger, the more like a grid", low=0.01)
    add("--mask", 0.25, "largest side of the noise over the view's; 0: none", high=1.0)
    add("--colour", 1.0, "strength of distortion; less where colour tells classes apart", high=1.0)
    add("--blur", 0.5, "share of views that are blurred; 0 where texture matters", high=1.0)
    add("--prototypes", 27, "27 on small images, 128 on large ones", low=2)
    add("--queue", 5000, "past regions that join the assignment; too many are stale")
    add("--queue-start", 313, "step from which they do", low=0)
    add("--freeze", 313, "steps in which the prototypes stay as they are", low=0)
    add("--warmup", 0.02, "share of the steps in which the learning rate rises", high=1.0)
    add("--weight-decay", 1e-6, "of LARS", high=1.0)
    add("--accumulate", 1, "parts of a batch, one after the other, where memory is short")
    add("--eval-size", 320, "shorter side of the images at scoring", low=16, metavar="PIXELS")
    add("--filters", 256, "width L of the linear model; eval.py fits others")
    add("--probe-images", 100_000, "train images at most whose pixels the clusters are fitted on")
    add("--probe-pixels", 20, "random pixels of each of them")
    add("--probe-steps", 12_000, "SGD steps of the linear model")
    add("--probe-batch", 16, "whole images in each; 0: 4,096 of the clusters' pixels", low=0)
    return p


PUBLISHED = dict(batch_size=128, lr=0.32, queue=160_000, protocol="square")  # steps as published
LARGE = dict(view_size=400, prototypes=128, protocol="native")
SMALL = dict(views=3, colour=0.4, beta=(0.75, 1.25), prototypes=32, queue_start=30, freeze=20,
             probe_images=128, probe_pixels=160, probe_batch=0)
PRESETS = {
    "scenes": dict(SMALL, weights="none", depth=2, size=96, eval_size=96, region_size=8,
                   view_size=64, blur=0.0, queue=1000, steps=200, batch_size=12, lr=1.5,
                   filters=27, probe_steps=300),
    "camvid": dict(SMALL, depth=3, size=128, eval_size=128, region_size=10, view_size=96, blur=0.1,
                   queue=2000, steps=150, batch_size=8, lr=0.5, filters=45, probe_steps=1000),
    "camvid arch=resnet50": dict(steps=80, batch_size=6),
    "camvid weights=none": dict(lr=1.5),
    "coco27": dict(PUBLISHED, steps=7552),  # 4 epochs of 241,690 images in the paper
    "coco27 decoder=deeplab": dict(LARGE, steps=30_208, warmup=0.005, size=480, eval_size=512),
    "coco27 arch=resnet1?? decoder=deeplab": dict(steps=22_656, warmup=0.0067),
    "cityscapes19": dict(PUBLISHED, steps=936),  # 24 epochs of 5,000
    "cityscapes19 weights=none": dict(steps=5616, warmup=0.0033),
    "cityscapes19 decoder=deeplab": dict(LARGE, steps=1872, warmup=0.01, size=1024, eval_size=1024),
    "cityscapes19 arch=resnet?0* decoder=deeplab": dict(steps=2808, warmup=0.0067),  # 50 and 101
    "smoke": dict(weights="none", view_size=64, steps=10, batch_size=2, queue_start=5, freeze=3,
                  probe_images=20, probe_steps=10),
}
PRESETS = {key.replace("cityscapes19", "cityscapes27"): x for key, x in PRESETS.items()} | PRESETS

if __name__ == "__main__":
    common.main(arguments, PRESETS, lambda args, images: None, train, data.count)
