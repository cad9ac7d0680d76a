"""CAUSE: unsupervised semantic segmentation through a concept codebook (Kim, Lee, Ro, arXiv 2310.07379).

1. codebook: K code vectors learned on frozen patch features by maximising modularity (community detection).
2. head: patches of like codes attract, of unlike codes repel; student, momentum teacher, bank of the past.
3. probe: C clusters found in the teacher's codes by the same modularity; a linear probe beside them.
No label reaches codebook, head or clusters. The published third step trains the head with labels, ours not.

    python cause.py                                  # generated scenes, no download, about a minute
    python cause.py --data camvid --root data/camvid --arch dinov2_vits14 --cache-features ram
    python cause.py --head tr --data coco27 --root data/cocostuff --arch vitb8   # paper: 41.9 mIoU, not run
    python eval.py runs/cause-scenes-dct8-0 --images photos --out segmented

The first gives 43.8 +- 0.2 mIoU, with --head tr 43.1 +- 2.1, K-means on the raw features 40.1 (seeds 0, 1, 2;
38 s and 46 s on one thread of a CPU, torch 2.15).
"""
import common                                              # first: it answers --help before torch is loaded
import copy

import torch
import torch.nn.functional as F
from torch import nn

import data
import eval
from eval import ClusterProbe, LinearProbe

# Letters: B images, h w patches, N = h * w tokens, n sampled tokens (anchors), D backbone width, K codes of
# the codebook, r code width of the head (90), R projection width (2048), S bank slots per code (100), C
# clusters.


# ---------------------------------------------------------------- model

class MLPHead(nn.Module):
    """Tokens (B,N,D) -> code (B,N,r): a linear branch plus a two-layer branch, each with its own dropout."""

    def __init__(self, D, r):
        super().__init__()
        self.f1 = nn.Linear(D, r)
        self.f2 = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, r))

    def forward(self, x):
        return self.f1(common.dropout(x, 0.1, self.training)) + self.f2(common.dropout(x, 0.1, self.training))


class Attention(nn.Module):
    """Single-head attention with dropout on its weights; parameters named as in nn.MultiheadAttention."""

    def __init__(self, D):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * D, D))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * D))
        self.out_proj = nn.Linear(D, D)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query, key, value):                         # (B,N,D), (B,M,D), (B,M,D) -> (B,N,D)
        q, k, v = (F.linear(x, w, b) for x, w, b in
                   zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)))
        if not self.training:
            return self.out_proj(F.scaled_dot_product_attention(q, k, v))
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)    # (B,N,M)
        return self.out_proj(common.dropout(weights, 0.1, True) @ v)


class TRHead(nn.Module):
    """Features (B,N,D) and their code vectors (B,N,D) -> code (B,N,r): one transformer layer, whose queries
    are the codes and whose keys are the features, added to the features (the paper has no such residual, the
    published code does).

    queries: N of the training grid; another grid gets the position table interpolated.
    """

    def __init__(self, D, r, queries):
        super().__init__()
        self.query_pos = nn.Parameter(torch.randn(queries, D))
        self.self_attn, self.cross_attn = Attention(D), Attention(D)
        self.linear1, self.linear2 = nn.Linear(D, 2048), nn.Linear(2048, D)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.out = MLPHead(D, r)

    def positions(self, grid):
        """The position table for a grid (h, w): (h*w, D)."""
        side = round(len(self.query_pos) ** 0.5)
        if side * side != len(self.query_pos) or grid in (None, (side, side)):
            return self.query_pos
        table = self.query_pos.T.reshape(1, -1, side, side)
        return F.interpolate(table, grid, mode="bicubic", align_corners=False)[0].flatten(1).T

    def forward(self, feats, codes, grid=None, index=None):
        """index (B,n): only these tokens are queries, (B,n,r): the same numbers for a part of the work, since
        a token's code depends on the other tokens as keys and values alone."""
        def drop(x):
            return common.dropout(x, 0.1, self.training)

        def queries(x):
            return x if index is None else take(x, index)
        p = self.positions(grid)[None].expand_as(codes)                                      # (B,N,D)
        q = queries(p)
        x = self.norm1(queries(codes) + drop(self.self_attn(queries(codes) + q, codes + p, codes)))
        x = self.norm2(x + drop(self.cross_attn(x + q, feats, feats)))                       # (B,n,D)
        x = self.norm3(x + drop(self.linear2(drop(self.linear1(x).relu()))))
        return self.out(queries(feats) + x)


def load_published_head(state_dict, head):
    """Fill our head from the authors' parameters (`head.f1.weight (r,D,1,1)`, `head.tr.self_attn...`, or
    without `head.`).

    Raises ValueError naming the first parameter that is missing or has another shape.
    """
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    prefix = next((p for p in ("head_ema.", "head.") if any(name.startswith(p) for name in state_dict)), "")
    found = {}
    for name, value in state_dict.items():  # a whole file: the teacher is what the authors score
        if name.startswith(prefix):
            name = name.removeprefix(prefix).removeprefix("tr.").replace("multihead_attn", "cross_attn")
            name = "out." + name if isinstance(head, TRHead) and name.startswith(("f1.", "f2.")) else name
            found[name] = value.flatten(1) if value.dim() == 4 else value
    for name, parameter in head.state_dict().items():
        if name not in found or found[name].shape != parameter.shape:
            raise ValueError(f"the published head does not fit: {name} should be {tuple(parameter.shape)}, "
                             f"is {tuple(found[name].shape) if name in found else 'missing'}")
    head.load_state_dict({name: found[name] for name in head.state_dict()})
    return head


class Model(nn.Module):
    """Images (B,3,H,W) -> code (B,r,h,w) of the teacher, with the probes `.linear` and `.cluster`."""

    alpha = 3                                                     # the CRF gets log-softmax(3 * cosine)

    def __init__(self, args):
        super().__init__()
        heads = getattr(args, "heads", None)                 # 12 for the authors' heads: their ViT-S had 12
        self.backbone = common.load_backbone(args.arch, args.weights, args.depth, heads)
        D, r = self.backbone.dim, args.code_dim
        self.codebook = nn.Parameter(torch.empty(args.codes, D).uniform_(-1 / args.codes, 1 / args.codes))
        queries = (args.size // self.backbone.patch) ** 2
        self.student = TRHead(D, r, queries) if args.head == "tr" else MLPHead(D, r)
        self.projection = nn.Linear(r, args.projection_dim)
        # The published teacher shares the student's memory until Adam's first step; a copy is what was meant.
        self.teacher, self.teacher_projection = copy.deepcopy(self.student), copy.deepcopy(self.projection)
        for p in [*self.teacher.parameters(), *self.teacher_projection.parameters()]:
            p.requires_grad_(False)
        self.linear = LinearProbe(r, args.classes) if args.classes else None
        self.cluster = ClusterProbe(r, args.clusters)
        nn.init.uniform_(self.cluster.clusters, -1 / args.clusters, 1 / args.clusters)

    def encode(self, head, tokens, grid, index=None):
        """Tokens (B,N,D) of a grid (h,w), through student or teacher: (B,N,r); of those at index (B,n) alone:
        (B,n,r)."""
        if isinstance(head, MLPHead):
            return head(tokens if index is None else take(tokens, index))
        codes = self.codebook.detach()[quantize(tokens, self.codebook)]                      # raw vectors
        return head(tokens, codes, grid, index)

    def code(self, feats):
        """Features (B,D,h,w) -> the teacher's code (B,r,h,w)."""
        code = self.encode(self.teacher, feats.flatten(2).mT, tuple(feats.shape[2:]))
        return code.mT.unflatten(2, feats.shape[2:])

    def forward(self, images):
        return self.code(self.backbone(images))


# ---------------------------------------------------------------- loss

def affinity(features, codebook):
    """Clamped cosines between tokens, without the diagonal (the paper keeps it), and to the codes: (B,N,N),
    (B,N,K)."""
    unit = F.normalize(features, dim=-1)
    A = (unit @ unit.mT).clamp(min=0)                                                        # eq. 3: A
    A = A - torch.diag_embed(A.diagonal(dim1=1, dim2=2))
    return A, (unit @ F.normalize(codebook, dim=-1).T).clamp(min=0)                          # eq. 3: C


def modularity_loss(features, codebook, tau=0.1, form="max"):
    """Minus the modularity of the communities that the codes make of the tokens, mean over images (eq. 3).

    features (B,N,D), codebook (K,D) -> scalar; the gradient reaches only the codebook.
    form "max": two tokens share a community as far as their best common code says, max_k tanh(C_ik C_jk /
    tau), which is what the published code computes; "sum": tanh(sum_k C_ik C_jk / tau), which is what the
    paper writes. The full (B,N,N,K) product never exists: the best code of a pair is found in chunks without
    gradient, then only that code's product is computed with gradient; value and gradient are the same.
    """
    A, C = affinity(features.detach(), codebook)
    degree = A.sum(-1)                                                                       # (B,N)
    total = degree.sum(-1).clamp(min=1e-12)[:, None, None]  # e, twice the edge weight
    W = A - degree[:, :, None] * degree[:, None, :] / total                                  # (B,N,N)
    if form == "sum":
        delta = torch.tanh(C @ C.mT / tau)
    else:
        best = best_common_code(C.detach())                                                  # (B,N,N)
        product = C.gather(2, best) * C.mT.gather(1, best)         # C[b,i,k*] * C[b,j,k*], k* = best[b,i,j]
        delta = torch.tanh(product / tau)
    return -(W / total * delta).sum((1, 2)).mean()


@torch.no_grad()
def best_common_code(C, elements=2 ** 24):
    """argmax_k C_ik C_jk for all pairs of tokens of an image: (B,N,K) -> (B,N,N), in chunks of bounded
    memory."""
    B, N, K = C.shape
    best = torch.empty(B, N, N, dtype=torch.int64, device=C.device)
    rows = max(1, elements // (N * K))
    for b in range(B):
        for i in range(0, N, rows):
            best[b, i:i + rows] = (C[b, i:i + rows, None] * C[b, None]).argmax(-1)
    return best


def quantize(features, codebook):
    """Index of the code with the largest cosine: (B,N,D), (K,D) -> (B,N)."""
    return (features @ F.normalize(codebook.detach(), dim=-1).T).argmax(-1)


def contrastive_loss(codes, student, teacher, similarity, bank_codes=None, bank=None,
                     tau=0.07, positive=0.3, negative=0.1):
    """Concept-wise contrastive loss (eq. 4): tokens whose codes are alike attract, tokens with unlike codes
    repel. To read and to copy; `train` adds up the same from `batch_term` and `Bank.loss`.

    codes (B,n) indices, student and teacher (B,n,R) projections, similarity (K,K) code-code cosines;
    bank_codes (m,), bank (m,R) past teacher projections -> scalar: the mean of one in-batch term and, with a
    bank, one bank term per image, each normalised on its own, as in the published code; the paper joins their
    keys. An image without a positive pair adds no term. `Bank.loss` takes a fifth of the work.
    """
    total, images = batch_term(codes, student, teacher, similarity, tau, positive, negative)
    if bank is not None and len(bank):
        cosine = F.normalize(student, dim=-1) @ F.normalize(bank, dim=-1).T
        more, more_images = contrast(cosine, similarity[codes][..., bank_codes], tau, positive, negative)
        total, images = total + more, images + more_images
    return mean_over_images(total, images)


def batch_term(codes, student, teacher, similarity, tau=0.07, positive=0.3, negative=0.1):
    """In-batch term of eq. 4, keys: the teacher's tokens of all images. Sum over images and number of
    images."""
    B, n, _ = student.shape
    keys = F.normalize(common.gather(teacher).flatten(0, 1), dim=-1)
    key_codes = common.gather(codes).flatten()
    own = torch.zeros(B * n, len(keys), dtype=torch.bool, device=student.device)
    own.diagonal(common.rank() * B * n).fill_(True)               # a token is no positive of itself
    cosine = F.normalize(student, dim=-1) @ keys.T                                           # (B,n,keys)
    return contrast(cosine, similarity[codes][..., key_codes], tau, positive, negative, own.view(B, n, -1))


def contrast(cosine, s, tau, positive, negative, own=None):
    """Eq. 4 for cosines and code-code similarities (B,n,keys): sum over the images with a positive pair,
    their number.

    A flat mean of -log p over the pairs of an image, p over all positives and negatives of the anchor; the
    paper takes the log of the mean over positives of p, each over itself and the negatives alone.
    """
    logit = cosine / tau
    attract = s > positive if own is None else (s > positive) & ~own
    kept = attract | (s < negative)  # between the two thresholds a key is ignored
    nothing = ~kept.any(-1, keepdim=True)                         # no key at all: any finite value will do
    lse = logit.masked_fill(~kept, float("-inf")).masked_fill(nothing, 0).logsumexp(-1, keepdim=True)
    pairs = attract.sum((1, 2))
    terms = ((lse - logit) * attract).sum((1, 2)) / pairs.clamp(min=1)                       # (B,)
    return terms.sum(), (pairs > 0).sum().to(logit.dtype)


def mean_over_images(total, images):
    """total / number of terms of all processes; `average_gradients` divides by the number of processes."""
    return total * common.world() / common.reduce_sum(images).clamp(min=1)


class Bank(nn.Module):
    """The last S teacher projections of every code: one ring buffer (K,S,R), no copy, no concatenation.

    The paper cuts the bank at random and samples new tokens at random; as in the published code, a random
    half of each code's new tokens enters and the oldest leave.
    """

    def __init__(self, codes, slots, width):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(codes, slots, width))
        self.register_buffer("added", torch.zeros(codes, dtype=torch.int64))  # tokens ever added to each code

    @torch.no_grad()
    def update(self, codes, projections, permutation=None):
        """codes (T,), projections (T,R) of all processes; permutation (T,): the random order, drawn if
        absent."""
        K, S, _ = self.vectors.shape
        permutation = torch.randperm(len(codes), device=codes.device) if permutation is None else permutation
        by_code, place = codes[permutation].sort(stable=True)  # tokens of a code, in random order
        token = permutation[place]
        number = torch.bincount(by_code, minlength=K)
        at = torch.arange(len(codes), device=codes.device) - (number.cumsum(0) - number)[by_code]
        half = (number // 2)[by_code]                             # a code seen once adds nothing
        kept = (at < half) & (at >= half - S)
        c, slot = by_code[kept], (self.added[by_code[kept]] + at[kept]) % S
        self.vectors[c, slot] = projections[token[kept]]
        self.added += number // 2

    @property
    def count(self):
        return self.added.clamp(max=self.vectors.shape[1])                      # (K,)

    def contents(self):
        """Codes (m,) and vectors (m,R) in code order, oldest first."""
        K, S, _ = self.vectors.shape
        age = (torch.arange(S, device=self.added.device) + (self.added % S * (self.added > S))[:, None]) % S
        valid = torch.arange(S, device=self.added.device) < self.count[:, None]                # (K,S)
        codes = torch.arange(K, device=self.added.device)[:, None].expand(K, S)[valid]
        return codes, self.vectors[codes, age[valid]]

    def loss(self, codes, student_code, projection, similarity, tau=0.07, positive=0.3, negative=0.1):
        """The bank term of `contrastive_loss` at a fifth of its operations: sum over images and number of
        images.

        codes (B,n), student_code (B,n,r), projection: the student's linear layer r -> R. A projection is
        linear, so its product with the bank folds: (y P + b) . v = (y, 1) . (P v, b v), of width r + 1
        instead of R.
        """
        length = F.linear(student_code, projection.weight, projection.bias).norm(dim=-1, keepdim=True)
        y = torch.cat([student_code, torch.ones_like(length)], -1) / length / tau              # (B,n,r+1)
        weight = torch.cat([projection.weight.T, projection.bias[None]])                       # (r+1,R)
        spare = -len(weight) % 16                               # zeros: products of aligned rows are faster
        folded = F.linear(self.vectors.flatten(0, 1), F.pad(weight, (0, 0, 0, spare)))         # (K*S,r+1)
        valid = torch.arange(self.vectors.shape[1], device=codes.device) < self.count[:, None]  # (K,S)
        folded = folded * (valid / self.vectors.norm(dim=-1).clamp(min=1e-12)).flatten()[:, None]
        s = similarity[codes]                                                                  # looked up
        return _BankTerm.apply(F.pad(y, (0, spare)), folded, valid, s > positive, s < negative)


@torch.no_grad()
def update_teacher(model, momentum=0.99):
    """teacher <- 0.99 teacher + 0.01 student, after every optimiser step."""
    for teacher, student in ((model.teacher, model.student), (model.teacher_projection, model.projection)):
        for t, s in zip(teacher.parameters(), student.parameters()):
            t.lerp_(s, 1 - momentum)


def grid_choice(B, h, w, k, device=None):
    """One random token from every k x k window: flat indices (B,n), n = (h//k)(w//k); a rest at the edge is
    left out."""
    k = min(k, h, w)
    rows, columns = h // k, w // k
    inside = (common.rand_rows(B, rows * columns, device=device) * k * k).long()               # (B,n)
    return grid_positions(inside, h, w, k)


def grid_positions(inside, h, w, k):
    """Choice (B,n) of 0..k*k-1 inside each window, windows row by row -> flat token index (B,n).

    >>> grid_positions(torch.tensor([[0, 3]]), h=2, w=4, k=2)        # first and last place of two 2x2 windows
    tensor([[0, 7]])
    """
    window = torch.arange(inside.shape[1], device=inside.device)
    y = window // (w // k) * k + inside // k
    x = window % (w // k) * k + inside % k
    return y * w + x


def take(tokens, index):
    """tokens (B,N,D), index (B,n) -> (B,n,D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


class _BankTerm(torch.autograd.Function):
    """Bank term of eq. 4 and its gradient in closed form: nothing of (B,n,K*S) is kept for the backward pass.

    An image's term is sum_i (P_i lse_i - sum_{j in pos_i} l_ij) / sum_i P_i, P_i the number of positives of
    anchor i, l = y folded^T; d term / d l_ij = (P_i softmax_ij - [j in pos_i]) / sum_i P_i. Keys of one code
    share their masks, so these act on sums over a code's keys. A logit is at most 1 / tau = 14, so its exp
    needs no maximum taken out first. y (B,n,r+1), folded (K*S,r+1), valid (K,S), positive and negative
    (B,n,K) -> sum over images, their number.
    """

    @staticmethod
    def forward(ctx, y, folded, valid, positive, negative):
        (B, n, _), (K, S) = y.shape, valid.shape
        valid = valid.to(y.dtype)
        by_code, count = folded.view(K, S, -1).sum(1), valid.sum(1)                            # (K,r+1), (K,)
        grad_y, grad_folded, grad_by_code = (torch.zeros_like(x) for x in (y, folded, by_code))
        total, images = y.new_zeros(()), y.new_zeros(())
        step = min(B, max(1, 2 ** 25 // (n * K * S)))                                      # images at once
        buffer = y.new_empty(step * n, K * S)                     # new memory costs more than the product
        for b in range(0, B, step):
            b = slice(b, b + step)
            anchors, pos = y[b].flatten(0, 1), positive[b].flatten(0, 1).to(y.dtype)          # (m,.), m = b*n
            kept = (positive | negative)[b].flatten(0, 1)                                      # (m,K)
            per_anchor = pos @ count                                                           # P_i
            per_image = per_anchor.view(-1, n).sum(1)
            images += (per_image > 0).sum()
            share = 1 / per_image.clamp(min=1).repeat_interleave(n)                            # (m,)
            exp = torch.mm(anchors, folded.T, out=buffer[:len(anchors)]).exp_().view(-1, K, S)
            exp.mul_(valid)
            Z = (exp.sum(-1) * kept).sum(-1)
            Z = Z.where(per_anchor > 0, 1)                          # such an anchor may have no key at all
            attracted = (anchors @ by_code.T * pos).sum(-1)
            total += ((per_anchor * Z.log() - attracted) * share).sum()
            grad = exp.mul_((kept * (per_anchor * share / Z)[:, None])[..., None]).flatten(1)  # (m,K*S)
            pos *= share[:, None]
            grad_y[b] = (grad @ folded - pos @ by_code).view_as(y[b])
            grad_folded.addmm_(grad.T, anchors)
            grad_by_code.addmm_(pos.T, anchors)
        grad_folded.view(K, S, -1).sub_(grad_by_code[:, None])  # at empty slots too: scaled by 0 before
        ctx.save_for_backward(grad_y, grad_folded)
        ctx.mark_non_differentiable(images)
        return total, images

    @staticmethod
    def backward(ctx, gradient, _):
        grad_y, grad_folded = ctx.saved_tensors
        return grad_y * gradient, grad_folded * gradient, None, None, None


# ---------------------------------------------------------------- training

def train(args):
    run = common.Run("cause", args)
    how = dict(crops=args.crops, protocol=args.protocol)
    images = data.load(args.data, args.root, "train", size=args.size, **how)
    wide = images if args.codebook_size == args.size else \
        data.load(args.data, args.root, "train", size=args.codebook_size, **how)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    model = Model(args).to(run.device).train()

    # 1. the codebook: communities of patches within each image
    features = run.features(model.backbone, images)
    wide_features = features if wide is images else run.features(model.backbone, wide)
    optimizer = torch.optim.Adam([model.codebook], args.lr)
    for step, batch in run.steps("codebook", args.codebook_steps, wide, model=model,
                                 codebook_optimizer=optimizer):
        feats = wide_features(batch["image"], batch["index"])                                  # (B,D,h,w)
        run.mark("backbone")
        tokens = take(feats.flatten(2).mT, grid_choice(len(feats), *feats.shape[2:], args.window, run.device))
        loss = modularity_loss(tokens, model.codebook, form=args.form)
        if not run.finite(batch, loss=loss):
            continue
        run.mark("loss")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(model)
        optimizer.step()
        run.mark("optimizer")
    model.codebook.requires_grad_(False)

    # 2. the head: concept-wise contrast between student, teacher and bank
    unit = F.normalize(model.codebook, dim=-1)
    similarity = unit @ unit.T                                                                 # (K,K)
    bank = Bank(args.codes, args.bank_slots, args.projection_dim).to(run.device)
    if args.bench:  # a full bank is what a step costs most of the time
        bank.vectors.normal_()
        bank.added.fill_(args.bank_slots)
    trained = [*model.student.parameters(), *model.projection.parameters()]
    optimizer = torch.optim.Adam(trained, args.lr, weight_decay=args.weight_decay)
    linear_optimizer = torch.optim.Adam(model.linear.parameters(), args.probe_lr) if model.linear else None
    linear_state = {"linear_optimizer": linear_optimizer} if model.linear else {}
    for step, batch in run.steps("head", args.steps, images, model=model, bank=bank, optimizer=optimizer,
                                 **linear_state):
        feats = features(batch["image"], batch["index"])                                   # (B,D,h,w)
        run.mark("backbone")
        grid, tokens = tuple(feats.shape[2:]), feats.flatten(2).mT                             # (B,N,D)
        index = grid_choice(len(feats), *grid, args.window, run.device)                              # (B,n)
        anchors = take(tokens, index)                                                          # (B,n,D)
        with run.autocast():
            student = model.encode(model.student, tokens, grid, index)                         # (B,n,r)
            projected = model.projection(student)                                              # (B,n,R)
            with torch.no_grad():
                full = model.encode(model.teacher, tokens, grid)                               # (B,N,r)
                key = model.teacher_projection(take(full, index)).float()
        codes = quantize(anchors, model.codebook)                                              # (B,n)
        now, images_now = batch_term(codes, projected.float(), key, similarity, 0.07, *args.thresholds)
        past, images_past = bank.loss(codes, student.float(), model.projection, similarity,
                                       0.07, *args.thresholds)
        loss = mean_over_images(now + past, images_now + images_past)                          # eq. 4
        run.mark("head and loss")
        linear = eval.linear_loss(model.linear(full.float().mT.unflatten(2, grid)), batch["label"]) \
            if model.linear else loss.new_zeros(())
        if not run.finite(batch, loss=loss, linear=linear):
            continue
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(model.student, model.projection)
        # The published clip covers the linear probe too; here labels would then scale the head's step.
        torch.nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()
        run.mark("backward and optimizer")
        step_linear(model, linear, linear_optimizer)
        run.mark("probes")
        bank.update(common.gather(codes).flatten(), common.gather(key).flatten(0, 1))
        update_teacher(model)  # after the bank: its vectors are the old teacher's
        run.mark("bank and teacher")

    # 3. the clusters: the same modularity, with C centroids in place of the codebook. The published code lets
    # the linear probe's labels train the head here (its teacher is not frozen); our codes are detached.
    cluster_optimizer = torch.optim.Adam(model.cluster.parameters(), args.probe_lr)
    for step, batch in run.steps("probe", args.probe_steps, images, model=model,
                                 cluster_optimizer=cluster_optimizer, **linear_state):
        feats = features(batch["image"], batch["index"])
        run.mark("backbone")
        with torch.no_grad(), run.autocast():
            code = model.code(feats).float()                                                   # (B,r,h,w)
        tokens = take(code.flatten(2).mT, grid_choice(len(code), *code.shape[2:], args.window, run.device))
        loss = modularity_loss(tokens, model.cluster.clusters, form=args.form)
        linear = eval.linear_loss(model.linear(code), batch["label"]) if model.linear else loss.new_zeros(())
        if not run.finite(batch, loss=loss, linear=linear):
            continue
        cluster_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(model.cluster)
        cluster_optimizer.step()
        step_linear(model, linear, linear_optimizer)
        run.mark("probes")
    if args.probe == "kmeans" and not args.bench:
        eval.refit_clusters(run, model, images)
    return eval.finish(run, model, images, val)


def step_linear(model, loss, optimizer):
    """One step of the linear probe, the only part that sees labels."""
    if model.linear:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(model.linear)
        optimizer.step()


# ---------------------------------------------------------------- command line

# Learning rates (4 x the paper's) and steps are those of one of the published code's four unsynchronised
# processes: an epoch is crops / 4 / 16 steps.
PRESETS = {
    "default": dict(size=224, codebook_size=224, eval_size=320, crops=None, head="mlp", steps=1000,
                    codebook_steps=400, probe_steps=400, probe="modularity", batch_size=16, lr=4e-3,
                    probe_lr=4e-3, weight_decay=1e-4, clip=1.0, codes=2048, bank_slots=100, window=4,
                    thresholds=(0.3, 0.1), code_dim=90, projection_dim=2048),
    "scenes": dict(size=96, codebook_size=96, eval_size=96, steps=200, codebook_steps=400, probe_steps=50,
                   probe="kmeans", lr=1e-3, codes=64, bank_slots=50, window=2, projection_dim=512),
    # at 1e-3 the clusters of TR vary by ten points
    "scenes+tr": dict(codebook_steps=800, lr=1e-4),
    # 367 photos: a smaller codebook and bank, which two CPU cores can carry
    "camvid": dict(eval_size=224, steps=300, codebook_steps=150, probe_steps=150, probe="kmeans", codes=256,
                   bank_slots=50, window=2, projection_dim=512, lr=1e-3),
    # 49,629 curated images x 5 crops; 320 px at test time, and in training for the codebook and for TR
    "coco27": dict(crops=5, codebook_size=320, steps=7754, codebook_steps=3877, probe_steps=3877, clip=0.1),
    "coco27+tr": dict(size=320, clip=2.0, probe_steps=19385),
    "cityscapes27": dict(crops=5, codebook_size=320, steps=464, codebook_steps=232, probe_steps=232,
                         weight_decay=0.0),
    "cityscapes27+tr": dict(size=320, probe_steps=1160),
    # step 2 of the published code does not run for these; weight decay as for COCO-27, clip 1
    "voc21": dict(crops=50, codebook_size=320, steps=2288, codebook_steps=1144, probe_steps=1144),
    "voc21+tr": dict(size=320, probe_steps=5720),
    "smoke": dict(steps=10, codebook_steps=10, probe_steps=10, batch_size=4, codes=32, projection_dim=64,
                  bank_slots=8),
}


def arguments():
    p = common.parser(__doc__)
    g = p.add_argument_group("CAUSE")
    g.add_argument("--head", choices=["mlp", "tr"], help="mlp: two layers per token, fast; tr: a "
                   "transformer layer that attends from code vectors to features, better in the paper")
    g.add_argument("--form", choices=["max", "sum"], default="max", help="modularity over the best common "
                   "code (published code) or over the sum of codes (paper)")
    g.add_argument("--codes", type=common.whole(2), help="codebook size K; 2048 as published")
    g.add_argument("--bank-slots", type=common.whole(1), help="past tokens kept per code; memory codes x "
                   "slots x projection width x 4 bytes")
    g.add_argument("--window", type=common.whole(1), help="one token of every window of so many patches is "
                   "used per step; 4 as published, less for small grids")
    g.add_argument("--thresholds", type=float, nargs=2, metavar=("POSITIVE", "NEGATIVE"), help="cosine of "
                   "two codes above which their patches attract, and below which they repel; 0.3 0.1 in the "
                   "paper")
    g.add_argument("--code-dim", type=common.whole(1), help="width of the head's code, 90")
    g.add_argument("--projection-dim", type=common.whole(1), help="width of the contrastive space, 2048")
    g.add_argument("--codebook-size", type=common.whole(8), metavar="PIXELS", help="image side in phase 1")
    g.add_argument("--eval-size", type=common.whole(8), metavar="PIXELS", help="image side for scoring")
    g.add_argument("--crops", type=int, choices=[5, 10, 20, 50], help="train on crops of each image: 5 "
                   "halves; 20 and 50 are the published sets for COCO-81/171 and VOC")
    g.add_argument("--codebook-steps", type=common.whole(1), help="steps of phase 1; one epoch in the paper")
    g.add_argument("--probe-steps", type=common.whole(1), help="steps of phase 3")
    g.add_argument("--probe", choices=["modularity", "kmeans"], help="clusters as published, by modularity "
                   "within each image; or moved to K-means of the codes of all images, where images hold "
                   "few classes each")
    g.add_argument("--probe-lr", type=float, help="learning rate of both probes")
    g.add_argument("--weight-decay", type=float, help="L2 in Adam; 1e-4, Cityscapes 0")
    g.add_argument("--clip", type=float, help="gradient norm of the head; COCO 0.1 (mlp), 2 (tr); "
                   "Cityscapes 1")
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
