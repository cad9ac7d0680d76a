"""Fully connected CRF in plain PyTorch: sharpens a segmentation along the edges of its photo.

    python crf.py PHOTO --out crf.png      before and after, with a legend
    python crf.py --bench                  table of times; on a GPU: --device cuda --batch 16

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011. Each
pixel is linked to every other one by two Gaussian kernels k(f_i, f_j), one over positions, one over positions
and colours. Mean field (algorithm 1):  Q = softmax(log p), then repeat Q = softmax(log p - sum of (K Q) mu over
the kernels), (K Q)_i = sum_j k(f_i, f_j) Q_j. This costs n^2; the permutohedral lattice makes it linear (Adams,
Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010). Cut the d-dimensional
space of features, d = 2 or 5, into equal simplices about as wide as the Gaussian. SPLAT each pixel onto the d+1
corners of its simplex with barycentric weights; BLUR the corners with [1/2 1 1/2] along the d+1 directions of
the lattice, one after the other; SLICE: read each pixel back from its corners with the weights of the splat.

In the right coordinates y the lattice is Z^d, and sorting y - floor(y) downwards finds the simplex: walk from
floor(y) one step along the axis of the largest fraction, then of the next, up to floor(y) + 1. The d+1 points of
the walk are the corners; the drops from 1 through the sorted fractions to 0 are their weights. The directions
are the d axes and (-1, ..., -1). A corner is kept as one integer, its coordinates in mixed radix, so that a step
adds a constant: sorting brings the pixels of a corner together, and binary search finds its neighbours.
"""
import argparse
import colorsys
import functools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps


class Lattice:
    """Gaussian filter of deviation 1: x (n,C) -> (n,C). Features (d,n) are within [0, highest[j]]; image (n,) is
    the number, below images, of the image that a pixel belongs to: images do not mix."""

    def __init__(self, features, highest, image, images):
        d, n = features.shape
        # Elevation to d+1 coordinates e that sum to 0; y_j = (e_j - e_d) / (d+1). Float32 in the order of the
        # original: other roundings move pixels on the border of two simplices, which creates other corners.
        elevated, above = [None] * (d + 1), torch.zeros_like(features[0])
        for j in range(d, 0, -1):
            scaled = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
            elevated[j], above = above - j * scaled, above + scaled
        elevated = torch.stack([above] + elevated[1:])
        whole = (elevated / (d + 1)).round()
        rest = elevated - whole * (d + 1)
        under = rest[:d] < rest[d]
        floor = (whole[:d] - whole[d]).long() - under.long()                               # of y (d,n)
        fraction, axis = ((rest[:d] - rest[d]) / (d + 1) + under).sort(dim=0, descending=True, stable=True)
        weight = F.pad(fraction, (0, 0, 1, 0), value=1.0)
        weight[:-1] -= fraction                                                            # (d+1,n)

        # The key packs z_j = y_j - y_(j+1): each depends on two features only, which keeps it small and places
        # the corners of a part of the image together in memory. 3: room for corner, neighbour and rounding.
        low = [-math.ceil(math.sqrt(2 / 3 * j / (j + 1)) * highest[j - 1]) - 3 for j in range(d)]
        high = [math.ceil(math.sqrt(2 / 3 * (j + 2) / (j + 1)) * highest[j]) + 3 for j in range(d)]
        radix = [math.prod(high[k] - low[k] + 1 for k in range(j, d)) for j in range(d + 1)]
        require(images * radix[0] < 2 ** 63 and n * (d + 1) < 2 ** 31, f"{n} pixels, {max(highest):.0f} deviations "
                "wide, are too many for the lattice: use a larger sxy and srgb or a smaller batch")
        steps = [radix[1]] + [radix[j + 1] - radix[j] for j in range(1, d)]                # of key along y_j
        step = torch.tensor(steps, device=image.device)
        first = (floor * step[:, None]).sum(0) + image * radix[0] - sum(l * r for l, r in zip(low, radix[1:]))
        key, entry = torch.cat([first[None], step[axis]]).cumsum(0).flatten().sort()
        new = F.pad(key[1:] != key[:-1], (1, 0), value=True)
        start, corner = new.nonzero()[:, 0], new.cumsum(0) - 1
        key, M = key[start], len(start)                                                    # M corners

        # The steps are sums over bags of rows. Row M stays zero and stands for neighbours that are absent.
        self.pixel, self.start = (entry % n).int(), F.pad(start, (0, 1), value=len(entry)).int()
        self.splat_weight = weight.flatten()[entry]
        self.corner = torch.empty_like(entry).scatter_(0, entry, corner).view(d + 1, n).T.int().contiguous()
        self.slice_weight = (weight.T / (1 + 2 ** -d)).contiguous()                        # undoes the blur's gain
        self.blur_weight = weight.new_tensor([1, 0.5, 0.5]).expand(M + 1, 3).contiguous()
        self.neighbors, here = [], torch.arange(M + 1, device=image.device)
        for by in steps + [-1]:                                                            # -1 = -sum(steps)
            place = torch.searchsorted(key, key + by).clamp(max=M - 1)
            up = F.pad(torch.where(key[place] == key + by, place, M), (0, 1), value=M)
            down = torch.full_like(up, M)
            down[up] = here
            down[M] = M
            self.neighbors.append(torch.stack([here, up, down], 1).int())

    def scale(self, norm):
        """From now on, pixels are multiplied by norm (n,) before and after the filter."""
        self.splat_weight = self.splat_weight * norm[self.pixel]
        self.slice_weight = self.slice_weight * norm[:, None]

    def __call__(self, x):
        bags = functools.partial(F.embedding_bag, mode="sum")                              # faster than CSR products
        x = bags(self.pixel, x, self.start, per_sample_weights=self.splat_weight)          # (M+1,C)
        for neighbors in self.neighbors:
            x = bags(neighbors, x, per_sample_weights=self.blur_weight)
        return bags(self.corner, x, per_sample_weights=self.slice_weight)                  # (n,C)


class Exact:
    """The same filter by brute force in chunks: the reference for small images."""

    def __init__(self, features, highest, image, images):
        self.points, self.norm = torch.cat([features, 100.0 * image[None]]).T, 1           # exp(-100^2 / 2) = 0

    def scale(self, norm):
        self.norm = norm[:, None]

    def __call__(self, x):
        near = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # a product is inexact
        chunks = self.points.split(2 ** 20 // len(x) + 1)
        return torch.cat([near(c, self.points).square_().div_(-2).exp_() @ (x * self.norm) for c in chunks]) * self.norm


def kernel(image, sxy, srgb, normalization, exact, shape, device):
    """The filter of one kernel; image (B,3,H,W), or None for positions alone."""
    B, H, W = shape
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    features, highest = [(x / sxy).expand(shape), (y / sxy).expand(shape)], [(W - 1) / sxy, (H - 1) / sxy]
    if image is not None:      # B, G, R, as the published code feeds pydensecrf: the order changes the lattice
        features, highest = features + [image[:, c] / srgb for c in (2, 1, 0)], highest + [255 / srgb] * 3
    number = torch.arange(B, device=device).repeat_interleave(H * W)
    filter = (Exact if exact else Lattice)(torch.stack(features).flatten(1), highest, number, B)
    if normalization == "symmetric":
        filter.scale((filter(torch.ones(B * H * W, 1, device=device))[:, 0] + 1e-20).rsqrt())
    return filter


spatial_kernel = functools.lru_cache(1)(functools.partial(kernel, None))                   # same for each image


def require(condition, message):
    if not condition:
        raise ValueError(message)


@torch.no_grad()
def dense_crf(image, log_probs, iterations=10, gaussian_sxy=1, gaussian_compat=3, bilateral_sxy=67,
              bilateral_srgb=3, bilateral_compat=4, normalization="symmetric", exact=False):
    """image uint8 (3,H,W) or (B,3,H,W) RGB, log_probs (C,H,W) or (B,C,H,W) -> Q float32, shaped as log_probs.

    log_probs: any logits, normalised here; -inf is probability 0; then clipped to probabilities >= 1e-5.
    *_sxy, *_srgb: deviations in pixels and colour levels 0..255. Defaults: those of STEGO, HP and CAUSE.
    *_compat: cost of different labels, a number (0: no such kernel) or mu (C,C), which is made symmetric as in
      pydensecrf; w is the same as w * (1 - eye(C)).
    normalization: "symmetric" (k(i,j) over the roots of its sums over i and j) or "none".
    exact: brute force, n^2 time, instead of the lattice. A batch gives what its images give alone.
    Raises ValueError on sizes, types and values that cannot be (NaN, +inf, a pixel of nothing but -inf).
    """
    require(torch.is_tensor(image) and image.dtype == torch.uint8 and image.ndim in (3, 4) and image.shape[-3] == 3,
            "image must be a uint8 RGB tensor (3,H,W) or (B,3,H,W), not normalised")
    require(torch.is_tensor(log_probs) and log_probs.is_floating_point() and log_probs.ndim == image.ndim and
            log_probs.shape[-3] > 0 and log_probs[..., 0, :, :].shape == image[..., 0, :, :].shape,
            f"log_probs must be floats (C,H,W) or (B,C,H,W), C > 0, else shaped as image {tuple(image.shape)}")
    require(normalization in ("symmetric", "none"), f"normalization {normalization!r}: symmetric or none")
    require(iterations >= 0 and min(gaussian_sxy, bilateral_sxy, bilateral_srgb) > 0,
            "iterations must be >= 0 and deviations (sxy, srgb) > 0")
    if log_probs.numel() == 0:
        return log_probs.float()
    (C, H, W), device = log_probs.shape[-3:], log_probs.device
    image = image.to(device).view(-1, 3, H, W)
    Q = log_probs.movedim(-3, -1).reshape(-1, C).float().softmax(1)                        # (n,C)
    require(Q.isfinite().all(), "log_probs hold NaN, +inf or a pixel of nothing but -inf")
    log_p, options, kernels = Q.clamp_(1e-5, 1).log_(), (normalization, exact, (len(image), H, W), device), []
    for build, sxy, srgb, compat in ((spatial_kernel, gaussian_sxy, None, gaussian_compat),
                                     (functools.partial(kernel, image), bilateral_sxy, bilateral_srgb, bilateral_compat)):
        mu = torch.as_tensor(compat, dtype=torch.float32)
        require(mu.shape in ((), (C, C)) and mu.isfinite().all(), f"compat must be a number or a ({C},{C}) matrix")
        if mu.any():
            kernels.append((build(sxy, srgb, *options), (mu + mu.T).to(device) / 2 if mu.ndim else mu.item()))
    Q = log_p.softmax(1)
    for _ in range(iterations):
        logits = log_p.clone()
        for filter, mu in kernels:      # w (1 - eye): w adds the same to each class, only -w eye is left
            logits.add_(filter(Q), alpha=mu) if isinstance(mu, float) else logits.addmm_(filter(Q), mu, alpha=-1)
        Q = torch.softmax(logits, 1, out=Q)
    return Q.view(-1, H, W, C).movedim(3, 1).reshape(log_probs.shape)
