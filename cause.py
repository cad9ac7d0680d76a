"""CAUSE: unsupervised segmentation by a concept clusterbook (Kim, Lee, Ro, arXiv 2310.07379).

1. codebook: code vectors learned on frozen patch features by maximising modularity.
2. head: patches whose code vectors are alike attract, others repel; student, teacher, bank.
3. probe: clusters found in the teacher's output Y by the same modularity; a linear probe beside.
No label reaches codebook, head or clusters.

    python cause.py                                      # drawn scenes, about a minute
    python cause.py --head tr                            # the transformer head
    python cause.py --data photos/ --arch dinov2_vits14  # your own

The first gives 43.6 +- 1.2 mIoU, the second 41.8 +- 5.4, K-means on the raw features 37.1 (seeds 0,
1, 2; 33 and 63 CPU-seconds, torch 2.14); with a ViT-S/14 CamVid 25.4 +- 0.8 and 27.5 +- 1.5 against
25.2, MSRC-21 21.5 +- 0.8 and 19.6 +- 0.6 against 21.5, accuracy 44.6 and 44.5 against 39.6.

Paper                          here
T = f(X), c, hw                feats (B,D,h,w), or features and tokens (B,N,D); D, N
mediator, clusterbook M, k     codebook (codes,D), --codes
C, A, d, 2e, H (eq. 3)         C, A, d, edges, minus `modularity_loss`
Q, id_q                        concepts (B,N,D), codes (B,N) by `quantize`
S, S_ema; Y, r                 student, teacher (`MLPHead` or `TRHead`); code (B,N,K), K
y, y+, y- (eq. 4)              projections of anchors, of keys that attract, that repel
D_M, phi+, phi-                similarity (codes,codes), --thresholds
Y_bank, R^2                    `Bank`, `Bank.update`

Departures from the paper (p) and from the published code (c)
c  phase 3's linear probe trains the teacher's head with labels; here the code is detached from it
c  DINO's ViT-S is built with 12 heads, which loads and attends wrongly; here it has its 6
c  the teacher shares the student's memory until Adam's first step; here a copy, as was meant
c  the gradient clip covers the linear probe, whose labels then scale the head's step; here not
c  an image without a positive pair makes the loss NaN; here it adds no term
c  MLP: teacher keys have a dropout draw of their own; here they are taken from Y of all tokens
c  the linear probe starts at random; here at zero, so that labels change no random draw
c  phase 2 stops for VOC, COCO-81 and COCO-171; here clip 1, weight decay 1e-4
c  fp16, crops cut to JPEG files; here bf16 on CUDA, where nothing overflows, crops on the fly
p  Algorithm 1 sums over codes inside tanh; here as in the code the largest product (--form sum)
p  eq. 3 has loops, A_ii = 1; here as in the code none
p  eq. 3 takes all hw tokens, and eq. 4's anchors stand in no text; here as in the code one random
   token of every 4 x 4 window (--window), in all three steps
p  eq. 4: log of a mean over y+, each against y-; here as in the code a mean of logs, against both
p  eq. 4: keys of batch and bank in one sum; here as in the code two terms, each with its sum
p  the projection before eq. 4 is an MLP; here as in the code one linear layer, 2,048 wide
p  R^2 cuts at random; here as in the code the newest stay, a random half of new tokens enters
p  eq. 4 does not say so; here as in the code an anchor is no positive of itself
p  TR: here as in the code self-attention comes first, queries have a learned place, the features
   are added to the transformer's output; the teacher's dropout stays on
p  lr 1e-3; here as in the code 4e-3, for the steps of one of its four processes, which never meet
p  no word on clusters; scenes, CamVid and folders end with K-means on Y of up to 1,000 images
   (--probe kmeans), as all figures above do
Left out: thresholds from shares of the code pairs (1.5/clusters attract, 65 % repel): scenes 43.9
-> 44.0 mIoU, CamVid 25.9 -> 24.9, MSRC-21 17.7 -> 22.9. Folders have 0.6 and 0.02, chosen there
with labels, instead of 0.3 and 0.1: MSRC-21 15.0 -> 21.3 mIoU, 35.9 -> 44.6 accuracy (two seeds).

The tables: the paper's mIoU / accuracy for MLP, TR, with labels in phase 3; none was run here

    python cause.py --data coco27 --root data/cocostuff --arch vitb8 --head tr
    python eval.py RUN --crf --flip

Table 1          coco27 (a)                cityscapes27 (b)          voc21 (d)
vits16           25.9 / 66.3, 33.1 / 70.4
dino_vits8_hub   27.9 / 66.8, 32.4 / 69.6  21.7 / 87.7, 24.6 / 89.4  46.0, 50.0
vitb8            34.3 / 72.8, 41.9 / 74.9  25.7 / 90.3, 28.0 / 90.8  47.9, 53.3
(c) TR with
dinov2_vitb14    45.3 / 78.0               29.9 / 89.8               53.2 / 91.5
ibot_vitb16      39.5 / 73.8               23.0 / 89.1               53.4 / 89.6
msn_vits16       34.1 / 72.1               21.2 / 89.1               30.2 / 84.2
mae_vitb16       21.5 / 59.1               12.5 / 82.0               25.8 / 83.7
Its README, dino_vits8_hub: coco81 19.1 / 78.8, 21.2 / 75.2; coco171 10.6 / 44.9, 15.2 / 46.6
Not here: other ways to discretise (Tables 2 to 5). No bank: --bank-slots 0.
"""
import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import eval


# ---------------------------------------------------------------- model

class MLPHead(nn.Module):
    """Tokens (B,N,D) -> code (B,N,K): a linear and a two-layer branch, each with its dropout."""
    def __init__(self, D, K):
        super().__init__()
        self.f1 = nn.Linear(D, K)
        self.f2 = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, K))
        self.drop = nn.Dropout(0.1)

    def forward(self, features):
        return self.f1(self.drop(features)) + self.f2(self.drop(features))


class TRHead(nn.Module):
    """Features T (B,N,D), their code vectors Q (B,N,D) -> code (B,N,K): one transformer layer; the
    queries are the code vectors, the keys the features. queries: N in training, a square grid; for
    another grid (h,w) the positions are interpolated."""
    def __init__(self, D, K, queries):
        super().__init__()
        self.query_pos = nn.Parameter(torch.randn(queries, D))
        self.self_attn = nn.MultiheadAttention(D, 1, dropout=0.1, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(D, 1, dropout=0.1, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(D, 2048), nn.Linear(2048, D)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.drop = nn.Dropout(0.1)
        self.out = MLPHead(D, K)

    def positions(self, grid):
        """For a grid (h,w): (h*w,D)."""
        side = round(len(self.query_pos) ** 0.5)
        if grid in (None, (side, side)):
            return self.query_pos
        table = self.query_pos.T.reshape(1, -1, side, side)
        return F.interpolate(table, grid, mode="bicubic", align_corners=False)[0].flatten(1).T

    def forward(self, features, concepts, grid=None, index=None):
        """index (B,anchors,1): only these tokens are queries -> (B,anchors,K), the same numbers for
        less work, since a token's code depends on the others as keys and values alone."""
        def queries(x):
            return x if index is None else x.take_along_dim(index, 1)

        def attend(attention, *qkv):
            return self.drop(attention(*qkv, need_weights=False)[0])
        place = self.positions(grid).expand_as(concepts)
        where, x = queries(place), queries(concepts)
        x = self.norm1(x + attend(self.self_attn, x + where, concepts + place, concepts))
        x = self.norm2(x + attend(self.cross_attn, x + where, features, features))
        x = self.norm3(x + self.drop(self.linear2(self.drop(self.linear1(x).relu()))))
        return self.out(queries(features) + x)


def load_published_head(state_dict, head):
    """Fill our head from the authors' file: `head.f1.weight (K,D,1,1)`, `head.tr.self_attn...`.
    ValueError: names parameters that are missing or have another shape."""
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    # of a whole file the teacher, which is what the authors score
    prefix = next((p for p in ("head_ema.", "head.") if any(k.startswith(p) for k in state)), "")
    found = {}
    for name, value in state.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix).removeprefix("tr.").replace("multihead_", "cross_")
            if isinstance(head, TRHead) and name.startswith("f"):
                name = "out." + name
            found[name] = value.flatten(1) if value.dim() == 4 else value
    try:
        head.load_state_dict({name: found[name] for name in head.state_dict()})
    except (KeyError, RuntimeError) as error:  # a key: it is missing
        why = " ".join(str(error).split())
        raise ValueError(f"the published head does not fit: {why}") from None
    return head


class Model(nn.Module):
    """Images (B,3,H,W) -> code (B,K,h,w) of the teacher, with probes `.linear` and `.cluster`."""
    alpha = 3  # the CRF gets log-softmax(3 * cosine)

    def __init__(self, args):
        super().__init__()
        self.backbone = common.load_backbone(args.arch, args.weights, args.depth, args.heads)
        if args.arch.startswith("mae"):
            self.backbone.position = "offset"  # DINO's rule, with which CAUSE read MAE's positions
        D, K = self.backbone.dim, args.code_dim
        if args.remove_position is not False:
            self.backbone = common.WithoutPlace(self.backbone, args.size)
        self.codebook = nn.Parameter(torch.empty(args.codes, D))
        nn.init.uniform_(self.codebook, -1 / args.codes, 1 / args.codes)
        queries = (args.size // self.backbone.patch) ** 2
        self.student = TRHead(D, K, queries) if args.head == "tr" else MLPHead(D, K)
        self.projection = nn.Linear(K, args.projection_dim)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.linear = eval.LinearProbe(K, args.classes) if args.classes else None
        self.cluster = eval.ClusterProbe(K, args.clusters)
        nn.init.uniform_(self.cluster.clusters, -1 / args.clusters, 1 / args.clusters)

    def concepts(self, tokens):
        """Tokens (B,N,D) -> Q, their code vectors (B,N,D), not unit ones; None for the MLP."""
        if isinstance(self.teacher, TRHead):
            return self.codebook.detach()[quantize(tokens, self.codebook)]

    def encode(self, head, tokens, concepts, grid, index=None):
        """Tokens (B,N,D) of a grid (h,w) -> code (B,N,K); of those at index alone (B,anchors,K)."""
        if isinstance(head, MLPHead):
            return head(tokens if index is None else tokens.take_along_dim(index, 1))
        return head(tokens, concepts, grid, index)

    def code(self, feats):
        """Features (B,D,h,w) -> the teacher's code (B,K,h,w)."""
        grid, tokens = tuple(feats.shape[2:]), feats.flatten(2).mT
        concepts = self.concepts(tokens)
        return self.encode(self.teacher, tokens, concepts, grid).mT.unflatten(2, grid)

    def forward(self, images):
        return self.code(self.backbone(images))


# ---------------------------------------------------------------- loss

def largest_product(C):
    """Two tokens share their best common code, max_m C_im C_jm: (B,N,codes) -> (B,N,N)."""
    return (C[:, :, None] * C[:, None]).amax(-1)


def sum_of_products(C):
    """Two tokens share all codes, sum_m C_im C_jm, as in the paper: (B,N,codes) -> (B,N,N)."""
    return C @ C.mT


def modularity_loss(features, codebook, tau=0.1, together=largest_product):
    """Minus the modularity of the communities that the codes make of an image's tokens (eq. 3, in
    the form of Algorithm 1), mean over the images.

    features T (B,N,D), codebook M (codes,D) -> scalar; the gradient reaches the codebook alone.
    together: how far two tokens share a community, from their assignments."""
    T, M = F.normalize(features.detach(), dim=-1), F.normalize(codebook, dim=-1)
    A = (T @ T.mT).clamp(min=0)  # affinity (B,N,N)
    A = A - torch.diag_embed(A.diagonal(dim1=1, dim2=2))
    d = A.sum(2, keepdim=True)  # degrees (B,N,1)
    edges = d.sum(1, keepdim=True).clamp(min=1e-12)  # the paper's 2e (B,1,1)
    C = (T @ M.T).clamp(min=0)  # assignment (B,N,codes)
    H = ((together(C) / tau).tanh() * (A - d * d.mT / edges) / edges).sum((1, 2))
    return -H.mean()


def quantize(features, codebook):
    """The code vector with the largest cosine, argmax_m cos(m, t), whatever the length of t:
    (B,N,D), (codes,D) -> indices (B,N). Not in bf16, where 2 % of the tokens get another one."""
    with torch.autocast(features.device.type, enabled=False):
        return (features.float() @ F.normalize(codebook.detach().float(), dim=-1).T).argmax(-1)


def contrastive_loss(codes, student, teacher, similarity, bank_codes=None, bank=None,
                     tau=0.07, positive=0.3, negative=0.1):
    """Concept-wise contrastive loss (eq. 4): tokens of like codes attract, of unlike codes repel.

    codes (B,anchors) indices, student and teacher (B,anchors,width) projections, similarity D_M
    (codes,codes) cosines, bank_codes (keys,), bank (keys,width) past teacher projections -> scalar:
    mean over a term per image against the batch and, with a bank, one against the bank. `train`
    does the same over all processes, with the fast bank term."""
    rule, keys = (similarity > positive, similarity < negative), teacher.flatten(0, 1)
    total, number = contrast(codes, student, codes.flatten(), keys, *rule, 0, tau)
    if bank is not None:
        past, more = contrast(codes, student, bank_codes, bank, *rule, None, tau)
        total, number = total + past, number + more
    return total / number.clamp(min=1)


def contrast(codes, student, key_codes, keys, attract, repel, own=None, tau=0.07):
    """Minus the log of eq. 4, anchors against keys -> sum over images with a pair, their number.

    codes (B,anchors), student (B,anchors,width), key_codes (keys,), keys (keys,width); attract,
    repel (codes,codes) bool: phi+ and phi- of D_M.
    own: where anchors are keys too, the first one's place; none is a positive of itself."""
    attract, repel = (x[codes][..., key_codes] for x in (attract, repel))  # (B,anchors,keys)
    if own is not None:
        attract.flatten(0, 1).diagonal(own).fill_(False)
    logits = F.normalize(student, dim=-1) @ F.normalize(keys, dim=-1).T / tau
    against = logits.masked_fill(~(attract | repel), -1e9).logsumexp(-1, keepdim=True)
    pairs = attract.sum((1, 2))  # (B,)
    terms = ((against - logits) * attract).sum((1, 2)) / pairs.clamp(min=1)
    return terms.sum(), (pairs > 0).sum()


class Bank(nn.Module):
    """Y_bank: the last teacher projections of every code, of unit length: (codes,slots,width)."""
    def __init__(self, codes, slots, width):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(codes, slots, width))
        self.register_buffer("added", torch.zeros(codes, dtype=torch.int64))  # ever, to each code

    @property
    def filled(self):
        """Which slots hold a vector: (codes,slots)."""
        return torch.arange(self.vectors.shape[1], device=self.added.device) < self.added[:, None]

    def contents(self):
        """Codes (keys,) and vectors (keys,width)."""
        codes, slots = self.filled.nonzero(as_tuple=True)
        return codes, self.vectors[codes, slots]

    @torch.no_grad()
    def update(self, codes, keys, order):
        """R^2: of the new keys (keys,width) of each of the codes (keys,) the first half in `order`,
        a permutation (keys,), enters; the oldest leave."""
        count, slots, _ = self.vectors.shape
        by_code, place = codes[order].sort(stable=True)
        number = torch.bincount(by_code, minlength=count)  # new keys of each code
        rank = torch.arange(len(codes), device=codes.device) - (number.cumsum(0) - number)[by_code]
        half = (number // 2)[by_code]  # a code seen once adds nothing
        kept = (rank < half) & (rank >= half - slots)
        at, new = by_code[kept], keys[order[place[kept]]]
        self.vectors[at, (self.added[at] + rank[kept]) % slots] = F.normalize(new, dim=-1)
        self.added += number // 2


@torch.no_grad()
def update_teacher(teacher, student, momentum=0.99):
    """Algorithm 2, line 10: S_ema <- 0.99 S_ema + 0.01 S, after every step of the optimiser."""
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.lerp_(s, 1 - momentum)


def one_per_window(noise, window):
    """The token with the most noise in each window x window patches, a rest at the edge left out:
    noise (B,1,h,w) -> indices (B,anchors,1)."""
    window = min(window, *noise.shape[2:])
    return F.max_pool2d(noise, window, return_indices=True)[1].flatten(1)[..., None]


# ---------------------------------------------------------------- training

def train(args):
    def load(size):
        return data.load(args.data, args.root, "train", size, args.crops, args.protocol)
    images = load(args.size)
    larger = images if args.codebook_size == args.size else load(args.codebook_size)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    schedule(args, len(images))
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    run = common.Run("cause", args, images, val)
    model = Model(args).to(run.device).train()
    features = run.features(model.backbone, images)
    larger_features = features if larger is images else run.features(model.backbone, larger)

    def anchors(grid):
        """A random token of every window of every image: (B,anchors,1)."""
        return one_per_window(run.rand(args.batch_size // run.world, 1, *grid), args.window)

    # 1. the codebook: communities of patches within each image
    optimizer = torch.optim.Adam([model.codebook], args.lr)
    run.keep(model=model, codebook_optimizer=optimizer)
    for step, batch in run.loop("codebook", larger, args.codebook_steps):
        feats = larger_features(batch)  # (B,D,h,w)
        tokens = feats.flatten(2).mT.take_along_dim(anchors(feats.shape[2:]), 1)  # (B,anchors,D)
        loss = modularity_loss(tokens, model.codebook, together=FORMS[args.form])  # eq. 3
        run.log(loss=loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.codebook.requires_grad_(False)

    # 2. the head: concept-wise contrast between student, teacher and bank
    unit = F.normalize(model.codebook, dim=-1)
    similarity = unit @ unit.T  # D_M (codes,codes)
    rule = similarity > args.thresholds[0], similarity < args.thresholds[1]
    bank = Bank(args.codes, args.bank_slots, args.projection_dim).to(run.device)
    if args.bench:  # a full bank, as in most steps
        bank.vectors.normal_(std=args.projection_dim ** -0.5)
        bank.added.fill_(args.bank_slots)
    head = [*model.student.parameters(), *model.projection.parameters()]
    linear = list(model.linear.parameters()) if model.linear else []
    optimizer = torch.optim.Adam(head, args.lr, weight_decay=args.weight_decay)
    probe = torch.optim.Adam([{"params": linear}], args.probe_lr, weight_decay=args.weight_decay)
    run.keep(model=model, bank=bank, head_optimizer=optimizer, linear_optimizer=probe)
    for step, batch in run.loop("head", images, args.steps):
        feats = features(batch)  # (B,D,h,w)
        grid, tokens = tuple(feats.shape[2:]), feats.flatten(2).mT  # (B,N,D)
        concepts = model.concepts(tokens)
        index = anchors(grid)  # (B,anchors,1)
        with run.autocast():
            code = model.encode(model.student, tokens, concepts, grid, index)  # (B,anchors,K)
            projected = model.projection(code)  # (B,anchors,width)
            with torch.no_grad():
                full = model.encode(model.teacher, tokens, concepts, grid)  # (B,N,K)
                key = model.teacher_projection(full.take_along_dim(index, 1)).float()
        codes = quantize(tokens.take_along_dim(index, 1), model.codebook)  # (B,anchors)
        key_codes, keys = common.gather(codes).flatten(), common.gather(key).flatten(0, 1)
        own = run.rank * codes.numel()
        now, number = contrast(codes, projected.float(), key_codes, keys, *rule, own)
        past, more = contrast_bank(codes, code.float(), model.projection, bank, *rule)
        loss = (now + past) * run.world / common.reduce_sum(number + more).clamp(min=1)  # eq. 4
        linear_loss = eval.probe_losses(model, full.mT.unflatten(2, grid), batch["label"])[1]
        run.log(loss=loss, linear=linear_loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head, args.clip)
        optimizer.step()
        probe.zero_grad(set_to_none=True)
        linear_loss.backward()
        probe.step()
        order = torch.randperm(len(keys), generator=run.shared, device=run.device)
        bank.update(key_codes, keys, order)
        update_teacher(model.teacher, model.student)
        update_teacher(model.teacher_projection, model.projection)

    # 3. the clusters: the same modularity, with C centres in place of the codebook
    probes = torch.optim.Adam([{"params": model.cluster.parameters(), "weight_decay": 0},
                               {"params": linear}], weight_decay=args.weight_decay)
    epochs = (args.epochs or [1])[-1]
    run.keep(model=model, probes=probes)
    for step, batch in run.loop("probe", images, args.probe_steps):
        for group in probes.param_groups:  # halved every two epochs
            group["lr"] = args.probe_lr * 0.5 ** (epochs * step // args.probe_steps // 2)
        with torch.no_grad(), run.autocast():
            code = model.code(features(batch)).float()  # (B,K,h,w)
        tokens = code.flatten(2).mT.take_along_dim(anchors(code.shape[2:]), 1)
        loss = modularity_loss(tokens, model.cluster.clusters, together=FORMS[args.form])
        linear_loss = eval.probe_losses(model, code, batch["label"])[1]
        run.log(loss=loss, linear=linear_loss)
        probes.zero_grad(set_to_none=True)
        (loss + linear_loss).backward()
        probes.step()
    return eval.finish(run, model, images, val)


# ---------------------------------------------------------------- fast forms: the same numbers

def at_once(x):
    """Elements of a temporary: what a CPU's cache holds, more on a GPU."""
    return 2 ** (20 if x.device.type == "cpu" else 26)


def largest_product_fast(C):
    """Equals `largest_product` above; 12 times faster, 1/25 of the memory at 16 images of 100
    tokens and 2,048 codes (0.45 s, 0.16 GB on a CPU thread): the best code needs no gradient.
    torch.compile of the plain form takes 0.3 s, after 18 s and where there is a C++ compiler."""
    rows = max(1, at_once(C) // C[0].numel())
    best = [(some[:, None] * x).argmax(-1) for x in C.detach() for some in x.split(rows)]
    best = torch.cat(best).view(*C.shape[:2], -1)  # (B,N,N)
    return C.gather(2, best) * C.mT.gather(1, best)


def contrast_bank(codes, code, projection, bank, attract, repel, tau=0.07):
    """Equals `contrast` above of projection(code) with `bank.contents()`; 7 times faster, 1/5 of
    the memory at 16 images of 49 anchors, 204,800 keys 2,048 wide (3.4 s, 1.1 GB on a CPU thread).

    codes (B,anchors), code (B,anchors,K), projection: linear, K -> width; tau at least 0.02.
    A product with a key v folds to the width of the code, (P y + b) . v = (y, 1) . (P^T v, b . v),
    and the keys of one code share all masks."""
    length = projection(code).norm(dim=-1, keepdim=True).clamp(min=1e-12)
    y = torch.cat([code, torch.ones_like(length)], -1) / length / tau
    fold = torch.cat([projection.weight.T, projection.bias[None]])  # (K+1,width)
    spare = -len(fold) % 16  # zeros: products of aligned rows are faster
    y = F.pad(y, (0, spare)).flatten(0, 1)  # (B*anchors,wide)
    keys = F.linear(bank.vectors, F.pad(fold, (0, 0, 0, spare)))  # (codes,slots,wide)
    empty = torch.where(bank.filled, 0.0, -torch.inf)[..., None]  # exp makes it 0
    some = max(1, at_once(y) // max(1, len(y) * keys.shape[1]))  # codes at once
    sums = torch.cat([(part @ y.T).add_(off).exp_().sum(1)  # over a code's keys (codes,B*anchors)
                      for part, off in zip(keys.split(some), empty.split(some))])
    if sums.requires_grad:  # its gradient comes transposed, which costs each product 4 ms
        sums.register_hook(torch.Tensor.contiguous)
    attract, repel = attract[codes].flatten(0, 1), repel[codes].flatten(0, 1)  # (B*anchors,codes)
    pairs = (attract * bank.filled.sum(1)).sum(-1)  # of each anchor
    against = (sums.T * (attract | repel)).sum(-1)
    against = pairs * against.where(pairs > 0, 1).log()  # without a pair there may be no key at all
    logits = ((y @ keys.sum(1).T) * attract).sum(-1)  # summed over the pairs
    of_image = pairs.view(codes.shape).sum(1)
    terms = (against - logits).view(codes.shape).sum(1) / of_image.clamp(min=1)
    return terms.sum(), (of_image > 0).sum()


# ---------------------------------------------------------------- command line

FORMS = {"max": largest_product_fast, "sum": sum_of_products}


def arguments():
    p = common.parser(__doc__)
    p.set_defaults(steps=1000, lr=4e-3, heads=None)  # of attention, set by eval --official
    add = p.group("CAUSE")
    add("--head", "mlp", "mlp: two layers a token; tr: a transformer layer", choices=["mlp", "tr"])
    add("--form", "max", "modularity by the best common code, or the paper's sum", choices=[*FORMS])
    add("--codes", 2048, "number of code vectors; 256 for a few hundred photos", low=2)
    add("--bank-slots", 100, "past keys of a code; codes * slots * projection * 4 bytes", low=0)
    add("--window", 4, "one token of every window of so many patches a step; 2 for small grids")
    add("--thresholds", (0.3, 0.1), "code cosines: above, patches attract; below, repel", high=1)
    add("--code-dim", 90, "width K of the code")
    add("--projection-dim", 2048, "width of the contrastive space")
    add("--codebook-size", 224, "image side in phase 1, not the number of codes", low=8, high=8192)
    add("--eval-size", 320, "image side for scoring", low=8, high=8192)
    add("--crops", None, "crops of each image", type=int, choices=[5, 10, 20, 50])
    add("--codebook-steps", 400, "steps of phase 1")
    add("--probe-steps", 400, "steps of phase 3")
    add("--probe", "modularity", "kmeans: of Y, on up to 1,000 images; each may hold few classes",
        choices=["modularity", "kmeans"])
    add("--probe-lr", 4e-3, "learning rate of both probes")
    add("--weight-decay", 1e-4, "L2 in Adam")
    add("--clip", 1.0, "largest norm of the head's gradient")
    add("--remove-position", None, "take out what the place explains; a folder's images decide",
        action=argparse.BooleanOptionalAction)
    return p


def schedule(args, n):
    """Steps of the published epochs over n crops, each of a quarter of them: the published code has
    four processes that never exchange gradients, and keeps one."""
    for name, epochs in zip(("codebook_steps", "steps", "probe_steps"), args.epochs or ()):
        vars(args)[name] = vars(args)[name] or epochs * max(1, -(-n // (4 * args.batch_size)))


PAPER = dict(epochs=(1, 2, 1), codebook_steps=None, probe_steps=None, codebook_size=320)
TR = dict(epochs=(1, 2, 5), size=320)
SMALL = dict(steps=300, codebook_steps=150, probe_steps=150, lr=1e-3, probe="kmeans", codes=256,
             bank_slots=50, window=2, projection_dim=512)  # a few hundred images, on a CPU too
PRESETS = {
    "folder": dict(SMALL, thresholds=(0.6, 0.02)),  # chosen on MSRC-21, with labels
    "scenes": dict(SMALL, size=96, codebook_size=96, eval_size=96, steps=200, codebook_steps=400,
                   probe_steps=50, codes=64),
    "scenes head=tr": dict(codebook_steps=800, lr=1e-4),  # at 1e-3 its clusters vary by ten points
    "camvid": dict(SMALL, eval_size=224),
    "coco27": dict(PAPER, crops=5, clip=0.1), "coco27 head=tr": dict(TR, clip=2.0),
    "coco81": dict(PAPER, crops=20), "coco81 head=tr": TR,
    "coco171": dict(PAPER, crops=20), "coco171 head=tr": TR,
    "cityscapes27": dict(PAPER, crops=5, weight_decay=0.0), "cityscapes27 head=tr": TR,
    "voc21": dict(PAPER, crops=50), "voc21 head=tr": TR,
    "smoke": dict(steps=10, codebook_steps=10, probe_steps=10, batch_size=4, codes=32,
                  projection_dim=64, bank_slots=8),
}

if __name__ == "__main__":
    common.main(arguments, PRESETS, schedule, train, data.count)
