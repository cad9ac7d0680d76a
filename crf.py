"""Fully connected CRF in plain PyTorch: sharpens a segmentation along the edges of its photo.

    python crf.py PHOTO --out crf.png      before and after, with a legend
    python crf.py --bench                  table of times; on a GPU: --device cuda --batch 16

Krähenbühl, Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011: every
pixel is linked to all others by two Gaussian kernels k(f_i, f_j), over positions and over positions with
colours. Mean field (algorithm 1): Q = softmax(log p), then repeat Q = softmax(log p - sum of (K Q) mu over
the kernels), with (K Q)_i = sum_j k(f_i, f_j) Q_j. That costs n^2; the permutohedral lattice makes it linear
(Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010). Cut the space
of the d = 2 or 5 features into equal simplices about as wide as the Gaussian. SPLAT each pixel onto the d+1
corners of its simplex with barycentric weights; BLUR the corners with [1/2 1 1/2] along the d+1 directions of
the lattice, one after the other; SLICE: read each pixel back from its corners with the weights of the splat.

In the right coordinates y the lattice is Z^d, and sorting y - floor(y) downwards finds the simplex: walk from
floor(y) one step along the axis of the largest fraction, then of the next, up to floor(y) + 1. The d+1 points
passed are the corners; the drops from 1 through the sorted fractions to 0 are their weights. Directions are
the d axes and (-1, ..., -1). A corner is kept as one integer, its coordinates in mixed radix, so a step adds
a constant: sorting brings the pixels of a corner together, binary search finds its neighbours.
"""
import argparse
import json
import math
import timeit

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torchvision.transforms.functional import pil_to_tensor


class Lattice:
    """Gaussian filter of deviation 1: x (n,C) -> (n,C). features (d,n) lie within [0, highest[j]]; image (n,)
    numbers the images. symmetric: k(i,j) is divided by the roots of its sums over i and over j."""

    def __init__(self, features, highest, image, images, symmetric):
        d, n = features.shape
        # Elevation to d+1 coordinates e that sum to 0; y_j = (e_j - e_d) / (d+1). Float32 in the order of the
        # original: rounded otherwise, pixels on the border of two simplices create other corners.
        elevated, above = [None] * (d + 1), torch.zeros_like(features[0])
        for j in range(d, 0, -1):
            scaled = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
            elevated[j], above = above - j * scaled, above + scaled
        elevated = torch.stack([above] + elevated[1:])
        whole = (elevated / (d + 1)).round()
        rest = elevated - whole * (d + 1)
        under = rest[:d] < rest[d]
        fraction, axis = ((rest[:d] - rest[d]) / (d + 1) + under).sort(dim=0, descending=True, stable=True)
        weight = F.pad(fraction, (0, 0, 1, 0), value=1.0)
        weight[:-1] -= fraction                                                     # (d+1,n)
        # The key packs y_j - y_(j+1): these depend on two features only, so they are small, and the corners
        # of a part of the image lie together in memory. 3: corner, neighbour, rounding.
        low = [-math.ceil(math.sqrt(2 / 3 * j / (j + 1)) * highest[j - 1]) - 3 for j in range(d)]
        high = [math.ceil(math.sqrt(2 / 3 * (j + 2) / (j + 1)) * highest[j]) + 3 for j in range(d)]
        radix = [math.prod(high[k] - low[k] + 1 for k in range(j, d)) for j in range(d + 1)]
        if images * radix[0] >= 2 ** 63 or n * (d + 1) >= 2 ** 31:
            raise ValueError(f"too many pixels ({n}) for this sxy and srgb: enlarge these or split the batch")
        steps = [radix[1]] + [radix[j + 1] - radix[j] for j in range(1, d)]         # of the key along y_j
        step, floor = torch.tensor(steps, device=image.device), (whole[:d] - whole[d]).long() - under.long()
        first = (floor * step[:, None]).sum(0) + image * radix[0] - sum(l * r for l, r in zip(low, radix[1:]))
        key, entry = torch.cat([first[None], step[axis]]).cumsum(0).flatten().sort()
        new = F.pad(key[1:] != key[:-1], (1, 0), value=True)
        start, corner = new.nonzero()[:, 0], new.cumsum(0) - 1
        key, M = key[start], len(start)                                             # M corners
        # Splat, blur, slice sum bags of rows, faster than sparse products. Row M, zero, is absent neighbours.
        self.pixel, self.start = (entry % n).int(), F.pad(start, (0, 1), value=len(entry)).int()
        self.corner = torch.empty_like(entry).scatter_(0, entry, corner).view(d + 1, n).T.int().contiguous()
        self.splat_weight = weight.flatten()[entry]
        self.blur_weight = weight.new_tensor([1, 0.5, 0.5]).expand(M + 1, 3).contiguous()
        self.slice_weight = (weight.T / (1 + 2 ** -d)).contiguous()              # undoes the blur's gain
        self.neighbors, here = [], torch.arange(M + 1, device=image.device)
        for by in steps + [-1]:                                                     # -1 = -sum(steps)
            place = torch.searchsorted(key, key + by).clamp(max=M - 1)
            up = F.pad(torch.where(key[place] == key + by, place, M), (0, 1), value=M)
            down = torch.full_like(up, M).scatter_(0, up, torch.where(up < M, here, M))
            self.neighbors.append(torch.stack([here, up, down], 1).int())
        if symmetric:
            norm = (self(torch.ones_like(weight[0, :, None])) + 1e-20).rsqrt()      # (n,1)
            self.splat_weight *= norm[entry % n, 0]
            self.slice_weight *= norm

    def __call__(self, x):
        x = F.embedding_bag(self.pixel, x, self.start, mode="sum", per_sample_weights=self.splat_weight)
        for neighbors in self.neighbors:                                            # (M+1,C)
            x = F.embedding_bag(neighbors, x, mode="sum", per_sample_weights=self.blur_weight)
        return F.embedding_bag(self.corner, x, mode="sum", per_sample_weights=self.slice_weight)


def exact_filter(features, highest, image, images, symmetric):
    """What Lattice approximates, by brute force in chunks: the reference for small images."""
    points = torch.cat([features, 100.0 * image[None]]).T                           # exp(-100^2 / 2) = 0
    near = {"x2": points, "compute_mode": "donot_use_mm_for_euclid_dist"}           # products are inexact
    chunks = points.split(2 ** 20 // len(points) + 1)
    apply = lambda x: torch.cat([torch.cdist(c, **near).square_().div_(-2).exp_() @ x for c in chunks])
    norm = (apply(torch.ones_like(points[:, :1])) + 1e-20).rsqrt() if symmetric else 1
    return lambda x: apply(x * norm) * norm


@torch.no_grad()
def dense_crf(image, log_probs, iterations=10, gaussian_sxy=1, gaussian_compat=3, bilateral_sxy=67,
              bilateral_srgb=3, bilateral_compat=4, normalization="symmetric", exact=False):
    """image uint8 (3,H,W) or (B,3,H,W) RGB, log_probs (C,H,W) or (B,C,H,W) -> Q float32, shaped as log_probs.

    log_probs: any logits, normalised here; -inf is probability 0; then clipped to probabilities >= 1e-5.
    *_sxy, *_srgb: deviations in pixels and colour levels 0..255. Defaults: those of STEGO, HP and CAUSE.
    *_compat: cost of different labels, a number (0: no such kernel) or mu (C,C), made symmetric as by
    pydensecrf; w equals w * (1 - eye(C)). normalization: "symmetric" or "none". exact: brute force, n^2 time.
    Raises ValueError on sizes, types and values that cannot be (NaN, +inf, a pixel of nothing but -inf).
    """
    if not torch.is_tensor(image) or image.dtype != torch.uint8 or image.shape[-3:-2] != (3,):
        raise ValueError("image must be a uint8 RGB tensor (3,H,W) or (B,3,H,W), not normalised")
    if not (torch.is_tensor(log_probs) and log_probs.is_floating_point() and log_probs.ndim in (3, 4) and
            log_probs.shape[-3] > 0 and log_probs[..., 0, :, :].shape == image[..., 0, :, :].shape):
        raise ValueError(f"log_probs must be floats (C,H,W) or (B,C,H,W), as large as {tuple(image.shape)}")
    if not (iterations >= 0 < min(gaussian_sxy, bilateral_sxy, bilateral_srgb) and
            normalization in ("symmetric", "none")):
        raise ValueError("iterations >= 0, sxy and srgb > 0, normalization 'symmetric' or 'none'")
    if log_probs.numel() == 0:
        return log_probs.float()
    C, H, W = log_probs.shape[-3:]
    photo = image.to(log_probs.device).view(-1, 3, H, W)
    log_p = log_probs.movedim(-3, -1).reshape(-1, C).float().softmax(1).clamp_(1e-5, 1).log_()        # (n,C)
    if not log_p.isfinite().all():
        raise ValueError("log_probs hold NaN, +inf or a pixel of nothing but -inf")
    build, symmetric, kernels = exact_filter if exact else Lattice, normalization == "symmetric", []
    grid = [torch.arange(size, device=photo.device) for size in (len(photo), H, W)]
    number, y, x = [index.flatten() for index in torch.meshgrid(*grid, indexing="ij")]                # (n,)
    colours = photo[:, [2, 1, 0]].transpose(0, 1).flatten(1)    # BGR as in STEGO: the order moves the lattice
    for compat, sxy, rest in ((gaussian_compat, gaussian_sxy, []),
                              (bilateral_compat, bilateral_sxy, [*(colours / bilateral_srgb)])):
        mu = torch.as_tensor(compat, dtype=torch.float32)
        if mu.shape not in ((), (C, C)) or not mu.isfinite().all():
            raise ValueError(f"compat must be a finite number or a ({C},{C}) matrix of finite numbers")
        if mu.any():
            highest = [W / sxy, H / sxy] + [255 / bilateral_srgb] * 3
            filter = build(torch.stack([x / sxy, y / sxy] + rest), highest, number, len(photo), symmetric)
            kernels.append((filter, (mu + mu.T).to(photo.device) / -2 if mu.ndim else mu.item()))
    Q = log_p.softmax(1)
    for _ in range(iterations):
        logits = log_p.clone()
        for filter, mu in kernels:    # w (1 - eye): w is the same for all classes, only -w eye counts
            logits.add_(filter(Q), alpha=mu) if isinstance(mu, float) else logits.addmm_(filter(Q), mu)
        torch.softmax(logits, 1, out=Q)
    return Q.view(-1, H, W, C).movedim(3, 1).reshape(log_probs.shape)


def compare(photo, path):
    """Draws a photo, its 8x8 patches labelled by colour, coarse as a ViT, and these labels after the CRF."""
    H, W = photo.shape[1:]
    patches = F.avg_pool2d(photo[None].float(), 8, ceil_mode=True)
    points = patches[0].flatten(1).T                                                # (h*w,3)
    centres = points[points.sum(1).argsort()[torch.linspace(0, len(points) - 1, 6).long()]]
    logits = torch.cdist(points, centres).square().T.view(1, 6, *patches.shape[2:]) / -800
    logits = F.interpolate(logits, (H, W), mode="bilinear")[0]
    maps = logits.argmax(0), dense_crf(photo, logits).argmax(0)                     # (H,W)
    colours = torch.tensor([ImageColor.getrgb(f"hsv({60 * k},60%,90%)") for k in range(6)], dtype=torch.uint8)
    canvas = Image.new("RGB", (3 * W + 150, max(H, 130)))
    for i, panel in enumerate((photo.permute(1, 2, 0), colours[maps[0]], colours[maps[1]])):
        canvas.paste(Image.fromarray(panel.numpy()), (i * W, 0))
    for k in range(6):
        text = f"cluster {k}: " + " -> ".join(f"{(m == k).float().mean():.0%}" for m in maps)
        ImageDraw.Draw(canvas).text((3 * W + 8, 8 + 18 * k), text, fill=tuple(colours[k].tolist()))
    canvas.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("photo", nargs="?", help="an image file; larger ones are shrunk to 1024 pixels")
    parser.add_argument("--out", default="crf.png", help="the picture that is written")
    parser.add_argument("--bench", action="store_true", help="seconds, best of 3, for PHOTO or soft noise")
    parser.add_argument("--json", help="file for the table of --bench")
    parser.add_argument("--device", default="cpu", help="of --bench, for example cuda")
    parser.add_argument("--batch", type=int, default=1, help="images per call of --bench")
    args, rows = parser.parse_args(), []
    if not args.photo and not args.bench:
        parser.error("give a PHOTO, or --bench")
    try:
        torch.manual_seed(0)
        photo = F.interpolate(torch.rand(1, 3, 4, 4) * 255, 512, mode="bicubic")[0].clamp(0, 255).byte()
        if args.photo:
            picture = ImageOps.exif_transpose(Image.open(args.photo)).convert("RGB")
            picture.thumbnail((1024, 1024))
            photo = pil_to_tensor(picture)
        if not args.bench:
            compare(photo, args.out)
            print(f"wrote {args.out}: photo, before, after")
        for size, C in [(size, C) for size in (160, 320, 512) for C in (5, 27) if args.bench]:
            image = F.interpolate(photo[None].float(), (size, size)).byte().repeat(args.batch, 1, 1, 1)
            logits = F.interpolate(torch.randn(args.batch, C, 40, 40), (size, size), mode="bilinear")
            image, logits = image.to(args.device), logits.to(args.device)
            run = lambda n: dense_crf(image, logits, n).sum().item()                # item() waits for a GPU
            build, total = (min(timeit.repeat(lambda: run(n), number=1, repeat=3)) for n in (0, 10))
            rows.append(dict(size=size, classes=C, build=build, iteration=(total - build) / 10, total=total,
                             images_per_second=args.batch / total))
            print("  ".join(f"{name} {value:<6.4g}" for name, value in rows[-1].items()))
        if args.json:
            json.dump(rows, open(args.json, "w"))
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
