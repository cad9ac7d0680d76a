"""SAN: alignment and uniformity in unsupervised segmentation (Zhang et al., AAAI 2023, arXiv 2211.14513).

Each pixel gets an embedding Q from its 3x3 neighbourhood. A ViT over 8x8 patches makes n semantic embeddings
S for the whole batch and says which of them an image holds. Each pixel attends to the semantics; one decoder
has to paint the image from Q, and the same picture from the mixture of semantics. The attention is the
segmentation. Nothing is pretrained. The authors published no code: where the paper leaves something open, a
line marked [1] to [18] says what is open and what was taken.

    python san.py                                             # generated scenes, no download, under a minute
    python san.py --data camvid --root data/camvid
    python san.py --data coco15 --root data/cocostuff         # paper: accuracy 55.7 %, not run here
    python san.py --no-reconstruction                         # Table 5, first row: little is learned
    python eval.py runs/san-scenes-scratch-0 --images photos --out segmented

The first gives accuracy 76.4 +- 1.0 %, mIoU 54.2 +- 1.1 % (seeds 0, 1, 2; 40 s on one thread, torch 2.15),
K-means on average patch colours 72.0 % and 51.4 %; the fourth 49.4 % and 25.8 % (seed 0).
"""
import common                                              # first: it answers --help before torch is loaded

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

import data
import eval
from eval import ClusterProbe, LinearProbe

# Letters: B images, H W pixels, P width of the embeddings (1024), M = P/2 width of the perceptron, n
# semantics, k tokens. Nothing P wide is ever stored per pixel: see `Norm.fold` and `Model.reconstruct`.

MOMENTUM = 0.1                                             # of all running averages, as in nn.BatchNorm2d


# ---------------------------------------------------------------- model

class Norm(nn.Module):
    """Batch normalisation of y = W x, folded into W: the mean and variance of y follow from those of x.

    Exactly what nn.BatchNorm2d makes of the map y, which need not exist; trained over all processes' images.
    """

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def fold(self, W, moments=None):
        """W (m,d) -> weight (m,d) and bias (m,) that give the normalised y.

        moments of x: count, sum (d,), sum of products (d,d). Without them: running statistics of y.
        """
        mean, var = self.running_mean, self.running_var
        if moments is not None:
            count, total, products = (common.reduce_sum(t) for t in moments)
            mu = total / count                                                      # (d,)
            covariance = products / count - mu[:, None] * mu                        # (d,d)
            mean, var = W @ mu, ((W @ covariance) * W).sum(1).clamp(min=0)          # diag W cov W^T
            with torch.no_grad():
                self.running_mean.lerp_(mean, MOMENTUM)
                self.running_var.lerp_(var * count / (count - 1), MOMENTUM)         # unbiased, as PyTorch's
        scale = self.weight * (var + 1e-5).rsqrt()
        return scale[:, None] * W, self.bias - scale * mean


def moments(x):
    """x (B,d,p) -> number of its columns, their sum (d,), their sum of products (d,d)."""
    return x.new_tensor(len(x) * x.shape[2]), x.sum((0, 2)), torch.einsum("bdp,bep->de", x, x)


class Generator(nn.Module):
    """Semantic-wise generator: images (B,3,H,W) -> tokens (B,k,P) of a plain transformer over 8x8 patches.

    From these, `semantics` makes n embeddings, and `gates` tells which of them an image holds.
    """

    def __init__(self, P, n, layers, gates, patch=8):
        super().__init__()
        self.gate, self.embed = gates, nn.Conv2d(3, P, patch, patch)
        # [3] transformer: heads of 64, hidden 4P, GELU, norms first, sinusoidal positions, no class token
        layer = nn.TransformerEncoderLayer(P, max(1, P // 64), 4 * P, 0.0, F.gelu, batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(P), enable_nested_tensor=False)
        for p in self.blocks.parameters():                    # PyTorch copies one layer: draw each anew
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        # [5] "MLP-based multi-head generator": n MLPs of two layers, P -> P -> P, that share nothing
        self.W1, self.W2 = (nn.Parameter(torch.randn(n, P, P) * P ** -0.5) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.zeros(n, P)) for _ in range(2))
        self.weight, self.bias = nn.Parameter(torch.ones(P)), nn.Parameter(torch.zeros(P))
        # [8] token matcher, sizes not given: the mean of the image's own tokens -> P/2 -> n
        self.matcher = nn.Sequential(nn.Linear(P, P // 2), nn.GELU(), nn.Linear(P // 2, n))

    def forward(self, images):
        t = self.embed(images)                                                      # (B,P,h,w)
        return self.blocks(t.flatten(2).mT + positions(*t.shape[1:], t.device))     # (B,k,P)

    def semantics(self, tokens, batchwise=True):
        """Tokens (B,k,P) -> semantic embeddings (n,P) of the batch (eq. 4), or (B,n,P), per image."""
        # [4] "merge all the output information": mean over tokens and images, in training of all processes
        g = tokens.mean(1)                                                          # (B,P)
        if batchwise:
            g = g.mean(0)                                                           # (P,)
            g = common.reduce_sum(g) / common.world() if self.training else g
        z = F.gelu(torch.einsum("...p,nqp->...nq", g, self.W1) + self.b1)
        z = torch.einsum("...np,nqp->...nq", z, self.W2) + self.b2                  # (...,n,P)
        # [6] "the normalization layer" that orthogonalises: batch norm over the n rows, which takes away what
        # they share. The n rows are all there at test time too, so it needs no running statistics.
        z = (z - z.mean(-2, keepdim=True)) * (z.var(-2, correction=0, keepdim=True) + 1e-5).rsqrt()
        return z * self.weight + self.bias

    def gates(self, tokens):
        """Tokens (B,k,P) -> p (B,n) in [0,1], how much of each semantic the image holds."""
        if self.gate == "none":
            return tokens.new_ones(len(tokens), len(self.b1))
        # [7] simplex (text) or Sigmoid (Fig. 3): sigmoid, for rows scaled by about 1/n flatten the attention
        p = self.matcher(tokens.mean(1))
        return p.sigmoid() if self.gate == "sigmoid" else p.softmax(-1)


def positions(P, h, w, device):
    """Sinusoidal positions (h*w,P), half the channels for rows, half for columns, for images of any size."""
    rate = 10000 ** -torch.linspace(0, 1, P // 4, device=device)
    y, x = (torch.arange(side, device=device)[:, None] * rate for side in (h, w))
    y, x = (torch.cat([a.sin(), a.cos()], 1) for a in (y, x))                       # (h,P/2), (w,P/2)
    return torch.cat([y[:, None].expand(h, w, -1), x.expand(h, w, -1)], -1).flatten(0, 1)


def prepare(images, normalise):
    """Images as the data set gives them (...,3,H,W) -> the network's input, which it must also paint."""
    # [12] the range of the target: mean 0, deviation 1 per channel, over all photos or over each alone; the
    # latter takes light and colour cast away, which a method that paints colours cannot ignore
    if normalise == "image":
        images = images - images.mean((-2, -1), keepdim=True)
        images = images / images.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=0.1)
    return images


class Model(nn.Module):
    """images (B,3,H,W) -> code (B,n,H,W), logits of the attention over the n semantics, at full resolution.

    `.cluster` holds the identity, so the nearest centre is the arg-max over semantics: SAN's own prediction.
    `.linear` is a probe on the code. In eval mode the other images of a batch do not matter, see [16].
    """
    patch, alpha = 8, 5

    def __init__(self, args):
        super().__init__()
        P, n, self.mode, self.normalise = args.dim, args.clusters, args.semantics, args.normalise
        # [1] per-pixel perceptron: one 3x3 convolution to P/2, BN, GELU ("a superficial 3x3 Conv layer")
        self.perceptron, self.norm1 = nn.Parameter(torch.empty(P // 2, 3, 3, 3)), Norm(P // 2)
        # [2] pixel-to-pixel encoder: a 1x1 convolution to P, BN
        self.encoder, self.norm2 = nn.Parameter(torch.empty(P, P // 2)), Norm(P)
        for weight in (self.perceptron, self.encoder):
            nn.init.kaiming_uniform_(weight, 5 ** 0.5)        # as nn.Conv2d does
        self.generator = Generator(P, n, args.layers, args.gates, self.patch)
        self.decoder1, self.decoder2 = nn.Linear(P, P // 4), nn.Linear(P // 4, 3)   # F_G, 1x1, shared
        # [16] in the paper S comes from the test batch, so who else is in it matters. Here the momentum
        # average of S in training takes its place; --semantics batch does as the paper.
        self.register_buffer("average", torch.zeros(n, P))
        self.register_buffer("seen", torch.zeros(()))
        self.cluster = ClusterProbe(n, n).requires_grad_(False)
        nn.init.eye_(self.cluster.clusters)
        self.linear = LinearProbe(n, args.classes) if args.classes else None

    def gamma(self, tokens):
        """Tokens (B,k,P) -> Gamma (B,n,P), what pixels attend to: the semantics, rows scaled by the gates."""
        if self.mode == "average" and not self.training:
            s = self.average
        else:
            s = self.generator.semantics(tokens, self.mode != "image")              # (n,P) or (B,n,P)
        if self.mode == "average" and self.training:
            with torch.no_grad():
                self.seen += 1
                self.average.lerp_(s, (1 / self.seen).clamp(min=MOMENTUM))          # a plain mean at first
        # [9] where p acts: on the rows of Gamma, which is key and value alike
        return self.generator.gates(tokens)[:, :, None] * s

    def pixels(self, images, W1, b1):
        """Perceptron with its batch norm folded in: (B,3,H,W) -> h (B,M,H,W)."""
        return F.gelu(F.conv2d(images, W1.view(-1, 3, 3, 3), b1, padding=1))

    def pixel_moments(self, images, W1, b1):
        return moments(self.pixels(images, W1, b1).flatten(2))

    def weights(self, images):
        """Pixel path with both batch norms folded in: W1 (M,27), b1, Wq (P,M), bq, so that Q = Wq h + bq."""
        first = second = None
        if self.training:
            with torch.no_grad():
                first = moments(F.unfold(images, 3, padding=1))                     # 27 numbers a pixel
        W1, b1 = self.norm1.fold(self.perceptron.flatten(1), first)
        if self.training:
            parts = [checkpoint(self.pixel_moments, x, W1, b1, use_reentrant=False) for x in images.split(1)]
            second = [sum(terms) for terms in zip(*parts)]
        return W1, b1, *self.norm2.fold(self.encoder, second)

    def code(self, h, gamma, Wq, bq):
        """Attention logits Q Gamma^T / sqrt(P) (B,n,H,W) without Q: h (Gamma Wq)^T, n wide instead of P."""
        logits = torch.einsum("bnm,bmhw->bnhw", gamma @ Wq, h) + (gamma @ bq)[..., None, None]
        return logits * len(bq) ** -0.5

    def forward(self, images):
        images = prepare(images, self.normalise)
        gamma, (W1, b1, Wq, bq) = self.gamma(self.generator(images)), self.weights(images)
        return torch.cat([self.code(self.pixels(x, W1, b1), s, Wq, bq)
                          for x, s in zip(images.split(1), gamma.split(1))])

    def reconstruct(self, images, tokens):
        """Prepared images (B,3,H,W), tokens (B,k,P) -> code (B,n,H,W), F_G(Q) and F_G(Theta) (B,3,H,W).

        Neither Q nor Theta exists: F_G starts with a linear A; A Q = (A Wq) h, A Theta = attention Gamma A^T.
        One image at a time, and what backward needs of an image is computed again then.
        """
        gamma, weights = self.gamma(tokens), self.weights(images)
        parts = [checkpoint(self.paint, x, s, *weights, use_reentrant=False)
                 for x, s in zip(images.split(1), gamma.split(1))]
        return (torch.cat(part) for part in zip(*parts))

    def paint(self, images, gamma, W1, b1, Wq, bq):
        h, A, a = self.pixels(images, W1, b1), self.decoder1.weight, self.decoder1.bias
        code = self.code(h, gamma, Wq, bq)
        q = torch.einsum("km,bmhw->bhwk", A @ Wq, h) + (A @ bq + a)                 # (B,H,W,P/4)
        theta = torch.einsum("bnhw,bnk->bhwk", code.softmax(1), gamma @ A.T) + a    # (B,H,W,P/4)
        return code, *(self.decoder2(F.gelu(x)).movedim(3, 1) for x in (q, theta))

    def reconstruct_plain(self, images, tokens):
        """`reconstruct` as the paper writes it, with Q and Theta stored: what it is tested against."""
        def norm(y, n):
            return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training, MOMENTUM)
        gamma = self.gamma(tokens)
        h = F.gelu(norm(F.conv2d(images, self.perceptron, padding=1), self.norm1))  # (B,M,H,W)
        q = norm(F.conv2d(h, self.encoder[:, :, None, None]), self.norm2)           # (B,P,H,W)
        attention, theta = semantic_attention(q, gamma)
        F_G = nn.Sequential(self.decoder1, nn.GELU(), self.decoder2)
        return attention.clamp(min=1e-30).log(), *(F_G(x.movedim(1, 3)).movedim(3, 1) for x in (q, theta))


def semantic_attention(q, s):
    """Eq. 3, softmax(q s^T / sqrt(P)) s, the softmax over the n semantics.

    Pixel embeddings q (B,P,H,W), semantics s (B,n,P) -> attention (B,n,H,W), aligned embeddings (B,P,H,W).
    """
    attention = (torch.einsum("bnp,bphw->bnhw", s, q) * q.shape[1] ** -0.5).softmax(1)
    return attention, torch.einsum("bnhw,bnp->bphw", attention, s)


# ---------------------------------------------------------------- loss

def reconstruction_loss(rec_q, images):
    """L_Rec (eq. 8): mean square difference of F_G(Q) and the network's input, both (B,3,H,W)."""
    return (rec_q - images).square().mean()


def consistency_loss(rec_s, rec_q, images, target="decoded"):
    """L_Con (eq. 9): mean square difference of F_G(Theta) and F_G(Q), or the image; all (B,3,H,W)."""
    # [10] which pairs of the three arguments of d in eq. 9: F_G(Theta) and F_G(Q), for only so can the loss
    # vanish without reconstruction, which is the collapse in Table 5
    return (rec_s - (images if target == "image" else rec_q)).square().mean()


# [13] the uniformity term S^T S = E (eq. 6, 7) "does not improve" and is left out, as in the paper; as
# printed it is impossible: the P x P matrix has rank n < P.
# [18] nothing keeps a semantic from staying empty, nor in the paper; a class is then missed.


# ---------------------------------------------------------------- training

class Crops(torch.utils.data.Dataset):
    """Random square crops of `size` pixels; with `augment` mirrored, colours jittered or dropped."""

    def __init__(self, images, size, normalise="set", augment=False):
        self.images, self.size, self.normalise, self.augment = images, size, normalise, augment
        self.colour = v2.Compose([v2.ColorJitter(0.1, 0.1, 0.1, 0.1), v2.RandomGrayscale(0.2)])    # IIC's

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        image, label = item["image"], item["label"]
        if self.augment:
            image = (self.colour(image * common.STD + common.MEAN) - common.MEAN) / common.STD
            if torch.rand(()) < 0.5:
                image, label = image.flip(-1), label.flip(-1)
        image = prepare(image, self.normalise)
        bottom, right = (max(self.size - side, 0) for side in label.shape)       # a long, narrow photo
        image = F.pad(image[None], (0, right, 0, bottom), mode="replicate")[0]
        label = F.pad(label, (0, right, 0, bottom), value=-1)
        y, x = (int(torch.randint(side - self.size + 1, ())) for side in label.shape)
        box = (..., slice(y, y + self.size), slice(x, x + self.size))
        return {**item, "image": image[box], "label": label[box]}


def train(args):
    if args.arch != "scratch" or args.weights or args.depth or args.cache_features:
        raise ValueError("SAN trains its own network, of width --dim and depth --layers: leave out --arch, "
                         "--weights, --depth and --cache-features")
    if args.dim % 64 and args.dim not in (8, 16, 32) or args.size % 8 or args.size > args.eval_size:
        raise ValueError(f"--dim {args.dim} should be a multiple of 64, --size {args.size} a multiple of 8 "
                         f"and no larger than --eval-size {args.eval_size}")
    run = common.Run("san", args)
    # [15] photos shrunk to a shorter side of --eval-size, as IIC and PiCIE do, then cropped; scored uncropped
    # [17] on the val split alone, where IIC maps and scores train and val together
    images = data.load(args.data, args.root, "train", size=args.eval_size, protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    crops = Crops(images, args.size, args.normalise, args.augment)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    model = Model(args).to(run.device).train()
    own = [p for name, p in model.named_parameters() if not name.startswith(("linear.", "cluster."))]
    optimizer = torch.optim.Adam(own, args.lr)
    linear_optimizer = torch.optim.Adam(model.linear.parameters(), 0.01) if model.linear else None
    reconstruct = model.reconstruct_plain if args.plain else model.reconstruct
    for step, batch in run.steps("head", args.steps, crops, model=model, optimizer=optimizer,
                                 **({"linear_optimizer": linear_optimizer} if model.linear else {})):
        image = batch["image"]
        with run.autocast():
            tokens = model.generator(image)                                         # (B,k,P)
        run.mark("transformer")
        code, rec_q, rec_s = reconstruct(image, tokens.float())                     # in float32
        rec, con = reconstruction_loss(rec_q, image), consistency_loss(rec_s, rec_q, image, args.target)
        loss = con if args.no_reconstruction else rec + con   # [11] no weights given: 1 and 1
        linear = eval.linear_loss(model.linear(code.detach()), batch["label"]) if model.linear \
            else loss.new_zeros(())
        run.mark("pixels")
        if not run.finite(batch, loss=loss, rec=rec, con=con, linear=linear):
            continue
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(model)
        optimizer.step()
        run.mark("backward and optimizer")
        if model.linear:
            linear_optimizer.zero_grad(set_to_none=True)
            linear.backward()
            common.average_gradients(model.linear)
            linear_optimizer.step()
        run.mark("probes")
    patch_colours = lambda x: F.avg_pool2d(prepare(x, args.normalise), model.patch)             # noqa: E731
    return eval.finish(run, model, images, val, encode=patch_colours)


# ---------------------------------------------------------------- command line

# [14] batch size not given: 32 for each of the paper's four GPUs. Steps: its 30 epochs.
PRESETS = {
    "default": dict(eval_size=128, size=128, protocol="whole", dim=1024, layers=6, steps=12000, lr=1e-4,
                    batch_size=128, normalise="set", augment=False),
    "scenes": dict(eval_size=96, size=48, dim=64, steps=300, batch_size=16, lr=5e-4, normalise="image"),
    "camvid": dict(size=64, dim=64, steps=1000, batch_size=16, lr=5e-4, normalise="image"),
    "coco3": dict(eval_size=160, steps=8000),                 # a third of 640 x 480, then a crop of 128
    "coco15": dict(eval_size=160, steps=11600),
    "coco27": dict(protocol="picie", steps=11600),            # PiCIE's central square, here too
    "cityscapes27": dict(protocol="picie", steps=700),
    "potsdam6": dict(eval_size=200, steps=2000, augment=True),
    "smoke": dict(steps=10, batch_size=4, dim=64, layers=2),
}


def arguments():
    p = common.parser(__doc__)
    p.set_defaults(arch="scratch")
    g = p.add_argument_group("SAN")
    g.add_argument("--dim", type=common.whole(8), metavar="P", help="length of all embeddings, a multiple of "
                   "64; 1024 in the paper, 64 learns scenes in a minute")
    g.add_argument("--layers", type=common.whole(1), help="layers of the transformer; with 4 instead "
                   "of 6 the paper loses 0.4 points")
    g.add_argument("--eval-size", type=common.whole(8), metavar="PIXELS", help="shorter side to which a "
                   "photo is resized before it is cropped to --size, or scored; small, as a pixel sees 3x3")
    g.add_argument("--normalise", choices=["set", "image"], help="colours relative to the mean of all "
                   "photos, or of each; image where light and colour cast vary")
    g.add_argument("--augment", action=common.argparse.BooleanOptionalAction, help="mirror, jitter and drop "
                   "colours; the paper does so on Potsdam only")
    g.add_argument("--semantics", choices=["average", "batch", "image"], default="average", help="semantics "
                   "are the batch's in training; to predict, take their average, or, as published, those of "
                   "the predicted batch; image: each image's own, Table 5 without batch-wise information")
    g.add_argument("--gates", choices=["sigmoid", "softmax", "none"], default="sigmoid", help="output of the "
                   "token matcher; softmax is the paper's text and is worse; none: Table 5 without matcher")
    g.add_argument("--target", choices=["decoded", "image"], default="decoded", help="what the mixture of "
                   "semantics must paint: what the pixel embedding paints, or the image")
    g.add_argument("--no-reconstruction", action="store_true", help="leave out L_Rec: Table 5, the collapse")
    g.add_argument("--plain", action="store_true", help="store the pixel embeddings as the paper does: the "
                   "same result in one process, to compare time and memory with --bench")
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
