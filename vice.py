"""ViCE: visual concept embeddings from raw images by swapped prediction of superpixels (Karlsson et al., arXiv 2111.12460).

An image is cut into superpixels (SLIC). M square views around one point of it show some of them together. A CNN embeds
every pixel; a superpixel is the mean embedding of its pixels. View 0's superpixels are assigned to K prototypes by
Sinkhorn's optimal transport, and the other views, which see them with other context, scale and colour, must predict that
assignment. Then the CNN is frozen, and clusters and a linear model are fitted on its embeddings. Nothing is pretrained
unless you want it: --weights none starts from random numbers.

    python vice.py                                                        # generated scenes, random weights
    python vice.py --data camvid --root data/camvid --weights resnet18.pth
    python vice.py --data coco27 --root data/cocostuff                    # paper: 12.3 to 25.5 mIoU, not run here
"""
import common  # isort: skip  (first: it answers --help before torch is loaded)

import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy import ndimage
from torch import nn
from torchvision.transforms import v2

import data
import eval
from eval import ClusterProbe

# Letters: B images, M views of an image, h pixels along a view, D embedding width, K prototypes, R regions of an image,
# S pixels along a region, s pixels along a crop before it is resized to h.


# ---------------------------------------------------------------- superpixels

def slic(image, region_size=20, ruler=10, iterations=5):
    """SLIC superpixels: uint8 RGB (H,W,3) -> labels (H,W), as OpenCV's SLIC gives them for the blurred BGR image.

    A label may lie in several pieces: connectivity is not enforced, as published. numpy in, numpy out; torch likewise.
    All windows are evaluated at once; where they overlap, the smallest distance wins, among equals the first seed.
    """
    pixels = blur(np.asarray(image)[..., ::-1], 84, 88).astype(np.float32)
    # The 3x3 kernel has sigma 4 (84 88 84 / 256): the published code passes a border flag where OpenCV wants the sigma.
    (H, W, _), S = pixels.shape, region_size
    colour, centre = seeds(pixels, S)
    side, wide = 2 * S, W + 4 * S                                  # of a window; of the padded image
    padded = np.full((3, H + 4 * S, wide), np.inf, np.float32)     # outside, every distance is infinite
    padded[:, side:-side, side:-side] = pixels.transpose(2, 0, 1)
    windows = [np.lib.stride_tricks.sliding_window_view(plane, (side, side)) for plane in padded]
    span, count = np.arange(side), len(centre)
    weight, ids = np.float32((S / ruler) ** 2), np.arange(count)[:, None, None]
    y, x = np.divmod(np.arange(H * W), W)
    planes, labels = pixels.reshape(-1, 3).T.astype(np.float64), np.zeros((H, W), np.int64)
    for _ in range(iterations):
        left, top = centre.astype(np.int64).T - S                  # windows of [-S, S) around the truncated centre
        parts = [window[top + side, left + side] for window in windows]                        # 3 x (n,2S,2S)
        for part, value in zip(parts, colour.T):
            part -= value[:, None, None]                           # in place: half the time
            part *= part
        distance = parts[0]
        distance += parts[1]
        distance += parts[2]
        dx = ((left[:, None] + span).astype(np.float32) - centre[:, :1]) ** 2
        dy = ((top[:, None] + span).astype(np.float32) - centre[:, 1:]) ** 2
        far = dx[:, None] + dy[..., None]
        far /= weight
        distance += far
        key = distance.view(np.int32).astype(np.int64)             # bits of a positive float order like the float:
        key <<= 32                                                 # one minimum over (distance, seed)
        key |= ids
        where = ((top + side) * wide + left + side)[:, None, None] + span[:, None] * wide + span
        best = np.full(padded[0].size, np.iinfo(np.int64).max)
        np.minimum.at(best, where.ravel(), key.ravel())
        best = best.reshape(padded[0].shape)[side:-side, side:-side]
        labels = np.where(best < np.iinfo(np.int64).max, best & 0xffffffff, labels)   # out of reach: as it was
        flat = labels.ravel()
        size = np.bincount(flat, minlength=count).clip(1).astype(np.float32)[:, None]
        colour = np.stack([np.bincount(flat, plane, count) for plane in planes], 1).astype(np.float32) / size
        centre = np.stack([np.bincount(flat, at, count) for at in (x, y)], 1).astype(np.float32) / size
    return torch.from_numpy(labels) if torch.is_tensor(image) else labels


def blur(image, edge, middle):
    """uint8 (H,W,C) with the kernel (edge, middle, edge) / 256 in both directions, mirrored borders, rounded once."""
    p = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), "reflect")
    p = edge * (p[:-2] + p[2:]) + middle * p[1:-1]
    p = edge * (p[:, :-2] + p[:, 2:]) + middle * p[:, 1:-1]
    return p + 2 ** 15 >> 16


def seeds(pixels, S):
    """Starting colours (n,3) and places (n,2) as (x,y): a grid, each seed moved to a flatter diagonal neighbour."""
    H, W, _ = pixels.shape
    nx, ny = max(1, int(0.5 + W / S)), max(1, int(0.5 + H / S))
    x, y = np.meshgrid(*(np.arange(n) * (S + int((side - S * n) / n)) + S // 2 for n, side in ((nx, W), (ny, H))))
    inside = (x < W) & (y < H)
    place, colour = np.zeros((nx * ny, 2), int), np.zeros((nx * ny, 3), np.float32)
    n = inside.sum()                                               # seeds outside become black ones at (0,0), at the end
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
    moved = (to != place).all(1)                                   # OpenCV moves a seed only if both x and y change
    place[moved] = to[moved]
    colour[moved] = pixels[place[moved, 1], place[moved, 0]]
    return colour, place.astype(np.float32)


def grid(H, W, S):
    """Squares of S pixels instead of superpixels, for comparison; S = 1 makes every pixel a region."""
    scale = (int(H * W / S ** 2) / (H * W)) ** 0.5
    rows, columns = max(1, int(scale * H)), max(1, int(scale * W))
    return np.arange(H)[:, None] * rows // H * columns + np.arange(W) * columns // W


# ---------------------------------------------------------------- views

def content(picture):
    """uint8 RGB (H,W,3) -> probability (H,W) of being the point all views show: high along edges, never zero.

    Canny's edges of a blurred grey image, one pixel thicker downwards (the published 3x3 dilation acts as 2x1), blurred.
    """
    grey = (blur(picture, 64, 128) @ np.array([0.299, 0.587, 0.114])).round()
    dx, dy = ndimage.sobel(grey, 1, mode="nearest"), ndimage.sobel(grey, 0, mode="nearest")
    m = np.pad(dx * dx + dy * dy, 1)
    at = lambda y, x: m[1 + y:m.shape[0] - 1 + y, 1 + x:m.shape[1] - 1 + x]                    # noqa: E731
    peak = np.where(dx * dy < 0, (at(0, 0) > at(-1, 1)) & (at(0, 0) > at(1, -1)), (at(0, 0) > at(-1, -1)) & (at(0, 0) > at(1, 1)))
    flat, steep = abs(dy) < 0.41421356 * abs(dx), abs(dy) > 2.41421356 * abs(dx)               # tan 22.5, tan 67.5 degrees
    peak = np.where(flat, (at(0, 0) > at(0, -1)) & (at(0, 0) >= at(0, 1)), peak)
    peak = np.where(steep, (at(0, 0) > at(-1, 0)) & (at(0, 0) >= at(1, 0)), peak)
    weak = peak & (at(0, 0) > 10 ** 2)
    parts, n = ndimage.label(weak, np.ones((3, 3)))
    strong = np.zeros(n + 1, bool)
    strong[parts[weak & (at(0, 0) > 50 ** 2)]] = True
    edge = strong[parts]
    edge[1:] |= edge[:-1].copy()
    p = blur(edge[..., None] * np.uint8(255), 64, 128)[..., 0] / 255 + 0.005
    return p / p.sum()


def share(v):
    """An angle of a von Mises draw in [-pi, pi] as a number in [0, 1]."""
    return (v + math.pi) / (2 * math.pi)


def clip_centre(x, y, width, height, W, H):
    """Move a centre so that the rectangle lies in the image; one that is too large begins at the left and top edge."""
    return max(math.ceil(width / 2), min(int(x), int(W - width / 2))), max(math.ceil(height / 2), min(int(y), int(H - height / 2)))


def near(centre, s, i, others, angle, radius):
    """Centre of view i + 1: in its own sector around view 0's centre, which it must contain. Two von Mises draws."""
    t = math.pi / 2 - 2 * math.pi / others * (i + share(angle))
    r = s / 2 * share(radius)
    return centre[0] + int(r * math.cos(t)), centre[1] + int(r * math.sin(t))


def mask_rectangle(s, h, largest, turn, radius, width, height):
    """Noise rectangle (x0, y0, x1, y1) in a crop of side s. The paper's "25 %" bounds its sides, not its area.

    turn in [0,1], the rest von Mises draws. It is placed as if the crop had side h already, as in the published code.
    """
    w, v = int(largest * s * share(width)), int(largest * s * share(height))
    r, t = h / 2 * share(radius), 2 * math.pi * turn
    x, y = clip_centre(h / 2 + r * math.cos(t), h / 2 + r * math.sin(t), w, v, h, h)
    return x - w // 2, y - v // 2, x + w // 2, y + v // 2


def place_views(centres, sizes):
    """Centres (x,y) and sides of the crops -> boxes (M,4) as x0 y0 x1 y1, and the rectangle (4,) that all of them show."""
    (x, y), s = np.array(centres).T, np.array(sizes)
    boxes = np.stack([x - s / 2, y - s / 2, x + s / 2, y + s / 2], 1).astype(int)              # truncated towards zero
    half = (s / 2).astype(int)
    return boxes, np.array([(x - half).max(), (y - half).max(), (x + half).min(), (y + half).min()])


def crop(labels, box):
    """labels (H,W) -> (y1-y0, x1-x0); -1 outside."""
    x0, y0, x1, y1 = box
    out = np.full((y1 - y0, x1 - x0), -1)
    H, W = labels.shape
    a, b, c, d = max(y0, 0), min(y1, H), max(x0, 0), min(x1, W)
    out[a - y0:b - y0, c - x0:d - x0] = labels[a:b, c:d]
    return out


def mask_views(crops, common_boxes, rectangles, protected=None, rng=None):
    """Which regions turn into noise -> noise [(s,s) bool] per view, ids (n,) that stay common to all views.

    A region that a view's rectangle touches becomes noise in that view and is no region of any view; a random quarter
    of the common ids is spared. A rectangle that touches the padding (-1) makes all padding of that view noise.
    """
    x0, y0, x1, y1 = common_boxes[0]
    ids = np.unique(crops[0][y0:y1, x0:x1])
    ids = ids[ids >= 0]
    if protected is None:
        protected = rng.choice(ids, len(ids) // 4, replace=False)
    noise = []
    for labels, rectangle in zip(crops, rectangles):
        x0, y0, x1, y1 = np.clip(rectangle, 0, None)
        touched = np.setdiff1d(labels[y0:y1, x0:x1], protected)
        noise.append(np.isin(labels, touched))
        ids = np.setdiff1d(ids, touched)
    return noise, ids


def resize_regions(crops, common_boxes, ids, h):
    """Crops to (M,h,h), nearest as OpenCV does; all but the ids that every view shows in the common rectangle are -1."""
    views = []
    for labels in crops:
        (a, b) = labels.shape
        views.append(labels[np.arange(h) * a // h][:, np.arange(h) * b // h])
    ids = np.intersect1d(ids, views[0])                            # of view 0 any pixel will do, as in the published code
    for view, labels, (x0, y0, x1, y1) in zip(views[1:], crops[1:], common_boxes[1:]):
        (a, b) = labels.shape
        ids = np.intersect1d(ids, view[y0 * h // a:y1 * h // a, x0 * h // b:x1 * h // b])
    views = np.stack(views)
    return np.where(np.isin(views, ids), views, -1)


class Views(torch.utils.data.Dataset):
    """M augmented views of an image -> {"image": (M,3,h,h) normalised, "regions": (M,h,h) ids 0..R-1, -1 = none, ...}.

    The superpixels of images of one size are computed once, in memory shared by the workers, up to 2 GB of them.
    """

    def __init__(self, images, args):
        self.images, self.args, self.names = images, args, []
        pixels = len(images) * args.size ** 2
        self.cache = None
        if args.regions == "slic" and images.protocol != "whole" and 2 * pixels < 2e9:
            self.cache = torch.full((len(images), args.size, args.size), -1, dtype=torch.int16).share_memory_()
        c = args.colour                                            # SimCLR's distortion of this strength
        self.distort = v2.Compose([v2.RandomApply([v2.ColorJitter(0.8 * c, 0.8 * c, 0.8 * c, 0.2 * c)], 0.8),
                                   v2.RandomGrayscale(0.2 * c), v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], args.blur)])

    def __len__(self):
        return len(self.images)

    def regions(self, i, picture):
        """Region of every pixel (H,W), int64."""
        if self.args.regions == "grid":
            return grid(*picture.shape[1:], self.args.region_size)
        if self.cache is None:
            return slic(picture.permute(1, 2, 0).numpy(), self.args.region_size, self.args.ruler)
        if self.cache[i, 0, 0] < 0:
            self.cache[i] = torch.from_numpy(slic(picture.permute(1, 2, 0).numpy(), self.args.region_size, self.args.ruler))
        return self.cache[i].long().numpy()

    def __getitem__(self, i):
        for _ in range(100):
            item = {"index": i, "path": self.images.paths[i], "error": ""}
            try:
                picture = self.images.picture(i)
            except Exception as error:                             # as in data.Images: a broken file ends no run
                return {**item, "error": f"{type(error).__name__}: {error}"}
            rng = np.random.default_rng(torch.randint(2 ** 62, ()).item())
            views, regions, noise = make_views(picture, self.regions(i, picture), rng, self.args)
            if regions.max() >= 0:
                break
            i = torch.randint(len(self), ()).item()                # no region is common to all views: another image
        else:
            raise ValueError("100 images in a row gave no region that all views show; take a smaller --region-size")
        flipped = torch.rand(len(views)) < 0.5
        result = []
        for view, hidden, flip in zip(views, noise, flipped):
            x = (self.distort(view) / 255 - data.MEAN) / data.STD
            x = torch.where(torch.from_numpy(hidden), torch.rand_like(x) * 2 - 1, x)           # after all augmentation
            result.append(x.flip(-1) if flip else x)
        regions = torch.stack([r.flip(-1) if flip else r for r, flip in zip(torch.from_numpy(regions), flipped)])
        return {**item, "image": torch.stack(result), "regions": regions}


def make_views(picture, regions, rng, args):
    """uint8 (3,H,W), (H,W) -> views uint8 (M,3,h,h), regions (M,h,h) ids 0..R-1 or -1, noise (M,h,h) bool."""
    (H, W), M, h = regions.shape, args.views, args.view_size
    p = content(picture.permute(1, 2, 0).numpy()).cumsum()
    y, x = divmod(min(int(np.searchsorted(p, rng.random() * p[-1])), H * W - 1), W)
    sizes = rng.uniform(args.beta[0], args.beta[1], M) * h         # paper 0.5 to 2 (text), 0.5 to 1.5 (appendix, code)
    centres = [clip_centre(x, y, sizes[0], sizes[0], W, H)]
    for i, s in enumerate(sizes[1:]):
        place = near(centres[0], s, i, M - 1, rng.vonmises(0, 2), rng.vonmises(math.pi / 2, 2))
        centres.append(clip_centre(*place, s, s, W, H))
    boxes, common_box = place_views(centres, sizes)
    common_boxes = common_box - boxes[:, [0, 1, 0, 1]]
    crops = [crop(regions, box) for box in boxes]
    rectangles = [mask_rectangle(s, h, args.mask, rng.random(), *rng.vonmises(math.pi / 2, 2, 3)) for s in sizes]
    noise, ids = mask_views(crops, common_boxes, rectangles, rng=rng)
    labels = resize_regions(crops, common_boxes, ids, h)
    known, labels = np.unique(np.append(labels, -1), return_inverse=True)
    views, hidden = [], []
    for (x0, y0, x1, y1), mask in zip(boxes, noise):
        view = v2.functional.crop(picture, y0, x0, y1 - y0, x1 - x0)                           # outside is black
        views.append(v2.functional.resize(view, [h, h], v2.InterpolationMode.BICUBIC, antialias=True))
        rows, columns = (np.arange(h) * n // h for n in mask.shape)
        hidden.append(mask[rows][:, columns])
    return torch.stack(views), labels[:-1].reshape(M, h, h) - 1, np.stack(hidden)


# ---------------------------------------------------------------- model

class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics of all processes (torch's own SyncBatchNorm is for CUDA only)."""

    def forward(self, x):
        if not self.training or common.world() == 1:
            return super().forward(x)
        x32 = x.float()
        n = common.reduce_sum(x32.new_tensor(x32.numel() / x32.shape[1]))
        mean = common.reduce_sum(x32.sum((0, 2, 3))) / n
        centred = x32 - mean[:, None, None]
        var = common.reduce_sum(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class FPN(nn.Module):
    """Maps of the stages -> sum (B,D,h/4,w/4): 1x1 convolutions, upsampled and added from the top. No norm, as in PiCIE."""

    def __init__(self, widths, D):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, D, 1) for width in widths)

    def forward(self, maps):
        x = None
        for conv, m in reversed(list(zip(self.lateral, maps))):
            x = conv(m) if x is None else conv(m) + F.interpolate(x, m.shape[2:], mode="bilinear")
        return x


def separable(c_in, c_out, dilation=1):
    """Depth-wise 3x3, then 1x1. ReLU stands before BN in both halves, as in the published code."""
    return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=dilation, dilation=dilation, groups=c_in, bias=False), nn.ReLU(),
                         BatchNorm(c_in), nn.Conv2d(c_in, c_out, 1, bias=False), nn.ReLU(), BatchNorm(c_out))


def conv_bn(c_in, c_out, kernel=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), BatchNorm(c_out))


class DeepLab(nn.Module):
    """DeepLabV3+: atrous pyramid on the last stage, refined by the first -> (B,D,h/4,w/4)."""

    def __init__(self, widths, D):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(widths[-1], 256), *(separable(widths[-1], 256, d) for d in (12, 24, 36))])
        self.pool, self.merge = conv_bn(widths[-1], 256), conv_bn(5 * 256, 256, 3)
        self.low = conv_bn(widths[0], 48)
        self.decode = nn.Sequential(separable(304, 256), separable(256, 256), nn.Conv2d(256, D, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, BatchNorm):
                nn.init.constant_(m.bias, 1e-4)

    def forward(self, maps):
        x, low = maps[-1], self.low(maps[0]).relu()
        pooled = self.pool(x.mean((2, 3), keepdim=True)).relu().expand(-1, -1, *x.shape[2:])
        x = self.merge(torch.cat([self.branches[0](x).relu(), *(b(x) for b in self.branches[1:]), pooled], 1))
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
        return self.decode(torch.cat([low, x], 1))


class Network(nn.Module):
    """Images (B,3,H,W) -> embeddings (B,D,H/4,W/4): a ResNet dilated to stride 8 and a decoder.

    depth: keep the first so many of the four stages.
    """

    def __init__(self, arch, decoder, D, depth=None):
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"--arch {arch}: ViCE trains a convolutional network{common.nearest(arch, ARCHS)}")
        net = getattr(torchvision.models, arch)(weights=None, norm_layer=BatchNorm)
        for stage, dilation in ((net.layer3, 2), (net.layer4, 4)):
            for m in stage.modules():
                if isinstance(m, nn.Conv2d):
                    m.stride = (1, 1)
                    if m.kernel_size == (3, 3):
                        m.dilation = m.padding = (dilation, dilation)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4][:depth])
        widths = [w * (1 if arch in ("resnet18", "resnet34") else 4) for w in (64, 128, 256, 512)][:len(self.stages)]
        self.decoder = {"fpn": FPN, "deeplab": DeepLab}[decoder](widths, D)

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.decoder(maps)

    def load(self, arch, weights):
        """ImageNet weights from torchvision's server, or a file with torchvision's names; "none" keeps random ones."""
        if weights == "none":
            return
        if weights is None:
            state = torchvision.models.get_model_weights(arch).DEFAULT.get_state_dict(progress=False)
        elif not os.path.isfile(weights):
            raise FileNotFoundError(f"--weights {weights} does not exist; none starts from random weights")
        else:
            try:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(f"--weights {weights} is no weights file ({type(error).__name__})") from None
        stem = {"conv1": self.stem[0], "bn1": self.stem[1]}
        for name, module in {**stem, **{f"layer{i + 1}": stage for i, stage in enumerate(self.stages)}}.items():
            for key, own in module.state_dict().items():
                value = state.get(f"{name}.{key}")
                if value is None and key.endswith("num_batches_tracked"):
                    continue
                if value is None or value.shape != own.shape:
                    raise ValueError(f"--weights {weights} does not fit {arch}: {name}.{key} should be {tuple(own.shape)}, is "
                                     f"{'missing' if value is None else tuple(value.shape)}")
                own.copy_(value)


class LinearModel(nn.Sequential):
    """The paper's linear model, L filters wide: 1x1 convolution, BN, 1x1 convolution. (B,D,H,W) -> (B,classes,H,W)."""

    def __init__(self, D, filters, classes):
        super().__init__(nn.Conv2d(D, filters, 1, bias=False), nn.BatchNorm2d(filters), nn.Conv2d(filters, classes, 1))


class Model(nn.Module):
    """Images (B,3,H,W) -> unit embeddings (B,D,H,W), with `.linear` and `.cluster`, both fitted after training."""

    alpha = 10                                                     # the CRF gets log-softmax(cosine / tau)

    def __init__(self, args):
        super().__init__()
        self.network = Network(args.arch, args.decoder, args.code_dim, args.depth)
        self.prototypes = nn.Parameter(F.normalize(nn.Linear(args.code_dim, args.prototypes).weight.detach(), dim=1))
        self.cluster = ClusterProbe(args.code_dim, args.clusters)
        self.linear = LinearModel(args.code_dim, args.filters, args.classes) if args.classes else None

    def forward(self, images):
        x = F.interpolate(self.network(images).float(), images.shape[2:], mode="bilinear", align_corners=True)
        return F.normalize(x, dim=1)


# ---------------------------------------------------------------- loss

def region_mean(embedding, regions, count):
    """Mean of the raw embeddings of each region: (D,H,W), (H,W) ids, -1 = none -> (count,D); an empty region gives 0.

    As in the published code; the paper takes the mean of unit vectors.
    """
    inside = regions >= 0
    ids = regions[inside]
    sums = embedding.new_zeros(count, len(embedding)).index_add(0, ids, embedding[:, inside].T)
    return sums / torch.bincount(ids, minlength=count).clamp(min=1)[:, None]


def region_weights(regions, count, h, w, dtype=torch.float32):
    """(V,H,W) ids, -1 = none -> (V,count,h*w): times a map (V,h*w,D) it is the region mean of that map upsampled.

    Upsampling (bilinear, align_corners) and averaging are linear, so the D-channel map of full size need not exist: a
    pixel hands its weight to the four cells that it would be interpolated from.
    """
    V, H, W = regions.shape
    v, i, j = (regions >= 0).nonzero(as_tuple=True)
    ids = v * count + regions[v, i, j]
    y, x = i.to(dtype) * (h - 1) / max(H - 1, 1), j.to(dtype) * (w - 1) / max(W - 1, 1)
    y0, x0 = y.long().clamp(max=max(h - 2, 0)), x.long().clamp(max=max(w - 2, 0))
    weights = torch.zeros(V * count * h * w, dtype=dtype, device=regions.device)
    for down, fy in ((0, 1 - (y - y0)), (1, y - y0)):
        for right, fx in ((0, 1 - (x - x0)), (1, x - x0)):
            cell = (y0 + down).clamp(max=h - 1) * w + (x0 + right).clamp(max=w - 1)
            weights.index_add_(0, ids * h * w + cell, fy * fx)
    weights = weights.view(V, count, h * w)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)


def embed_regions(maps, regions, count):
    """Maps (V,D,h,w), regions (V,H,W) -> unit vectors (V,count,D) of the regions; missing ones are 0."""
    h, w = maps.shape[2:]
    if count < h * w:
        z = region_weights(regions, count, h, w) @ maps.flatten(2).mT
    else:                                                          # tiny regions: the weights would be the larger thing
        z = torch.stack([region_mean(F.interpolate(m[None], r.shape, mode="bilinear", align_corners=True)[0], r, count)
                         for m, r in zip(maps, regions)])
    return F.normalize(z, dim=-1)


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Scores (M,K) -> assignment (M,K): rows sum to 1 and, nearly, every prototype gets the same total (SwAV's optimal
    transport). The rows of all processes have to be in it; then one process computes what several would."""
    Q = ((scores - scores.max()) / epsilon).exp()
    Q /= Q.sum()
    for _ in range(iterations):
        total = Q.sum(0)
        if (total == 0).any():                                     # a prototype that nothing comes near
            Q += 1e-12
            total = Q.sum(0)
        Q = Q / total / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / len(Q)
    return Q * len(Q)


def swapped_prediction_loss(scores, assignment, tau=0.1):
    """Scores (V,M,K) of the views 1.. must predict the assignment (M,K) that view 0 got (eq. 4) -> scalar.

    One mean over all regions of the batch, as in the published code; the paper averages per image first.
    """
    return -(assignment * F.log_softmax(scores / tau, -1)).sum(-1).mean()


class Queue(nn.Module):
    """The last L view-0 embeddings, newest first. The paper keeps scores; embeddings can be scored anew, as published."""

    def __init__(self, length, D):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(length, D))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, z):
        self.vectors.copy_(torch.cat([z, self.vectors])[:len(self.vectors)])
        self.filled.add_(len(z)).clamp_(max=len(self.vectors))

    def contents(self):
        return self.vectors[:self.filled]


# ---------------------------------------------------------------- training

class LARS(torch.optim.Optimizer):
    """SGD whose gradient has, tensor by tensor, the length trust * |parameter|. A parameter or gradient of length zero
    takes a plain step without weight decay. params, lr, momentum, weight_decay, trust as in the published code."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                length, steepness, decay = p.norm(), p.grad.norm(), group["weight_decay"]
                scaled = (length > 0) & (steepness > 0)
                rate = torch.where(scaled, group["trust"] * length / (steepness + decay * length + 1e-8), 1.0)
                g = (p.grad + decay * scaled * p) * rate
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * momentum)


def learning_rate(step, total, lr, warmup=0.02):
    """Linear from lr / 16 to lr over the first share `warmup` of the steps, then a cosine of the whole run to lr / 1000."""
    t = step / total
    if t < warmup:
        return lr / 16 + (lr - lr / 16) * t / warmup
    return lr / 1000 + 0.5 * (lr - lr / 1000) * (1 + math.cos(math.pi * t))


def train(args):
    run = common.Run("vice", args)
    if args.cache_features:
        raise ValueError("--cache-features: ViCE trains the network itself, so there are no fixed features; leave it out")
    images = data.load(args.data, args.root, "train", size=args.size, protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    fit = data.load(args.data, args.root, "train", size=args.eval_size, protocol=val.protocol)     # for the probes
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    model = start(args).to(run.device).train()
    queue = Queue(args.queue, args.code_dim).to(run.device)
    optimizer = LARS([*model.network.parameters(), model.prototypes], args.lr, weight_decay=args.weight_decay)
    for step, batch in run.steps("network", args.steps, Views(images, args), model=model, queue=queue, optimizer=optimizer):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        regions = batch["regions"].transpose(0, 1)                                             # (M,B,h,h)
        with run.autocast():                                       # all views in one batch: they share BN's statistics
            maps = model.network(batch["image"].transpose(0, 1).flatten(0, 1)).float()         # (M*B,D,h/4,h/4)
        run.mark("network")
        numbers = common.gather(regions[0].flatten(1).amax(1) + 1)                             # R of all images
        z = embed_regions(maps, regions.flatten(0, 1), int(numbers.max()))
        z = z.unflatten(0, regions.shape[:2])                                                  # (M,B,R,D)
        valid = torch.arange(z.shape[2], device=run.device) < numbers[:, None]                 # (all B,R)
        everyone = common.gather(z[0].detach())[valid]                                         # (all regions,D)
        known = torch.cat([everyone, queue.contents()]) if step >= args.queue_start else everyone
        before, mine = len(numbers) // run.world * run.rank, len(maps) // len(z)               # images of lower ranks
        own = slice(int(numbers[:before].sum()), int(numbers[:before + mine].sum()))
        assignment = sinkhorn(known @ model.prototypes.detach().T)[own]                        # every process has all rows
        z = z[:, valid[before:before + mine]]                                                  # (M,own regions,D)
        loss = swapped_prediction_loss(z[1:] @ model.prototypes.T, assignment)
        loss = loss * z.shape[1] * run.world / len(everyone)       # the mean over processes is the mean over all regions
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
            model.prototypes.copy_(F.normalize(model.prototypes, dim=1))
        queue.push(everyone)
        run.mark("backward and optimizer")
    if args.bench:
        return 0
    fit_probes(model, fit, args)
    run.save()
    untrained = start(args).to(run.device).eval()                  # the same network before its first step
    code = eval.finish(run, model, fit, val, encode=untrained)
    if val.classes:
        fit_probes(untrained, fit, args)
        colours = eval.baseline(run, colour_patches, fit, val, args.clusters, 8)
        report(run, val, {"linear, untrained": eval.scores(eval.evaluate(untrained, val, run.device)["linear"]),
                          "K-means, colours": eval.scores(eval.matched(colours, eval.hungarian(colours)))})
    return code


def start(args):
    """The model before its first step."""
    torch.manual_seed(args.seed)
    model = Model(args)
    model.network.load(args.arch, args.weights)
    return model


def fit_probes(model, images, args):
    """Clusters by K-means and the linear model by SGD, as in the paper, on random pixels of the training images.

    The network is frozen by now, so one pass over some images replaces the paper's 12,000 batches.
    """
    device = model.prototypes.device
    model.eval()
    with torch.no_grad():
        X, y, _ = eval.sample_points(model, images, device, points=args.probe_pixels, images=args.probe_images, seed=args.seed)
    X, y, generator = X.flatten(0, 1), y.flatten(), torch.Generator().manual_seed(args.seed)
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
        logits = model.linear(X[chosen].T[None, ..., None])                                    # (1,classes,4096,1)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, y[chosen][None, :, None]).backward()
        optimizer.step()
    model.linear.eval()


def colour_patches(images, patch=8):
    """(B,3,H,W) -> average colours (B,3,h,w), normalised as the images are: without any network."""
    return F.avg_pool2d(images, patch)


def report(run, val, more):
    """Print further rows and add them to scores.json."""
    if run.rank:
        return
    print(eval.table(more, val.names))
    path = run.folder / "scores.json"
    common.write(path, json.dumps({**json.loads(path.read_text()), **eval.plain(more)}, indent=1).encode())


# ---------------------------------------------------------------- command line

ARCHS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
PRESETS = {
    # low resolution; lr as published: 0.0025 x images per step
    "default": dict(arch="resnet18", size=320, eval_size=320, view_size=256, views=5, beta=(0.5, 1.5), mask=0.25, colour=1.0, blur=0.5,
                    regions="slic", region_size=20, ruler=10, decoder="fpn", code_dim=128, prototypes=27, steps=7552,
                    batch_size=32, lr=0.08, warmup=0.02, weight_decay=1e-6, queue=5000, queue_start=313, freeze=313,
                    filters=256, probe_images=1000, probe_pixels=500, probe_steps=3000),
    "scenes": dict(weights="none", depth=2, size=96, eval_size=96, view_size=64, region_size=8, steps=150, batch_size=4,
                   lr=1.0, queue=1000, queue_start=30, freeze=20, filters=27, probe_steps=300,
                   probe_pixels=200),
    "camvid": dict(size=160, eval_size=160, view_size=128, region_size=10, steps=150, batch_size=4, lr=0.32, queue=2000,
                   queue_start=30, freeze=20, filters=256, probe_steps=1000),
    "smoke": dict(steps=10, batch_size=2, queue_start=5, freeze=3, probe_images=20, probe_steps=10),
}


def arguments():
    p = common.parser(__doc__)
    p.set_defaults(arch="resnet18")
    g = p.add_argument_group("ViCE")
    g.add_argument("--decoder", choices=["fpn", "deeplab"], help="fpn for images of about 320 pixels, deeplab "
                   "(DeepLabV3+) for larger ones; fpn on large or deeplab on small images fails in the paper")
    g.add_argument("--views", type=common.whole(2), help="views per image, M; 5 in the paper, 3 costs it 1.2 mIoU")
    g.add_argument("--view-size", type=common.whole(16), metavar="PIXELS", help="side of a view as the network sees it; a step "
                   "costs its square")
    g.add_argument("--beta", type=float, nargs=2, metavar=("LOW", "HIGH"), help="side of the crop over side of the view")
    g.add_argument("--regions", choices=["slic", "grid"], help="superpixels, or squares (with --region-size 1: pixels)")
    g.add_argument("--region-size", type=common.whole(1), metavar="PIXELS", help="mean side of a region; smaller gives more "
                   "targets per image, 20 or 10 in the paper")
    g.add_argument("--ruler", type=float, help="how compact superpixels are; larger is more like a grid")
    g.add_argument("--mask", type=float, metavar="SHARE", help="largest side of the noise rectangle over that of the view; 0 "
                   "switches it off")
    g.add_argument("--colour", type=float, metavar="STRENGTH", help="of the colour distortion; 1 as in the paper, less where "
                   "colour tells classes apart")
    g.add_argument("--blur", type=float, metavar="P", help="share of views that are blurred; lower it for tiny views, where "
                   "blurring removes all texture")
    g.add_argument("--code-dim", type=common.whole(1), help="embedding width D; 128 in the paper, 32 costs it 1.5 mIoU")
    g.add_argument("--prototypes", type=common.whole(2), help="K: about the number of classes on low resolution, 128 on high")
    g.add_argument("--queue", type=common.whole(1), help="past regions that join the assignment; more than a few batches' "
                   "worth gets stale")
    g.add_argument("--queue-start", type=common.whole(0), metavar="STEP", help="step from which the queue is used")
    g.add_argument("--freeze", type=common.whole(0), metavar="STEPS", help="steps in which the prototypes stay as they are")
    g.add_argument("--warmup", type=float, metavar="SHARE", help="share of the steps with rising learning rate")
    g.add_argument("--weight-decay", type=float, help="of LARS")
    g.add_argument("--eval-size", type=common.whole(16), metavar="PIXELS", help="shorter side of the images at scoring")
    g.add_argument("--filters", type=common.whole(1), help="L, width of the linear model: 27, 45, 128, 256 in the paper")
    g.add_argument("--probe-images", type=common.whole(1), help="training images the probes are fitted on")
    g.add_argument("--probe-pixels", type=common.whole(1), help="random pixels of each of them")
    g.add_argument("--probe-steps", type=common.whole(1), help="SGD steps of the linear model; 12,000 in the paper")
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
