"""Rows of Table 1 that are known methods, against those methods' own losses, written out here.

Networks are taken from the model; everything between the batch and the loss is computed once more,
after the papers. Losses and all gradients are compared, in one process and in two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from helpers.ranks import run_ranks
from helpers.small import SMALL, random_batch
from m3i_scale.config import Config
from m3i_scale.data.batch import Batch
from m3i_scale.models.positions import relative_positions
from m3i_scale.objective.inputs import build_input
from m3i_scale.objective.m3i import M3I
from m3i_scale.objective.masks import PatchMask

SIZE, PATCH = 48, 16  # 3 x 3 tokens
METHODS = Path(__file__).parents[2] / "configs" / "methods"


# ------------------------------------------------------------------------- from a batch to networks


def views(batch: Batch) -> tuple[Tensor, Tensor]:
    """Both views, normalised: (B, 3, H, W)."""
    mean, std = (
        torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return tuple(
        (v.permute(0, 3, 1, 2).float() / 255 - mean) / std for v in (batch.view_a, batch.view_b)
    )


def masked(image: Tensor, batch: Batch) -> Tensor:
    return image * F.interpolate(batch.mask[:, None].float(), scale_factor=PATCH)


def global_pair(
    model: M3I, x: Tensor, y: Tensor, encoder: str = "teacher"
) -> tuple[Tensor, Tensor]:
    """Student branch of x, target branch of y."""
    target = model.teacher if encoder == "teacher" else model.student
    student = model.student
    q = student.projector(student.backbone.pool(student.backbone.features(x)))
    if hasattr(model, "predictor"):
        q = model.predictor(q)
    return q, target.projector(target.backbone.pool(target.backbone.features(y)))


def decoded(
    model: M3I, what: str, x: Tensor, batch: Batch, other: bool, n: int, wanted: Tensor
) -> Tensor:
    """The decoder's predictions for sample n at the target positions `wanted`."""
    seen = batch.mask[n].flatten()
    box, flip = batch.box_a[n][None], batch.flip_a[n][None]
    own = relative_positions(box, flip, box, flip, (3, 3))[0]
    places = own
    if other:
        places = relative_positions(box, flip, batch.box_b[n][None], batch.flip_b[n][None], (3, 3))[
            0
        ]
    features = model.student.backbone.features(x[n][None])[0]
    return model.decoders[what](features[seen][None], own[seen][None], places[wanted][None])[0]


# ------------------------------------------------------------------------------- published losses


def mae(model: M3I, batches: Sequence[Batch], *, norm_pix: bool) -> Tensor:
    """arXiv 2111.06377, section 3: mean squared error on removed patches."""
    batch = batches[-1]
    image, _ = views(batch)
    target = image.reshape(len(image), 3, 3, PATCH, 3, PATCH)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(len(image), 9, -1)
    if norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    removed = ~batch.mask.flatten(1)
    x = masked(image, batch)
    prediction = torch.zeros_like(target)
    for n in range(len(image)):
        rows = decoded(model, "pixels", x, batch, False, n, removed[n])
        prediction[n, removed[n]] = rows.reshape(-1, 3, PATCH, PATCH).permute(0, 2, 3, 1).flatten(1)
    loss = ((prediction - target) ** 2).mean(-1)
    return (loss * removed).sum() / removed.sum()


def centred(targets: Sequence[Tensor], decay: float) -> Tensor:
    """The last targets (B, N, D) without their average over all until then, unit mean square."""
    mean, square, total = torch.zeros(()), torch.zeros(()), 0.0
    for target in targets:
        rows = target.reshape(-1, target.shape[-1])
        mean = decay * mean + (1 - decay) * rows.sum(0) / len(rows)
        square = decay * square + (1 - decay) * (rows**2).sum() / rows.numel()
        total = decay * total + 1 - decay
    mean, square = mean / total, square / total
    return (targets[-1] - mean) / (square - (mean**2).mean() + 1e-6) ** 0.5


def data2vec(model: M3I, batches: Sequence[Batch], *, decay: float | None = None) -> Tensor:
    """arXiv 2202.03555, section 3.3, with the squared error: normalised teacher at the mask.

    With `decay` the targets are centred, by the last batch alone (0) or by averages.
    """
    batch = batches[-1]
    features = [model.teacher.backbone.features(views(part)[0]) for part in batches]
    targets = [F.layer_norm(part, part.shape[-1:], eps=1e-6) for part in features]
    teacher = targets[-1] if decay is None else centred(targets, decay)
    image, _ = views(batch)
    x = masked(image, batch)
    pairs = []
    for n in range(len(image)):
        hidden = ~batch.mask[n].flatten()
        pairs.append((decoded(model, "features", x, batch, False, n, hidden), teacher[n, hidden]))
    students, teachers = (torch.cat(side) for side in zip(*pairs, strict=True))
    return F.mse_loss(students, teachers)


def byol(model: M3I, batches: Sequence[Batch], *, symmetric: bool) -> Tensor:
    """arXiv 2006.07733, equation 2, and the mean of both directions."""
    a, b = views(batches[-1])
    losses = [
        (2 - 2 * F.cosine_similarity(*global_pair(model, x, y), dim=-1)).mean()
        for x, y in (((a, b), (b, a)) if symmetric else ((a, b),))
    ]
    return sum(losses) / len(losses)


def simsiam(model: M3I, batches: Sequence[Batch]) -> Tensor:
    """arXiv 2011.10566, equations 1 and 4 (plus 1, to be a squared distance)."""
    a, b = views(batches[-1])
    losses = []
    for x, y in ((a, b), (b, a)):
        p, z = global_pair(model, x, y, "student")
        losses.append(1 - F.cosine_similarity(p, z.detach(), dim=-1).mean())
    return sum(losses)


def moco(model: M3I, batches: Sequence[Batch], *, length: int) -> Tensor:
    """arXiv 1911.05722, algorithm 1: one positive, the queue as negatives."""
    queue = torch.zeros(0)
    for batch in batches[:-1]:
        _, key = global_pair(model, *views(batch))
        queue = torch.cat([F.normalize(key, dim=1).detach(), queue.view(-1, key.shape[1])])
        queue = queue[:length]
    q, k = (F.normalize(z, dim=1) for z in global_pair(model, *views(batches[-1])))
    l_pos, l_neg = torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,kc->nk", q, queue)
    logits = torch.cat([l_pos, l_neg], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def moco_v3(model: M3I, batches: Sequence[Batch]) -> Tensor:
    """arXiv 2104.02057, algorithm 1, without its factor 2 tau and as the mean of both losses."""
    a, b = views(batches[-1])
    losses = []
    for x, y in ((a, b), (b, a)):
        q, k = (F.normalize(z, dim=1) for z in global_pair(model, x, y))
        losses.append(F.cross_entropy(q @ k.T / 0.2, torch.arange(len(q))))
    return sum(losses) / 2


def barlow_twins(model: M3I, batches: Sequence[Batch]) -> Tensor:
    """arXiv 2103.03230, algorithm 1."""
    z_a, z_b = global_pair(model, *views(batches[-1]), "student")
    norm = nn.BatchNorm1d(z_a.shape[1], affine=False)
    c = norm(z_a).T @ norm(z_b) / len(z_a)
    on_diagonal = (torch.diagonal(c) - 1).pow(2).sum()
    off_diagonal = c[~torch.eye(len(c), dtype=torch.bool)].pow(2).sum()
    return on_diagonal + 0.005 * off_diagonal


def densecl(model: M3I, batches: Sequence[Batch], *, length: int) -> Tensor:
    """arXiv 2011.09157, equations 2 to 4, lambda 0.5: global and dense InfoNCE, two queues."""

    def dense(view: Tensor, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        features = encoder.backbone.features(view)
        return features, encoder.dense_projector(features)

    queue = torch.zeros(0, 12)
    for batch in batches[:-1]:
        _, grid = dense(views(batch)[1], model.teacher)
        queue = torch.cat([F.normalize(grid.mean(1), dim=1), queue])[:length]
    x, y = views(batches[-1])
    f_q, q = dense(x, model.student)
    f_k, k = dense(y, model.teacher)
    losses = []
    for n in range(len(x)):
        similarity = F.normalize(f_q[n], dim=1) @ F.normalize(f_k[n], dim=1).T
        for s in range(9):
            r = F.normalize(q[n, s], dim=0)
            t = F.normalize(k[n, similarity[s].argmax()], dim=0)
            logits = torch.cat([(r @ t)[None], queue @ r]) / 0.2
            losses.append(-logits.log_softmax(0)[0])
    return 0.5 * torch.stack(losses).mean() + 0.5 * moco(model, batches, length=length)


def clip(model: M3I, batches: Sequence[Batch]) -> Tensor:
    """arXiv 2103.00020, figure 3."""
    batch = batches[-1]
    image, _ = views(batch)
    backbone = model.student.backbone
    i = F.normalize(model.text_projection(backbone.pool(backbone.features(image))), dim=1)
    t = F.normalize(model.text_tower(batch.tokens, batch.token_mask), dim=1)
    logits = i @ t.T * model.temperatures["text"].log_scale.exp()
    labels = torch.arange(len(i))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siamese_im(model: M3I, batches: Sequence[Batch], *, negative_weight: float) -> Tensor:
    """arXiv 2206.01204, section 3.2: normalised regression, and UniGrad's term."""
    batch = batches[-1]
    a, b = views(batch)
    target = model.teacher.backbone.features(b)
    width = target.shape[-1]
    target = F.layer_norm(target, (width,), eps=1e-6).reshape(-1, width)
    x, everywhere = masked(a, batch), torch.ones(9, dtype=torch.bool)
    rows = [decoded(model, "features", x, batch, True, n, everywhere) for n in range(len(a))]
    prediction = torch.cat(rows)
    if negative_weight:
        prediction = F.layer_norm(prediction, (width,), eps=1e-6)
    positive = ((prediction - target) ** 2).sum(-1).mean()
    correlation = target.T @ target / len(target)
    negative = torch.diagonal(prediction @ correlation @ prediction.T).mean()
    return (positive + negative_weight * negative) / width


def cross_entropy(model: M3I, batches: Sequence[Batch]) -> Tensor:
    """Label smoothing of arXiv 1512.00567, section 7."""
    image, _ = views(batches[-1])
    backbone = model.student.backbone
    logits = model.category_head(backbone.pool(backbone.features(image)))
    return nn.CrossEntropyLoss(label_smoothing=0.1)(logits, batches[-1].category)


# ----------------------------------------------------------------------------------------- the rows


class Case(NamedTuple):
    """A file of configs/methods, what is changed in it, and the published loss."""

    method: str
    loss: Callable[..., Tensor]
    options: Mapping[str, Any] = MappingProxyType({})
    target: Mapping[str, Any] = MappingProxyType({})  # of the only group, or of the first
    likelihood: Mapping[str, Any] = MappingProxyType({})
    input: Mapping[str, Any] = MappingProxyType({})
    predictor: bool | None = None
    more: str | None = None  # a method whose group is added, both with half the weight


ROWS = {
    "MAE": Case("mim_pixel", mae, {"norm_pix": True}),
    "MAE, raw pixels": Case("mim_pixel", mae, {"norm_pix": False}, {"normalise": "none"}),
    "data2vec": Case("mim_feature", data2vec, target={"centre": "none"}),
    "data2vec, centred": Case("mim_feature", data2vec, {"decay": 0.0}),
    "data2vec, centred by averages": Case(
        "mim_feature", data2vec, {"decay": 0.7}, {"centre": "running", "centre_decay": 0.7}
    ),
    "BYOL": Case("instance_discrimination_predictor", byol, {"symmetric": False}),
    "BYOL, both directions": Case(
        "instance_discrimination_predictor", byol, {"symmetric": True}, input={"both_views": True}
    ),
    "SimSiam": Case(
        "instance_discrimination_predictor",
        simsiam,
        target={"encoder": "student"},
        input={"both_views": True},
    ),
    "MoCo": Case(
        "instance_discrimination_negatives",
        moco,
        {"length": 9},
        likelihood={"candidates": "own", "queue": 9},
    ),
    "MoCo v3": Case(
        "instance_discrimination_negatives", moco_v3, input={"both_views": True}, predictor=True
    ),
    "Barlow Twins": Case("instance_discrimination_decorrelation", barlow_twins),
    "DenseCL": Case(
        "dense_instance_discrimination",
        densecl,
        {"length": 9},
        {"match": "similarity", "weight": 0.5},
        {"queue": 9},
        more="instance_discrimination_negatives",
    ),
    "CLIP": Case("language_image_contrastive", clip),
    "SiameseIM, regression": Case(
        "siamim_feature", siamese_im, {"negative_weight": 0.0}, {"centre": "none"}
    ),
    "SiameseIM": Case(
        "siamim_feature",
        siamese_im,
        {"negative_weight": 0.02},
        {
            "regularisation": "decorrelation",
            "decorrelation": "unigrad",
            "centre": "none",
            "normalise_prediction": "layer_norm",
        },
    ),
    "cross-entropy": Case("image_classification", cross_entropy),
}


def configure(row: Case) -> Config:
    """The method over a small ViT."""
    tree = yaml.safe_load(SMALL)
    method = yaml.safe_load((METHODS / f"{row.method}.yaml").read_text())
    objective = tree["objective"] = method["objective"]
    objective["input"] |= row.input
    first = objective["targets"][0]
    first |= row.target
    first["likelihood"] |= row.likelihood
    if row.more:
        extra = yaml.safe_load((METHODS / f"{row.more}.yaml").read_text())
        (group,) = extra["objective"]["targets"]
        group["likelihood"] |= {"candidates": "own", **row.likelihood}
        objective["targets"].append(group | {"weight": 0.5})
    head = method.get("model", {}).get("global_head", {})
    if row.predictor is not None:
        head["predictor"] = row.predictor
    tree["model"] |= {
        "backbone": {
            "name": "vit",
            "options": {"width": 24, "depth": 1, "heads": 2, "pool_heads": 3, "embed_dim": 18},
        },
        "global_head": {"hidden": 20, "width": 12} | head,
    }
    tree["data"]["image_size"] = SIZE
    return Config.model_validate(tree)


def build(config: Config) -> M3I:
    torch.manual_seed(0)
    model = M3I(config.model, config.objective, SIZE).train()
    for parameter in model.parameters():  # the encoders must differ for the test to tell them apart
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def make_batch(config: Config, size: int, start: int) -> Batch:
    batch = random_batch(size, start=start, image_size=SIZE, patch=PATCH)
    spec = config.objective.input
    mask = PatchMask(3, 3, spec.ratio, spec.mask)
    drawn = [mask(np.random.default_rng(start + n)) for n in range(size)]
    batch.mask = torch.stack([torch.as_tensor(m) for m in drawn])
    batch.has_text[:] = True
    batch.category = torch.arange(start, start + size) % 5
    return batch


def losses_and_gradients(
    row: Case, size: int, rank: int = 0, ranks: int = 1
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Ours on this rank's part of the third batch, and the published loss on the whole of it."""
    config = configure(row)
    model = build(config)
    part = size // ranks
    loss = torch.zeros(())
    for step in range(3):  # the first two fill the queues
        own = make_batch(config, part, step * size + rank * part)
        data = config.data
        view = build_input(
            own, config.objective.input, mean=data.mean, std=data.std, dtype=torch.float32
        )
        loss = model(view)["loss"]
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batches = [make_batch(config, size, step * size) for step in range(3)]
    expected = row.loss(model, batches, **row.options)
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [loss.detach(), expected.detach()], [found, wanted]


def assert_same(losses: list[Tensor], gradients: list[dict[str, Tensor]]) -> None:
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    found, wanted = gradients
    assert found.keys() == wanted.keys()
    # What only rounding separates from zero, the bias of attention keys say, cannot be compared.
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4 * scale + noise, msg=name
        )


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_published_loss(name: str):
    assert_same(*losses_and_gradients(ROWS[name], size=6))


def all_rows(world: Any, folder: Path) -> dict[str, Any]:
    """Every row, half of each batch on this rank; losses and gradients averaged over the ranks."""
    results = {}
    for name, row in ROWS.items():
        losses, (found, wanted) = losses_and_gradients(row, 8, world.rank, world.size)
        for value in (losses[0], *found.values()):
            dist.all_reduce(value)
            value /= world.size
        results[name] = [losses, [found, wanted]]
    return results


@pytest.mark.distributed
def test_two_ranks_with_half_the_batch_each_give_the_published_losses(tmp_path: Path):
    for results in run_ranks(2, all_rows, tmp_path):
        assert results.keys() == ROWS.keys()
        for losses, gradients in results.values():
            assert_same(losses, gradients)
