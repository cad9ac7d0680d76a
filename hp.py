"""HP: unsupervised semantic segmentation by contrast with hidden positives (Seong, Moon et al., CVPR 2023).

A small head on frozen patch features is trained by contrast between the patches of a batch. Two patches are
positives if they are more alike than at least one of them is to its nearest patch in a reference pool of
random patches: first by the backbone's features, then more and more also by the codes of a momentum head.
Each patch also passes its gradient on to the neighbours it attends to. K-means on the codes gives the
clusters; a linear probe is trained beside. No label reaches head or clusters.

    python hp.py                                                   # drawn scenes, no download, about a minute
    python hp.py --data coco27 --root data/cocostuff --arch vits8   # paper: 24.6 mIoU with CRF; not run here
    python hp.py --data photos/ --arch vits8 --consistency 0 --cache-features ram       # your own pictures
    python hp.py --data coco27 --root data/cocostuff --arch vits8 --local none --no-task-specific  # table 4 d

The first gives 48.7 +- 5.1 mIoU, K-means on the raw features 40.1 (seeds 0, 1, 2; 18 s on one CPU thread,
torch 2.15).
"""
import common                                                # first: it answers --help before torch is loaded
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

import data
import eval
from eval import ClusterProbe, LinearProbe

# Letters: B images, h w patches, N = h * w, M = B * N patches of a batch, D backbone width, K code width,
# P patches of a reference pool.


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
    """Backbone and local hidden positives: images (B,3,H,W) -> (B,D+9,h,w), features and their `window`.

    Attention: of the last block; the soft-max of cosines where a backbone has none (dct8, resnet50).
    """

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
    """Positives between two ranges of patches, for anchors b and for anchors c: bool (|b|,|c|), eq. 3, 4."""
    cosine = features[b] @ features[c].T
    if symmetric:
        return (cosine > torch.minimum(limits[b, None], limits[None, c]),) * 2
    return cosine > limits[b, None], cosine > limits[None, c]


def hidden_positives(features, pool):
    """Unit (M,D), unit pool (P,D) -> positives (M,M) bool, symmetric and without self, thresholds (M,).

    Two of three vectors are closer to each other than to the one vector of the pool:
    >>> positives, _ = hidden_positives(F.normalize(torch.tensor([[9.0, 1], [8, 1], [1, 9]])),
    ...                                 F.normalize(torch.ones(1, 2)))
    >>> positives.int()
    tensor([[0, 1, 0],
            [1, 0, 0],
            [0, 0, 0]], dtype=torch.int32)
    """
    limits, everything = thresholds(features, pool), slice(0, len(features))
    return compare(features, limits, everything, everything)[0].fill_diagonal_(False), limits


def contrastive_loss(z, z_mix, positives_ag, positives_sp, negatives, lam, tau, reweight=True):
    """Contrast with hidden positives, the mean of Phi over z and Psi over z_mix (eq. 5, 6, 10) -> scalar. To
    read and to copy, as are `hidden_positives` and `mix_local`; `train` gives `Contrast` masks by blocks.

    z, z_mix unit (M,K), M = B*N; positives (M,M) bool; negatives (N,M) bool, a row per patch position, shared
    by the images. The published code, followed here, departs from the paper: both kinds of positives go into
    one average with weights 1 and lam; the denominator is negatives, drawn from all patches, and the
    task-agnostic positives; anchors without a task-agnostic positive are left out; anchors count by their
    number of positives (reweight); all is scaled by tau / 0.07.
    """
    def masks(b, c):
        return (positives_ag[b, c], positives_ag[c, b].T), (positives_sp[b, c], positives_sp[c, b].T)
    return Contrast.apply(masks, negatives, range(len(z) // len(negatives)), lam, tau, reweight, z, z_mix)


class Contrast(torch.autograd.Function):
    """`contrastive_loss` and its gradient in blocks of a few images: no (M,M) similarity is ever held.

    With l_ij = z_i z_j / tau, weights w_ij (1 task-agnostic, lam task-specific), W_i = sum_j w_ij, D_i the
    denominator's patches and Z_i = sum_{j in D_i} exp l_ij, an image's loss is
    -tau/0.07 sum_i a_i (sum_j w_ij l_ij - W_i log Z_i), where a_i = 1 / (sum of W over the image's anchors),
    or without reweighting 1 / (number of anchors * W_i). So d loss / d z = (G + G^T) z / tau with
    G_ij = -tau/0.07 a_i (w_ij - W_i [j in D_i] exp(l_ij) / Z_i).
    l is symmetric, so a block serves its rows and its columns as anchors. First pass: W, Z, value; second: G.
    exp l is kept between the passes for the first gigabyte of blocks, and computed again for the others.
    """

    @staticmethod
    def forward(ctx, masks, negatives, own, lam, tau, reweight, *embeddings):
        """masks(b, c) -> task-agnostic and task-specific (or None) positives, both for anchors b and c, as
        bool (|b|,|c|). own: this process's images; embeddings: z (M,K) over all processes."""
        (N, M), device, E = negatives.shape, negatives.device, len(embeddings)
        step, share = max(1, (4096 if device.type == "cuda" else 1024) // N) * N, len(own) * N
        blocks = [slice(i, min(i + step, p + share)) for p in range(0, M, share)
                  for i in range(p, p + share, step)]
        mine = [b.start // N in own for b in blocks]
        weight, agnostic = torch.zeros(2, M, device=device)
        attracted, total = torch.zeros(2, E, M, device=device)
        scaled, kept, negatives_t = [z / tau for z in embeddings], [], negatives.T.contiguous()
        free = torch.empty(min(2 ** 28, E * share * M), device=device)  # room for exps, in one piece

        def real(mask):                               # 0 or 1; straight from bool takes a CPU 8 times as long
            return mask.view(torch.uint8).float()

        def sides(b, c, ag, sp, mutual):              # anchors b, then c: the axis of a sum, positives, w, D
            for anchors, axis, random in ((b, 1, negatives[:, c]), (c, 0, negatives_t[b]))[:1 + mutual]:
                random = torch.cat([random] * ((anchors.stop - anchors.start) // N), 1 - axis)
                d, p = ag[1 - axis] | random, real(ag[1 - axis])
                w = p if sp is None else torch.add(p, real(sp[1 - axis]), alpha=lam)
                yield anchors, axis, p, w, real(d.fill_diagonal_(False) if b == c else d)

        for i, b in enumerate(blocks):
            for j, c in enumerate(blocks):
                if not mine[i] or (mine[j] and j < i):
                    continue
                ag, sp = masks(b, c)
                if i == j:                                         # a patch is no key of itself
                    other = ~torch.eye(b.stop - b.start, dtype=torch.bool, device=device)
                    ag, sp = (x and [p & other for p in x] for x in (ag, sp))
                block = b, c, ag, sp, mine[j] and j > i
                logits = [x[b] @ z[c].T for x, z in zip(scaled, embeddings)]
                size = E * logits[0].numel()
                space, free = free[:size], free[size:]
                keep = len(space) == size
                space = space.view(E, *logits[0].shape) if keep else [None] * E
                exps = [torch.exp(x, out=place) for x, place in zip(logits, space)]
                for anchors, axis, p, w, d in sides(*block):
                    agnostic[anchors] += p.sum(axis)
                    weight[anchors] += w.sum(axis)
                    for e in range(E):
                        attracted[e, anchors] += (w * logits[e]).sum(axis)
                        total[e, anchors] += (d * exps[e]).sum(axis)
                kept.append((block, exps if keep else None))

        def per_image(x):                          # sum over an image's patches, at each of them
            return x.view(-1, N).sum(1).clamp(min=1e-12).repeat_interleave(N)
        anchor = agnostic > 0
        a = anchor / (per_image(weight * anchor) if reweight else per_image(anchor) * weight.clamp(min=1e-12))
        a = -tau / 0.07 / len(own) / E * a
        total = total.where(anchor, torch.ones_like(total))
        loss = (a * (attracted - weight * total.log())).sum()
        pull, push = a / tau, a * weight / total / tau                                       # (M,), (E,M)
        gradients = [torch.zeros_like(z) for z in embeddings]
        while kept:
            (b, c, *more), exps = kept.pop()
            exps = exps or [(x[b] @ z[c].T).exp_() for x, z in zip(scaled, embeddings)]
            attract, repel = 0, [0] * E                    # G = w * pull - D * push * exp l, of both sides
            for anchors, axis, _, w, d in sides(b, c, *more):
                attract = attract + w * pull[anchors].unsqueeze(axis)
                for e in range(E):
                    repel[e] = repel[e] + d * push[e, anchors].unsqueeze(axis)
            for e, z in enumerate(embeddings):
                G = torch.addcmul(attract, repel[e], exps[e], value=-1)
                gradients[e][b] += (G + G.T if b == c else G) @ z[c]
                if b != c:
                    gradients[e][c] += G.T @ z[b]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return (None,) * 6 + tuple(gradient * g for g in ctx.saved_tensors)


def window(attention, h, w):
    """Attention (B,heads,p+N,p+N), p prefix tokens -> (B,9,h,w): what a patch takes of its 3 x 3 neighbours.

    As published, and other than eq. 7 to 9: each row is clipped to its 10 and 90 % quantiles and soft-maxed
    again, times 28; what is below the row's mean counts 0; the sum is divided by the size of the window.
    """
    N, device = h * w, attention.device
    at, steps = torch.arange(N, device=device)[:, None], torch.arange(9, device=device)
    y, x = at // w + steps // 3 - 1, at % w + steps % 3 - 1                                  # (N,9)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    levels, result = torch.tensor([0.1, 0.9], device=device), []
    for row in attention[:, :, -N:, -N:].mean(1):                  # image by image: the sort needs memory
        low, high = row.quantile(levels, dim=1, keepdim=True)
        row = 28 * row.clamp(low, high).softmax(1)                                           # (N,N)
        near = row.gather(1, torch.where(inside, y * w + x, 0))                              # (N,9)
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
    """Loss propagation (table 5): the loss of a patch, with its positives and negatives, is asked of the
    patches that it attends to, in proportion to `near` (B,9,h,w). z (M,K), the rest as in `Contrast`."""
    N, (h, w) = len(negatives), near.shape[2:]

    def term(padded, k, share, weight, allowed):                   # anchors: every patch's neighbour k
        anchors = padded[k // 3:k // 3 + h, k % 3:k % 3 + w].reshape(N, -1)
        logit = anchors @ z.T / tau                                                          # (N,M)
        lse = logit.masked_fill(~allowed, -1e9).logsumexp(1)
        return (share[k] * (weight.sum(1) * lse - (weight * logit).sum(1))).sum()

    total = z.new_zeros(())
    for b, image in enumerate(own):
        rows = slice(image * N, (image + 1) * N)
        ag, sp = masks(rows, slice(0, len(z)))
        index = torch.arange(len(z), device=z.device)
        itself = index[rows, None] == index
        allowed = (ag[0] | negatives) & ~itself                                              # (N,M)
        weight = (ag[0].float() if sp is None else ag[0] + lam * sp[0]).masked_fill(itself, 0)
        weight = weight * (ag[0] & ~itself).any(1, keepdim=True)
        share = near[b].flatten(1) / near[b].flatten(1).sum(0).clamp(min=1e-12)              # (9,N)
        padded = F.pad(z[rows].view(h, w, -1), (0, 0, 1, 1, 1, 1))
        terms = sum(checkpoint(term, padded, k, share, weight, allowed, use_reentrant=False)
                    for k in range(9))
        total = total + tau / 0.07 * terms / weight.sum().clamp(min=1e-12)
    return total / len(own)


def naive_loss(z, z_view, images, tau):
    """Eq. 1 times tau / 0.07, row (g) of table 4: the positive of a patch is itself in the other view, all
    others repel."""
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
    """lambda of eq. 11: 0 during the warm-up, then linearly to 1 (the paper: from the first step on).

    >>> [task_specific_share(step, 100, 20) for step in (0, 20, 60, 100)]
    [0.0, 0.0, 0.5, 1.0]
    """
    return 0.0 if step <= warmup else (step - warmup) / (total - warmup)


# ---------------------------------------------------------------- training

class Views(torch.utils.data.Dataset):
    """Items of `images` with a photometrically changed copy, "view", whose patches stay in place.

    As published the changes act on the normalised image, whose values they clamp to [0,1].
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
    """Features (size,D) of random patches, one of each training image, more where there are fewer images."""
    count = min(run.args.batch_size if run.args.bench else size, len(images))
    chosen = torch.randperm(len(images))[:count]
    at = torch.rand(count, -(-size // count))                    # the same on every process
    found = torch.zeros(*at.shape, D, device=run.device)
    subset = torch.utils.data.Subset(images, chosen.tolist())
    for k, items in enumerate(eval.batches(subset, 16, run.args.workers, "reference pool")):
        rows = slice(16 * (k * run.world + run.rank), 16 * (k * run.world + run.rank) + len(items))
        feats = features(common.together(items)["image"].to(run.device), chosen[rows])[:, :D]
        feats = feats.flatten(2).mT                                                          # (b,N,D)
        index = (at[rows] * feats.shape[1]).long().to(run.device)
        found[rows] = feats.gather(1, index[..., None].expand(-1, -1, D))
    return common.reduce_sum(found).flatten(0, 1)[:size]


@torch.no_grad()
def pool(run, network, feats):
    """A reference pool of unit vectors (P,C): network, with its dropout, on features (P,D), shared out."""
    share = feats.chunk(run.world)[run.rank]
    return F.normalize(common.gather(network(share[:, :, None, None]).flatten(1)), dim=1)


@torch.no_grad()
def update_momentum(model, rate):
    """S' <- rate S' + (1 - rate) S, before every optimiser step as published."""
    for slow, fast in zip(model.momentum.parameters(), model.head.parameters()):
        slow.lerp_(fast, 1 - rate)


def train(args):
    if args.cache_features and (args.consistency or args.naive):
        raise ValueError("the second view of an image is new in every step, so --cache-features cannot "
                         "keep it; add --consistency 0, as published for Potsdam, or leave the cache out")
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
    linear_parameters = model.linear.parameters() if model.linear else []
    others = torch.optim.Adam([{"params": model.projection.parameters(), "lr": 5e-4},
                               {"params": model.cluster.parameters(), "lr": 5e-3},
                               {"params": linear_parameters, "lr": 1e-3}])
    size = args.pool // run.world * run.world
    pool_ag = pool(run, drop, random_patches(run, features, images, D, size))                # (P,D), stays
    # The published code renews the task-specific pool from P fresh images each time; here it takes a patch of
    # each of the last P training images, which are fresh too and cost no pass through the backbone.
    recent = random_patches(run, features, images, D, size)                                  # (P,D)
    pool_sp = pool(run, lambda x: drop(model.momentum(x)), recent)                           # (P,K)
    state = dict(model=model, optimizer=optimizer, others=others, pool_ag=pool_ag, pool_sp=pool_sp,
                 recent=recent)
    for step, batch in run.steps("head", args.steps, Views(images) if two_views else images, **state):
        both = features(batch["image"], batch["index"])
        feats, near = both[:, :D], both[:, D:]                                          # (B,D,h,w), (B,9,h,w)
        feats_view = view_features(batch["view"]) if two_views else None
        run.mark("backbone")
        code = model.head(feats)                                                             # (B,K,h,w)
        z = model.project(code)                                                              # (M,K), M = B*N
        z_view = model.project(model.head(feats_view)) if two_views else None
        lam = 0.0 if not args.task_specific else 1.0 if args.bench else \
            task_specific_share(step, args.steps, args.warmup)
        if args.naive:
            contrast = naive_loss(common.gather(z), common.gather(z_view), len(feats) * run.world, args.tau)
        else:
            with torch.no_grad():
                f = common.gather(F.normalize(tokens(drop(feats)), dim=1))                   # (world*M,D)
                slow = common.gather(F.normalize(tokens(drop(model.momentum(feats))), dim=1))
                limits_ag, limits_sp = thresholds(f, pool_ag), thresholds(slow, pool_sp)

            def masks(b, c):                      # the task-specific ones only where they count
                return (compare(f, limits_ag, b, c, args.symmetric),
                        compare(slow, limits_sp, b, c, args.symmetric) if lam else None)
            own = range(run.rank * len(feats), (run.rank + 1) * len(feats))
            negatives = torch.rand(len(z) // len(feats), len(f), device=run.device) < args.rho
            embeddings = [common.gather(z)]
            if args.local == "gradient":                           # Phi of z and Psi of z_mix, eq. 10
                embeddings.append(common.gather(model.project(drop(mix(code, near)))))
            contrast = Contrast.apply(masks, negatives, own, lam, args.tau, args.reweight, *embeddings)
            if args.local == "loss":
                spread = propagated_loss(embeddings[0], near, masks, negatives, own, lam, args.tau)
                contrast = (contrast + spread) / 2
        distance = consistency_loss(z, z_view) if two_views else 0 * contrast                # R
        loss = contrast + args.consistency * distance * (not args.naive)                     # eq. 11
        run.mark("head and loss")
        cluster, _ = model.cluster(code)
        linear = 0 * cluster
        if model.linear:
            linear = eval.linear_loss(model.linear(code.detach()), batch["label"])
        run.mark("probes")
        if not run.finite(batch, loss=loss, contrast=contrast, consistency=distance, cluster=cluster,
                          linear=linear):
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

# Steps = epochs * images * crops / batch: COCO 3, Cityscapes 30 (paper: 20), Potsdam 10 epochs.
PRESETS = {
    "default": dict(size=224, eval_size=320, five_crop=False, steps=3000, batch_size=64, lr=5e-4,
                    weight_decay=0.1, code_dim=512, tau=0.6, consistency=0.05, rho=0.02, pool=2048,
                    renew=100, warmup=100, momentum=0.99, probe="online"),
    "folder": dict(steps=1000, batch_size=16, probe="kmeans"),
    # a large pool asks for closer positives; lambda stays 0, since few steps leave no codes worth following
    "scenes": dict(size=96, eval_size=96, steps=300, batch_size=4, lr=1e-2, code_dim=64, consistency=0.0,
                   pool=4096, renew=20, warmup=300, probe="kmeans"),
    "camvid": dict(eval_size=224, steps=200, batch_size=8, code_dim=256, consistency=0.0, pool=1024, renew=20,
                   warmup=50, probe="kmeans"),
    "coco27": dict(five_crop=True, steps=11631, tau=0.8, warmup=1000),
    "coco27/vits16": dict(code_dim=256),
    "cityscapes27": dict(five_crop=True, steps=6960, renew=20, warmup=50, momentum=0.999),
    "potsdam3": dict(steps=710, tau=0.4, consistency=0.0, rho=1.0, pool=1024, renew=20, momentum=0.999,
                     code_dim=256),
    "smoke": dict(steps=10, batch_size=4, pool=64, renew=5, warmup=2, code_dim=32),
}


def arguments():
    p, switch = common.parser(__doc__), common.argparse.BooleanOptionalAction
    g = p.add_argument_group("HP")
    g.add_argument("--eval-size", type=common.whole(8), metavar="PIXELS", help="image side for scoring")
    g.add_argument("--code-dim", type=common.whole(1), help="width K of the code")
    g.add_argument("--tau", type=float, help="temperature; lower separates harder")
    g.add_argument("--rho", type=float, help="share of patches that are negatives; 1 where classes are few")
    g.add_argument("--pool", type=common.whole(1), help="patches in a pool; more: fewer but surer positives")
    g.add_argument("--renew", type=common.whole(1), help="steps between renewals of the task-specific pool")
    g.add_argument("--warmup", type=common.whole(0), help="steps without task-specific positives")
    g.add_argument("--momentum", type=float, help="how slowly the momentum head follows; 0.99 or 0.999")
    g.add_argument("--consistency", type=float, help="weight of the distance between two views; 0 is row (f) "
                   "of table 4 and saves half of the backbone's work")
    g.add_argument("--weight-decay", type=float, help="AdamW's, on the head")
    g.add_argument("--probe", choices=["online", "kmeans"], help="cluster centres: learned beside the head "
                   "as published, or K-means on the final codes of the train split: keeps small classes")
    g = p.add_argument_group("ablations of tables 4 and 5")
    g.add_argument("--five-crop", action=switch, help="train on five half-size crops of each image")
    g.add_argument("--local", choices=["gradient", "loss", "none"], default="gradient", help="local ones: "
                   "by mixing codes; by loss propagation (table 5, slow); none (table 4, rows b and d)")
    g.add_argument("--task-specific", action=switch, default=True, help="positives by codes; off is row (c)")
    g.add_argument("--symmetric", action=switch, default=True, help="patches are positives of each other if "
                   "either says so; off is row (e)")
    g.add_argument("--reweight", action=switch, default=True, help="anchors count by their positives")
    g.add_argument("--naive", action="store_true", help="row (g): plain contrast of two views")
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
