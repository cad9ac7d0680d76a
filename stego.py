"""STEGO: unsupervised semantic segmentation by distilling feature correspondences (Hamilton, ICLR 2022).

A small head on frozen patch features learns a code whose patch-to-patch cosines are those of the features,
sharpened: above a shift b pairs attract, below it they repel. Pairs come from an image and itself, from one
of its 7 nearest neighbours, and from random other images. K-means on the codes gives the clusters; a linear
probe is trained beside. No label reaches head or clusters.

    python stego.py                                                # drawn scenes, no download, about a minute
    python stego.py --data coco27 --root data/cocostuff --arch vitb8  # paper: 26.8 mIoU, no CRF; not run here
    python stego.py --data photos/ --arch vits8                    # your own pictures: the shifts are found
    python stego.py --plot-correspondence one.jpg two.jpg --arch vits8                 # figure 2 of the paper

The first gives 48.5 +- 3.8 mIoU, K-means on the raw features 40.1 (seeds 0, 1, 2; 22 s on one CPU thread,
torch 2.15); CamVid with a ViT-S/14 33.9 +- 1.6 against 25.2, with --auto-shift 35.0 +- 0.5.
"""
import common                                                # first: it answers --help before torch is loaded
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import eval
from eval import ClusterProbe, LinearProbe

# Letters: B images, h w patches, N = h * w, D backbone width, K code width (70), S x S sampled points.


# ---------------------------------------------------------------- model

class Head(nn.Module):
    """Features (B,D,h,w) -> code (B,K,h,w): a linear plus a two-layer branch, each behind its own dropout."""

    def __init__(self, D, K):
        super().__init__()
        self.linear = nn.Conv2d(D, K, 1)
        self.mlp = nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU(), nn.Conv2d(D, K, 1))

    def forward(self, feats):
        return self.linear(drop(feats, self.training)) + self.mlp(drop(feats, self.training))


def drop(x, training=True):
    """Dropout of whole channels of (B,C,h,w), 10 % per image (A.10)."""
    return common.dropout(x, 0.1, training, channels=True)


class Model(nn.Module):
    """Images (B,3,H,W) -> code (B,K,h,w), with the probes `.linear` and `.cluster`."""

    alpha = 2                                                    # the CRF gets log-softmax(2 * cosine)

    def __init__(self, args):
        super().__init__()
        self.backbone = common.load_backbone(args.arch, args.weights, args.depth)
        self.head = Head(self.backbone.dim, args.code_dim)
        self.linear = LinearProbe(args.code_dim, args.classes) if args.classes else None
        self.cluster = ClusterProbe(args.code_dim, args.clusters)

    def forward(self, images):
        return self.head(self.backbone(images))


# ---------------------------------------------------------------- loss

def sample(t, coords):
    """t (B,C,h,w) at coords (B,S,S,2) in [-1,1], last axis (x,y) -> (B,C,S,S), bilinear. +-1: centres of
    the patches at the border.

    out[b,:,i,j] is taken at coords[b,j,i], as in the published code; for random points the order means
    nothing.
    """
    return F.grid_sample(t, coords.transpose(1, 2), padding_mode="border", align_corners=True)


def correlation(a, b):
    """Cosines between all positions of a (B,C,h,w) and of b (B,C,i,j): (B,h,w,i,j), eq. 1."""
    a, b = (F.normalize(x, dim=1, eps=1e-10) for x in (a, b))
    return torch.einsum("bchw,bcij->bhwij", a, b)


def correlation_loss(feat_a, feat_b, code_a, code_b, shift, pointwise=True, zero_clamp=True, stabilize=False):
    """Eq. 4 for maps sampled at S x S points, features (B,D,S,S), codes (B,K,S,S) -> scalar.

    A mean where the paper sums. pointwise: spatial centring, eq. 3. zero_clamp: codes with a cosine below 0
    are neither pushed nor pulled. stabilize: nor are those above 0.8. No gradient reaches the features.
    """
    with torch.no_grad():
        f = correlation(feat_a, feat_b)                                                      # (B,S,S,S,S)
        if pointwise:
            # The published code adds the mean of all pairs back (over all processes here), so that a shift
            # keeps its meaning; eq. 3 alone would centre every row at zero.
            f = f - f.mean((3, 4), keepdim=True) + common.reduce_sum(f.mean()) / common.world()
    s = correlation(code_a, code_b).clamp(0.0 if zero_clamp else -9999.0, 0.8 if stabilize else None)
    return -(s * (f - shift)).mean()


def shifted_permutation(permutation):
    """(n,) -> (n,): an element at its own place moves on by one, so no image meets itself. Repeats occur.

    >>> shifted_permutation(torch.tensor([2, 1, 0, 3]))
    tensor([2, 2, 0, 0])
    """
    n = len(permutation)
    return (permutation + (permutation == torch.arange(n, device=permutation.device))) % n


def terms(feats, feats_pos, code, code_pos, coords, coords_pos, permutations, shifts, **form):
    """The terms of eq. 5 (self, knn, rand), and the mean code cosine of each kind of pair (3,).

    feats (b,D,h,w), code (b,K,h,w) of this process's images, feats_pos, code_pos of a neighbour of each;
    coords (b,S,S,2); permutations: each (B,) over the global batch, five in the published code, one in the
    paper.
    """
    fa, ca = sample(feats, coords), sample(code, coords)
    fb, cb = sample(feats_pos, coords_pos), sample(code_pos, coords_pos)
    pairs = [(fa, ca, shifts[0]), (fb, cb, shifts[1])]
    all_feats, all_code = common.gather(feats), common.gather(code)
    for permutation in permutations:
        other = permutation[common.rank() * len(feats):(common.rank() + 1) * len(feats)]
        pairs.append((sample(all_feats[other], coords_pos), sample(all_code[other], coords_pos), shifts[2]))
    losses = torch.stack([correlation_loss(fa, f, ca, c, b, **form) for f, c, b in pairs])
    cosines = torch.stack([mean_cosine(ca, c) for _, c, _ in pairs])
    return (*losses[:2], losses[2:].mean()), torch.stack([*cosines[:2], cosines[2:].mean()])


@torch.no_grad()
def mean_cosine(a, b):
    """Mean of correlation(a, b): the mean of all dot products is the dot product of the means."""
    a, b = (F.normalize(x, dim=1, eps=1e-10).mean((2, 3)) for x in (a, b))
    return (a * b).sum(1).mean()


@torch.no_grad()
def first_shifts(feats, feats_pos):
    """Shifts (3,) for --auto-shift to start from: of a batch's centred correspondences the mean plus half a
    deviation for an image with itself and with its neighbour, plus one for random pairs.

    So a third of the first attract and a sixth of the last, whatever backbone and data make of cosines.
    """
    coarse = [F.interpolate(x, (11, 11), mode="bilinear") for x in (feats, feats_pos, feats.roll(1, 0))]
    pairs = [correlation(coarse[0], x) for x in coarse]
    shifts = [f.mean() + above * (f - f.mean((3, 4), keepdim=True)).std()
              for f, above in zip(pairs, (0.5, 0.5, 1.0))]
    return common.reduce_sum(torch.stack(shifts)) / common.world()


def adjust(shifts, start, cosines, targets, step, total):
    """One step of --auto-shift, the rule of section 3.3: steer the mean code cosine (2,) of neighbours and
    of random pairs to `targets` (2,) by moving the shifts (self, knn, rand) in place. No label is involved.

    Pairs too alike: more pressure. Self follows knn, since both attract. The gain falls like 1 / step, so the
    shifts settle; within 0.02 of a target nothing moves. That of random pairs, whose target can be reached,
    may move by 0.4. The other two may move by 0.05: neighbours rarely get to 0.3, and shifts that sink in
    pursuit of it merge clusters.
    """
    error = cosines - cosines.new_tensor(targets)
    error = error.sign() * (error.abs() - 0.02).clamp(min=0)
    gain, reach = 30 / total / (1 + 20 * step / total), shifts.new_tensor([0.05, 0.05, 0.4])
    shifts.copy_((shifts + gain * error[[0, 0, 1]]).clamp(start - reach, start + reach))


def crf_loss(image, code, points=1000):
    """Contrastive CRF of A.9: pixels alike in place and colour get alike codes. Off by default, as published.

    image (B,3,H,W) normalised, code (B,K,h,w) -> scalar. On a 56 x 56 grid: kernel of eq. 15 with a = 10, b =
    3 and variances 0.5 (place, in pixels), 0.15 (colour) and 0.05 (place alone), the values of the published
    code.
    """
    image, code = (F.interpolate(x, (56, 56), mode="bilinear") for x in (image, code))
    at = (common.rand_rows(len(image), points, device=image.device) * 56 * 56).long()        # (B,P)
    place = torch.stack([at // 56, at % 56], 1).float()                                      # (B,2,P)
    colour = image.flatten(2).gather(2, at[:, None].expand(-1, 3, -1))
    code = F.normalize(code.flatten(2).gather(2, at[:, None].expand(-1, code.shape[1], -1)), dim=1)
    dp, di = (torch.cdist(x.mT, x.mT).square() for x in (place, colour))                     # (B,P,P)
    kernel = 10 * torch.exp(-dp / (2 * 0.5) - di / (2 * 0.15)) + 3 * torch.exp(-dp / (2 * 0.05))
    return -(kernel * (code.mT @ code)).mean()


# ---------------------------------------------------------------- training

class Pairs(torch.utils.data.Dataset):
    """Items of `images` with one of their nearest neighbours (n,1+k): "positive" and "positive_index"."""

    def __init__(self, images, neighbors):
        self.images, self.neighbors = images, neighbors

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        j = self.neighbors[i, torch.randint(1, self.neighbors.shape[1], ())].item()
        item, other = self.images[i], self.images[j]
        if other["error"]:                                       # the next pair takes its place
            return other
        return {**item, "positive": other["image"], "positive_index": j}


def nearest_neighbors(features, k):
    """Features (n,D) -> (n,k) indices by cosine, itself first. Memory: unit features, 2^26 cosines.

    With fewer than k images the neighbours repeat; a single image is its own neighbour.

    >>> nearest_neighbors(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]), 2)
    tensor([[0, 2],
            [1, 2],
            [2, 0]])
    """
    unit = F.normalize(features.float(), dim=1)
    n, found = len(unit), []
    for rows in torch.arange(n, device=unit.device).split(max(1, 2 ** 26 // n)):
        cosine = unit[rows] @ unit.T
        cosine[torch.arange(len(rows), device=unit.device), rows] = 2                      # even among copies
        found.append(cosine.topk(min(k, n), dim=1).indices)
    found = torch.cat(found)
    if k > n:
        found = torch.cat([found[:, :1], found[:, min(1, n - 1):].repeat(1, k)], 1)[:, :k]
    return found


@torch.no_grad()
def neighbors_of(run, features, backbone, images, k):
    """Nearest neighbours (n,1+k) of every image by its mean feature, kept under all that they depend on.

    The published code computes them with dropout switched on by accident; these are without.
    """
    if run.args.bench:                                         # which neighbour does not change a step's time
        return torch.randint(len(images), (len(images), 1 + k))
    file = run.folder.parent / "cache" / f"neighbors-{common.fingerprint(backbone, images)}-{k}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    pooled = torch.zeros(len(images), backbone.dim, device=run.device)
    for items in eval.batches(images, 16, run.args.workers, "neighbours"):
        index = torch.tensor([item["index"] for item in items])
        feats = features(common.together(items)["image"].to(run.device), index)
        pooled[index.to(run.device)] = feats.mean((2, 3))
    neighbors = nearest_neighbors(common.reduce_sum(pooled), 1 + k).cpu()
    if run.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        common.save(neighbors, file)
    return neighbors


@torch.no_grad()
def plot_correspondence(args):
    """Figure 2: three points of the first picture, and how alike all patches are to them (eq. 1).

    The points are as unlike as can be: the patch least like the mean, then twice the one least like those
    before.
    """
    device = common.start_processes(args.device)
    backbone = common.load_backbone(args.arch, args.weights, args.depth).to(device)
    photos, maps = [], []
    for path in args.plot_correspondence:
        try:
            image, _ = eval.read_picture(path, max(args.size, 224))
        except Exception as error:                               # Pillow raises many kinds for a damaged file
            raise ValueError(f"{path} cannot be read as an image: {error}") from None
        photos.append(eval.photo_of({"image": image}))
        feats = backbone(eval.padded(image[None].to(device), backbone.patch))[0]
        maps.append(F.normalize(feats, dim=0).cpu())
    unit, points, rows = maps[0].flatten(1), [], []                                          # (D,N)
    near = unit.mean(1) @ unit
    for _ in range(3):
        points.append(near.argmin().item())
        near = torch.stack([unit[:, p] @ unit for p in points]).amax(0)
    colours = np.array([[220, 30, 30], [30, 160, 30], [40, 80, 255]], np.uint8)
    for photo, patches in zip(photos, maps):
        row, (H, W) = [photo.copy()], photo.shape[:2]
        for point, colour in zip(points, colours):
            if photo is photos[0]:
                y, x = (backbone.patch * k + backbone.patch // 2 for k in divmod(point, maps[0].shape[2]))
                row[0][max(0, y - 5):y + 6, max(0, x - 5):x + 6] = colour
            heat = torch.einsum("d,dhw->hw", unit[:, point], patches).clamp(min=0)[None, None]
            heat = F.interpolate(heat, scale_factor=backbone.patch, mode="bilinear")
            heat = heat[0, 0, :H, :W, None].numpy()
            row.append(((1 - heat) * 0.6 * photo + heat * colour).round().astype(np.uint8))
        rows.append([eval.fit(cell) for cell in row])
    file, names = Path(args.out or "runs") / "correspondence.png", ["point 1", "point 2", "point 3"]
    eval.write_png(file, eval.sheet(rows, ["photo", *names], names, colours, args.plot_correspondence))
    print(f"wrote {file}")
    return 0


def train(args):
    if args.plot_correspondence:
        return plot_correspondence(args)
    if args.crf_weight and args.cache_features:
        raise ValueError("--crf-weight compares colours, which --cache-features does not keep")
    run = common.Run("stego", args)
    images = data.load(args.data, args.root, "train", size=args.size, crops=5 if args.five_crop else None,
                       protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    model = Model(args).to(run.device)
    features = run.features(model.backbone, images)
    pairs = Pairs(images, neighbors_of(run, features, model.backbone, images, args.neighbors))

    probes = [*model.cluster.parameters(), *(model.linear.parameters() if model.linear else [])]
    optimizer = torch.optim.Adam([{"params": model.head.parameters(), "lr": args.lr},
                                  {"params": probes, "lr": args.probe_lr}])
    shifts = torch.tensor([args.shift_self, args.shift_knn, args.shift_rand], device=run.device)
    start = shifts.clone()
    form = dict(pointwise=args.centering, zero_clamp=args.zero_clamp, stabilize=args.stabilize)
    for step, batch in run.steps("head", args.steps, pairs, model=model, optimizer=optimizer, shifts=shifts,
                                 start=start):
        both = features(torch.cat([batch["image"], batch["positive"]]),
                        torch.cat([batch["index"], batch["positive_index"]]))
        feats, feats_pos = both.chunk(2)                                                     # (B,D,h,w) each
        run.mark("backbone")
        if args.auto_shift and step == 0:
            start.copy_(first_shifts(feats, feats_pos))
            shifts.copy_(start)
        code, code_pos = model.head(feats), model.head(feats_pos)                            # (B,K,h,w)
        coords, coords_pos = (2 * common.rand_rows(len(feats), *[args.points] * 2, 2, device=run.device) - 1
                              for _ in range(2))                                             # (B,S,S,2)
        permutations = [shifted_permutation(torch.randperm(len(feats) * run.world, device=run.device))
                        for _ in range(args.negatives)]
        (own, knn, rand), cosines = terms(drop(feats), drop(feats_pos), code, code_pos, coords, coords_pos,
                                          permutations, shifts, **form)
        loss = args.weight_self * own + args.weight_knn * knn + args.weight_rand * rand      # eq. 5
        if args.crf_weight:
            loss = loss + args.crf_weight * crf_loss(batch["image"], code)
        cosines = common.reduce_sum(cosines) / run.world
        run.mark("head and loss")
        cluster, _ = model.cluster(code)
        linear = 0 * cluster
        if model.linear:
            linear = eval.linear_loss(model.linear(code.detach()), batch["label"])
        run.mark("probes")
        if not run.finite(batch, loss=loss, own=own, knn=knn, rand=rand, cluster=cluster, linear=linear,
                          **dict(zip(("cosine_self", "cosine_knn", "cosine_rand"), cosines)),
                          **dict(zip(("shift_self", "shift_knn", "shift_rand"), shifts))):
            continue
        optimizer.zero_grad(set_to_none=True)
        (loss + cluster + linear).backward()
        common.average_gradients(model)
        optimizer.step()
        if args.auto_shift:
            adjust(shifts, start, cosines[1:], (args.target_knn, args.target_rand), step, args.steps)
        run.mark("backward and optimizer")
    if args.probe == "kmeans" and not args.bench:
        eval.refit_clusters(run, model, images)
    return eval.finish(run, model, images, val)


# ---------------------------------------------------------------- command line

# Shifts belong to a data set and a backbone: table 6 of the paper is COCO with ViT-B and Cityscapes; others
# are the published code's; 0.5, 0.5, 0.8 were chosen on scenes and CamVid by validation mIoU, so with labels.
# Elsewhere a wrong one can merge all clusters, so the default finds its own.
PRESETS = {
    "default": dict(size=224, eval_size=320, five_crop=False, steps=5000, batch_size=16, lr=5e-4,
                    probe_lr=5e-3, code_dim=70, neighbors=7, points=11, negatives=5, probe="online",
                    auto_shift=True, target_knn=0.3, target_rand=0.0,
                    shift_self=0.5, shift_knn=0.5, shift_rand=0.8,
                    weight_self=0.67, weight_knn=0.25, weight_rand=0.63),
    "folder": dict(steps=1000, probe="kmeans"),
    "scenes": dict(size=96, eval_size=96, steps=200, points=7, probe="kmeans", auto_shift=False),
    "camvid": dict(eval_size=224, steps=300, probe="kmeans", auto_shift=False),
    "coco27": dict(five_crop=True, auto_shift=False, shift_self=0.08, shift_knn=0.02, shift_rand=0.66),
    "coco27/vitb": dict(shift_self=0.12, shift_knn=0.2, shift_rand=1.0,
                        weight_self=0.1, weight_knn=1.0, weight_rand=0.1538476246),
    "coco27/mocov2": dict(shift_self=0.32, shift_knn=0.36, shift_rand=0.26),
    "cityscapes27": dict(five_crop=True, auto_shift=False, code_dim=100,   # of the published model; paper: 70
                         shift_self=0.4582847221, shift_knn=0.1754346515, shift_rand=0.3136124189,
                         weight_self=1.0, weight_knn=0.5774534831, weight_rand=0.9058762625),
    "potsdam3": dict(auto_shift=False, shift_self=0.08, shift_knn=0.02, shift_rand=0.46),
    "smoke": dict(steps=10, batch_size=4),
}


def arguments():
    p, switch = common.parser(__doc__), common.argparse.BooleanOptionalAction
    g = p.add_argument_group("STEGO")
    g.add_argument("--eval-size", type=common.whole(8), metavar="PIXELS", help="image side for scoring")
    g.add_argument("--code-dim", type=common.whole(1), help="width K of the code")
    g.add_argument("--neighbors", type=common.whole(1), help="an image's partner is one of so many nearest")
    g.add_argument("--points", type=common.whole(1), help="S: codes are compared at S x S random points")
    g.add_argument("--negatives", type=common.whole(1), help="random partners of an image in a step")
    g.add_argument("--probe-lr", type=float, help="learning rate of both probes")
    g.add_argument("--probe", choices=["online", "kmeans"], help="cluster centres: learned beside the head "
                   "as published, or K-means on the final codes of the train split: keeps small classes")
    g.add_argument("--auto-shift", action=switch, help="find the three shifts from the data; on where "
                   "there is no preset, since a wrong shift can put everything into one cluster")
    g.add_argument("--target-knn", type=float, help="mean code cosine of neighbours --auto-shift steers to")
    g.add_argument("--target-rand", type=float, help="likewise of random pairs")
    for name, what in (("self", "an image with itself"), ("knn", "neighbours"), ("rand", "random pairs")):
        g.add_argument(f"--shift-{name}", type=float, metavar="B", help=f"b of {what}, used only with "
                       "--no-auto-shift: higher pushes more of them apart; too low merges clusters")
        g.add_argument(f"--weight-{name}", type=float, metavar="X", help=f"lambda of {what}; 0 drops it")
    g.add_argument("--crf-weight", type=float, default=0.0, metavar="X", help="weight of the CRF term (A.9), "
                   "which ties codes to colour edges; 0 in the paper, where it did not help")
    g.add_argument("--plot-correspondence", nargs="+", metavar="IMAGE", help="only draw figure 2 for these")
    g = p.add_argument_group("ablations of tables 2 and 5")
    g.add_argument("--five-crop", action=switch, help="train on five half-size crops of each image: finer "
                   "detail and five times as many neighbours")
    g.add_argument("--zero-clamp", action=switch, default=True, help="orthogonal codes stay as they are; "
                   "without it training is unstable")
    g.add_argument("--centering", action=switch, default=True, help="spatial centring, eq. 3")
    g.add_argument("--stabilize", action="store_true", help="codes closer than 0.8 are pulled no further")
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
