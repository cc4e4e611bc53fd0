"""The losses of the systems in docs/objectives.md, written out densely from the papers' formulas.

`n` holds the names that the page defines. Nothing of the package is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.grams import dense as gram
from tests.support.oracles import divergence, kl, taid
from tests.support.row_objectives import akl_weight

Names = SimpleNamespace
FORMULAS: dict[str, Callable[[Names], Tensor]] = {}
# Systems whose loss is a cross-entropy, or a sum of KL, that the call has up to a constant.
UP_TO_A_CONSTANT: set[str] = set()


def system(name: str, *, up_to_a_constant: bool = False):
    """Register the formula of a row by its first cell."""

    def register(formula):
        FORMULAS[name] = formula
        if up_to_a_constant:
            UP_TO_A_CONSTANT.add(name)
        return formula

    return register


def logs(h: Tensor, w: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Compute log-probabilities of a head."""
    return (h @ w.T / temperature).log_softmax(-1)


def nll(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Compute -log q(y), in the shape of y."""
    return -logs(h, w).gather(-1, y[..., None])[..., 0]


def output_kd(h: Tensor, w: Tensor, t: Tensor, wt: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the mean of KL(p || q) at a temperature, without its square."""
    return kl(logs(t, wt, temperature), logs(h, w, temperature)).mean()


def of_output(text: str):
    """Make the formula of a divergence at the output."""
    return lambda n: divergence(text, logs(n.t, n.wt), logs(n.h, n.w)).mean()


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    return -(p * log_q).sum(-1)


def similarity(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def info_nce(a: Tensor, b: Tensor, scale: float, target: Tensor | None = None) -> Tensor:
    target = torch.arange(len(a)) if target is None else target
    return F.cross_entropy(similarity(a, b, scale), target)


def info_nce_of(a: Tensor, b: Tensor, negatives: Tensor, scale: float) -> Tensor:
    """InfoNCE of pairs (a_i, b_i) with negatives that all rows share."""
    own = scale * torch.cosine_similarity(a, b)[:, None]
    scores = torch.cat([own, similarity(a, negatives, scale)], 1)
    return -scores.log_softmax(1)[:, 0].mean()


def mean_squares(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().mean()


def relations(x: Tensor, y: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Compute scores (B, heads, T, T) of tensors (B, T, width)."""
    x, y = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in (x, y))
    return x @ y.mT * (x.shape[-1] ** -0.5 if scale is None else scale)


def relation_kl(s: tuple[Tensor, Tensor], t: tuple[Tensor, Tensor], heads: int) -> Tensor:
    log_q, log_p = (relations(*pair, heads).log_softmax(-1) for pair in (s, t))
    return kl(log_p, log_q).mean()


# Divergences of predictions


def layers_of(n: Names) -> tuple[list[Tensor], list[Tensor]]:
    """Return log-probabilities of both models' layers, the final state last."""
    return [logs(x, n.w) for x in (n.h1, n.h2, n.h)], [logs(x, n.wt) for x in (n.t1, n.t2, n.t)]


def terms_of(n: Names) -> tuple[Tensor, Tensor, Tensor]:
    """Compute output KD, trajectory and derivative."""
    s, t = layers_of(n)
    trajectory = (kl(t[0], s[0]) + kl(t[1], s[1])).mean() / 2
    derivative = (1 - torch.cosine_similarity(s[1] - s[0], t[1] - t[0], dim=-1)).mean()
    return kl(t[2], s[2]).mean(), trajectory, derivative


system("FDD")(lambda n: sum(terms_of(n)))
system("FDD's derivative")(lambda n: terms_of(n)[2])


@system("task, logits and dynamics")
def _(n):
    output, trajectory, derivative = terms_of(n)
    return nll(n.h, n.w, n.y).mean() + 0.5 * output + 0.1 * trajectory + 0.1 * derivative


@system("DCKD")
def _(n):
    chosen = nll(n.h[:2], n.w, n.y[:2]).mean() + 0.5 * output_kd(n.h[:2], n.w, n.t[:2], n.wt)
    return chosen + 0.2 * output_kd(n.h[2:], n.w, n.t[2:], n.wt)


@system("ADPA")
def _(n):
    advantage = logs(n.t[2:], n.wt) - logs(n.ref[2:], n.wt)
    expected = (logs(n.h[2:], n.w).exp() * advantage).sum(-1).mean()
    return nll(n.h[:2], n.w, n.y[:2]).mean() - 0.5 * expected


@system("MST-Distill", up_to_a_constant=True)
def _(n):
    each = [output_kd(n.h, n.w, *teacher, 4.0) for teacher in n.teachers]
    return 16 * (0.7 * each[0] + 0.3 * each[1])


@system("MEND")
def _(n):
    return nll(n.h, n.w, n.y).mean() + output_kd(n.h, n.w, n.old, n.w.detach())


@system("Mixup-KD")
def _(n):
    z_s, z_t = n.h @ n.w.T, n.t @ n.wt.T
    log_q, log_p = ((z / z.std(-1, keepdim=True)).log_softmax(-1) for z in (z_s, z_t))
    mixed = 0.3 * F.one_hot(n.y, n.V) + 0.7 * F.one_hot(n.y.flip(0), n.V)
    return (kl(log_p, log_q) + cross_entropy(mixed, log_q)).mean()


@system("LELP")
def _(n):
    of_class = (n.t @ n.wt[:5].T).softmax(-1)
    p = [
        of_class[..., i, None] * (n.t @ n.wt[10 * i : 10 * i + 10].T).softmax(-1) for i in range(5)
    ]
    return cross_entropy(torch.cat(p, -1), logs(n.h, n.w)).mean()


@system("block-wise logit KD")
def _(n):
    stones = sum(output_kd(x @ n.P.T, n.wt, n.t, n.wt, 4.0) for x in (n.h1, n.h2))
    return stones + output_kd(*n.pair) + nll(n.h, n.w, n.y).mean()


@system("ND")
def _(n):
    f = n.a @ n.P.T
    centres = torch.stack([n.ta[n.c == i].mean(0) for i in range(4)])[n.c]
    direction = (f * F.normalize(centres)).sum(-1)
    loss = 1 - direction / torch.maximum(f.norm(dim=-1), n.ta.norm(dim=-1))
    return loss.mean() + 16 * output_kd(*n.pair, 4.0)


@system("DSE")
def _(n):
    apart = (n.h @ n.w.T - n.t @ n.wt.T).square().sum(-1).mean()
    return 0.5 * apart + 0.5 * nll(n.h, n.w, n.y).mean()


@system("KD3")
def _(n):
    weight = (n.h @ n.w.T - n.t @ n.wt.T).detach().norm(dim=-1).sigmoid()
    return (weight[..., None] * (n.h @ n.P.T - n.t).square()).mean()


@system("WAD")
def _(n):
    axes = F.normalize(n.wt)
    first, second = (
        (F.normalize(n.ref[2:], dim=-1) @ axes.T).sort(-1).values[..., [-1, -2]].unbind(-1)
    )
    weighted = first * (1 - second / first) * nll(n.h[2:], n.w, n.y[2:])
    return nll(n.h[:2], n.w, n.y[:2]).mean() + weighted.mean()


@system("DCD")
def _(n):
    s = torch.stack([n.docs[ids] @ a for a, ids in zip(n.a, n.ids)])
    p = n.scores.softmax(1)
    share = (p * p.log()).sum(1) / (p * p.log()).sum()
    of_right = -F.logsigmoid(s[:, 0])
    bce = (of_right - F.logsigmoid(-s[:, 1:]).sum(1)) / 8
    weights = ((1 - share) ** 2).softmax(0)
    return 0.2 * (weights * mean_squares(s, n.scores)).sum() + 0.8 * (share * bce).sum()


@system("QCRD")
def _(n):
    each = nll(n.h, n.w, n.y).mean(1)
    hinge = torch.relu(1.0 + each[1] - each[3])
    return each[0] + (torch.tensor([0.9, 0.4]) * each[1:3]).sum() + hinge


@system("DistilBERT")
def _(n):
    cosine = torch.cosine_similarity(n.h @ n.P.T, n.t, dim=-1)
    return 5 * 4 * output_kd(*n.pair, 2.0) + 2 * nll(n.h, n.w, n.y).mean() + (1 - cosine).mean()


@system("PKD")
def _(n):
    log_q, log_p = logs(n.h[:, 0], n.w, 10.0), logs(n.t[:, 0], n.wt, 10.0)
    soft = 100 * F.kl_div(log_q, log_p.exp(), reduction="none").mean()
    patient = mean_squares(F.normalize(n.h1[:, 0] @ n.P.T), F.normalize(n.t1[:, 0]))
    return 0.7 * soft + 0.3 * nll(n.h[:, 0], n.w, n.y[:, 0]).mean() + 100 * patient


@system("TinyBERT, stage 1")
def _(n):
    states = zip((n.h1, n.h2, n.h), (n.t1, n.t2, n.t))
    attention = mean_squares(relations(n.q, n.k, 2), relations(n.qt, n.kt, 2))
    return sum(mean_squares(s @ n.P.T, t) for s, t in states) + attention


@system("TinyBERT, stage 2", up_to_a_constant=True)
def _(n):
    return -((n.t @ n.wt.T).softmax(-1) * logs(n.h, n.w)).mean()


# Rows of one side as columns of the other


@system("MobileCLIP2", up_to_a_constant=True)
def _(n):
    teachers = (70.0, n.ta, n.tb), (60.0, n.ua, n.ub)
    p = sum(similarity(x, y, s).softmax(1) for s, x, y in teachers) / 2
    q = similarity(n.a, n.b, 14.0)
    back = sum(similarity(y, x, s).softmax(1) for s, x, y in teachers) / 2
    forth = cross_entropy(p, q.log_softmax(1)).mean()
    return (forth + cross_entropy(back, q.T.log_softmax(1)).mean()) / 2


@system("LinguGKD")
def _(n):
    other = (n.c[:, None] == n.c) & ~torch.eye(n.N, dtype=torch.bool)
    losses = []
    for x, u in ((n.a, n.ta), (n.b, n.tb)):
        scores = similarity(x @ n.P.T, u, 1 / 0.07).masked_fill(other, -torch.inf)
        losses.append(F.cross_entropy(scores, torch.arange(n.N)))
    mix = n.mix.softmax(0)
    return mix[0] * losses[0] + mix[1] * losses[1]


@system("CRECL")
def _(n):
    scores = similarity(n.a, n.protos, 1 / 0.08).log_softmax(1)
    one_hot = F.one_hot(n.c, 4)
    passes = [logs(x, n.w) for x in (n.h, n.h1, n.h2)]
    mean = torch.stack(passes).exp().mean(0).log()  # with gradient
    apart = sum(kl(log_p, mean).mean() for log_p in passes) / 3
    return -(one_hot * scores).sum() / one_hot.sum() + apart


def proxy_contrast(n: Names) -> Tensor:
    """SupCon of vectors with the class vectors of the batch, one column for each sample."""
    log_q = similarity(n.a, n.protos[n.c], 1 / 0.09).log_softmax(1)
    positive = n.c[:, None] == n.c
    return -((positive * log_q).sum(1) / positive.sum(1)).mean()


@system("HPCR", up_to_a_constant=True)
def _(n):
    kept = ~torch.eye(n.N, dtype=torch.bool)
    new, old = (similarity(x, x, 1 / 0.09)[kept].view(n.N, -1).log_softmax(1) for x in (n.a, n.oa))
    proxies = n.protos.detach()
    apart = mean_squares((n.a @ n.protos.T)[:, n.c], (n.oa @ proxies.T)[:, n.c])
    return 0.8 * proxy_contrast(n) + 0.1 * apart + 0.5 * cross_entropy(old.exp(), new).mean()


@system("NT-Xent of KD3, VidLanKD")
def _(n):
    views = F.normalize(torch.cat([n.a, n.b]))
    scores = (views @ views.T / 0.3).masked_fill(torch.eye(2 * n.N, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(2 * n.N).roll(n.N))


system("MACIL-SD")(lambda n: 1.5 * info_nce_of(n.a, n.b, n.docs, 10.0))


@system("SemCoT")
def _(n):
    cosine = torch.cosine_similarity(n.h @ n.P.T, n.t, dim=-1)
    return 0.5 * (1 - cosine).mean() + 0.5 * nll(n.h, n.w, n.y).mean()


@system("SgVA-CLIP", up_to_a_constant=True)
def _(n):
    texts = n.docs[:4]
    old = similarity(n.oa, texts.detach(), 2.0).softmax(1)
    kept = cross_entropy(old, similarity(n.a, texts, 2.0).log_softmax(1)).sum()
    return info_nce(n.a, n.protos, 10.0, n.c) + info_nce(n.a, texts, 10.0, n.c) + kept


@system("DiSCo")
def _(n):
    s = torch.stack([n.docs[ids] @ a for a, ids in zip(n.a, n.ids)])
    return kl(n.scores.log_softmax(1), s.log_softmax(1)).mean()


@system("Margin-MSE, all pairs")
def _(n):
    s, t = n.a @ n.b.T, n.ta @ n.tb.T
    return mean_squares(s[:, :, None] - s[:, None], t[:, :, None] - t[:, None])


@system("Margin-MSE, one pair a row")
def _(n):
    s = torch.stack([n.docs[ids[:2]] @ a for a, ids in zip(n.a, n.ids)])
    return mean_squares(s[:, 0] - s[:, 1], n.scores[:, 0] - n.scores[:, 1])


@system("SeqPE")
def _(n):
    log_q, log_p = (relations(x, x, 1, 1.0).log_softmax(-1) for x in (n.q, n.qt))
    both = kl(log_p, log_q).mean() + kl(log_q, log_p).mean()
    return F.cross_entropy(n.a @ n.b.T, torch.arange(n.N)) + both


@system("contrastive feature alignment")
def _(n):
    return info_nce(n.h.flatten(0, 1) @ n.P.T, n.t.flatten(0, 1), 1 / 0.07)


@system("COCONUT")
def _(n):
    scores, eye = similarity(n.a, n.a, 10.0), torch.eye(n.N, dtype=torch.bool)
    lse = scores.masked_fill(eye, -torch.inf).logsumexp(1, keepdim=True)
    positive = (n.c[:, None] == n.c) & ~eye
    each = positive * (lse - similarity(n.a, n.oa, 10.0))
    rehearsal = (each.sum(1) / positive.sum(1)).mean()
    return rehearsal + (info_nce(n.a, n.b, 10.0) + info_nce(n.b, n.a, 10.0)) / 2


@system("ProKD")
def _(n):
    distances = (n.t[..., None, :] - n.wt).norm(dim=-1)
    p = (n.t @ n.wt.T).softmax(-1) * (-distances).softmax(-1)
    p = p / p.sum(-1, keepdim=True)
    return info_nce(n.protos, n.docs[:4], 10.0) + cross_entropy(p, logs(n.h, n.w)).mean()


@system("DisCo, point clouds", up_to_a_constant=True)
def _(n):
    z = n.ta @ n.tdocs.T
    p = ((z - z.mean(0)) / 0.04).softmax(1)
    dino = cross_entropy(p, (n.a @ n.docs.T / 0.1).log_softmax(1)).mean()
    return dino + info_nce_of(n.a, n.b, n.docs, 1 / 0.07)


@system("CPRD")
def _(n):
    ranked = (n.a @ n.docs.T / 0.5).gather(1, (n.ta @ n.tdocs.T).argsort(1, descending=True))
    return sum((ranked[:, i:].logsumexp(1) - ranked[:, i]).mean() for i in range(8))


@system("INDUS")
def _(n):
    log_q, log_p = (similarity(*x, 20.0).log_softmax(1) for x in ((n.a, n.b), (n.ta, n.tb)))
    return relation_kl((n.q, n.k), (n.qt, n.kt), 2) + kl(log_p, log_q).mean()


# Deltas of states


def deviations(z: Tensor) -> Tensor:
    return z - z.mean((0, 1))


@system("deviation from the mean, features")
def _(n):
    return mean_squares(deviations(n.h @ n.P.T), deviations(n.t))


@system("deviation from the mean, logits")
def _(n):
    return mean_squares(deviations(n.h @ n.w.T), deviations(n.t @ n.wt.T))


@system("differences of neighbours")
def _(n):
    s, t = (z.diff(dim=1) for z in (n.h @ n.w.T, n.t @ n.wt.T))
    return (1 - torch.cosine_similarity(s, t, dim=-1)).mean()


@system("the same under a soft cap")
def _(n):
    models = (n.h, n.w, 20.0), (n.t, n.wt, 30.0)
    s, t = [
        (cap * torch.tanh(x @ head.T / cap)).log_softmax(-1).diff(dim=1) for x, head, cap in models
    ]
    return (1 - torch.cosine_similarity(s, t, dim=-1)).mean()


# Pairs of layers


def feature_costs(n: Names, dims=(0, 1, 2)) -> Tensor:
    """Compute mean squares of all pairs of projected layers, (3, 3, ...)."""
    student, teacher = (n.h1, n.h2, n.h), (n.t1, n.t2, n.t)
    return torch.stack(
        [torch.stack([(s @ n.P.T - t).square().mean(dims) for t in teacher]) for s in student]
    )


@system("BERT-EMD")
def _(n):
    """With equal masses and as many layers the flow is that of the best permutation."""
    costs, permutations = feature_costs(n), torch.cartesian_prod(*[torch.arange(3)] * 3)
    sums = [costs[range(3), p].mean() for p in permutations if len(p.unique()) == 3]
    return min(sums)


@system("SemCKD")
def _(n):
    weights = torch.einsum("ibd,jbd->ijb", n.query, n.key).softmax(1)
    return (weights * feature_costs(n, (1, 2))).sum() / (3 * n.B)


def costs_of(n: Names, count: int) -> list[list[Tensor]]:
    """Compute the mean KL of every pair of the first layers."""
    s, t = layers_of(n)
    return [[kl(theirs, ours).mean() for theirs in t[:count]] for ours in s[:count]]


@system("FDD, pairs with weights")
def _(n):
    output, _, derivative = terms_of(n)
    (a, b), (c, d) = costs_of(n, 2)
    return output + (0.7 * a + 0.3 * b + 0.4 * c + 0.6 * d) / 2 + derivative


@system("FDD, pairs found from costs")
def _(n):
    costs = torch.stack([torch.stack(row) for row in costs_of(n, 2)])
    weights = (-costs / costs.std(correction=0)).softmax(1).detach()
    paths = {(i, j): float(weights[0, i] + weights[1, j]) for i, j in ((0, 0), (0, 1), (1, 1))}
    i, j = max(paths, key=paths.get)
    s, t = layers_of(n)
    of_pair = 1 - torch.cosine_similarity(s[1] - s[0], t[j] - t[i], dim=-1)
    derivative = torch.ones(()) if i == j else of_pair.mean()
    return kl(t[2], s[2]).mean() + (weights * costs).sum() / 2 + derivative


@system("trajectory matrix, ours")
def _(n):
    costs = costs_of(n, 3)
    triples = [(i, j, k) for i in range(3) for j in range(i, 3) for k in range(j, 3)]
    return min(sum(costs[row][column] for row, column in enumerate(p)) / 3 for p in triples)


# Sorted, top-k, target


@system("DKD")
def _(n):
    log_q, log_p, o = logs(n.h, n.w, 4.0), logs(n.t, n.wt, 4.0), F.one_hot(n.y, n.V).bool()
    of_label = [torch.stack([x[o], torch.log1p(-x[o].exp())], -1) for x in (log_p, log_q)]
    others = [x[~o].view(n.B * n.T, -1).log_softmax(-1) for x in (log_p, log_q)]
    return 16 * (kl(*of_label) + 8 * kl(*others)).mean()


@system("top-k KL")
def _(n):
    log_p, ids = logs(n.t, n.wt).topk(5)
    both = []
    for x in (log_p, logs(n.h, n.w).gather(-1, ids)):
        both.append(torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1))
    return kl(*both).mean()


@system("ULD")
def _(n):
    ordered = [logs(*x).exp().sort(-1).values for x in ((n.h, n.w), n.teachers[1])]
    return (ordered[0] - ordered[1]).abs().sum(-1).mean()


@system("SinKD")
def _(n):
    models = n.h[:, 0], n.w, n.t[:, 0], n.wt
    costs = torch.cdist(logs(*models[:2], 2.0).exp(), logs(*models[2:], 2.0).exp(), p=1)
    x = -costs / 0.1
    for _ in range(20):
        x = x - x.logsumexp(1, keepdim=True)
        x = x - x.logsumexp(0, keepdim=True)
    transport = (x.exp() * costs).sum()
    return 0.0008 * transport + output_kd(*models) + nll(*models[:2], n.y[:, 0]).mean()


# Gram matrices and relations


@system("MiniLM")
def _(n):
    attention = relation_kl((n.q, n.k), (n.qt, n.kt), 2)
    return attention + relation_kl((n.v, n.v), (n.vt, n.vt), 2)


@system("MiniLM v2")
def _(n):
    pairs = (n.q, n.qt), (n.k, n.kt), (n.v, n.vt)
    return sum(relation_kl((x, x), (z, z), 4) for x, z in pairs)


@system("attention transfer")
def _(n):
    s, t = (F.normalize(x.square().mean(-1), dim=-1) for x in (n.h, n.t))
    return mean_squares(s, t)


@system("VidLanKD, NST")
def _(n):
    return sum(gram("nst", s, t) for s, t in zip(n.h, n.t))


@system("TRG")
def _(n):
    eye = torch.eye(n.N, dtype=torch.bool)
    s, t = (relations(x[None], x[None], 1)[0, 0].masked_fill(eye, -torch.inf) for x in (n.a, n.ta))
    nearest = t.topk(3).indices
    local = kl(*[x.gather(1, nearest).log_softmax(1) for x in (t, s)]).mean()
    return local + info_nce(n.a @ n.P.T, n.ta, 10.0) + relation_kl((n.h, n.h), (n.t, n.t), 1)


@system("DisWOT: ICKD, SP, RMI")
def _(n):
    ickd = sum(gram("ickd", s @ n.P.T, t) for s, t in zip(n.h, n.t)) / n.B
    rows = [(s.flatten(0, 1), t.flatten(0, 1)) for s, t in ((n.h1, n.t1), (n.h2, n.t2))]
    return ickd + gram("sp", n.a, n.ta) + sum(gram("cka", s, t) for s, t in rows)


@system("RKD")
def _(n):
    losses = []
    for x in (n.a, n.ta):
        apart = x[:, None] - x
        distances = apart.square().sum(-1)[~torch.eye(n.N, dtype=torch.bool)].sqrt()
        directions = F.normalize(apart, dim=-1)
        losses.append((distances / distances.mean(), directions @ directions.mT))
    (s, angles_s), (t, angles_t) = losses
    of_distances = F.smooth_l1_loss(s, t, reduction="sum") / n.N**2
    return 25 * of_distances + 50 * F.smooth_l1_loss(angles_s, angles_t)


# Weights that change


@system("early-to-late weights")
def _(n):
    return sum(terms_of(n))


@system("staged distillation")
def _(n):
    return sum(terms_of(n))


@system("gradient-aware weights")
def _(n):
    output, trajectory, _ = terms_of(n)
    lengths = []
    for term in (output, trajectory):
        found = torch.autograd.grad(term, (n.h1, n.h2, n.h), retain_graph=True, allow_unused=True)
        lengths.append(torch.cat([g.flatten() for g in found if g is not None]).norm())
    mean = (lengths[0] + lengths[1]) / 2
    return mean / lengths[0] * output + 0.5 * mean / lengths[1] * trajectory


@system("KD warm-up of DKD, ND")
def _(n):
    return FORMULAS["DKD"](n) / 16 * 5 / 20


@system("HPCR's weight")
def _(n):
    weight = (1.8 - 0.5625) * (1 - math.cos(2 * math.pi * 300 / 500)) / 2 + 0.5625
    return weight * proxy_contrast(n)


@system("learned weights")
def _(n):
    first, second = n.mix.softmax(0)
    return first * output_kd(*n.pair) + second * FORMULAS["DKD"](n) / 16


@system("TAID", up_to_a_constant=True)
def _(n):
    p = taid(n.h @ n.w.T, n.t @ n.wt.T, 0.4).softmax(-1)
    return cross_entropy(p, logs(n.h, n.w)).mean()


# Common requests

system("generalised JSD, GKD")(of_output("jsd:0.1"))
system("on-policy")(of_output("reverse_kl"))
system("ABKD")(of_output("alpha_beta:0.2,0.7"))
system("total variation")(of_output("tv"))


@system("DistiLLM")
def _(n):
    return of_output("skew_kl:0.1")(n) + of_output("skew_reverse_kl:0.1")(n)


@system("AKL")
def _(n):
    log_p, log_q = (x.flatten(0, 1) for x in (logs(n.t, n.wt), logs(n.h, n.w)))
    weight = akl_weight(log_p, log_q, 0.5)
    return (weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)).mean()


def entropies(n: Names) -> tuple[Tensor, Tensor]:
    """Compute the entropies of both models, constants."""
    log_q, log_p = logs(n.h, n.w).detach(), logs(n.t, n.wt)
    return cross_entropy(log_q.exp(), log_q), cross_entropy(log_p.exp(), log_p)


@system("weights of tokens")
def _(n):
    of_student, of_teacher = entropies(n)
    return (
        torch.where(of_student > of_teacher, 3.0, 1.0) * kl(logs(n.t, n.wt), logs(n.h, n.w))
    ).mean()


@system("entropy gate")
def _(n):
    gate, log_p, log_q = (entropies(n)[1] / 4).clamp(max=1), logs(n.t, n.wt), logs(n.h, n.w)
    return (gate * kl(log_p, log_q) + (1 - gate) * kl(log_q, log_p)).mean()


@system("GOLD")
def _(n):
    q, p = logs(n.h, n.w).exp(), logs(*n.teachers[1]).exp()
    a, b = q[..., :30], p[..., :30].flip(-1)
    m = (a + b) / 2
    matched = (b * (b / m).log() + a * (a / m).log()).sum(-1) / 2
    ordered = [x[..., 30:].sort(-1).values for x in (q, p)]
    others = (ordered[0] - ordered[1]).abs().sum(-1)
    return (30 / n.V * matched + 20 / n.V * others).mean()


@system("DSKD")
def _(n):
    z = n.t @ n.P
    of_student = output_kd(n.h, n.w, z.detach(), n.w.detach())
    of_teacher = output_kd(n.h @ n.P.T, n.wt, n.t, n.wt)
    return of_student + of_teacher + nll(z, n.w.detach(), n.y).mean()


@system("MiniLLM")
def _(n):
    log_q, log_p = -nll(n.h, n.w, n.y), -nll(n.t, n.wt, n.y)
    reward = (log_p - log_q).detach()
    advantage = torch.stack([reward[:, i:].sum(1) for i in range(n.T)], 1)
    return of_output("reverse_kl")(n) - (advantage * log_q).mean()


@system("AlphaNet")
def _(n):
    log_p, log_q = logs(n.t, n.wt), logs(n.h, n.w)
    chi = ((log_q.exp().square() / log_p.exp()).sum(-1) - 1) / 2
    return torch.maximum(chi, kl(log_p, log_q)).mean()


@system("logistic ranking")
def _(n):
    z = (n.h @ n.w.T).gather(-1, (n.t @ n.wt.T).topk(4).indices)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    return sum(F.softplus(z[..., j] - z[..., i]) for i, j in pairs).mean() / len(pairs)


@system("hinge ranking")
def _(n):
    log_p, log_q = logs(n.t, n.wt), logs(n.h, n.w)
    p, ids = log_p.exp().topk(4)
    q = log_q.exp().gather(-1, ids)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    hinges = [torch.relu(p[..., i] - p[..., j] - (q[..., i] - q[..., j])) for i, j in pairs]
    return sum(hinges).mean() / len(pairs)


@system("cosine, MSE of states")
def _(n):
    s, t = [x @ n.P.T for x in (n.h1, n.h)], (n.t1, n.t)
    cosines = [1 - torch.cosine_similarity(a, b, dim=-1) for a, b in zip(s, t)]
    return sum(cosines).mean() / 2 + mean_squares(s[1] - s[0], t[1] - t[0])


@system("SquareHead")
def _(n):
    z_s, z_t = n.h @ n.w.T, n.t @ n.wt.T
    return ((z_s - z_t).square().sum(-1) / z_t.square().sum(-1)).mean()
