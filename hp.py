"""HP: unsupervised segmentation by contrast with hidden positives (Seong, Moon et al., CVPR 2023).

A small head on frozen patch features is trained by contrast between the patches of a batch. Two
patches are positives if they are more alike than one of them is to its nearest in a reference pool
of random patches: by the backbone's features, then more and more also by a momentum head's codes.
Each patch passes its gradient on to the neighbours it attends to. K-means on the codes gives the
clusters; a linear probe is trained beside. No label reaches head or clusters.

    python hp.py                                                   # drawn scenes, about a minute
    python hp.py --data photos/ --arch dinov2_vits14 --cache-features  # your own
    python hp.py --data coco27 --root data/cocostuff --arch vits8  # the paper's; not run here

The first gives 45.4 +- 6.4 mIoU, K-means on the raw features 37.1 (seeds 0, 1, 2; 15 CPU-seconds,
torch 2.14); with a ViT-S/14 CamVid 28.7 +- 1.4 against 25.2, MSRC-21 36.0 +- 2.8 against 21.5.

Paper                      here (M = B*N patches of a batch)
f_i, s_i, s'_i, z_i        feats (B,D,h,w), code (B,K,h,w), momentum(feats), z (M,K)
S, S', Z; Q^ag, Q^sp       head, momentum, projection; pool_ag, pool_sp, of --pool (its M) vectors
c_i, P^ag, P^sp (eq. 2-4)  `hidden_positives` (GHP): positives_ag, positives_sp (M,M)
N_i; L^cont, Phi, Psi      negatives (N,M); `contrastive_loss`
I^local, T (LHP), s^mix    `window` (B,9,h,w); `mix`, or `mix_local` from attention
R, alpha; lambda           `consistency_loss`, --consistency; `task_specific_share`

Departures from the paper (p) and from the published code (c)
p  eq. 11 adds four means; here as in the code half of Phi and Psi, each a mean over both kinds of
   positives, of weights 1 and lambda; anchors count by their positives, all is times tau / 0.07
p  eq. 5 compares with N and its own P; here as in the code with N and P^ag, for both kinds
p  the head is a two-layer MLP, R compares two changed views; here as in the code a linear branch
   too, and the image as it is with one that is changed
p  N_i is drawn from the rest, per kind; here as in the code once, from all patches, for all images
p  anchors without a positive are left out; here as in the code without a task-agnostic one
p  eq. 7 takes attention above its mean; here as in the code clipped, soft-maxed again, times 28
p  eq. 9 divides by |I^local|; here as in the code by the patches of the 3 x 3 window
p  eq. 10 mixes z_i (of z_p it says nothing); here as in the code all that it is compared with too
p  lambda grows at once; here as in the code after a warm-up (--warmup 0: the paper)
p  f_i, s'_i, s^mix and both pools are bare; here as in the code all pass a dropout of channels
p  Q^sp is renewed every 100 steps; here as in the code every 20 off COCO
p  20 epochs of Cityscapes; here as in the code 30; its Potsdam has K = 256, rho = 1, alpha = 0
p  --probe kmeans: centres that learn online and never win never move, and small classes are lost
c  Q^sp is built by a pass over other images; here from a patch of each image trained on last;
   both pools start from the same patches
c  fp16, crops as JPEG files, a random linear probe; here bf16 and TF32, on the fly, one from zero
c  NaN where images are fewer than pool rows, or one has no positives; here more patches, and 0
c  the best validation checkpoint counts, pools age by the epoch; here the last, and by the run

The tables, with B="--data coco27 --root data/cocostuff", S="$B --arch vits8"; behind each command
the paper's clusters with CRF, mIoU / accuracy: python eval.py RUN --crf
1  python hp.py $S  24.6 / 57.2;  python hp.py $B --arch vits16  24.3 / 54.5
   python hp.py $B --arch selfpatch_vits16 --weights FILE  23.2 / 56.1
2  python hp.py --data cityscapes27 --root data/cityscapes --arch vits8  18.4/80.1; vitb8 18.4/79.5
3  python hp.py --data potsdam3 --root data/potsdam --arch vitb8  - / 82.4
4  python hp.py $S, alone (a), with (b) --no-local 23.1 / 52.5, (c) --no-task-specific 19.1 / 55.0,
   (d) --no-local --no-task-specific 20.1 / 49.3, (e) --no-symmetric 23.6 / 54.0,
   (f) --consistency 0 24.5 / 55.8, (g) --naive 10.4 / 37.8
5  GradProp is 1; LossProp (a mIoU less, three times the time) is not here. 6: the presets.
"""
import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

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
    alpha = 2  # not the paper's: the CRF gets log-softmax(2 * cosine)

    def __init__(self, args):
        super().__init__()
        self.backbone = common.load_backbone(args.arch, args.weights, args.depth)
        if args.remove_position is not False:  # None, on a folder: decided on its images
            self.backbone = common.WithoutPlace(self.backbone, args.size)
        self.head = Head(self.backbone.dim, args.code_dim)
        self.momentum = copy.deepcopy(self.head).requires_grad_(False)  # S', follows the head
        self.projection = nn.Linear(args.code_dim, args.code_dim)  # Z
        self.linear = eval.LinearProbe(args.code_dim, args.classes) if args.classes else None
        self.cluster = eval.ClusterProbe(args.code_dim, args.clusters)

    def forward(self, images):
        return self.head(self.backbone(images))

    def project(self, code):
        """Code (B,K,h,w) -> unit vectors z (M,K)."""
        return F.normalize(self.projection(tokens(code)), dim=1)


def tokens(x):
    """(B,C,h,w) -> (B*N,C)."""
    return x.flatten(2).mT.flatten(0, 1)


class WithWindow(nn.Sequential):
    """Images (B,3,H,W) -> (B,D+9,h,w): features and `window`, from the last block's attention."""
    def forward(self, images):
        feats, attention = self[0].forward_with_attention(images)
        near = window(attention.float(), *feats.shape[2:])
        return torch.cat([feats, near.to(feats.dtype)], 1)


# ---------------------------------------------------------------- loss

def hidden_positives(features, pool, symmetric=True):
    """Unit (M,D), unit pool (pool,D) -> positives (M,M) bool, without self, and criteria c (M,).

    Two of three vectors are closer to each other than to the one vector of the pool:
    >>> hidden_positives(torch.eye(2)[[0, 0, 1]], torch.tensor([[0.6, 0.8]]))[0].int().tolist()
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]]"""
    c = (features @ pool.T).amax(1)  # eq. 2
    positives = features @ features.T > c[:, None]  # row i: sim(f_i, f_j) > c_i
    if symmetric:
        positives = positives | positives.T  # or > c_j, eq. 3 and 4
    return positives.fill_diagonal_(False), c


def contrastive_loss(z, z_mix, positives_ag, positives_sp, negatives, lam, tau, reweight=True):
    """tau / 0.07 times the average of Phi's mean (eq. 6, z) and Psi's (eq. 10, z_mix) -> scalar.

    z, z_mix unit (M,K); positives (M,M) bool; negatives (N,M) bool, for the patches of any image.
    Each image is computed again for the gradient: memory for one (N,M)."""
    N, patches = len(negatives), torch.arange(len(z), device=z.device)

    def image_loss(z, z_mix, anchors):
        others = anchors[:, None] != patches  # (N,M)
        ag, sp = positives_ag[anchors] & others, positives_sp[anchors] & others
        kept = ag.any(1)  # anchors without a task-agnostic positive are left out
        weight = (ag + lam * sp)[kept]  # 1 for P^ag, lambda for P^sp
        compared = ((ag | negatives) & others)[kept]  # N_i u P_i^ag
        W = weight.sum(1)  # |P^ag| + lambda |P^sp|
        # an anchor's share of the mean: reweight cancels the 1/|P| of eq. 5, as in the code
        share = W if reweight else torch.ones_like(W)
        loss = 0
        for x in (z, z_mix):
            logit = x[anchors[kept]] @ x.T / tau  # sim(z_i, z_j) / tau
            log_E = logit.masked_fill(~compared, -torch.inf).logsumexp(1, keepdim=True)
            L_cont = -(weight * (logit - log_E)).sum(1) / W  # eq. 5
            loss = loss + (share * L_cont).sum() / share.sum().clamp(min=1e-12) / 2
        return loss

    losses = [checkpoint(image_loss, z, z_mix, anchors, use_reentrant=False)
              for anchors in patches.split(N)]
    return tau / 0.07 * sum(losses) / len(losses)


def naive_loss(z, z_view, N, tau):
    """Eq. 1 times tau / 0.07, row (g) of table 4: the positive of a patch is itself in the other
    view, all others repel. z, z_view unit (M,K) -> scalar; N anchors at a time, P^sp weighs 0."""
    both = torch.cat([z, z_view])
    itself = torch.eye(len(both), dtype=torch.bool, device=z.device).roll(len(z), 0)
    return contrastive_loss(both, both, itself, itself, itself.new_ones(N, len(both)), 0.0, tau)


def window(attention, h, w):
    """Attention (B,heads,prefix+N,prefix+N) -> (B,9,h,w): what a patch takes of its 3 x 3
    neighbours, eq. 7 to 9, with sigma.
    A row is clipped to its 10 and 90 % quantiles and soft-maxed again, times 28; less than its mean
    counts 0; all is divided by the size of the window."""
    N, device = h * w, attention.device
    at, steps = torch.arange(N, device=device)[:, None], torch.arange(9, device=device)
    y, x = at // w + steps // 3 - 1, at % w + steps % 3 - 1  # (N,9)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    levels, result = torch.linspace(0.1, 0.9, 2, device=device), []
    for row in attention[:, :, -N:, -N:].mean(1):  # image by image: the sort needs memory
        low, high = row.quantile(levels, dim=1, keepdim=True)
        row = 28 * row.clamp(low, high).softmax(1)  # sigma = 28; (N,N)
        near = row.gather(1, torch.where(inside, y * w + x, 0))  # (N,9)
        near = near * (inside & (near >= row.mean(1, keepdim=True)))
        result.append((near / inside.sum(1, keepdim=True)).T.unflatten(1, (h, w)))
    return torch.stack(result)


def mix(code, near):
    """Code (B,K,h,w), `window` (B,9,h,w) -> weighted sums of 3 x 3 neighbours (B,K,h,w), eq. 9."""
    (h, w), padded = code.shape[2:], F.pad(code, (1, 1, 1, 1))
    shifted = (padded[:, :, y:y + h, x:x + w] for y in range(3) for x in range(3))
    return sum(near[:, k, None] * code_k for k, code_k in enumerate(shifted))


def mix_local(code, attention):
    """Code (B,K,h,w), soft-maxed attention (B,heads,prefix+N,prefix+N) -> (B,K,h,w)."""
    return mix(code, window(attention, *code.shape[2:]))


def consistency_loss(z, z_view):
    """R: mean distance of the projections of two views of a patch; (M,K) twice -> scalar."""
    return (z - z_view + 1e-6).norm(dim=1).mean()


def task_specific_share(step, total, warmup):
    """lambda of eq. 11: 0 during the warm-up, then linearly to 1."""
    return 0.0 if step <= warmup else (step - warmup) / (total - warmup)


# ---------------------------------------------------------------- training

class Views(torch.utils.data.Dataset):
    """Items of `images` with "view": photometrically changed, and clamped to [0,1] as published."""
    def __init__(self, images):
        self.images = images
        self.change = v2.Compose([v2.ColorJitter(0.3, 0.3, 0.3, 0.1), v2.RandomGrayscale(0.2),
                                  v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.5)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        item = self.images[i]
        return {**item, "view": self.change(item["image"])}


def at_random(feats, draws):
    """Features (B,D,h,w), uniform draws (B,n) -> n random patches of each image (B,n,D)."""
    index = (draws * feats[0, 0].numel()).long()
    return feats.flatten(2).mT[torch.arange(len(feats), device=feats.device)[:, None], index]


@torch.no_grad()
def random_patches(run, features, images, D, size):
    """Features (size,D) of one random patch of each image, more where there are fewer images."""
    few = run.args.bench or run.args.resume  # then it does not matter which
    count, found = min(run.args.batch_size if few else size, len(images)), []
    chosen = torch.randperm(len(images), generator=run.shared, device=run.device)[:count].tolist()
    for items in eval.batches(images, 16, run.args.workers, "reference pool", order=chosen):
        draws = torch.rand(len(items), -(-size // count), generator=run.shared, device=run.device)
        found.append(at_random(features(torch.utils.data.default_collate(items))[:, :D], draws))
    return torch.cat(found).flatten(0, 1)[:size]


@torch.no_grad()
def pool_of(run, network, feats):
    """Reference pool of unit vectors: network, with its dropout, on (size,D), by shares."""
    share = feats.chunk(run.world)[run.rank][:, :, None, None]
    return F.normalize(common.gather(network(share).flatten(1)), dim=1)


def schedule(args, n):
    """Steps of the published epochs over n images, each without its last, short batch."""
    args.steps = args.steps or args.epochs * max(1, n // args.batch_size)


def train(args):
    two_views = args.consistency > 0 or args.naive
    if args.cache_features and two_views:
        raise ValueError("--cache-features cannot keep new second views; add --consistency 0")
    images = data.load(args.data, args.root, "train", size=args.size,
                       crops=5 if args.five_crop else None, protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    schedule(args, len(images))
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    run = common.Run("hp", args, images, val)
    model = Model(args).to(run.device)
    features = run.features(WithWindow(model.backbone) if args.local else model.backbone, images)
    view_features = run.features(model.backbone, images) if two_views else None

    optimizer = torch.optim.AdamW([
        {"params": model.head.parameters(), "lr": args.lr, "weight_decay": args.weight_decay},
        {"params": model.projection.parameters(), "lr": 5e-4, "weight_decay": 0.0}])
    probes = torch.optim.Adam([
        {"params": model.cluster.parameters(), "lr": 5e-3},
        {"params": model.linear.parameters() if model.linear else [], "lr": 1e-3}])
    D, drop, size = model.backbone.dim, model.head.drop, args.pool // run.world * run.world
    recent = random_patches(run, features, images, D, size)  # (pool,D), then of the latest
    pool_ag = pool_of(run, drop, recent)  # (pool,D), stays
    pool_sp = pool_of(run, lambda x: drop(model.momentum(x)), recent)  # (pool,K)
    run.keep(model=model, optimizer=optimizer, probes=probes, pool_ag=pool_ag, pool_sp=pool_sp,
             recent=recent)
    for step, batch in run.loop("head", Views(images) if two_views else images, args.steps):
        feats, near = features(batch).tensor_split([D], 1)  # (B,D,h,w); (B,9,h,w) or (B,0,h,w)
        code = model.head(feats)  # (B,K,h,w)
        z = model.project(code)  # (M,K)
        N = len(z) // len(feats)
        z_view = model.project(model.head(view_features(batch, "view"))) if two_views else None
        lam = 1.0 if args.bench else task_specific_share(step, args.steps, args.warmup)
        lam *= args.task_specific

        if args.naive:
            contrast = naive_loss(common.gather(z), common.gather(z_view), N, args.tau)
        else:
            with torch.no_grad():  # unit f_i (M,D) and s'_i (M,K), of all processes
                f, s = (common.gather(F.normalize(tokens(drop(x)), dim=1))
                        for x in (feats, model.momentum(feats)))
                positives_ag, _ = hidden_positives_by_strips(f, pool_ag, args.symmetric)
                positives_sp = (hidden_positives_by_strips(s, pool_sp, args.symmetric)[0] if lam
                                else positives_ag)  # P^sp weighs nothing
            negatives = torch.rand(N, len(f), generator=run.shared, device=run.device) < args.rho
            z_mix = model.project(drop(mix(code, near))) if args.local else z
            terms = (common.gather(z), common.gather(z_mix), positives_ag, positives_sp, negatives,
                     lam, args.tau, args.reweight)
            own = slice(run.rank * len(z), (run.rank + 1) * len(z))  # anchors of this process
            contrast = Contrast.apply(*terms, own) if args.symmetric else contrastive_loss(*terms)
        distance = consistency_loss(z, z_view) if two_views else 0 * contrast
        loss = contrast if args.naive else contrast + args.consistency * distance  # eq. 11

        cluster, linear = eval.probe_losses(model, code, batch["label"])
        run.log(loss=loss, contrast=contrast, consistency=distance, cluster=cluster, linear=linear)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.head.parameters(), 10.0)
        for slow, fast in zip(model.momentum.parameters(), model.head.parameters()):
            slow.data.lerp_(fast.data, 1 - args.momentum)  # before the step, as published
        optimizer.step()
        probes.zero_grad(set_to_none=True)
        (cluster + linear).backward()
        probes.step()
        newest = common.gather(at_random(feats, run.rand(len(feats), 1)).squeeze(1))
        recent.copy_(torch.cat([recent, newest])[-size:])
        if step and step % args.renew == 0:
            pool_sp.copy_(pool_of(run, lambda x: drop(model.momentum(x)), recent))
    return eval.finish(run, model, images, val)


# ---------------------------------------------------------------- fast forms: the same numbers

def hidden_positives_by_strips(features, pool, symmetric=True):
    """Equals `hidden_positives`, three times as fast: 0.9 s against 2.8 s for 16 images of 784
    patches, D = 384, one thread; and without an (M,M) of floats."""
    if not symmetric:
        return hidden_positives(features, pool, False)
    M = len(features)
    c = torch.cat([(part @ pool.T).amax(1) for part in features.split(512)])
    positives = torch.empty(M, M, dtype=torch.bool, device=features.device)
    for i in range(0, M, 512):  # rows from the diagonal on: similarities are symmetric
        rows, rest = slice(i, i + 512), slice(i, M)
        found = features[rows] @ features[rest].T > torch.minimum(c[rows, None], c[rest])
        positives[rest, rows], positives[rows, rest] = found.T, found
    return positives.fill_diagonal_(False), c


class Contrast(torch.autograd.Function):
    """Equals `contrastive_loss` for symmetric positives without self, five times as fast: 7 s, not
    34 with the gradient for 16 images of 784 patches, K = 512, one thread.

    In closed form, by blocks of the (M,M) matrix whose rows and columns are anchors. With l_ij =
    z_i z_j / tau, w_ij the weight of a positive, W_i = sum_j w_ij, A_i what i is compared with,
    E_i = sum of exp l_ij over A_i, and a_i = (the anchor's share of the loss) / W_i:
        loss = sum_i a_i (W_i log E_i - sum_j w_ij l_ij),   d loss / d z_i = sum_j G_ij z_j / tau,
        G_ij = (r_i [j in A_i] + r_j [i in A_j]) exp l_ij - (a_i + a_j) w_ij,   r_i = a_i W_i / E_i
    `first_pass` finds E and the value, `second_pass` G. The first GB of exp l is kept meanwhile.
    On CUDA both are compiled: 6 launches for 40, a quarter of the memory traffic, by count."""
    @staticmethod
    def forward(ctx, z, z_mix, positives_ag, positives_sp, negatives, lam, tau, reweight, own):
        """own: slice of the patches of this process; all else is of all processes."""
        (N, M), x = negatives.shape, torch.stack([z, z_mix])  # (2,M,K)
        lam = z.new_full((), lam)  # a number would be compiled anew each step
        scaled, negatives_t = x / tau, negatives.T.contiguous()
        most = max(1, (4096 if z.is_cuda else 1024) // N)  # images to a block; all have one size
        side = N * max(n for n in range(1, most + 1) if M // N % n == 0)
        blocks = [slice(i, i + side) for i in range(0, M, side)]
        pairs = [(b, c) for i, b in enumerate(blocks) for c in blocks[i:]
                 if any(y.start < own.stop and own.start < y.stop for y in (b, c))]
        n_ag, n_sp = (torch.cat([rows.view(torch.uint8).sum(1, dtype=torch.float32)  # (M,) each
                                 for rows in y.split(4096 if z.is_cuda else 64)])  # a CPU's cache
                      for y in (positives_ag, positives_sp))
        W = n_ag + lam * n_sp
        share = torch.zeros_like(W)
        share[own] = (n_ag[own] > 0).float()  # the others are left out
        share = (share * W if reweight else share).view(-1, N)
        share = share / share.sum(1, keepdim=True).clamp(min=1e-12)  # adds up to 1 in an image
        images = (own.stop - own.start) // N
        a = tau / 0.07 / 2 / images * share.flatten() / W.clamp(min=1e-12)

        fuse = z.is_cuda and len(pairs) > 1  # else compiling takes longer than it saves
        first, second = (torch.compile(f) if fuse else f for f in (first_pass, second_pass))
        loss, E, kept = 0, torch.zeros(2, M, device=z.device), []
        for b, c in pairs:
            block = (b == c, lam, positives_ag[b, c], positives_sp[b, c], a[b], a[c],
                     negatives_t[b], negatives[:, c]), scaled[:, b], x[:, c]
            pull, E_b, E_c, exp = first(*block)
            loss = loss - pull / (2 if b == c else 1)  # a diagonal block has each pair twice
            E[:, b] += E_b
            if b != c:
                E[:, c] += E_c
            kept.append((b, c, block, exp if len(kept) < 2 ** 27 // side ** 2 else None))
        E = E.where(a > 0, torch.ones_like(E))  # of other processes' anchors it is not whole

        r, gradient = a * W / E, torch.zeros_like(x)
        while kept:
            b, c, block, exp = kept.pop()
            to_b, to_c = second(*block, exp, scaled[:, c], r[:, b], r[:, c])
            gradient[:, b] += to_b
            if b != c:
                gradient[:, c] += to_c
        ctx.save_for_backward(*gradient)
        return loss + (a * W * E.log()).sum()

    @staticmethod
    def backward(ctx, gradient):
        return *(gradient * g for g in ctx.saved_tensors), *[None] * 7


def block_masks(same, lam, ag, sp, a_b, a_c, negatives_b, negatives_c):
    """Of a block of rows b and columns c: (a_i + a_j) w_ij, [j in A_i] and [i in A_j]."""
    def real(mask):  # 0 or 1; straight from bool takes a CPU 8 times as long
        return mask.view(torch.uint8).float()
    w = real(ag).addcmul_(lam, real(sp))
    in_b = ag | negatives_c.repeat(len(ag) // len(negatives_c), 1)
    in_c = ag | negatives_b.repeat(1, ag.shape[1] // negatives_b.shape[1])
    if same:  # nothing is compared with itself
        in_b, in_c = in_b.fill_diagonal_(False), in_c.fill_diagonal_(False)
    return w.mul_(a_b[:, None] + a_c), real(in_b), real(in_c)


def first_pass(masks, scaled_b, x_c):
    pull, in_b, in_c = block_masks(*masks)
    logit = scaled_b @ x_c.mT  # (2,b,c), at most 1 / tau
    pulled, exp = (logit.flatten(1) @ pull.flatten()).sum(), logit.exp_()
    return pulled, (in_b * exp).sum(2), (in_c * exp).sum(1), exp


def second_pass(masks, scaled_b, x_c, exp, scaled_c, r_b, r_c):
    pull, in_b, in_c = block_masks(*masks)
    exp = (scaled_b @ x_c.mT).exp_() if exp is None else exp
    G = (in_b * r_b[..., None]).addcmul_(in_c, r_c[:, None]).mul_(exp).sub_(pull)
    return G @ scaled_c, None if masks[0] else G.mT @ scaled_b  # G is symmetric in one block


# ---------------------------------------------------------------- command line

def arguments():
    p = common.parser(__doc__)
    p.set_defaults(steps=3000, batch_size=64)
    add = p.group("HP")
    add("--eval-size", 320, "image side for scoring", low=8, high=8192)
    add("--code-dim", 512, "width K of the code")
    add("--tau", 0.6, "temperature; lower separates harder", low=2e-2)
    add("--rho", 0.02, "share of patches that are negatives; 1 where classes are few", high=1)
    add("--pool", 2048, "patches in a reference pool; more: fewer but surer positives")
    add("--renew", 100, "steps between renewals of the task-specific pool")
    add("--warmup", 100, "steps without task-specific positives", low=0)
    add("--momentum", 0.99, "how slowly the momentum head follows", high=1)
    add("--consistency", 0.05, "weight of the distance of two views; 0 halves the backbone's work")
    add("--weight-decay", 0.1, "AdamW's, on the head")
    add("--probe", "online", "clusters learned online, or kmeans of the codes: keeps small ones",
        choices=["online", "kmeans"])
    add("--remove-position", None, "take out of the features what a patch's place alone explains; "
        "a folder's images decide", action=argparse.BooleanOptionalAction)
    add("--five-crop", False, "train on five half-size crops of each image")
    add("--reweight", True, "anchors count by their positives, as in the code, unlike the paper")
    add = p.group("ablations of table 4")
    add("--local", True, "local hidden positives by mixing codes; off in rows (b), (d)")
    add("--task-specific", True, "positives by codes too; off in rows (c), (d)")
    add("--symmetric", True, "patches are positives if either says so; off in row (e)")
    add("--naive", False, "row (g): plain contrast of two views")
    return p


PRESETS = {
    # without second views --cache-features serves; a step costs the square of the batch
    "folder": dict(steps=1000, batch_size=8, consistency=0.0, probe="kmeans"),
    # a large pool asks for closer positives; lambda stays 0: few steps leave no codes to follow
    "scenes": dict(size=96, eval_size=96, steps=300, batch_size=4, lr=1e-2, code_dim=64,
                   consistency=0.0, pool=4096, renew=20, warmup=300, probe="kmeans"),
    "camvid": dict(eval_size=224, steps=200, batch_size=8, code_dim=256, consistency=0.0, pool=1024,
                   renew=20, warmup=50, probe="kmeans"),
    "coco27": dict(five_crop=True, epochs=3, tau=0.8, warmup=1000),
    "coco27 arch=*vits16": dict(code_dim=256),  # DINO's and SelfPatch's
    "cityscapes27": dict(five_crop=True, epochs=30, renew=20, warmup=50, momentum=0.999),
    "potsdam3": dict(epochs=10, code_dim=256, tau=0.4, rho=1.0, pool=1024, renew=20,
                     momentum=0.999, consistency=0.0),
    "smoke": dict(steps=10, batch_size=4, pool=64, renew=5, warmup=2, code_dim=32),
}

if __name__ == "__main__":
    common.main(arguments, PRESETS, schedule, train, data.count)
