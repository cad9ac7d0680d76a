"""HP: unsupervised semantic segmentation by contrast with hidden positives (Seong, Moon, Lee, Lee, Heo, CVPR 2023).

A small head on frozen patch features is trained by contrast between the patches of a batch. Two patches are positives if
they are more alike than either is to its nearest patch in a reference pool, one random patch per image: first by the
backbone's features, then more and more also by the codes of a momentum head. Each patch also passes its gradient on to
the neighbours it attends to. Clusters and a linear probe are trained beside. No label reaches head or clusters.

    python hp.py                                           # generated scenes, no download, about a minute
    python hp.py --data coco27 --root data/cocostuff --arch vits8                    # paper: 24.6 mIoU with CRF, not run here
    python hp.py --data camvid --root data/camvid --arch dinov2_vits14 --cache-features ram
    python hp.py --local none --no-task-specific                                     # row (d) of table 4
"""
import common                                              # first: it answers --help before torch is loaded
import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

import data
import eval
from eval import ClusterProbe, LinearProbe

# Letters: B images, h w patches, N = h * w, M = B * N patches of a batch, D backbone width, K code width (512), P patches
# of a reference pool, C clusters.


# ---------------------------------------------------------------- model

class Head(nn.Module):
    """Features (B,D,h,w) -> code (B,K,h,w): a linear branch plus a two-layer branch, each behind its own dropout."""

    def __init__(self, D, K):
        super().__init__()
        self.linear = nn.Conv2d(D, K, 1)
        self.mlp = nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU(), nn.Conv2d(D, K, 1))

    def forward(self, feats):
        return self.linear(drop(feats, self.training)) + self.mlp(drop(feats, self.training))


def drop(x, training=True):
    """Dropout of whole channels of (B,C,h,w), 10 % per image."""
    return common.dropout(x, 0.1, training, channels=True)


class Model(nn.Module):
    """Images (B,3,H,W) -> code (B,K,h,w), with the probes `.linear` and `.cluster`."""

    alpha = 2                                                     # the CRF gets log-softmax(2 * cosine)

    def __init__(self, args):
        super().__init__()
        self.backbone = common.load_backbone(args.arch, args.weights, args.depth)
        self.head = Head(self.backbone.dim, args.code_dim)
        self.momentum = copy.deepcopy(self.head).requires_grad_(False)   # S', follows the head
        self.projection = nn.Linear(args.code_dim, args.code_dim)        # Z
        self.linear = LinearProbe(args.code_dim, args.classes) if args.classes else None
        self.cluster = ClusterProbe(args.code_dim, args.clusters)

    def forward(self, images):
        return self.head(self.backbone(images))

    def project(self, code):
        """Code (B,K,h,w) -> unit vectors z (B*N,K)."""
        return F.normalize(self.projection(tokens(code)), dim=1)


def tokens(x):
    """(B,C,h,w) -> (B*N,C)."""
    return x.flatten(2).mT.flatten(0, 1)


class WithWindow(nn.Module):
    """A backbone that also gives the local hidden positives: images (B,3,H,W) -> (B,D+9,h,w), features and `window`."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        feats, attention = self.backbone.forward_with_attention(images)
        return torch.cat([feats, window(attention.float(), *feats.shape[2:]).to(feats.dtype)], 1)


# ---------------------------------------------------------------- loss

def thresholds(features, pool):
    """Cosine of each unit vector (M,D) to its nearest in the reference pool (P,D): (M,), eq. 2."""
    return torch.cat([(part @ pool.T).amax(1) for part in features.split(4096)])


def compare(features, limits, b, c, symmetric=True):
    """Hidden positives between two ranges of patches: for anchors b and for anchors c, both (|b|,|c|) bool, eq. 3 and 4."""
    cosine = features[b] @ features[c].T
    if symmetric:
        positives = cosine > torch.minimum(limits[b, None], limits[None, c])
        return positives, positives
    return cosine > limits[b, None], cosine > limits[None, c]


def hidden_positives(features, pool):
    """Unit features (M,D), unit pool (P,D) -> positives (M,M) bool, symmetric and without self, thresholds (M,)."""
    limits, everything = thresholds(features, pool), slice(0, len(features))
    return compare(features, limits, everything, everything)[0].fill_diagonal_(False), limits


def contrastive_loss(z, z_mix, positives_ag, positives_sp, negatives, lam, tau, reweight=True):
    """Contrast with hidden positives, the mean of Phi over z and Psi over z_mix (eq. 5, 6, 10) -> scalar.

    z, z_mix unit (M,K), M = B*N; positives (M,M) bool; negatives (N,M) bool, one row per patch position, shared by the
    images. The published code, followed here, departs from the paper: both kinds of positives go into one average with
    weights 1 and lam; the denominator is negatives and task-agnostic positives; anchors without one of those are left
    out; an anchor counts by its number of positives (reweight); the whole is scaled by tau / 0.07.
    """
    def masks(b, c):
        return (positives_ag[b, c], positives_ag[c, b].T), (positives_sp[b, c], positives_sp[c, b].T)
    return Contrast.apply(masks, negatives, range(len(z) // len(negatives)), lam, tau, reweight, z, z_mix)


class Contrast(torch.autograd.Function):
    """`contrastive_loss` and its gradient in blocks of a few images: no (M,M) similarity is ever held.

    With l_ij = z_i z_j / tau, weights w_ij (1 task-agnostic, lam task-specific), W_i = sum_j w_ij and D_i the denominator's
    patches, an image's loss is -tau/0.07 sum_i a_i (sum_j w_ij l_ij - W_i log Z_i), Z_i = sum_{j in D_i} exp l_ij, with
    a_i = 1 / sum of W over the image's anchors (reweight) or 1 / (number of anchors * W_i), so
    d loss / d l_ij = G_ij = -tau/0.07 a_i (w_ij - W_i [j in D_i] exp(l_ij) / Z_i) and d loss / d z = (G + G^T) z / tau.
    l is symmetric: a block serves its rows and its columns as anchors. First pass: W, Z and the value; second: G.
    """

    @staticmethod
    def forward(ctx, masks, negatives, own, lam, tau, reweight, *embeddings):
        """masks(b, c) -> task-agnostic and task-specific (or None) positives, each for anchors b and for anchors c, as
        (|b|,|c|) bool. own: this process's images; embeddings: z (M,K) over all processes."""
        (N, M), device = negatives.shape, negatives.device
        step = max(1, (4096 if device.type == "cuda" else 1024) // N) * N
        starts = [i for p in range(0, M, len(own) * N) for i in range(p, p + len(own) * N, step)]
        blocks = [slice(i, min(i + step, (i // (len(own) * N) + 1) * len(own) * N)) for i in starts]
        mine = [b.start // N in own for b in blocks]
        weight, any_ag = torch.zeros(M, device=device), torch.zeros(M, dtype=torch.bool, device=device)
        attracted, total = torch.zeros(2, len(embeddings), M, device=device)
        kept = []

        def sides(b, c, ag, sp, mutual):                          # for anchors b, then c: rows of a column, w, D
            for anchors, keys, dim in ((b, c, 1), (c, b, 0))[:1 + mutual]:
                p = ag[1 - dim]
                w = p.float() if sp is None else torch.add(p.float(), sp[1 - dim], alpha=lam)
                random = negatives[:, keys].repeat((anchors.stop - anchors.start) // N, 1)
                yield anchors, dim, w, p | (random if dim else random.T)

        for i, b in enumerate(blocks):
            for j, c in enumerate(blocks):
                if not mine[i] or (mine[j] and j < i):
                    continue
                ag, sp = masks(b, c)
                if i == j:                                        # a patch is no key of itself
                    ag, sp = ([p & ~torch.eye(len(p), dtype=torch.bool, device=device) for p in x] if x else x
                              for x in (ag, sp))
                mutual = mine[j] and j > i
                kept.append((b, c, ag, sp, mutual))
                logits = [z[b] @ z[c].T / tau for z in embeddings]
                exps = [x.exp() for x in logits]
                for anchors, dim, w, d in sides(*kept[-1]):
                    if i == j:
                        d = d.fill_diagonal_(False)
                    weight[anchors] += w.sum(dim)
                    any_ag[anchors] |= ag[1 - dim].any(dim)
                    for e in range(len(embeddings)):
                        attracted[e, anchors] += (w * logits[e]).sum(dim)
                        total[e, anchors] += (d * exps[e]).sum(dim)
        share = any_ag / (weight * any_ag).view(-1, N).sum(1).clamp(min=1e-12).repeat_interleave(N) if reweight else \
            any_ag / (any_ag.view(-1, N).sum(1).clamp(min=1).repeat_interleave(N) * weight.clamp(min=1e-12))
        scale = -tau / 0.07 / len(own) / len(embeddings)
        total = total.where(any_ag, torch.ones_like(total))
        loss = scale * (share * (attracted - weight * total.log())).sum()
        gradients = [torch.zeros_like(z) for z in embeddings]
        pull, push = scale * share / tau, scale * share * weight / total / tau               # (M,), (E,M)
        for b, c, ag, sp, mutual in kept:
            G = [0] * len(embeddings)
            exps = [(z[b] @ z[c].T / tau).exp_() for z in embeddings]
            for anchors, dim, w, d in sides(b, c, ag, sp, mutual):
                if b == c:
                    d = d.fill_diagonal_(False)
                w = w * pull[anchors].unsqueeze(dim)
                for e in range(len(embeddings)):
                    G[e] = G[e] + w - d * exps[e] * push[e, anchors].unsqueeze(dim)
            for z, g, gradient in zip(embeddings, G, gradients):
                gradient[b] += g @ z[c]
                gradient[c] += g.T @ z[b]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return (None,) * 6 + tuple(gradient * g for g in ctx.saved_tensors)


def window(attention, h, w):
    """Attention (B,heads,p+N,p+N), p prefix tokens -> (B,9,h,w): how much a patch takes of each of its 3 x 3 neighbours.

    As published, and other than eq. 7 to 9: each row is clipped to its 10 and 90 % quantiles and soft-maxed again, times
    28; what is below the row's mean counts 0; the sum is divided by the size of the window inside the image.
    """
    N = h * w
    a = attention[:, :, -N:, -N:].mean(1)                                                    # (B,N,N)
    y, x = torch.arange(N, device=a.device) // w, torch.arange(N, device=a.device) % w
    steps = torch.arange(9, device=a.device)
    ny, nx = y[:, None] + steps // 3 - 1, x[:, None] + steps % 3 - 1                         # (N,9)
    inside = (ny >= 0) & (ny < h) & (nx >= 0) & (nx < w)
    index = torch.where(inside, ny * w + nx, 0)
    result = []
    for row in a:                                                 # image by image: the sort needs memory
        low, high = row.quantile(torch.tensor([0.1, 0.9], device=a.device, dtype=a.dtype), dim=1, keepdim=True)
        row = 28 * row.clamp(low, high).softmax(1)
        near = row.gather(1, index)                                                          # (N,9)
        near = near * (inside & (near >= row.mean(1, keepdim=True))) / inside.sum(1, keepdim=True)
        result.append(near.T.unflatten(1, (h, w)))
    return torch.stack(result)


def mix(code, near):
    """Code (B,K,h,w), `window` (B,9,h,w) -> each code a weighted sum of its 3 x 3 surroundings, eq. 9."""
    h, w = code.shape[2:]
    padded = F.pad(code, (1, 1, 1, 1))
    return sum(near[:, k:k + 1] * padded[:, :, k // 3:k // 3 + h, k % 3:k % 3 + w] for k in range(9))


def mix_local(code, attention):
    """Code (B,K,h,w), soft-maxed attention (B,heads,p+N,p+N) with p prefix tokens -> mixed code (B,K,h,w)."""
    return mix(code, window(attention, *code.shape[2:]))


def propagated_loss(z, near, masks, negatives, own, lam, tau):
    """Loss propagation, the alternative of table 5: the loss of a patch (its positives and negatives) is also asked of the
    patches that it attends to, in proportion to `near` (B,9,h,w); arguments as for `Contrast`, z (M,K) -> scalar."""
    N, (h, w) = len(negatives), near.shape[2:]

    def term(padded, k, share, weight, allowed):                  # the neighbour at offset k of every patch as anchor
        anchors = padded[k // 3:k // 3 + h, k % 3:k % 3 + w].reshape(N, -1)
        logit = anchors @ z.T / tau                                                          # (N,M)
        lse = logit.masked_fill(~allowed, -1e9).logsumexp(1)
        return (share[k] * (weight.sum(1) * lse - (weight * logit).sum(1))).sum()

    total = z.new_zeros(())
    for b, image in enumerate(own):
        rows = slice(image * N, (image + 1) * N)
        ag, sp = masks(rows, slice(0, len(z)))
        itself = torch.arange(N, device=z.device)[:, None] + image * N == torch.arange(len(z), device=z.device)
        allowed = (ag[0] | negatives) & ~itself                                              # (N,M)
        weight = (ag[0].float() if sp is None else ag[0] + lam * sp[0]).masked_fill(itself, 0)
        weight = weight * (ag[0] & ~itself).any(1, keepdim=True)
        share = near[b].flatten(1) / near[b].flatten(1).sum(0).clamp(min=1e-12)              # (9,N)
        padded = F.pad(z[rows].view(h, w, -1), (0, 0, 1, 1, 1, 1))
        terms = sum(checkpoint(term, padded, k, share, weight, allowed, use_reentrant=False) for k in range(9))
        total = total + tau / 0.07 * terms / weight.sum().clamp(min=1e-12)
    return total / len(own)


def naive_loss(z, z_view, images, tau):
    """Eq. 1, row (g) of table 4: the one positive of a patch is itself in the other view, all others are negatives."""
    M, N = len(z), len(z) // images

    def masks(b, c):
        rows, columns = (torch.arange(x.start, x.stop, device=z.device) for x in (b, c))
        same = (rows[:, None] + M) % (2 * M) == columns
        return (same, same), None
    everyone = torch.ones(N, 2 * M, dtype=torch.bool, device=z.device)
    return Contrast.apply(masks, everyone, range(2 * images), 0.0, tau, True, torch.cat([z, z_view]))


def consistency_loss(z, z_view):
    """Mean Euclidean distance between the projections of two views of a patch; (M,K) twice -> scalar."""
    return (z - z_view + 1e-6).norm(dim=1).mean()


def task_specific_share(step, total, warmup):
    """lambda of eq. 11: 0 during the warm-up, then linearly to 1 (the paper: from the first step on)."""
    return 0.0 if step <= warmup else (step - warmup) / (total - warmup)


# ---------------------------------------------------------------- training

class Views(torch.utils.data.Dataset):
    """Items of `images` with a photometrically changed copy, "view", whose patches stay in place.

    As published the changes act on the normalised image, whose values they clamp to [0,1]: strong, but it is what gave
    the published numbers.
    """

    def __init__(self, images):
        self.images = images
        self.change = v2.Compose([v2.ColorJitter(0.3, 0.3, 0.3, 0.1), v2.RandomGrayscale(0.2),
                                  v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.5)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        item = self.images[i]
        return {**item, "view": self.change(item["image"])}


def random_patch(feats):
    """One random patch of every image: (B,C,h,w) -> (B,C)."""
    at = (common.rand_rows(len(feats), 1, device=feats.device) * feats[0, 0].numel()).long()
    return feats.flatten(2).gather(2, at[:, None].expand(-1, feats.shape[1], -1)).squeeze(2)


@torch.no_grad()
def random_patches(run, features, images, D, size):
    """Features (size,D) of random patches of the training images: one of each image, more where there are fewer images."""
    count = min(run.args.batch_size if run.args.bench else size, len(images))
    chosen = torch.randperm(len(images))[:count]
    at = torch.rand(count, -(-size // count))                     # the same on every process, as is the choice
    found = torch.zeros(*at.shape, D, device=run.device)
    subset = torch.utils.data.Subset(images, chosen.tolist())
    for k, items in enumerate(eval.batches(subset, 16, run.args.workers, "reference pool")):
        rows = slice(16 * (k * run.world + run.rank), 16 * (k * run.world + run.rank) + len(items))
        feats = features(torch.stack([item["image"] for item in items]).to(run.device), chosen[rows])[:, :D]
        feats = feats.flatten(2).mT                                                          # (b,N,D)
        index = (at[rows] * feats.shape[1]).long().to(run.device)
        found[rows] = feats.gather(1, index[..., None].expand(-1, -1, D))
    return common.reduce_sum(found).flatten(0, 1)[:size]


@torch.no_grad()
def pool(run, network, feats):
    """A reference pool of unit vectors (P,C): network, and its dropout, on features (P,D), a share on each process."""
    share = feats.chunk(run.world)[run.rank]
    return F.normalize(common.gather(network(share[:, :, None, None]).flatten(1)), dim=1)


@torch.no_grad()
def update_momentum(model, rate):
    """S' <- rate S' + (1 - rate) S, before every optimiser step as published."""
    for slow, fast in zip(model.momentum.parameters(), model.head.parameters()):
        slow.lerp_(fast, 1 - rate)


def train(args):
    if args.cache_features and (args.consistency or args.naive):
        raise ValueError("the second view of an image is new in every step, so --cache-features cannot keep its features; "
                         "add --consistency 0, as published for Potsdam, or leave the cache out")
    run = common.Run("hp", args)
    images = data.load(args.data, args.root, "train", size=args.size, crops=5 if args.five_crop else None,
                       protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    model = Model(args).to(run.device)
    D, two_views = model.backbone.dim, args.consistency > 0 or args.naive
    features = run.features(model.backbone if args.local == "none" else WithWindow(model.backbone), images)
    view_features = run.features(model.backbone, images) if two_views else None

    optimizer = torch.optim.AdamW(model.head.parameters(), args.lr, weight_decay=args.weight_decay)
    others = torch.optim.Adam([{"params": model.projection.parameters(), "lr": 5e-4},
                               {"params": model.cluster.parameters(), "lr": 5e-3},
                               {"params": model.linear.parameters() if model.linear else [], "lr": 1e-3}])
    size = args.pool // run.world * run.world
    pool_ag = pool(run, drop, random_patches(run, features, images, D, size))                # (P,D), stays
    # The published code renews the task-specific pool from P fresh images each time; here it takes a patch of each of the
    # last P training images, which are fresh too and cost no pass through the backbone.
    recent = random_patches(run, features, images, D, size)                                  # (P,D)
    pool_sp = pool(run, lambda x: drop(model.momentum(x)), recent)                           # (P,K)
    for step, batch in run.steps("head", args.steps, Views(images) if two_views else images, model=model,
                                 optimizer=optimizer, others=others, pool_ag=pool_ag, pool_sp=pool_sp, recent=recent):
        both = features(batch["image"], batch["index"])
        feats, near = both[:, :D], both[:, D:]                                               # (B,D,h,w), (B,9,h,w)
        feats_view = view_features(batch["view"]) if two_views else None
        run.mark("backbone")
        code = model.head(feats)                                                             # (B,K,h,w)
        z = model.project(code)                                                              # (M,K), M = B*N
        z_view = model.project(model.head(feats_view)) if two_views else None
        lam = 0.0 if not args.task_specific else 1.0 if args.bench else \
            task_specific_share(step, args.steps, args.warmup)
        if args.naive:
            contrast = naive_loss(z, z_view, len(feats), args.tau)
        else:
            with torch.no_grad():
                f = common.gather(F.normalize(tokens(drop(feats)), dim=1))                   # (world*M,D)
                slow = common.gather(F.normalize(tokens(drop(model.momentum(feats))), dim=1))   # (world*M,K)
                limits_ag, limits_sp = thresholds(f, pool_ag), thresholds(slow, pool_sp)

            def masks(b, c):                                      # without lambda the task-specific ones are not needed
                return (compare(f, limits_ag, b, c, args.symmetric),
                        compare(slow, limits_sp, b, c, args.symmetric) if lam else None)
            N, images_here = len(z) // len(feats), range(run.rank * len(feats), (run.rank + 1) * len(feats))
            negatives = torch.rand(N, len(f), device=run.device) < args.rho
            z = common.gather(z)
            if args.local == "gradient":                          # Phi of z and Psi of z_mix, eq. 10
                z_mix = common.gather(model.project(drop(mix(code, near))))
                contrast = Contrast.apply(masks, negatives, images_here, lam, args.tau, args.reweight, z, z_mix)
            else:
                contrast = Contrast.apply(masks, negatives, images_here, lam, args.tau, args.reweight, z)
            if args.local == "loss":
                contrast = (contrast + propagated_loss(z, near, masks, negatives, images_here, lam, args.tau)) / 2
        loss = contrast
        if args.consistency and not args.naive:                   # eq. 11: R
            distance = consistency_loss(model.project(code), z_view)
            loss = loss + args.consistency * distance
        run.mark("head and loss")
        cluster, _ = model.cluster(code)
        linear = eval.linear_loss(model.linear(code.detach()), batch["label"]) if model.linear else loss.new_zeros(())
        run.mark("probes")
        if not run.finite(batch, loss=loss, contrast=contrast, cluster=cluster, linear=linear):
            continue
        optimizer.zero_grad(set_to_none=True)
        others.zero_grad(set_to_none=True)
        (loss + cluster + linear).backward()
        common.average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.head.parameters(), 10.0)
        update_momentum(model, args.momentum)                     # before the step, as published
        optimizer.step()
        others.step()
        recent.copy_(torch.cat([recent, common.gather(random_patch(feats))])[-size:])
        if step and step % args.renew == 0:
            pool_sp.copy_(pool(run, lambda x: drop(model.momentum(x)), recent))
        run.mark("backward and optimizer")
    if args.probe == "kmeans" and not args.bench:
        eval.refit_clusters(run, model, images)
    return eval.finish(run, model, images, val)


# ---------------------------------------------------------------- command line

PRESETS = {      # steps = epochs * images * crops / batch; COCO 3, Cityscapes 30 (paper: 20), Potsdam 10 epochs
    "default": dict(size=224, eval_size=320, five_crop=False, steps=3000, batch_size=64, lr=5e-4, weight_decay=0.1,
                    code_dim=512, tau=0.6, consistency=0.05, rho=0.02, pool=2048, renew=100, warmup=100, momentum=0.99,
                    probe="online"),
    "scenes": dict(size=96, eval_size=96, steps=300, batch_size=16, code_dim=64, pool=512, renew=20, warmup=50,
                   probe="kmeans"),
    "camvid": dict(five_crop=True, eval_size=336, steps=600, batch_size=16, code_dim=256, consistency=0.0, renew=20,
                   warmup=50, probe="kmeans"),
    "coco27": dict(five_crop=True, steps=11631, tau=0.8, warmup=1000),
    "coco27/vits16": dict(code_dim=256),
    "cityscapes27": dict(five_crop=True, steps=6960, renew=20, warmup=50, momentum=0.999),
    "potsdam3": dict(steps=710, tau=0.4, consistency=0.0, rho=1.0, pool=1024, renew=20, momentum=0.999, code_dim=256),
    "smoke": dict(steps=10, batch_size=4, pool=64, renew=5, warmup=2, code_dim=32),
}


def arguments():
    p = common.parser(__doc__)
    g = p.add_argument_group("HP")
    g.add_argument("--five-crop", action=argparse.BooleanOptionalAction, help="train on five half-size crops of each image")
    g.add_argument("--eval-size", type=common.whole(8), metavar="PIXELS", help="image side for scoring")
    g.add_argument("--code-dim", type=common.whole(1), help="width K of the code")
    g.add_argument("--tau", type=float, help="temperature; lower separates harder: COCO 0.8, Cityscapes 0.6, Potsdam 0.4")
    g.add_argument("--rho", type=float, help="share of all patches that serve as negatives; 1 where there are few classes")
    g.add_argument("--pool", type=common.whole(1), help="patches in a reference pool; more means fewer, surer positives")
    g.add_argument("--renew", type=common.whole(1), help="steps between renewals of the task-specific pool")
    g.add_argument("--warmup", type=common.whole(0), help="steps without task-specific positives")
    g.add_argument("--momentum", type=float, help="how slowly the momentum head follows: 0.99, long runs 0.999")
    g.add_argument("--consistency", type=float, help="weight of the distance between two views; 0 = row (f) of table 4 and "
                   "half the time of a step")
    g.add_argument("--weight-decay", type=float, help="AdamW's, on the head")
    g.add_argument("--probe", choices=["online", "kmeans"], help="cluster centres: learned beside the head as published, or "
                   "K-means on the final codes of the train split, which keeps small classes")
    g = p.add_argument_group("ablations of the paper")
    g.add_argument("--local", choices=["gradient", "loss", "none"], default="gradient", help="local hidden positives: by "
                   "mixing codes; by loss propagation (table 5, three times slower); none (table 4, rows b and d)")
    g.add_argument("--task-specific", action=argparse.BooleanOptionalAction, default=True,
                   help="positives by the momentum head's codes; --no-task-specific is row (c)")
    g.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True,
                   help="two patches are positives of each other if either says so; --no-symmetric is row (e)")
    g.add_argument("--reweight", action=argparse.BooleanOptionalAction, default=True,
                   help="anchors count by their number of positives, as in the published code")
    g.add_argument("--naive", action="store_true", help="row (g): plain contrast of two views, no hidden positives")
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
