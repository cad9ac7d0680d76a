"""Fully connected CRF in plain PyTorch: sharpens a segmentation along the edges of its photo.

    python crf.py PHOTO --out crf.png             before and after, with a legend
    python crf.py --bench                         table of times; --device cuda --batch 16 on a GPU

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011. Every pixel
is linked to every other one, by two Gaussian kernels: one over positions, one over positions and colours. Mean field:

    Q = softmax(log p);   repeat:  Q = softmax(log p - sum over kernels of mu K Q),   (K Q)_i = sum_j k(f_i, f_j) Q_j

K Q costs n^2 as written. The permutohedral lattice (Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the
Permutohedral Lattice", 2010) makes it linear: in feature space (d = 2 or 5) lay a grid of equal simplices as wide as
the Gaussian; SPLAT each pixel onto the d+1 corners of its simplex, with barycentric weights; BLUR the corners with
[1/2 1 1/2] along each of the d+1 directions of the lattice; SLICE: read each pixel back with the weights of the splat.

The lattice is the set Z^d in the right coordinates. There the simplex of a point y is found by sorting y - floor(y)
downwards: walk from floor(y) one step along the axis with the largest fraction, then along the next one, ... to
floor(y) + 1; the d+1 points of that walk are the corners, the drops between the sorted fractions their weights. The
directions of the blur are the d axes and (-1, ..., -1). A corner is one integer (its coordinates in mixed radix), so
a step in a direction adds a constant: sorting groups the pixels of a corner, a binary search finds its neighbours.
"""
import argparse
import functools
import json
import math
import sys
import time

import torch
import torch.nn.functional as F


class Lattice:
    """Gaussian filter of unit deviation over features, by the permutohedral lattice: x (n,C) -> (n,C).

    features (d,n), each within [0, highest[j]]; image (n,) numbers the images of a batch, which do not mix.
    """

    def __init__(self, features, highest, image, images):
        d, n = features.shape
        # The original's float32 arithmetic, in its order: another one moves pixels that lie on a border between simplices
        above, elevated = torch.zeros_like(features[0]), [None] * (d + 1)
        for j in range(d, 0, -1):
            scaled = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
            elevated[j] = above - j * scaled
            above = above + scaled
        elevated = torch.stack([above] + elevated[1:])                         # (d+1,n); y_j = (e_j - e_d) / (d+1)
        whole = (elevated / (d + 1)).round()
        rest = elevated - whole * (d + 1)
        below = rest[:d] < rest[d]
        floor = (whole[:d] - whole[d]).long() - below.long()                   # of y (d,n)
        fraction, axis = ((rest[:d] - rest[d]) / (d + 1) + below).sort(dim=0, descending=True, stable=True)

        # key: z_j = y_j - y_(j+1) in mixed radix, since z_j depends on two features alone and stays small, and since
        # the corners of one part of the image then lie next to each other in memory. 3: corner, neighbour, rounding
        low = [-math.ceil(math.sqrt(2 / 3 * j / (j + 1)) * highest[j - 1]) - 3 for j in range(d)]
        high = [math.ceil(math.sqrt(2 / 3 * (j + 2) / (j + 1)) * highest[j]) + 3 for j in range(d)]
        radix = [math.prod(high[k] - low[k] + 1 for k in range(j + 1, d)) for j in range(-1, d)]
        if images * radix[0] >= 2 ** 63 or n * (d + 1) >= 2 ** 31:
            raise ValueError(f"a lattice over {n} pixels with coordinates up to {max(highest):.0f} deviations is too "
                             "large: use larger deviations (sxy, srgb) or fewer images in a batch")
        steps = [radix[1]] + [radix[j + 1] - radix[j] for j in range(1, d)]    # what one step along y_j adds to a key
        step = torch.tensor(steps, device=floor.device)

        weight = F.pad(fraction, (0, 0, 1, 0), value=1.0)
        weight[:-1] -= fraction                                                # (d+1,n)
        first = (floor * step[:, None]).sum(0) + image * radix[0] - sum(l * r for l, r in zip(low, radix[1:]))
        key, entry = torch.cat([first[None], step[axis]]).cumsum(0).flatten().sort()
        new = F.pad(key[1:] != key[:-1], (1, 0), value=True)
        start = new.nonzero()[:, 0]                                            # (M,) first entry of each corner
        corner, key, self.corners = new.cumsum(0) - 1, key[start], len(start)

        # three sparse matrices as bags of rows; the last row, number M, stays zero: it stands for absent neighbours
        self.pixel, self.start = (entry % n).int(), F.pad(start, (0, 1), value=len(entry)).int()
        self.splat_weight = weight.flatten()[entry]
        self.corner = torch.empty_like(entry).scatter_(0, entry, corner).view(d + 1, n).T.int().contiguous()
        self.slice_weight = weight.T / (1 + 2 ** -d)                           # undoes the gain of the blur
        self.neighbors = [self.find(key, by) for by in steps + [-sum(steps)]]
        self.blur_weight = weight.new_tensor([1, 0.5, 0.5]).expand(len(start) + 1, 3).contiguous()

    def find(self, key, by):
        """Sorted keys (M,) -> (M+1,3): each corner, its neighbours one step up and one step down; M where absent."""
        absent = len(key)
        place = torch.searchsorted(key, key + by).clamp(max=absent - 1)
        above = F.pad(torch.where(key[place] == key + by, place, absent), (0, 1), value=absent)
        below = torch.full_like(above, absent)
        below[above] = torch.arange(absent + 1, device=key.device)
        below[absent] = absent
        return torch.stack([torch.arange(absent + 1, device=key.device), above, below], 1).int()

    def scale(self, norm):
        """Multiply pixels (n,) by norm before and after filtering."""
        self.splat_weight = self.splat_weight * norm[self.pixel.long()]
        self.slice_weight = self.slice_weight * norm[:, None]

    def __call__(self, x):
        bag = functools.partial(F.embedding_bag, mode="sum")                   # much faster than sparse CSR products
        x = bag(self.pixel, x, self.start, per_sample_weights=self.splat_weight)              # splat (M+1,C)
        for neighbors in self.neighbors:
            x = bag(neighbors, x, per_sample_weights=self.blur_weight)                        # blur  (M+1,C)
        return bag(self.corner, x, per_sample_weights=self.slice_weight)                      # slice (n,C)


class Exact:
    """The same filter by brute force, in chunks: the reference for small images."""

    def __init__(self, features, highest, image, images):
        self.features, self.norm = features.T.reshape(images, -1, len(features)), 1

    def scale(self, norm):
        self.norm = norm[:, None]

    def __call__(self, x):
        rows = (x * self.norm).view(*self.features.shape[:2], -1)
        chunk = max(1, 2 ** 25 // max(1, rows.shape[0] * rows.shape[1]))
        # the default of cdist multiplies matrices and loses the small distances between large coordinates
        near = functools.partial(torch.cdist, x2=self.features, compute_mode="donot_use_mm_for_euclid_dist")
        out = [(near(part).square() / -2).exp() @ rows for part in self.features.split(chunk, 1)]
        return torch.cat(out, 1).view(len(x), -1) * self.norm


def kernel(image, sxy, srgb, normalization, exact, shape, device):
    """The filter of one kernel; image (B,3,H,W), or None for positions alone."""
    B, H, W = shape
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    features, highest = [(x / sxy).expand(B, H, W), (y / sxy).expand(B, H, W)], [(W - 1) / sxy, (H - 1) / sxy]
    if image is not None:                   # B G R as the original code is called: the order changes the lattice a bit
        features, highest = features + [image[:, c] / srgb for c in (2, 1, 0)], highest + [255 / srgb] * 3
    number = torch.arange(B, device=device).repeat_interleave(H * W)
    filter = (Exact if exact else Lattice)(torch.stack(features).view(len(features), -1), highest, number, B)
    if normalization == "symmetric":
        filter.scale((filter(torch.ones(B * H * W, 1, device=device))[:, 0] + 1e-20).rsqrt())
    return filter


spatial_kernel = functools.lru_cache(maxsize=1)(functools.partial(kernel, None))       # the same for images of one size


@torch.no_grad()
def dense_crf(image, log_probs, iterations=10, gaussian_sxy=1, gaussian_compat=3, bilateral_sxy=67, bilateral_srgb=3,
              bilateral_compat=4, normalization="symmetric", exact=False):
    """Mean field of the fully connected CRF: image uint8 (3,H,W) or (B,3,H,W) RGB, log_probs (C,H,W) or (B,C,H,W)
    -> Q, float32, the shape of log_probs; Q.argmax(-3) is the segmentation.

    log_probs: any logits, they are normalised here (-inf = probability zero); clipped to probabilities >= 1e-5.
    gaussian_sxy, bilateral_sxy: deviations in pixels. bilateral_srgb: deviation in colour levels of 0..255.
    *_compat: weight of the kernel, a number w (Potts: different labels cost w; 0 leaves the kernel out) or a matrix
      mu (C,C), the cost of label a near label b, made symmetric as pydensecrf does; w is the same as w * (1 - eye(C)).
    normalization: "symmetric" divides the kernel by the root of its sum at both pixels, "none" does not.
    exact: brute force instead of the lattice, n^2 time.
    The defaults are those of STEGO, HP and CAUSE. A batch gives what its images give alone. No gradients.
    ValueError: sizes that differ, a type or value that cannot be (NaN, +inf, a pixel of -inf, deviations <= 0).
    """
    if image.dtype != torch.uint8:
        raise ValueError(f"image must be uint8 RGB, 0..255, not {image.dtype}: undo the normalisation of the network")
    if log_probs.ndim not in (3, 4) or image.ndim != log_probs.ndim or image.shape[-3] != 3 or \
            image.shape[:-3] + image.shape[-2:] != log_probs.shape[:-3] + log_probs.shape[-2:]:
        raise ValueError(f"image {tuple(image.shape)} and log_probs {tuple(log_probs.shape)} do not fit: expected "
                         "(3,H,W) and (C,H,W), or (B,3,H,W) and (B,C,H,W), of one size")
    if not log_probs.is_floating_point() or log_probs.shape[-3] == 0:
        raise ValueError(f"log_probs {tuple(log_probs.shape)} {log_probs.dtype} must be floats of at least one class")
    if normalization not in ("symmetric", "none"):
        raise ValueError(f"normalization {normalization!r} is neither 'symmetric' nor 'none'")
    if not (iterations >= 0 and min(gaussian_sxy, bilateral_sxy, bilateral_srgb) > 0):
        raise ValueError("iterations must be >= 0, and gaussian_sxy, bilateral_sxy and bilateral_srgb > 0")
    if image.ndim == 3:
        return dense_crf(image[None], log_probs[None], iterations, gaussian_sxy, gaussian_compat, bilateral_sxy,
                         bilateral_srgb, bilateral_compat, normalization, exact)[0]
    B, C, H, W = log_probs.shape
    if log_probs.numel() == 0:
        return torch.empty_like(log_probs, dtype=torch.float32)
    image = image.to(log_probs.device)
    log_p = log_probs.permute(0, 2, 3, 1).reshape(-1, C).float().softmax(1)            # (n,C): a row is a pixel
    if not log_p.isfinite().all():
        raise ValueError("log_probs has NaN, +inf or a pixel whose classes are all -inf")
    log_p = log_p.clamp_(1e-5, 1).log_()

    kernels, options = [], (normalization, exact, (B, H, W), log_p.device)
    for compat, build in ((gaussian_compat, lambda: spatial_kernel(gaussian_sxy, None, *options)),
                          (bilateral_compat, lambda: kernel(image, bilateral_sxy, bilateral_srgb, *options))):
        compat = torch.as_tensor(compat, dtype=torch.float32)
        if compat.shape not in ((), (C, C)) or not compat.isfinite().all():
            raise ValueError(f"a compat of shape {tuple(compat.shape)} is neither a number nor a matrix ({C},{C})")
        if compat.any():
            kernels.append((build(), compat.item() if compat.ndim == 0 else (compat + compat.T).to(image.device) / -2))

    Q = log_p.softmax(1)
    for _ in range(iterations):
        logits = log_p.clone()
        for filter, compat in kernels:      # for a number w: mu = w (1 - eye), whose w cancels in the softmax
            logits.add_(filter(Q), alpha=compat) if isinstance(compat, float) else logits.addmm_(filter(Q), compat)
        Q = torch.softmax(logits, 1, out=Q)
    return Q.view(B, H, W, C).permute(0, 3, 1, 2).contiguous()
