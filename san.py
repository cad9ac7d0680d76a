"""SAN: rethinking alignment and uniformity in unsupervised image semantic segmentation (Zhang et al., AAAI 2023,
arXiv 2211.14513).

Every pixel gets an embedding Q from a 3x3 neighbourhood; a ViT over 8x8 patches gives N semantic embeddings S for the
whole batch and decides which of them this image holds. Each pixel attends to the semantics, and one shared decoder must
paint the image from Q and nearly the same picture from the mixture of semantics. The attention is the segmentation.
Nothing is pretrained, no label is read. The authors published no code; where the paper leaves something open, a line
marked [n] below says what is left open and what was taken.

    python san.py                                             # generated scenes, no download, about a minute
    python san.py --data camvid --root data/camvid
    python san.py --data coco3 --root data/cocostuff          # paper: accuracy 80.3 %, not run here
    python san.py --data scenes --no-reconstruction           # Table 5, first row: it collapses
    python eval.py runs/san-scenes-scratch-0 --images photos --out segmented
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

# Letters: B images, H W pixels, P embedding width (1024), M = P/2 width of the perceptron, n semantics, k tokens of the
# ViT. Pixels are far more numerous than anything else, so what is P wide is never stored per pixel: see `fold`.


# ---------------------------------------------------------------- model

class Norm(nn.Module):
    """Batch normalisation of y = W x, folded into W: the mean and variance of y follow from those of x.

    Exactly what nn.BatchNorm2d makes of the map y, which need not exist; over all processes' images while training.
    """

    def __init__(self, width, momentum=0.1):
        super().__init__()
        self.weight, self.bias, self.momentum = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def fold(self, W, moments=None):
        """W (m,d), moments of x: count, sum (d,), sum of products (d,d); without them the running statistics are used.
        -> weight (m,d) and bias (m,) of the normalised y."""
        mean, var = self.running_mean, self.running_var
        if moments is not None:
            count, total, products = (common.reduce_sum(t) for t in moments)
            mu = total / count                                                                 # (d,)
            mean, var = W @ mu, ((W @ (products / count - mu[:, None] * mu)) * W).sum(1).clamp(min=0)    # diag W S W^T
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)               # as PyTorch's: unbiased
        scale = self.weight * (var + 1e-5).rsqrt()
        return scale[:, None] * W, self.bias - scale * mean


class Generator(nn.Module):
    """Semantic-wise generator: images (B,3,H,W) -> tokens of a plain transformer over 8x8 patches (B,k,P), then
    `semantics`: n embeddings by n separate perceptrons, and `gates`: which of them an image holds."""

    def __init__(self, P, n, layers, gates, patch=8):
        super().__init__()
        self.patch, self.gate = patch, gates
        self.embed = nn.Conv2d(3, P, patch, patch)
        # [3] transformer details: heads of 64, hidden 4P, GELU, pre-norm, no class token; dropout 0 where Vaswani has 0.1
        layer = nn.TransformerEncoderLayer(P, max(1, P // 64), 4 * P, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(P), enable_nested_tensor=False)
        for p in self.blocks.parameters():                    # the layers are copies of one: draw each anew
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        # [5] "MLP-based multi-head generator": n MLPs of two layers, P -> P -> P, that share nothing
        self.W1, self.b1 = nn.Parameter(torch.randn(n, P, P) * P ** -0.5), nn.Parameter(torch.zeros(n, P))
        self.W2, self.b2 = nn.Parameter(torch.randn(n, P, P) * P ** -0.5), nn.Parameter(torch.zeros(n, P))
        self.weight, self.bias = nn.Parameter(torch.ones(P)), nn.Parameter(torch.zeros(P))
        # [8] token matcher, sizes not given: the mean of the image's own tokens -> P/2 -> n
        self.matcher = nn.Sequential(nn.Linear(P, P // 2), nn.GELU(), nn.Linear(P // 2, n))

    def forward(self, images):
        t = self.embed(images)                                                                 # (B,P,h,w)
        t = t.flatten(2).mT + positions(*t.shape[1:], t.device)                                # (B,k,P)
        return self.blocks(t)

    def semantics(self, tokens, batchwise=True):
        """Tokens (B,k,P) -> semantic embeddings (n,P) of the batch (eq. 4), or (B,n,P), each image for itself."""
        # [4] "merge all the output information": the mean over tokens, and over the images of all processes
        g = tokens.float().mean(1)                                                             # (B,P)
        if batchwise:
            g = common.reduce_sum(g.mean(0)) / common.world()                                  # (P,)
        z = F.gelu(torch.einsum("...p,nqp->...nq", g, self.W1) + self.b1)
        z = torch.einsum("...np,nqp->...nq", z, self.W2) + self.b2                             # (...,n,P)
        # [6] which norm: batch norm over the n rows, which removes what they share ("orthogonalises"); it needs no
        # running statistics, since the rows are all there at test time too
        z = (z - z.mean(-2, keepdim=True)) * (z.var(-2, correction=0, keepdim=True) + 1e-5).rsqrt()
        return z * self.weight + self.bias

    def gates(self, tokens):
        """Tokens (B,k,P) -> p (B,n) in [0,1], how much of each semantic the image holds."""
        # [7] simplex (text) or Sigmoid (legend of Fig. 3): sigmoid, as rows scaled by about 1/n flatten the attention
        if self.gate == "none":
            return tokens.new_ones(len(tokens), len(self.b1), dtype=torch.float)
        p = self.matcher(tokens.mean(1)).float()
        return p.sigmoid() if self.gate == "sigmoid" else p.softmax(-1)


def positions(P, h, w, device):
    """Sinusoidal positions (h*w,P), rows in one half of the channels, columns in the other: fit for images of any size."""
    rate = 10000 ** -torch.linspace(0, 1, P // 4, device=device)
    y, x = (torch.arange(side, device=device)[:, None] * rate for side in (h, w))
    y, x = (torch.cat([a.sin(), a.cos()], 1) for a in (y, x))                                  # (h,P/2), (w,P/2)
    return torch.cat([y[:, None].expand(h, w, -1), x[None].expand(h, w, -1)], -1).flatten(0, 1)


class Model(nn.Module):
    """images (B,3,H,W) -> code (B,n,H,W), the logits of the attention over the n semantics, at full resolution.

    `.cluster` is the identity, so the nearest centre is the arg-max over semantics, SAN's own prediction; `.linear` is
    a probe on the code. Other images of the batch do not matter in eval mode, see `semantics`.
    """
    patch, alpha = 8, 5

    def __init__(self, args):
        super().__init__()
        P, n = args.dim, args.clusters
        self.mode, self.plain, self.target = args.semantics, args.plain, args.target
        # [1] per-pixel perceptron: one 3x3 convolution to P/2, BN, GELU ("a superficial 3x3 Conv layer")
        self.perceptron = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(P // 2, 3, 3, 3), 5 ** 0.5))
        self.norm1 = Norm(P // 2)
        # [2] pixel-to-pixel encoder: 1x1 convolution to P, BN
        self.encoder = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(P, P // 2), 5 ** 0.5))
        self.norm2 = Norm(P)
        self.generator = Generator(P, n, args.layers, args.gates, self.patch)
        self.decoder1, self.decoder2 = nn.Linear(P, P // 4), nn.Linear(P // 4, 3)              # F_G, shared
        # [16] S depends on the test batch in the paper. Here the momentum average of training takes its place.
        self.register_buffer("average", torch.zeros(n, P))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.cluster = ClusterProbe(n, n).requires_grad_(False)
        nn.init.eye_(self.cluster.clusters)
        self.linear = LinearProbe(n, args.classes) if args.classes else None

    def gamma(self, images):
        """What the pixels of each image attend to: Gamma (B,n,P), the semantics, their rows scaled by the image's gates."""
        tokens = self.generator(images)
        if self.mode == "average" and not self.training:
            s = self.average
        else:
            s = self.generator.semantics(tokens, self.mode != "image")                         # (n,P) or (B,n,P)
            if self.mode == "average":
                with torch.no_grad():
                    self.average.lerp_(s, 0.1 if self.seen else 1.0)                           # as batch norm's: 0.1
                    self.seen += 1
        # [9] where p acts: on the rows of Gamma, which is key and value alike
        return self.generator.gates(tokens)[:, :, None] * s

    def pixels(self, images, W, b):
        """Perceptron with its batch norm folded in: (B,3,H,W) -> h (B,M,H,W)."""
        return F.gelu(F.conv2d(images, W.view(-1, 3, 3, 3), b, padding=1))

    def weights(self, images):
        """Weights of the pixel path with both batch norms folded in: W1 (M,27), b1, Wq (P,M), bq, so that Q = Wq h + bq."""
        first = second = None
        if self.training:
            with torch.no_grad():
                first = moments(F.unfold(images, 3, padding=1))                                # 27 numbers a pixel
        W1, b1 = self.norm1.fold(self.perceptron.flatten(1), first)
        if self.training:
            parts = [checkpoint(self.moments, x, W1, b1, use_reentrant=False) for x in images.split(2)]
            second = [sum(terms) for terms in zip(*parts)]
        return W1, b1, *self.norm2.fold(self.encoder, second)

    def moments(self, images, W1, b1):
        return moments(self.pixels(images, W1, b1).flatten(2))

    def code(self, h, gamma, Wq, bq):
        """Attention logits Q Gamma^T / sqrt(P) (B,n,H,W) without Q: h (Gamma Wq)^T, n wide instead of P."""
        logits = torch.einsum("bnm,bmhw->bnhw", gamma @ Wq, h).float() + (gamma @ bq)[..., None, None]
        return logits * len(bq) ** -0.5

    def forward(self, images):
        gamma, (W1, b1, Wq, bq) = self.gamma(images), self.weights(images)
        return torch.cat([self.code(self.pixels(x, W1, b1), s, Wq, bq) for x, s in zip(images.split(2), gamma.split(2))])

    def reconstruct(self, images):
        """images (B,3,H,W) -> code (B,n,H,W), F_G(Q) and F_G(Theta) (B,3,H,W), neither Q nor Theta ever stored.

        The first layer of F_G is linear, so it folds into what comes before it: A Q = (A Wq) h, A Theta = attention (Gamma A^T).
        Two images at a time, and what backward needs of them is computed again then.
        """
        if self.plain:
            return self.reconstruct_plain(images)
        gamma, weights = self.gamma(images), self.weights(images)
        parts = [checkpoint(self.paint, x, s, *weights, use_reentrant=False) for x, s in zip(images.split(2), gamma.split(2))]
        return (torch.cat(part) for part in zip(*parts))

    def paint(self, images, gamma, W1, b1, Wq, bq):
        h, A, a = self.pixels(images, W1, b1), self.decoder1.weight, self.decoder1.bias
        code = self.code(h, gamma, Wq, bq)
        q = torch.einsum("km,bmhw->bhwk", A @ Wq, h) + (A @ bq + a)                            # (B,H,W,P/4)
        theta = torch.einsum("bnhw,bnk->bhwk", code.softmax(1), gamma @ A.T) + a               # (B,H,W,P/4)
        return code, *(self.decoder2(F.gelu(x)).movedim(3, 1).float() for x in (q, theta))

    def reconstruct_plain(self, images):
        """The same as the paper writes it, with Q and Theta stored: what `reconstruct` is measured and tested against."""
        def norm(y, n):
            return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training, n.momentum)
        gamma = self.gamma(images)
        h = F.gelu(norm(F.conv2d(images, self.perceptron, padding=1), self.norm1))             # (B,M,H,W)
        q = norm(F.conv2d(h, self.encoder[:, :, None, None]), self.norm2)                      # (B,P,H,W)
        attention, theta = semantic_attention(q, gamma)
        F_G = nn.Sequential(self.decoder1, nn.GELU(), self.decoder2)
        return attention.log(), *(F_G(x.movedim(1, 3)).movedim(3, 1) for x in (q, theta))


def moments(x):
    """x (B,d,p) -> number of columns, their sum (d,), their sum of products (d,d), in float32."""
    with torch.autocast("cuda", enabled=False):
        x = x.float()
        return x.new_tensor(len(x) * x.shape[2]), x.sum((0, 2)), torch.einsum("bdp,bep->de", x, x)


def semantic_attention(q, s):
    """Pixel embeddings q (B,P,H,W), semantic embeddings s (B,n,P) -> attention (B,n,H,W), aligned embeddings (B,P,H,W).

    Eq. 3: softmax(q s^T / sqrt(P)) s, the softmax over the n semantics.
    """
    attention = (torch.einsum("bnp,bphw->bnhw", s, q) * q.shape[1] ** -0.5).softmax(1)
    return attention, torch.einsum("bnhw,bnp->bphw", attention, s)


# ---------------------------------------------------------------- loss

def reconstruction_loss(rec_q, images):
    """L_Rec (eq. 8, 9): mean square difference of F_G(Q) and the image, both (B,3,H,W)."""
    # [12] the target is the network's input, normalised per channel
    return (rec_q - images).square().mean()


def consistency_loss(rec_s, rec_q, images, target="decoded"):
    """L_Con (eq. 9): mean square difference of F_G(Theta) and F_G(Q), or the image with target "image"; all (B,3,H,W)."""
    # [10] three arguments of d in eq. 9, no word which pairs: F_G(Theta) against F_G(Q), as only then can the loss be
    # trivially zero without reconstruction, which is the collapse in Table 5
    return (rec_s - (images if target == "image" else rec_q)).square().mean()


# [13] the uniformity term S^T S = E (eq. 6, 7) "does not improve" and is left out, as in the paper; as printed it is
# impossible, for the P x P matrix has rank n < P.


# ---------------------------------------------------------------- training

class Crops(torch.utils.data.Dataset):
    """Random square crops of a data set, as large as `size`; with `augment` mirrored and with colours changed too."""

    def __init__(self, images, size, augment=False):
        self.images, self.size, self.augment = images, size, augment
        # strengths not given ("following IIC")
        self.colour = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.125), v2.RandomGrayscale(0.2)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        h, w = item["label"].shape
        y, x = (int(torch.randint(side - min(side, self.size) + 1, ())) for side in (h, w))
        image, label = (t[..., y:y + self.size, x:x + self.size] for t in (item["image"], item["label"]))
        if self.augment:
            if torch.rand(()) < 0.5:
                image, label = image.flip(-1), label.flip(-1)
            image = (self.colour(image * common.STD + common.MEAN) - common.MEAN) / common.STD
        return {**item, "image": image, "label": label}


def patch_colours(images):
    """The baseline's features: images (B,3,H,W) -> mean colours of the 8x8 patches (B,3,h,w)."""
    return F.avg_pool2d(images, 8)


def train(args):
    run = common.Run("san", args)
    images = data.load(args.data, args.root, "train", size=args.scale, protocol=args.protocol, multiple=8)
    val = data.load(args.data, args.root, "val", size=args.scale, protocol=args.protocol, multiple=8)
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    model = Model(args).to(run.device).train()
    own = [p for name, p in model.named_parameters() if not name.startswith(("linear.", "cluster."))]
    optimizer = torch.optim.Adam(own, args.lr)
    linear_optimizer = torch.optim.Adam(model.linear.parameters(), 0.01) if model.linear else None
    for step, batch in run.steps("head", args.steps, Crops(images, args.size, args.augment), model=model,
                                 optimizer=optimizer, **({"linear_optimizer": linear_optimizer} if model.linear else {})):
        with run.autocast():
            code, rec_q, rec_s = model.reconstruct(batch["image"])
        rec = reconstruction_loss(rec_q, batch["image"])
        con = consistency_loss(rec_s, rec_q, batch["image"], args.target)
        loss = con if args.no_reconstruction else rec + con           # [11] no weights given: 1 and 1
        linear = eval.linear_loss(model.linear(code.detach()), batch["label"]) if model.linear else loss.new_zeros(())
        run.mark("forward")
        if not run.finite(batch, loss=loss, rec=rec, con=con, linear=linear):
            continue
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for p in own:                                         # the gates' perceptron is idle with --gates none
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        common.average_gradients(model)
        optimizer.step()
        if model.linear:
            linear_optimizer.zero_grad(set_to_none=True)
            linear.backward()
            common.average_gradients(model.linear)
            linear_optimizer.step()
        run.mark("backward and optimizer")
    return eval.finish(run, model, images, val, encode=patch_colours)


# ---------------------------------------------------------------- command line

PRESETS = {
    "default": dict(scale=128, size=128, dim=1024, layers=6, steps=10000, batch_size=32, lr=1e-4, augment=False),
    "scenes": dict(scale=96, size=96, dim=128, steps=300, batch_size=16, lr=1e-3),
    "camvid": dict(scale=128, size=128, dim=256, steps=500, batch_size=16, lr=3e-4),
    "smoke": dict(steps=10, batch_size=4, dim=64, layers=2),
}


def arguments():
    p = common.parser(__doc__)
    p.set_defaults(arch="scratch")
    g = p.add_argument_group("SAN")
    g.add_argument("--scale", type=common.whole(8), metavar="PIXELS", help="photos are resized to this shorter side first")
    g.add_argument("--dim", type=common.whole(8), metavar="P", help="length of all embeddings; 1024 in the paper, a multiple of 8")
    g.add_argument("--layers", type=common.whole(1), help="layers of the transformer; 6, with 4 the paper loses 0.4 points")
    g.add_argument("--semantics", choices=["average", "batch", "image"], default="average", help="where the semantic "
                   "embeddings come from when predicting")
    g.add_argument("--gates", choices=["sigmoid", "softmax", "none"], default="sigmoid")
    g.add_argument("--target", choices=["decoded", "image"], default="decoded")
    g.add_argument("--no-reconstruction", action="store_true")
    g.add_argument("--plain", action="store_true")
    g.add_argument("--augment", action=common.argparse.BooleanOptionalAction)
    return p


if __name__ == "__main__":
    common.main(arguments, PRESETS, train)
