"""Fully connected CRF in plain PyTorch: sharpens a segmentation along the edges of its photo.

    python crf.py PHOTO --out crf.png      before and after
    python crf.py --bench                  seconds; on a GPU: --device cuda --batch 16

Every pixel is linked to all others by two Gaussian kernels k(f_i, f_j), over positions and over
positions with colours (Krähenbühl, Koltun, arXiv 1210.5644). Mean field, algorithm 1: from
Q = softmax(log p) repeat Q = softmax(log p - sum of (K Q) mu over the kernels), with
(K Q)_i = sum_j k(f_i, f_j) Q_j. That costs the square of the pixels; the permutohedral lattice
makes it linear (Adams, Baek, Davis, 2010). Cut the space of the d = 2 or 5 features into equal
simplices about as wide as the Gaussian. SPLAT each pixel onto the d+1 corners of its simplex with
barycentric weights; BLUR the corners with [1/2 1 1/2] along the d+1 directions of the lattice, one
after the other; SLICE: read each pixel back with the weights of the splat.

In the right coordinates y the lattice is Z^d, and sorting y - floor(y) downwards finds the simplex:
walk from floor(y) one step along the axis of the largest fraction, then of the next, up to
floor(y) + 1. The d+1 points passed are the corners; the drops from 1 through the sorted fractions
to 0 are their weights. Directions are the d axes and (-1, ..., -1). A corner is one integer, its
coordinates in mixed radix, so a step adds a constant: sorting brings the pixels of a corner
together, binary search finds its neighbours.

The labels are pydensecrf's (100 % on two photos, Q within 6e-6); both give 98.8 % of those of exact
Gaussians. On one thread of an AMD EPYC (torch 2.15) a 320x320 photo takes 0.30 s with 5 classes and
0.50 with 27 (pydensecrf 0.34, 0.93), 1024x2048 with 27 takes 26 s and 3.0 GB, white noise 6.3 GB.
On a CPU give one image at a time (in a batch of 8 each takes twice as long); no GPU was measured.
"""
import itertools
import json
import math
import os
import timeit
from argparse import ArgumentParser, RawTextHelpFormatter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torchvision.transforms.functional import pil_to_tensor

bags = partial(F.embedding_bag, mode="sum")  # sums of weighted rows, faster than sparse products


class Lattice:
    """Gaussian filter of deviation 1: x (pixels,C) -> (pixels,C). features (d,pixels) lie within
    [0, highest[j]]; image (pixels,) numbers the images. symmetric: k(i,j) is divided by the roots
    of its sums over i and over j."""

    def __init__(self, features, highest, image, images, symmetric):
        d, pixels = features.shape
        # Elevation to d+1 coordinates e that sum to 0; y_j = (e_j - e_d) / (d+1). Float32 in the
        # order of the original: rounded otherwise, pixels on a border create other corners.
        elevated, above = [None] * (d + 1), torch.zeros_like(features[0])
        for j in range(d, 0, -1):
            scaled = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
            elevated[j], above = above - j * scaled, above + scaled
        elevated = torch.stack([above] + elevated[1:])
        whole = (elevated / (d + 1)).round()
        rest = elevated - whole * (d + 1)
        under = rest[:d] < rest[d]
        fraction = (rest[:d] - rest[d]) / (d + 1) + under
        fraction, axis = fraction.sort(dim=0, descending=True, stable=True)
        weight = F.pad(fraction, (0, 0, 1, 0), value=1.0)
        weight[:-1] -= fraction  # (d+1,pixels)
        # The key packs y_j - y_(j+1): these depend on two features only, so they are small, and the
        # corners of a part of the image lie together. 7 = 2 * 3 + 1: corner, neighbour, rounding.
        values = [math.ceil(math.sqrt(2 / 3 * j / (j + 1)) * highest[j - 1]) + 7
                  + math.ceil(math.sqrt(2 / 3 * (j + 2) / (j + 1)) * highest[j]) for j in range(d)]
        radix = [math.prod(values[j:]) for j in range(d + 1)]
        if images * radix[0] >= 2 ** 63 or pixels * (d + 1) >= 2 ** 31:
            raise ValueError(f"{pixels} pixels are too many: enlarge sxy, srgb or split the batch")
        step = torch.tensor([0] + radix[1:], device=image.device).diff()  # of the key along y_j
        floor = (whole[:d] - whole[d]).long() - under.long()
        first = image * radix[0] + (floor * step[:, None]).sum(0)
        key, entry = torch.cat([first[None], step[axis]]).cumsum(0).flatten().sort()
        key, corner, count = key.unique_consecutive(return_inverse=True, return_counts=True)
        corners = len(key)  # beside them a last row, zero, that stands for absent neighbours
        self.pixel = (entry % pixels).int()
        self.start = F.pad(count.cumsum(0), (1, 0)).int()
        corner = torch.empty_like(entry).scatter_(0, entry, corner)
        self.corner = corner.view(d + 1, pixels).T.int().contiguous()
        self.splat_weight = weight.flatten()[entry]
        self.blur_weight = F.pad(weight.new_full((corners + 1, 2), 0.5), (1, 0), value=1.0)
        self.slice_weight = (weight.T / (1 + 2 ** -d)).contiguous()  # undoes the blur's gain
        self.neighbors, here = [], torch.arange(corners + 1, device=image.device)
        for by in [*step, -1]:  # -1 = -sum(step)
            place = torch.searchsorted(key, key + by).clamp(max=corners - 1)
            up = F.pad(torch.where(key[place] == key + by, place, corners), (0, 1), value=corners)
            down = torch.full_like(up, corners)
            down.scatter_(0, up, torch.where(up < corners, here, corners))
            self.neighbors.append(torch.stack([here, up, down], 1).int())
        if symmetric:
            norm = (self(torch.ones_like(weight[0, :, None])) + 1e-20).rsqrt()  # (pixels,1)
            self.splat_weight *= norm[entry % pixels, 0]
            self.slice_weight *= norm

    def __call__(self, x):
        x = bags(self.pixel, x, self.start, per_sample_weights=self.splat_weight)  # (corners+1,C)
        for neighbors in self.neighbors:
            x = bags(neighbors, x, per_sample_weights=self.blur_weight)
        return bags(self.corner, x, per_sample_weights=self.slice_weight)


def exact_filter(features, highest, image, images, symmetric):
    """What Lattice approximates, by brute force: the reference for small images."""
    points = torch.cat([features, 100.0 * image[None]]).T  # exp(-100^2 / 2) = 0 between images
    kernel = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    kernel = kernel.square_().div_(-2).exp_()  # (pixels,pixels)
    norm = (kernel.sum(1, keepdim=True) + 1e-20).rsqrt() if symmetric else 1
    return lambda x: kernel @ (x * norm) * norm


@torch.no_grad()
def dense_crf(image, log_probs, iterations=10, gaussian_sxy=1, gaussian_compat=3, bilateral_sxy=67,
              bilateral_srgb=3, bilateral_compat=4, normalization="symmetric", exact=False):
    """image uint8 (3,H,W) or (B,3,H,W) RGB, log_probs (C,H,W) or (B,C,H,W) -> Q float32, shaped so.

    log_probs: any logits, normalised here; -inf is probability 0; then clipped to probabilities
    >= 1e-5. *_sxy, *_srgb: deviations in pixels and colour levels 0..255, as in STEGO, HP, CAUSE.
    *_compat: cost of different labels, a number w (0: no such kernel), which is w * (1 - eye(C)),
    or mu (C,C), made symmetric as by pydensecrf. normalization: "symmetric" or "none". exact: by
    brute force. Raises ValueError on sizes, types and values that cannot be."""
    if not torch.is_tensor(image) or image.dtype != torch.uint8 or image.shape[-3:-2] != (3,):
        raise ValueError("image must be a uint8 RGB tensor (3,H,W) or (B,3,H,W), not normalised")
    if not (torch.is_tensor(log_probs) and log_probs.is_floating_point()
            and log_probs.ndim in (3, 4) and log_probs.shape[-3] > 0
            and log_probs[..., 0, :, :].shape == image[..., 0, :, :].shape):
        raise ValueError(f"log_probs must be floats (C,H,W) or (B,C,H,W), as {tuple(image.shape)}")
    if not (iterations >= 0 < min(gaussian_sxy, bilateral_sxy, bilateral_srgb)
            and normalization in ("symmetric", "none")):
        raise ValueError("iterations >= 0, sxy and srgb > 0, normalization 'symmetric' or 'none'")
    if log_probs.numel() == 0:
        return log_probs.float()
    C, H, W = log_probs.shape[-3:]
    photo = image.to(log_probs.device).view(-1, 3, H, W)
    log_p = log_probs.movedim(-3, -1).reshape(-1, C).float()
    log_p = log_p.softmax(1).clamp_(1e-5, 1).log_()  # (pixels,C)
    if not log_p.isfinite().all():
        raise ValueError("log_probs hold NaN, +inf or a pixel of nothing but -inf")
    number, y, x = torch.ones_like(photo[:, 0]).nonzero().T  # (pixels,) each
    colours = photo[:, [2, 1, 0]].transpose(0, 1).flatten(1)  # BGR as in STEGO: moves the lattice
    build, kernels = exact_filter if exact else Lattice, []
    for compat, sxy, rest in ((gaussian_compat, gaussian_sxy, []),
                              (bilateral_compat, bilateral_sxy, [*(colours / bilateral_srgb)])):
        mu = torch.as_tensor(compat, dtype=torch.float32)
        if mu.shape not in ((), (C, C)) or not mu.isfinite().all():
            raise ValueError(f"compat must be a finite number or a ({C},{C}) matrix of such")
        if mu.any():
            features = torch.stack([x / sxy, y / sxy] + rest)
            highest = [W / sxy, H / sxy] + [255 / bilateral_srgb] * 3
            filter = build(features, highest, number, len(photo), normalization == "symmetric")
            kernels.append((filter, (mu + mu.T).to(photo.device) / -2 if mu.ndim else mu.item()))
    Q = log_p.softmax(1)
    for _ in range(iterations):
        logits = log_p.clone()
        for filter, mu in kernels:  # w (1 - eye): w is the same for all classes, -w eye counts
            if isinstance(mu, float):
                logits.add_(filter(Q), alpha=mu)
            else:
                logits.addmm_(filter(Q), mu)
        torch.softmax(logits, 1, out=Q)
    return Q.view(-1, H, W, C).movedim(3, 1).reshape(log_probs.shape)


def read(path):
    """Image file -> uint8 (3,H,W) of at most 1024 pixels. ValueError for a bad one."""
    try:  # what Pillow raises varies; EPS would start Ghostscript
        photo = ImageOps.exif_transpose(Image.open(path, formats="JPEG PNG TIFF WEBP PPM".split()))
        if photo.mode[0] in "IF":
            raise ValueError("its pixels have more than 8 bits")
        photo = photo.convert("RGB")
    except Exception as error:
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from None
    photo.thumbnail((1024, 1024))
    return pil_to_tensor(photo)


def before_and_after(photo):
    """A photo, its 8x8 patches labelled by colour, coarse as a ViT, and these after the CRF."""
    H, W = photo.shape[1:]
    patches = F.avg_pool2d(photo[None].float(), 8, ceil_mode=True)
    points = patches[0].flatten(1).T  # (N,3)
    centres = points[points.sum(1).argsort()[torch.linspace(0, len(points) - 1, 6).long()]]
    logits = torch.cdist(points, centres).square().T.view(1, 6, *patches.shape[2:]) / -800
    logits = F.interpolate(logits, (H, W), mode="bilinear")[0]
    colours = torch.tensor([ImageColor.getrgb(f"hsv({60 * k},60%,90%)") for k in range(6)])
    maps = [colours[x.argmax(0)] for x in (logits, dense_crf(photo, logits))]  # (H,W,3)
    whole = Image.fromarray(torch.cat([photo.permute(1, 2, 0), *maps], 1).byte().numpy())
    for k, title in enumerate(("photo", "before", "after")):  # in white
        ImageDraw.Draw(whole).text((4 + k * W, H - 15), title, stroke_width=1, stroke_fill=0)
    return whole


def bench(photo, batch, device):
    """Print seconds, best of 3, for a photo (1,3,H,W) in three sizes, with 5 and 27 classes."""
    for size, C in itertools.product((160, 320, 512), (5, 27)):
        image = F.interpolate(photo, (size, size), mode="bicubic").clamp(0, 255).byte()
        image = image.repeat(batch, 1, 1, 1).to(device)
        logits = torch.randn(batch, C, 40, 40, device=device)
        logits = F.interpolate(logits, (size, size), mode="bilinear")
        run = lambda n: dense_crf(image, logits, n).sum().item()  # item() waits for a GPU
        build, total = (min(timeit.repeat(lambda: run(n), number=1, repeat=3)) for n in (0, 10))
        print(json.dumps(dict(size=size, classes=C, build=build, iteration=(total - build) / 10,
                              total=total, images_per_second=batch / total)), flush=True)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("photo", nargs="?", help="an image file; larger ones are shrunk to 1024 pixels")
    add("--out", type=Path, default="crf.png", help="the picture that is written")
    add("--bench", action="store_true", help="seconds as JSON, for PHOTO or soft noise")
    add("--device", default="cpu", help="of --bench, for example cuda")
    add("--batch", type=int, default=1, help="images per call of --bench")
    args = parser.parse_args()
    try:
        photo = read(args.photo) if args.photo else torch.randint(256, (3, 4, 4))
        if args.bench:
            bench(photo[None].float(), args.batch, args.device)
        elif args.photo:
            part = args.out.with_name(os.urandom(8).hex() + args.out.suffix)
            before_and_after(photo).save(part)
            os.replace(part, args.out)  # a link is replaced, not followed
            print(f"wrote {args.out}: photo, before, after", flush=True)
        else:
            parser.error("give a PHOTO, or --bench")
    except (BrokenPipeError, KeyboardInterrupt):  # the reader has left, `| head -1`, or Ctrl-C
        os._exit(130)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
