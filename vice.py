"""ViCE: visual concepts by swapped prediction of superpixels (Karlsson et al., arXiv 2111.12460).

An image is cut into superpixels (SLIC), and M square views around one point of it show some of them together.
A CNN embeds every pixel; a superpixel is the mean embedding of its pixels. Sinkhorn's optimal transport
assigns view 0's superpixels to K prototypes, and the other views, which see them with other context, scale
and colour, must predict that assignment. Then the CNN is frozen, and clusters and a linear model are fitted
on its embeddings. No label reaches the CNN, and with --weights none nothing is pretrained.

    python vice.py                                        # generated scenes, random weights, about a minute
    python vice.py --data camvid --root data/camvid --weights resnet18.pth
    python vice.py --data coco27 --root data/cocostuff    # paper: 12 to 25 mIoU, not run here

Measured on one thread of a CPU, torch 2.15, mIoU in percent (before: the same network, untrained). Scenes,
seeds 0 to 2: clusters 36.6 +- 4.2 (before 21.1), linear model 68.7 +- 2.4 (before 61.7). CamVid, three stages
of an ImageNet-supervised ResNet-18, seeds 0 to 2: clusters 21.9 +- 0.8 (before 16.7), linear 32.6 +- 0.1
(before 37.4: so short a training costs what ImageNet's labels had taught).
"""
import common  # isort: skip  (first: it answers --help before torch is loaded)

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy import ndimage
from torch import nn
from torchvision.transforms import v2

import data
import eval

# Letters: B images, M views of each, h pixels along a view, s along its crop before resizing, D embedding
# width, K prototypes, R regions of an image, S pixels along a region.


# ---------------------------------------------------------------- superpixels

def slic(image, region_size=20, ruler=10, iterations=5):
    """SLIC superpixels, uint8 RGB (H,W,3) -> labels (H,W): pixel for pixel what OpenCV's SLIC gives.

    Published: on the blurred BGR image; connectivity is not enforced, so a label may lie in pieces. numpy in,
    numpy out; torch likewise. All windows are evaluated at once: the smallest distance wins, then the seed.
    """
    # sigma 4 (84 88 84 / 256) by accident: a border flag is passed where OpenCV wants the sigma
    pixels, S = blur(np.asarray(image)[..., ::-1], 84, 88).astype(np.float32), region_size
    H, W, _ = pixels.shape
    colour, centre = seeds(pixels, S)
    side, wide = 2 * S, W + 4 * S                              # of a window; of the padded image
    padded = np.full((3, H + 4 * S, wide), np.inf, np.float32)             # outside, all is infinitely far
    padded[:, side:-side, side:-side] = pixels.transpose(2, 0, 1)
    windows = [np.lib.stride_tricks.sliding_window_view(plane, (side, side)) for plane in padded]
    span, count = np.arange(side), len(centre)
    weight, ids = np.float32((S / ruler) ** 2), np.arange(count)[:, None, None]
    y, x = np.divmod(np.arange(H * W), W)
    planes, labels = pixels.reshape(-1, 3).T.astype(np.float64), np.zeros((H, W), np.int64)
    for _ in range(iterations):
        left, top = centre.astype(np.int64).T - S              # windows [-S, S) around the truncated centre
        distance, *more = [window[top + side, left + side] for window in windows]              # (n,2S,2S)
        for part, value in zip((distance, *more), colour.T):
            part -= value[:, None, None]                       # in place: half the time
            part *= part
        dx = ((left[:, None] + span).astype(np.float32) - centre[:, :1]) ** 2
        dy = ((top[:, None] + span).astype(np.float32) - centre[:, 1:]) ** 2
        more.append(dx[:, None] + dy[..., None])
        more[-1] /= weight
        for part in more:
            distance += part
        key = distance.view(np.int32).astype(np.int64)         # a positive float's bits order as it does:
        key <<= 32                                             # one minimum over (distance, seed)
        key |= ids
        where = ((top + side) * wide + left + side)[:, None, None] + span[:, None] * wide + span
        best = np.full(padded[0].size, np.iinfo(np.int64).max)
        np.minimum.at(best, where.ravel(), key.ravel())
        best = best.reshape(padded[0].shape)[side:-side, side:-side]
        labels = np.where(best < np.iinfo(np.int64).max, best & 0xffffffff, labels)  # unreached: as before
        flat = labels.ravel()
        size = np.bincount(flat, minlength=count).clip(1).astype(np.float32)[:, None]
        colour = np.stack([np.bincount(flat, plane, count) for plane in planes], 1).astype(np.float32) / size
        centre = np.stack([np.bincount(flat, at, count) for at in (x, y)], 1).astype(np.float32) / size
    return torch.from_numpy(labels) if torch.is_tensor(image) else labels


def blur(image, edge, middle):
    """uint8 (H,W,C) with the kernel (edge, middle, edge) / 256 both ways, mirrored borders, rounded once."""
    p = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), "reflect")
    p = edge * (p[:-2] + p[2:]) + middle * p[1:-1]
    p = edge * (p[:, :-2] + p[:, 2:]) + middle * p[:, 1:-1]
    return p + 2 ** 15 >> 16


def seeds(pixels, S):
    """Colours (n,3), places (n,2) as (x,y): a grid, each seed moved to a flatter diagonal neighbour."""
    H, W, _ = pixels.shape
    nx, ny = max(1, int(0.5 + W / S)), max(1, int(0.5 + H / S))
    x, y = np.meshgrid(*(np.arange(n) * (S + int((length - S * n) / n)) + S // 2
                         for n, length in ((nx, W), (ny, H))))
    inside = (x < W) & (y < H)
    n = inside.sum()                                          # seeds outside: black ones at (0,0), at the end
    place, colour = np.zeros((nx * ny, 2), int), np.zeros((nx * ny, 3), np.float32)
    place[:n], colour[:n] = np.stack([x[inside], y[inside]], 1), pixels[y[inside], x[inside]]
    p = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), "reflect")
    edge = ((p[1:-1, 2:] - p[1:-1, :-2]) ** 2 + (p[2:, 1:-1] - p[:-2, 1:-1]) ** 2).sum(-1)
    edge = np.pad(edge, 1, constant_values=np.inf)
    (x, y), to = place.T + 1, place.copy()
    best = edge[y, x]
    for dx, dy in ((-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1)):
        better = edge[y + dy, x + dx] < best
        best[better] = edge[y + dy, x + dx][better]
        to[better] = place[better] + (dx, dy)
    moved = (to != place).all(1)                               # OpenCV moves only if both x and y change
    place[moved] = to[moved]
    colour[moved] = pixels[place[moved, 1], place[moved, 0]]
    return colour, place.astype(np.float32)


def grid(H, W, S):
    """Squares of S pixels instead of superpixels, for comparison; S = 1 makes every pixel a region.

    >>> grid(2, 6, 2)
    array([[0, 0, 1, 1, 2, 2],
           [0, 0, 1, 1, 2, 2]])
    """
    scale = (int(H * W / S ** 2) / (H * W)) ** 0.5
    rows, columns = max(1, int(scale * H)), max(1, int(scale * W))
    return np.arange(H)[:, None] * rows // H * columns + np.arange(W) * columns // W


# ---------------------------------------------------------------- views

def content(picture):
    """uint8 RGB (H,W,3) -> probability (H,W) of being the point that all views show: high along edges.

    Canny's edges, a pixel thicker downwards (the published 3x3 dilation acts as 2x1), blurred, plus 0.005.
    """
    grey = (blur(picture, 64, 128) @ np.array([0.299, 0.587, 0.114])).round()
    dx, dy = ndimage.sobel(grey, 1, mode="nearest"), ndimage.sobel(grey, 0, mode="nearest")
    m = dx * dx + dy * dy
    p = np.pad(m, 1)
    at = lambda y, x: p[1 + y:p.shape[0] - 1 + y, 1 + x:p.shape[1] - 1 + x]                    # noqa: E731
    tan = 0.41421356                                           # of 22.5 degrees: four directions of edges
    peak = np.where(dx * dy < 0, m > np.maximum(at(-1, 1), at(1, -1)), m > np.maximum(at(-1, -1), at(1, 1)))
    peak = np.where(abs(dy) < tan * abs(dx), (m > at(0, -1)) & (m >= at(0, 1)), peak)
    peak = np.where(abs(dx) < tan * abs(dy), (m > at(-1, 0)) & (m >= at(1, 0)), peak)
    parts, n = ndimage.label(peak & (m > 10 ** 2), np.ones((3, 3)))
    strong = np.zeros(n + 1, bool)
    strong[parts[peak & (m > 50 ** 2)]] = True
    edge = strong[parts]
    edge[1:] |= edge[:-1].copy()
    p = blur(edge[..., None] * np.uint8(255), 64, 128)[..., 0] / 255 + 0.005
    return p / p.sum()


def share(v):
    """A von Mises draw in [-pi, pi] -> [0, 1]."""
    return (v + math.pi) / (2 * math.pi)


def clip_centre(x, y, width, height, W, H):
    """Move a centre so that its rectangle lies in the image; one too large starts at the left or top."""
    x, y = min(int(x), int(W - width / 2)), min(int(y), int(H - height / 2))
    return max(x, math.ceil(width / 2)), max(y, math.ceil(height / 2))


def near(centre, s, i, others, angle, radius):
    """Centre of view i + 1, in a sector of its own around view 0's. angle, radius: von Mises draws."""
    t = math.pi / 2 - 2 * math.pi / others * (i + share(angle))
    r = s / 2 * share(radius)
    return centre[0] + int(r * math.cos(t)), centre[1] + int(r * math.sin(t))


def mask_rectangle(s, h, largest, turn, radius, width, height):
    """Noise rectangle (x0, y0, x1, y1) in a crop of side s; turn in [0,1], then three von Mises draws.

    The paper's "25 %" bounds its sides, not its area. It is placed as if the crop had side h: published.
    """
    w, v = int(largest * s * share(width)), int(largest * s * share(height))
    r, t = h / 2 * share(radius), 2 * math.pi * turn
    x, y = clip_centre(h / 2 + r * math.cos(t), h / 2 + r * math.sin(t), w, v, h, h)
    return x - w // 2, y - v // 2, x + w // 2, y + v // 2


def place_views(centres, sizes):
    """Centres (x,y) and sides of crops -> boxes (M,4) as x0 y0 x1 y1; the rectangle (4,) that all show."""
    (x, y), s = np.array(centres).T, np.array(sizes)
    boxes = np.stack([x - s / 2, y - s / 2, x + s / 2, y + s / 2], 1).astype(int)              # towards zero
    half = (s / 2).astype(int)
    return boxes, np.array([(x - half).max(), (y - half).max(), (x + half).min(), (y + half).min()])


def crop(labels, box):
    """labels (H,W) -> (y1-y0, x1-x0); -1 outside."""
    (x0, y0, x1, y1), (H, W) = box, labels.shape
    out = np.full((y1 - y0, x1 - x0), -1)
    top, bottom, left, right = max(y0, 0), min(y1, H), max(x0, 0), min(x1, W)
    out[top - y0:bottom - y0, left - x0:right - x0] = labels[top:bottom, left:right]
    return out


def nearest(x, h):
    """(a,b) -> (h,h), rounded down as OpenCV does."""
    return x[np.arange(h) * x.shape[0] // h][:, np.arange(h) * x.shape[1] // h]


def mask_views(crops, shared, rectangles, protected=None, rng=None):
    """-> noise [(s,s) bool] per view, and the ids (n,) that stay common to all views.

    crops: labels [(s,s)]; shared (M,4): the common rectangle in each crop. A region that a view's rectangle
    touches becomes noise in that view and a region of none; a random quarter of the common ids is spared. A
    rectangle that touches the padding (-1) makes all padding of that view noise.
    """
    x0, y0, x1, y1 = shared[0]
    ids = np.setdiff1d(crops[0][y0:y1, x0:x1], [-1])
    spared = rng.choice(ids, len(ids) // 4, replace=False) if protected is None else protected
    noise = []
    for labels, (x0, y0, x1, y1) in zip(crops, np.maximum(rectangles, 0)):
        touched = np.setdiff1d(labels[y0:y1, x0:x1], spared)
        noise.append(np.isin(labels, touched))
        ids = np.setdiff1d(ids, touched)
    return noise, ids


def resize_regions(crops, shared, ids, h):
    """Crops to (M,h,h), nearest as in OpenCV; -1 but for ids that all views show in the common rectangle."""
    views = np.stack([nearest(labels, h) for labels in crops])
    ids = np.intersect1d(ids, views[0])                        # in view 0 anywhere will do, as published
    for view, labels, (x0, y0, x1, y1) in zip(views[1:], crops[1:], shared[1:] * h):
        (a, b) = labels.shape
        ids = np.intersect1d(ids, view[y0 // a:y1 // a, x0 // b:x1 // b])
    return np.where(np.isin(views, ids), views, -1)


def make_views(picture, regions, rng, args):
    """uint8 (3,H,W), (H,W) -> views uint8 (M,3,h,h), regions (M,h,h) ids 0..R-1 or -1, noise (M,h,h) bool."""
    (H, W), M, h = regions.shape, args.views, args.view_size
    p = content(picture.permute(1, 2, 0).numpy()).cumsum()
    y, x = divmod(min(int(np.searchsorted(p, rng.random() * p[-1])), H * W - 1), W)
    sizes = rng.uniform(args.beta[0], args.beta[1], M) * h  # paper 0.5 to 2; appendix, code 0.5 to 1.5
    centres = [clip_centre(x, y, sizes[0], sizes[0], W, H)]
    for i, s in enumerate(sizes[1:]):
        place = near(centres[0], s, i, M - 1, rng.vonmises(0, 2), rng.vonmises(math.pi / 2, 2))
        centres.append(clip_centre(*place, s, s, W, H))
    boxes, rectangle = place_views(centres, sizes)
    shared, crops = rectangle - boxes[:, [0, 1, 0, 1]], [crop(regions, box) for box in boxes]
    masks = [mask_rectangle(s, h, args.mask, rng.random(), *rng.vonmises(math.pi / 2, 2, 3)) for s in sizes]
    noise, ids = mask_views(crops, shared, masks, rng=rng)
    labels = resize_regions(crops, shared, ids, h)
    _, labels = np.unique(np.append(labels, -1), return_inverse=True)                          # 0 = none
    views, hidden = [], []
    for (x0, y0, x1, y1), mask in zip(boxes, noise):
        view = v2.functional.crop(picture, y0, x0, y1 - y0, x1 - x0)                        # outside is black
        views.append(v2.functional.resize(view, [h, h], v2.InterpolationMode.BICUBIC, antialias=True))
        hidden.append(nearest(mask, h))
    return torch.stack(views), labels[:-1].reshape(M, h, h) - 1, np.stack(hidden)


class Views(torch.utils.data.Dataset):
    """Item: "image" (M,3,h,h) normalised, "regions" (M,h,h) ids 0..R-1, -1 = none, and index, path, error.

    Superpixels of images of one size are computed once, in memory that the workers share, up to 2 GB of them.
    """

    def __init__(self, images, args):
        self.images, self.args, self.cache = images, args, None
        shape = len(images), args.size, args.size
        if args.regions == "slic" and images.protocol != "whole" and 2 * math.prod(shape) < 2e9:
            self.cache = torch.full(shape, -1, dtype=torch.int16).share_memory_()
        c = args.colour                                        # SimCLR's distortion of this strength
        self.distort = v2.Compose([
            v2.RandomApply([v2.ColorJitter(0.8 * c, 0.8 * c, 0.8 * c, 0.2 * c)], 0.8),
            v2.RandomGrayscale(0.2 * c), v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], args.blur)])

    def __len__(self):
        return len(self.images)

    def regions(self, i, picture):
        """Region of every pixel, (H,W)."""
        if self.args.regions == "grid":
            return grid(*picture.shape[1:], self.args.region_size)
        if self.cache is not None and self.cache[i, 0, 0] >= 0:
            return self.cache[i].long().numpy()
        labels = slic(picture.permute(1, 2, 0), self.args.region_size, self.args.ruler)
        if self.cache is not None:
            self.cache[i] = labels
        return labels.numpy()

    def __getitem__(self, i):
        for _ in range(100):
            item = {"index": i, "path": self.images.paths[i], "error": ""}
            try:
                picture = self.images.picture(i)
            except Exception as error:                         # as in data.Images: a broken file ends no run
                return {**item, "error": data.describe(error)}
            rng = np.random.default_rng(torch.randint(2 ** 62, ()).item())
            views, regions, noise = make_views(picture, self.regions(i, picture), rng, self.args)
            if regions.max() >= 0:
                break
            i = torch.randint(len(self), ()).item()            # no region that all views show: another image
        else:
            raise ValueError("100 images in a row have no region that all views show; lower --region-size")
        images, labels = [], []
        for view, label, hidden in zip(views, torch.from_numpy(regions), torch.from_numpy(noise)):
            x = (self.distort(view) / 255 - data.MEAN) / data.STD
            x = torch.where(hidden, torch.rand_like(x) * 2 - 1, x)                        # last, as published
            flip = torch.rand(()) < 0.5
            images.append(x.flip(-1) if flip else x)
            labels.append(label.flip(-1) if flip else label)
        return {**item, "image": torch.stack(images), "regions": torch.stack(labels)}


# ---------------------------------------------------------------- model

class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics of all processes (torch's SyncBatchNorm is for CUDA only)."""

    def forward(self, x):
        if not self.training or common.world() == 1:
            return super().forward(x)
        x32 = x.float()
        n = common.reduce_sum(x32.new_tensor(x32.numel() / x32.shape[1]))
        mean = common.reduce_sum(x32.sum((0, 2, 3))) / n
        x32 = x32 - mean[:, None, None]
        var = common.reduce_sum(x32.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / (var + self.eps).sqrt()
        return (x32 * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class FPN(nn.Module):
    """Maps of the stages -> (B,D,h/4,w/4): 1x1 convolutions, upsampled and added from the top; PiCIE's."""

    def __init__(self, widths, D):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, D, 1) for width in widths)

    def forward(self, maps):
        x = self.lateral[-1](maps[-1])
        for conv, m in list(zip(self.lateral, maps))[-2::-1]:
            x = conv(m) + F.interpolate(x, m.shape[2:], mode="bilinear")
        return x


def separable(c_in, c_out, dilation=1):
    """Depth-wise 3x3, then 1x1; ReLU stands before BN in both halves, as published."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, padding=dilation, dilation=dilation, groups=c_in, bias=False), nn.ReLU(),
        BatchNorm(c_in), nn.Conv2d(c_in, c_out, 1, bias=False), nn.ReLU(), BatchNorm(c_out))


def conv_bn(c_in, c_out, kernel=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), BatchNorm(c_out))


class DeepLab(nn.Module):
    """DeepLabV3+: atrous pyramid on the last stage's map, refined by the first's -> (B,D,h/4,w/4)."""

    def __init__(self, widths, D):
        super().__init__()
        top = widths[-1]
        self.one, self.pool, self.low = conv_bn(top, 256), conv_bn(top, 256), conv_bn(widths[0], 48)
        self.atrous = nn.ModuleList(separable(top, 256, dilation) for dilation in (12, 24, 36))
        self.merge = conv_bn(5 * 256, 256, 3)                  # no ReLU after it, as published
        self.decode = nn.Sequential(separable(304, 256), separable(256, 256), nn.Conv2d(256, D, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, BatchNorm):
                nn.init.constant_(m.bias, 1e-4)

    def forward(self, maps):
        x, low = maps[-1], self.low(maps[0]).relu()
        pooled = self.pool(x.mean((2, 3), keepdim=True)).relu().expand(-1, -1, *x.shape[2:])
        x = self.merge(torch.cat([self.one(x).relu(), *(branch(x) for branch in self.atrous), pooled], 1))
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
        return self.decode(torch.cat([low, x], 1))


class Network(nn.Module):
    """Images (B,3,H,W) -> raw embeddings (B,D,H/4,W/4): a ResNet dilated to stride 8, then a decoder.

    depth: keep the first so many of the four stages. weights: a file with torchvision's names, None: from
    torchvision's server, "none": random. Raises ValueError for an unknown network or weights that do not fit.
    """

    def __init__(self, arch, decoder, D, depth=None, weights="none"):
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"--arch {arch}: ViCE trains a ResNet{common.nearest(arch, ARCHS)}")
        if depth and depth > 4:
            raise ValueError(f"--depth {depth}: a ResNet has four stages")
        self.trunk = net = getattr(torchvision.models, arch)(norm_layer=BatchNorm)
        for stage, dilation in ((net.layer3, 2), (net.layer4, 4)):       # all 3x3, the first included
            for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
                conv.stride = 1, 1
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = dilation, dilation
        widths = [w * (net.fc.in_features // 512) for w in (64, 128, 256, 512)][:depth]
        net.fc = nn.Identity()
        if weights != "none":
            common.load_weights(net, weights or published(arch), arch)
        for name in ("layer2", "layer3", "layer4")[len(widths) - 1:]:
            setattr(net, name, None)
        self.decoder = {"fpn": FPN, "deeplab": DeepLab}[decoder](widths, D)

    def forward(self, x):
        net, maps = self.trunk, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for stage in filter(None, (net.layer1, net.layer2, net.layer3, net.layer4)):
            maps.append(x := stage(x))
        return self.decoder(maps)


def published(arch):
    """torchvision's ImageNet weights in hub's cache, downloaded on first use; its name ends in its hash."""
    url = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        common.download(url, path, path.stem.rsplit("-", 1)[1])
    return path


class LinearModel(nn.Sequential):
    """The paper's linear model of L filters: (B,D,H,W) -> (B,classes,H,W). It calls this a 1x1 convolution;
    the published code has two with BN between them."""

    def __init__(self, D, L, classes):
        super().__init__(nn.Conv2d(D, L, 1, bias=False), nn.BatchNorm2d(L), nn.Conv2d(L, classes, 1))


class Model(nn.Module):
    """Images (B,3,H,W) -> unit embeddings (B,D,H,W), with `.linear` and `.cluster`, fitted after training."""

    alpha = 10                                                 # the CRF gets log-softmax(cosine / tau)

    def __init__(self, args, weights="none"):
        super().__init__()
        self.network = Network(args.arch, args.decoder, args.code_dim, args.depth, weights)
        self.prototypes = nn.Parameter(F.normalize(nn.Linear(args.code_dim, args.prototypes).weight.data))
        self.cluster = eval.ClusterProbe(args.code_dim, args.clusters)
        self.linear = LinearModel(args.code_dim, args.filters, args.classes) if args.classes else None

    def forward(self, images):
        x = self.network(images).float()
        return F.normalize(F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=True))


# ---------------------------------------------------------------- loss

def region_mean(embedding, regions, count):
    """Mean raw embedding of each region, (D,H,W), (H,W) ids, -1 = none -> (count,D); 0 for an empty region.

    As published: the mean is normalised later. The paper takes the mean of unit vectors.
    """
    inside = regions >= 0
    ids = regions[inside]
    sums = embedding.new_zeros(count, len(embedding)).index_add(0, ids, embedding[:, inside].T)
    return sums / torch.bincount(ids, minlength=count).clamp(min=1)[:, None]


def region_weights(regions, count, h, w, dtype=torch.float32):
    """(V,H,W) ids, -1 = none -> (V,count,h*w): times a map (V,h*w,D), the region means of its upsampling.

    Upsampling (bilinear, align_corners) and averaging are linear, so the D-channel map of full size need not
    exist: a pixel hands its weight to the four cells it would be interpolated from.
    """
    V, H, W = regions.shape
    v, i, j = (regions >= 0).nonzero(as_tuple=True)
    ids = (v * count + regions[v, i, j]) * h * w
    y, x = i.to(dtype) * (h - 1) / max(H - 1, 1), j.to(dtype) * (w - 1) / max(W - 1, 1)
    y0, x0 = y.long(), x.long()
    weights = torch.zeros(V * count * h * w, dtype=dtype, device=regions.device)
    for down, fy in ((0, 1 - (y - y0)), (1, y - y0)):
        for right, fx in ((0, 1 - (x - x0)), (1, x - x0)):
            cell = (y0 + down).clamp(max=h - 1) * w + (x0 + right).clamp(max=w - 1)
            weights.index_add_(0, ids + cell, fy * fx)
    weights = weights.view(V, count, h * w)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)


def embed_regions(maps, regions, count):
    """Maps (V,D,h,w), regions (V,H,W) -> unit vectors (V,count,D) of the regions; 0 for an empty region."""
    h, w = maps.shape[2:]
    if count < h * w:
        z = region_weights(regions, count, h, w) @ maps.flatten(2).mT
    else:                                                      # tiny regions: the weights would be larger
        up = (F.interpolate(m[None], regions.shape[1:], mode="bilinear", align_corners=True)[0] for m in maps)
        z = torch.stack([region_mean(m, r, count) for m, r in zip(up, regions)])
    return F.normalize(z, dim=-1)


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Scores (M,K) -> assignment (M,K): rows sum to 1 and the prototypes get, nearly, the same total.

    SwAV's optimal transport. Give it the rows of all processes: then any number of them computes the same.
    Both rows prefer the first prototype; the one that minds less gets the second:
    >>> sinkhorn(torch.tensor([[0.9, 0.0], [0.6, 0.5]])).round()
    tensor([[1., 0.],
            [0., 1.]])
    """
    Q = ((scores - scores.max()) / epsilon).exp()
    Q /= Q.sum()
    for _ in range(iterations):
        if (Q.sum(0) == 0).any():                              # a prototype that nothing comes near
            Q += 1e-12
        Q = Q / Q.sum(0) / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / len(Q)
    return Q * len(Q)


def swapped_prediction_loss(scores, assignment, tau=0.1):
    """Scores (V,M,K) of views 1.. are to predict the assignment (M,K) that view 0 got (eq. 4) -> scalar.

    One mean over all regions of the batch, as published; the paper averages per image first.
    """
    return -(assignment * F.log_softmax(scores / tau, -1)).sum(-1).mean()


class Queue(nn.Module):
    """The last view-0 embeddings, newest first. The paper keeps scores, the code embeddings."""

    def __init__(self, length, D):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(length, D))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, z):
        self.vectors.copy_(torch.cat([z, self.vectors])[:len(self.vectors)])
        self.filled.add_(len(z)).clamp_(max=len(self.vectors))

    def contents(self):
        return self.vectors[:self.filled]                      # published: random vectors until it is full


# ---------------------------------------------------------------- training

class LARS(torch.optim.Optimizer):
    """SGD whose gradient is scaled, tensor by tensor, to the length trust * |parameter|. Where either has
    length zero, a plain step without weight decay. Biases and BN are treated like the rest, as published."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                length, steepness, decay = p.norm(), p.grad.norm(), group["weight_decay"]
                scaled = (length > 0) & (steepness > 0)
                rate = torch.where(scaled, group["trust"] * length / (steepness + decay * length + 1e-8), 1.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_((p.grad + decay * scaled * p) * rate)
                p.sub_(group["lr"] * momentum)


def learning_rate(step, total, lr, warmup=0.02):
    """From lr / 16 to lr in the first share `warmup` of the steps, then the run's cosine to lr / 1000."""
    t = step / total
    if t < warmup:
        return lr / 16 + (lr - lr / 16) * t / warmup
    return lr / 1000 + 0.5 * (lr - lr / 1000) * (1 + math.cos(math.pi * t))


def train(args):
    run = common.Run("vice", args)
    if args.cache_features:
        raise ValueError("--cache-features: ViCE trains its network, no features stay the same; leave it out")
    images = data.load(args.data, args.root, "train", size=args.size, protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    fit = data.load(args.data, args.root, "train", size=args.eval_size, protocol=val.protocol)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    model = start(args).to(run.device).train()
    queue = Queue(args.queue, args.code_dim).to(run.device)
    trained = [*model.network.parameters(), model.prototypes]
    optimizer = LARS(trained, args.lr, weight_decay=args.weight_decay)
    state = dict(model=model, queue=queue, optimizer=optimizer)
    for step, batch in run.steps("network", args.steps, Views(images, args), **state):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        views, regions = batch["image"].transpose(0, 1), batch["regions"].transpose(0, 1)      # (M,B,...)
        M, B = regions.shape[:2]
        with run.autocast():                                   # all views at once: they share BN's statistics
            maps = model.network(views.flatten(0, 1)).float()                                # (M*B,D,h/4,h/4)
        run.mark("network")
        numbers = common.gather(regions[0].flatten(1).amax(1) + 1)                           # R of all images
        z = embed_regions(maps, regions.flatten(0, 1), int(numbers.max()))
        z = z.unflatten(0, (M, B))                                                             # (M,B,R,D)
        valid = torch.arange(z.shape[2], device=run.device) < numbers[:, None]                # (all images,R)
        mine = slice(B * run.rank, B * run.rank + B)
        own = slice(int(numbers[:mine.start].sum()), int(numbers[:mine.stop].sum()))
        everyone = common.gather(z[0].detach())[valid]                                       # (all regions,D)
        z = z[:, valid[mine]]                                                              # (M,own regions,D)
        known = torch.cat([everyone, queue.contents()]) if step >= args.queue_start else everyone
        assignment = sinkhorn(known @ model.prototypes.detach().T)[own]
        loss = swapped_prediction_loss(z[1:] @ model.prototypes.T, assignment)
        loss = loss * z.shape[1] * run.world / len(everyone)  # mean over processes = mean over regions
        run.mark("loss")
        if not run.finite(batch, loss=loss, regions=numbers.float().mean()):
            continue
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(model)
        if step < args.freeze:
            model.prototypes.grad = None
        optimizer.step()
        with torch.no_grad():
            model.prototypes.copy_(F.normalize(model.prototypes))
        queue.push(everyone)
        run.mark("backward and optimizer")
    if args.bench:
        return 0
    untrained = start(args).to(run.device).eval()              # the same network before its first step
    if model.linear:                                           # a run resumed after its fit begins it again
        model.linear.load_state_dict(untrained.linear.state_dict())
    fit_probes(model, fit, args)
    run.save()
    code = eval.finish(run, model, fit, val, encode=untrained)
    if val.classes:
        fit_probes(untrained, fit, args)
        linear = eval.evaluate(untrained, val, run.device)["linear"]
        colours = eval.baseline(run, patch_colours, fit, val, args.clusters, 8)
        add_scores(run, val, {"linear, untrained": linear, "K-means, colours": eval.matched(
            colours, eval.hungarian(colours))})
    return code


def start(args):
    """The model before its first step."""
    torch.manual_seed(args.seed)
    return Model(args, args.weights)


def fit_probes(model, images, args):
    """Clusters by K-means and the linear model by SGD with the published settings, on random training pixels.

    The network is frozen by now: one pass over some images replaces the paper's 12,000 batches.
    """
    device, generator = model.prototypes.device, torch.Generator().manual_seed(args.seed)
    model.eval()
    with torch.no_grad():
        points = eval.sample_points(model, images, device, 1, args.probe_pixels, args.probe_images, args.seed)
    X, y = points[0].flatten(0, 1), points[1].flatten()
    some = torch.randperm(len(X), generator=generator)[:20000].to(device)
    model.cluster.clusters.data.copy_(eval.kmeans(X[some], args.clusters, seed=args.seed))
    X, y = X[y >= 0], y[y >= 0]
    if model.linear is None or len(y) == 0:
        return
    model.linear.train()
    optimizer = torch.optim.SGD(model.linear.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for step in range(args.probe_steps):
        optimizer.param_groups[0]["lr"] = max(1e-4, 0.01 * (1 - step / args.probe_steps) ** 0.9)
        chosen = torch.randint(len(y), (4096,), generator=generator).to(device)
        logits = model.linear(X[chosen].T[None, ..., None])                               # (1,classes,4096,1)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, y[chosen][None, :, None]).backward()
        optimizer.step()
    model.linear.eval()


def patch_colours(images):
    """A baseline without any network: images (B,3,H,W) -> mean colours of the 8x8 patches (B,3,h,w)."""
    return F.avg_pool2d(images, 8)


def add_scores(run, val, counts):
    """Print further rows, {title: confusion}, and add them to scores.json."""
    if run.rank == 0:
        rows = {title: eval.scores(confusion) for title, confusion in counts.items()}
        print(eval.table(rows, val.names))
        content = {**json.loads((run.folder / "scores.json").read_text()), **eval.plain(rows)}
        common.write(run.folder / "scores.json", json.dumps(content, indent=1).encode())


# ---------------------------------------------------------------- command line

ARCHS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
PRESETS = {      # lr: published 0.0025 x images per step, for thousands of steps; short runs need more
    "default": dict(
        arch="resnet18", decoder="fpn", code_dim=128, size=320, eval_size=320, regions="slic", region_size=20,
        ruler=10, views=5, view_size=256, beta=(0.5, 1.5), mask=0.25, colour=1.0, blur=0.5, prototypes=27,
        queue=5000, queue_start=313, freeze=313, steps=7552, batch_size=32, lr=0.08, warmup=0.02,
        weight_decay=1e-6, filters=256, probe_images=1000, probe_pixels=500, probe_steps=3000),
    "scenes": dict(
        weights="none", depth=2, size=96, eval_size=96, region_size=8, views=3, view_size=64, colour=0.4,
        blur=0.0, beta=(0.75, 1.25), prototypes=32, queue=1000, queue_start=30, freeze=20, steps=200,
        batch_size=12, lr=1.5, filters=27, probe_images=128, probe_pixels=160, probe_steps=300),
    "camvid": dict(      # three stages and small images: what a CPU does in minutes
        depth=3, size=128, eval_size=128, region_size=10, views=3, view_size=96, colour=0.4, blur=0.1,
        beta=(0.75, 1.25), prototypes=32, queue=2000, queue_start=30, freeze=20, steps=150, batch_size=8,
        lr=0.5, filters=45, probe_images=128, probe_pixels=160, probe_steps=1000),
    "camvid/resnet50": dict(steps=80, batch_size=6),
    "camvid+none": dict(lr=1.5),
    "smoke": dict(weights="none", view_size=64, steps=10, batch_size=2, queue_start=5, freeze=3,
                  probe_images=20, probe_steps=10),
}


def arguments():
    p, whole = common.parser(__doc__), common.whole
    p.set_defaults(arch="resnet18")
    for name, text in (
            ("--arch", "resnet18, resnet34, resnet50, resnet101 or resnet152; a larger one pays on COCO"),
            ("--depth", "keep the first K of the ResNet's four stages; the last costs most"),
            ("--weights", "ImageNet weights from a file instead of torchvision's server; none = random")):
        p._option_string_actions[name].help = text
    add = p.add_argument_group("ViCE").add_argument
    add("--decoder", choices=["fpn", "deeplab"], help="fpn for images of about 320 pixels, deeplab "
        "(DeepLabV3+) for larger ones; the other way round fails in the paper")
    add("--code-dim", type=whole(1), help="embedding width D; 128 in the paper, 32 costs it 1.5 mIoU")
    add("--views", type=whole(2), help="views per image, M; 5 in the paper")
    add("--view-size", type=whole(16), metavar="PIXELS", help="side of a view; a step costs its square")
    add("--beta", type=float, nargs=2, metavar=("LOW", "HIGH"), help="side of the crop over side of the view")
    add("--regions", choices=["slic", "grid"], help="superpixels or squares; grid, --region-size 1: pixels")
    add("--region-size", type=whole(1), metavar="PIXELS", help="mean side of a region; 20 or 10 in the paper")
    add("--ruler", type=float, help="how compact superpixels are; the larger, the more like a grid")
    add("--mask", type=float, metavar="SHARE", help="largest side of the noise over the view's; 0 = none")
    add("--colour", type=float, metavar="STRENGTH", help="of the colour distortion: 1 as in the paper, less "
        "where colour tells classes apart")
    add("--blur", type=float, metavar="P", help="share of views that are blurred; 0 where texture matters")
    add("--prototypes", type=whole(2), help="K: 27 on small images, 128 on large ones")
    add("--queue", type=whole(1), help="past regions that join the assignment; too many are stale")
    add("--queue-start", type=whole(0), metavar="STEP", help="step from which the queue is used")
    add("--freeze", type=whole(0), metavar="STEPS", help="steps in which the prototypes stay as they are")
    add("--warmup", type=float, metavar="SHARE", help="share of the steps with a rising learning rate")
    add("--weight-decay", type=float, help="of LARS")
    add("--eval-size", type=whole(16), metavar="PIXELS", help="shorter side of the images at scoring")
    add("--filters", type=whole(1), help="L, the width of the linear model: 27, 45, 128, 256 in the paper")
    add("--probe-images", type=whole(1), help="training images that clusters and linear model are fitted on")
    add("--probe-pixels", type=whole(1), help="random pixels of each of them")
    add("--probe-steps", type=whole(1), help="SGD steps of the linear model; 12,000 in the paper")
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
