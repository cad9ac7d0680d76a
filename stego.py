"""STEGO: unsupervised segmentation by distilling feature correspondences (Hamilton, ICLR 2022).

A small head on frozen patch features learns a code whose patch-to-patch cosines are those of the
features, sharpened: above a shift b pairs attract, below it they repel. Pairs are of an image and
itself, one of its 7 nearest neighbours, and random other images. K-means on the codes gives the
clusters; a linear probe is trained beside. No label reaches head or clusters.

    python stego.py                                                # drawn scenes, about a minute
    python stego.py --data photos/ --arch dinov2_vits14            # your own: the shifts are found
    python stego.py --data coco27 --root data/cocostuff --arch vitb8  # the paper's; not run here
    python stego.py --plot-correspondence one.jpg two.jpg --arch vits8  # figure 2

The first gives 47.7 +- 3.7 mIoU, K-means on the raw features 37.1 (seeds 0, 1, 2; 20 CPU-seconds,
torch 2.14); with a ViT-S/14 CamVid 33.4 +- 1.5 against 25.2, MSRC-21 25.2 +- 0.4 against 21.5.

Paper                        here
f, g; s, t                   feats, feats_pos (B,D,h,w); code, code_pos (B,K,h,w)
F, S (eq. 1)                 `correlation` of features, of codes
b, lambda                    --shift-*, --weight-*
SC (eq. 3), 0-clamp, 5-crop  --centering, --zero-clamp, --five-crop
GAP, x_knn; x_rand           `nearest_neighbors`, batch["positive"]; `shifted_permutation`
121 locations                `sample` at --points 11 x 11

Departures from the paper (p) and from the published code (c)
p  eq. 3 takes out a row's mean; here as in the code the mean of all is put back, which b is set for
p  eq. 4 sums over pairs; here as in the code a mean
p  x_rand is one shuffle; here as in the code five a step, with repeats (--negatives 1: one)
p  batch 32; here as in the code 16, for 5,000 steps; the code's 16 are a GPU's, here all processes'
p  images are resized bilinearly; here as in the code to the nearest pixel
p  one dropout of the features; here as in the code three: of either branch, and of the loss
p  table 6 is ViT-B's; ViT-S and Potsdam have the published configuration's shifts
p  K = 70; Cityscapes here 100, as its released checkpoint; that of COCO with ViT-B has probably 90
p  --auto-shift is the rule of thumb of section 3.3 and A.11, followed by the program
p  --probe kmeans: centres that learn online and never win never move, and small classes are lost
p  MoCo v2's rows had another network: stride 32, one 1x1 convolution, no dropout, 56 x 56 codes
c  neighbours come from features with dropout, in a file named without the patch size; here neither
c  five crops are cut to JPEG files; here on the fly
c  the checkpoint of the best validation score counts; here the last
c  terms of weight 0 (contrastive CRF of A.9, reconstruction, augmented views) are left out

The tables, with B="--data coco27 --root data/cocostuff", S="$B --arch vits8"; behind each command
the paper's clusters, mIoU / accuracy; * with CRF and flip: python eval.py RUN --crf --flip
1, 6  python stego.py $B --arch vitb8                          26.8 / 54.8, 28.2 / 56.9*
2     the same, and python stego.py $S                         24.0 / 47.7, 24.5 / 48.3*
      python stego.py $S --no-five-crop --no-zero-clamp --no-centering        7.3 / 34.2
      python stego.py $S --no-five-crop --no-centering                       21.3 / 44.3
      python stego.py $S --no-centering                                      23.4 / 47.6
3, 6  python stego.py --data cityscapes27 --root data/cityscapes --arch vitb8  21.0 / 73.2*
4     python stego.py --data potsdam3 --root data/potsdam --arch vits8          - / 77.0*
5     python stego.py $S, alone 24.5 / 48.3*, or with --no-zero-clamp 10.3 / 42.8*,
      --no-five-crop 23.1 / 48.0*, --no-centering 22.3 / 50.2*, --weight-self 0 20.2 / 43.0*,
      --weight-knn 0 22.2 / 47.0*, --weight-rand 0 12.8 / 39.8*
Not here: MoCo v2 (2: 20.8 / 48.4, 5: 19.6 / 43.1*); figures 3, 10, 13, 14, 15. Figure 2 is drawn by
--plot-correspondence, 6, 11 and 12 are confusion.png, the others samples.png.
"""
import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.io import encode_png
from torchvision.transforms import v2
from torchvision.utils import make_grid

import common
import data
import eval


# ---------------------------------------------------------------- model

class Head(nn.Module):
    """Features (B,D,h,w) -> code (B,K,h,w): a linear plus a two-layer branch, each with dropout."""
    def __init__(self, D, K):
        super().__init__()
        self.linear = nn.Conv2d(D, K, 1)
        self.mlp = nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU(), nn.Conv2d(D, K, 1))
        self.drop = nn.Dropout2d(0.1)  # of whole channels

    def forward(self, feats):
        return self.linear(self.drop(feats)) + self.mlp(self.drop(feats))


class Model(nn.Module):
    """Images (B,3,H,W) -> code (B,K,h,w), with the probes `.linear` and `.cluster`."""
    alpha = 2  # the CRF gets log-softmax(2 * cosine)

    def __init__(self, args):
        super().__init__()
        self.backbone = common.load_backbone(args.arch, args.weights, args.depth)
        if args.remove_position is not False:  # None, on a folder: decided on its images
            self.backbone = common.WithoutPlace(self.backbone, args.size)
        self.head = Head(self.backbone.dim, args.code_dim)
        self.linear = eval.LinearProbe(args.code_dim, args.classes) if args.classes else None
        self.cluster = eval.ClusterProbe(args.code_dim, args.clusters)

    def forward(self, images):
        return self.head(self.backbone(images))


# ---------------------------------------------------------------- loss

def sample(t, coords):
    """t (B,C,h,w) at coords (B,S,S,2) in [-1,1], last axis (x,y) -> (B,C,S,S), bilinear. +-1 are
    centres of border patches; out[b,:,i,j] is taken at coords[b,j,i], as in the published code."""
    return F.grid_sample(t, coords.transpose(1, 2), padding_mode="border", align_corners=True)


def correlation(a, b):
    """Cosines of all positions of a (B,C,h,w) and of b (B,C,i,j) -> (B,h,w,i,j), eq. 1."""
    a, b = (F.normalize(x, dim=1, eps=1e-10) for x in (a, b))
    return torch.einsum("bchw,bcij->bhwij", a, b)


def correlation_loss(feat_a, feat_b, code_a, code_b, shift,
                     pointwise=True, zero_clamp=True, stabilize=False):
    """L_corr, eq. 4, of features (B,D,S,S) and codes (B,K,S,S) at sampled points -> scalar.

    pointwise: spatial centring, eq. 3. zero_clamp: pairs of codes with a cosine below 0 get no
    gradient; stabilize: nor those above 0.8. None reaches the features."""
    fd = correlation(feat_a, feat_b).detach()  # the paper's F, (B,S,S,S,S)
    cd = correlation(code_a, code_b)  # its S
    if pointwise:
        fd = fd - fd.mean((3, 4), keepdim=True) + fd.mean()  # eq. 3
    cd = cd.clamp(0.0 if zero_clamp else -torch.inf, 0.8 if stabilize else torch.inf)
    return -((fd - shift) * cd).mean()  # eq. 4; without clamps eq. 2


def shifted_permutation(permutation):
    """(n,) -> (n,): an element at its own place moves on by one, so no image, of two or more, meets
    itself.

    >>> shifted_permutation(torch.tensor([2, 1, 0, 3]))
    tensor([2, 2, 0, 0])"""
    n = len(permutation)
    return (permutation + (permutation == torch.arange(n, device=permutation.device))) % n


@torch.no_grad()
def first_shifts(feats, feats_pos):
    """Shifts (3,) for --auto-shift to start from: the mean of a batch's correspondences plus half a
    deviation (centred) for self and knn, a whole one for rand: a third and a sixth attract."""
    a, b = (F.interpolate(x, (11, 11), mode="bilinear") for x in (feats, feats_pos))
    pairs = [correlation(a, x) for x in (a, b, a.roll(1, 0))]
    return torch.stack([fd.mean() + above * (fd - fd.mean((3, 4), keepdim=True)).std()
                        for fd, above in zip(pairs, (0.5, 0.5, 1.0))])


@torch.no_grad()
def adjust(shifts, start, cosines, targets, step, total):
    """--auto-shift, the rule of section 3.3: move shifts (self, knn, rand) in place so that mean
    code cosines (2,) of neighbours and random pairs come to `targets` (2,).

    Pairs too alike, by more than 0.02: more pressure. Self follows knn, since both attract. The
    gain falls with step / total. Rand may move by 0.4, self and knn by 0.05 alone: neighbours
    rarely reach 0.3, and shifts that sink all the way for it merge clusters."""
    error = F.softshrink(cosines - targets, 0.02)
    moved = shifts + 30 / total / (1 + 20 * step / total) * error[[0, 0, 1]]
    for i, reach in enumerate((0.05, 0.05, 0.4)):
        shifts[i] = moved[i].clamp(start[i] - reach, start[i] + reach)


# ---------------------------------------------------------------- training

class Pairs(torch.utils.data.Dataset):
    """Items of `images` with one of their neighbours (n,1+k): "positive" and "positive_index"."""
    def __init__(self, images, neighbors):
        self.images, self.neighbors = images, neighbors

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        j = self.neighbors[i, torch.randint(1, self.neighbors.shape[1], ())].item()
        item, other = self.images[i], self.images[j]
        if other["error"]:  # the next pair takes its place
            return other
        return {**item, "positive": other["image"], "positive_index": j}


def nearest_neighbors(features, k):
    """Features (n,D) -> (n,k) indices by cosine, itself first. Memory: unit features, 2^26 cosines.
    With fewer than k images the neighbours repeat; a single image is its own neighbour."""
    unit = F.normalize(features.float(), dim=1)
    n, found = len(unit), []
    for rows in torch.arange(n, device=unit.device).split(max(1, 2 ** 26 // n)):
        cosine = unit[rows] @ unit.T
        cosine.scatter_(1, rows[:, None], 2)  # itself, even among copies
        found.append(cosine.topk(min(k, n), dim=1).indices)
    columns = [0] + [1 + i % (n - 1) if n > 1 else 0 for i in range(k - 1)]
    return torch.cat(found)[:, columns]


@torch.no_grad()
def find_neighbors(run, features, images, D, k):
    """Nearest neighbours (n,1+k) of every image by its pooled features."""
    if run.args.bench:  # which neighbour does not change a step's time
        return torch.randint(len(images), (len(images), 1 + k))
    pooled = torch.zeros(len(images), D, device=run.device)
    for items in eval.batches(images, 16, run.args.workers, "neighbours"):
        batch = torch.utils.data.default_collate(items)
        pooled[batch["index"].to(run.device)] = features(batch).mean((2, 3))  # GAP
    return nearest_neighbors(common.reduce_sum(pooled), 1 + k)


def schedule(args, n):
    """Nothing to fill in: as published the steps are 5,000 for any number of images."""


def train(args):
    if args.plot_correspondence:
        return plot_correspondence(args)
    images = data.load(args.data, args.root, "train", size=args.size,
                       crops=5 if args.five_crop else None, protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    run = common.Run("stego", args, images, val)
    model = Model(args).to(run.device)
    features = run.features(model.backbone, images)
    neighbors = torch.zeros(len(images), 1 + args.neighbors, dtype=torch.int32)
    if not args.resume:  # else they are in the checkpoint
        neighbors.copy_(find_neighbors(run, features, images, model.backbone.dim, args.neighbors))

    optimizer = torch.optim.Adam(model.head.parameters(), args.lr)
    probes = torch.optim.Adam([p for name, p in model.named_parameters()
                               if name.startswith(("cluster", "linear"))], args.probe_lr)
    shifts = torch.tensor([args.shift_self, args.shift_knn, args.shift_rand], device=run.device)
    start = shifts.clone()
    targets = torch.tensor([args.target_knn, args.target_rand], device=run.device)
    alike = dict(generator=run.shared, device=run.device)  # the same draws in all processes
    form = dict(pointwise=args.centering, zero_clamp=args.zero_clamp, stabilize=args.stabilize)
    run.keep(model=model, optimizer=optimizer, probes=probes, shifts=shifts, start=start,
             neighbors=neighbors)
    for step, batch in run.loop("head", Pairs(images, neighbors), args.steps):
        feats, feats_pos = features(batch), features(batch, "positive")  # (B,D,h,w)
        code, code_pos = model.head(feats), model.head(feats_pos)  # (B,K,h,w)
        if args.auto_shift and step == 0:
            start.copy_(first_shifts(common.gather(feats), common.gather(feats_pos)))
            shifts.copy_(start)

        # every process computes the loss of the global batch, on the same points and pairs
        f, c = common.gather(model.head.drop(feats)), common.gather(code)  # with dropout
        f_pos, c_pos = common.gather(model.head.drop(feats_pos)), common.gather(code_pos)
        coords, coords_pos = 2 * torch.rand(2, len(f), args.points, args.points, 2, **alike) - 1
        fa, ca = sample(f, coords), sample(c, coords)  # (B,D,S,S), (B,K,S,S)
        fb, cb = sample(f_pos, coords_pos), sample(c_pos, coords_pos)
        own = correlation_loss(fa, fa, ca, ca, shifts[0], **form)
        knn = correlation_loss(fa, fb, ca, cb, shifts[1], **form)
        rand = cosine_rand = 0
        for _ in range(args.negatives):
            other = shifted_permutation(torch.randperm(len(f), **alike))
            fr, cr = sample(f[other], coords_pos), sample(c[other], coords_pos)
            rand = rand + correlation_loss(fa, fr, ca, cr, shifts[2], **form) / args.negatives
            cosine_rand = cosine_rand + correlation(ca, cr).mean() / args.negatives
        loss = args.weight_self * own + args.weight_knn * knn + args.weight_rand * rand  # eq. 5

        cluster, linear = eval.probe_losses(model, code, batch["label"])
        cosine_knn = correlation(ca, cb).mean()
        run.log(loss=loss, own=own, knn=knn, rand=rand, cluster=cluster, linear=linear,
                cosine_knn=cosine_knn, cosine_rand=cosine_rand, shift_self=shifts[0],
                shift_knn=shifts[1], shift_rand=shifts[2])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        probes.zero_grad(set_to_none=True)
        (cluster + linear).backward()
        probes.step()
        if args.auto_shift:
            adjust(shifts, start, torch.stack([cosine_knn, cosine_rand]), targets, step, args.steps)
    return eval.finish(run, model, images, val)


@torch.no_grad()
def plot_correspondence(args):
    """Figure 2: three points of the first picture, and how alike all patches are to them (eq. 1):
    the patch least like the mean, then those least like the points before."""
    backbone = common.load_backbone(args.arch, args.weights, args.depth)
    p, side, cells = backbone.patch, max(args.size, 224), []
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.6, 0.1], [0.2, 0.3, 1]])[..., None, None]
    for path in args.plot_correspondence:
        photo, error = data.attempt(data.read_image, path)
        if error:
            raise ValueError(f"{path} cannot be read as an image: {error}")
        photo = v2.functional.center_crop(v2.functional.resize(photo, [side]), [side])
        photo = v2.functional.pil_to_tensor(photo) / 255  # (3,H,W)
        feats = F.normalize(backbone((photo - common.MEAN)[None] / common.STD)[0], dim=0)  # (D,h,w)
        if not cells:  # the first picture, whose points are looked for in all
            unit = feats.flatten(1)  # (D,N)
            points = [(unit.mean(1) @ unit).argmin().item()]
            for _ in range(2):
                points.append((unit[:, points].T @ unit).amax(0).argmin().item())
        heat = torch.einsum("dn,dhw->nhw", unit[:, points], feats).clamp(min=0)[:, None]
        heat = F.interpolate(heat, (side, side), mode="bilinear")
        cells += [photo, *((1 - heat) * 0.6 * photo + heat * colours)]
    for point, colour in zip(points, colours):
        y, x = (p * k for k in divmod(point, side // p))
        cells[0][:, y:y + p, x:x + p] = colour
    picture = make_grid(cells, nrow=4).clamp(0, 1).mul(255).round().byte()
    file = f"{args.out or 'runs'}/correspondence.png"
    common.write(file, encode_png(picture).numpy().tobytes())
    return print(f"wrote {file}")


# ---------------------------------------------------------------- command line

def arguments():
    p = common.parser(__doc__)
    p.set_defaults(steps=5000)
    add = p.group("STEGO")
    add("--eval-size", 320, "image side for scoring", low=8, high=8192)
    add("--code-dim", 70, "width K of the code")
    add("--neighbors", 7, "an image's partner is one of so many nearest")
    add("--points", 11, "S: codes are compared at S x S random points")
    add("--negatives", 5, "random partners of an image in a step")
    add("--probe-lr", 5e-3, "learning rate of both probes")
    add("--probe", "online", "clusters learned online, or kmeans of the codes: keeps small ones",
        choices=["online", "kmeans"])
    add("--auto-shift", True, "shifts from the data, not --shift-*; wrong ones merge all clusters")
    add("--target-knn", 0.3, "mean code cosine of neighbours it steers to", low=-1, high=1)
    add("--target-rand", 0.0, "likewise of random pairs", low=-1, high=1)
    for name, shift, weight, what in (("self", 0.5, 0.67, "an image with itself"),
                                      ("knn", 0.5, 0.25, "neighbours"),
                                      ("rand", 0.8, 0.63, "random pairs")):
        add(f"--shift-{name}", shift, f"b of {what}: higher pushes more apart", low=-2, high=2)
        add(f"--weight-{name}", weight, f"lambda of {what}; 0 drops it")
    add("--remove-position", None, "take out of the features what a patch's place alone explains; "
        "a folder's images decide", action=argparse.BooleanOptionalAction)
    add("--plot-correspondence", None, "only draw figure 2 for these", nargs="+", metavar="IMAGE")
    add = p.group("ablations of tables 2 and 5")
    add("--five-crop", False, "five half-size crops of each image: detail, and more neighbours")
    add("--zero-clamp", True, "orthogonal codes stay as they are; unstable without")
    add("--centering", True, "spatial centring, eq. 3")
    add("--stabilize", False, "codes closer than 0.8 are neither pulled nor pushed")
    return p


# Shifts belong to a data set and a backbone; with another take --auto-shift. Scenes' and CamVid's,
# the defaults, were chosen by validation mIoU, so with labels.
PRESETS = {
    "folder": dict(steps=500, lr=5e-3, probe="kmeans"),  # 1,000 steps at 5e-4: 4 mIoU less
    "scenes": dict(size=96, eval_size=96, steps=200, points=7, probe="kmeans", auto_shift=False),
    "camvid": dict(eval_size=224, steps=300, probe="kmeans", auto_shift=False),
    "coco27": dict(five_crop=True, auto_shift=False,
                   shift_self=0.08, shift_knn=0.02, shift_rand=0.66),  # of ViT-S
    "coco27 arch=vitb*": dict(shift_self=0.12, shift_knn=0.2, shift_rand=1.0,
                         weight_self=0.1, weight_knn=1.0, weight_rand=0.1538476246),
    "cityscapes27": dict(
        five_crop=True, auto_shift=False, code_dim=100,
        shift_self=0.4582847221, shift_knn=0.1754346515, shift_rand=0.3136124189,
        weight_self=1.0, weight_knn=0.5774534831, weight_rand=0.9058762625),
    "potsdam3": dict(auto_shift=False, shift_self=0.08, shift_knn=0.02, shift_rand=0.46),
    "smoke": dict(steps=10, batch_size=4),
}

if __name__ == "__main__":
    common.main(arguments, PRESETS, schedule, train, data.count)
