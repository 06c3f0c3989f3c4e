"""The classifier around the backbone: keys, pooling, head, losses, accuracy, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.classifier import (
    CrossEntropyLoss,
    GlobalAveragePooling,
    ImageClassifier,
    LabelSmoothLoss,
    LinearClsHead,
    accuracy,
    topk_correct,
)
from fastres.registry import MODELS


class Backbone(nn.Module):
    """Two feature maps, as a backbone with out_indices=(0, 1) gives."""

    num_stages, out_indices, feat_dim = 2, (0, 1), 5

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)

    def forward(self, x):
        a = self.a(x)
        return a, self.b(a)


HEAD = dict(type="LinearClsHead", num_classes=7, in_channels=5)
NECK = dict(type="GlobalAveragePooling")


def classifier(**head) -> ImageClassifier:
    return ImageClassifier(Backbone(), NECK, {**HEAD, **head})


def test_keys_and_forward():
    model = classifier()
    assert set(model.state_dict()) == {
        *(f"backbone.{c}.{p}" for c in "ab" for p in ("weight", "bias")),
        "head.fc.weight",
        "head.fc.bias",
    }
    x = torch.randn(6, 3, 9, 7)
    y = model.backbone(x)[1]
    assert len(model.extract_feat(x, "backbone")) == 2
    pooled = model.extract_feat(x)
    assert [t.shape for t in pooled] == [(6, 4), (6, 5)]
    torch.testing.assert_close(pooled[1], y.mean((2, 3)))
    torch.testing.assert_close(model(x), F.linear(y.mean((2, 3)), model.head.fc.weight, model.head.fc.bias))
    torch.testing.assert_close(model.predict(x).sum(1), torch.ones(6))
    assert not model.predict(x).requires_grad


def test_losses_and_accuracy_in_forward():
    model = classifier(topk=(1, 3), cal_acc=True)
    x, labels = torch.randn(6, 3, 9, 7), torch.arange(6)
    losses = model(x, labels)
    scores = model(x)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(scores, labels))
    assert set(losses) == {"loss", "accuracy_top-1", "accuracy_top-3"}
    expected = (scores.argmax(1) == labels).float().mean() * 100
    torch.testing.assert_close(losses["accuracy_top-1"], expected)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert set(classifier()(x, labels)) == {"loss"}


def test_built_from_config_and_without_neck_or_head():
    MODELS.register_module("_TestBackbone", module=Backbone, force=True)
    cfg = dict(type="ImageClassifier", backbone=dict(type="_TestBackbone"), neck=NECK, head=HEAD)
    assert MODELS.build(cfg)(torch.randn(2, 3, 5, 5)).shape == (2, 7)
    bare = ImageClassifier(Backbone())
    assert [t.shape for t in bare(torch.randn(2, 3, 5, 5))] == [(2, 4, 5, 5), (2, 5, 3, 3)]
    with pytest.raises(ValueError, match="gt_label: labels were given, but the model has no head"):
        bare(torch.randn(2, 3, 5, 5), torch.zeros(2, dtype=torch.long))


def test_initialisation():
    head = LinearClsHead(1000, 512)
    head.init_weights()
    assert abs(head.fc.weight.std().item() - 0.01) < 1e-3 and head.fc.bias.eq(0).all()
    head = LinearClsHead(1000, 5, init_cfg=dict(type="Normal", layer="Linear", mean=1.0, std=0.1, bias=2.0))
    model = ImageClassifier(Backbone(), NECK, head, init_cfg=dict(type="Constant", layer="Conv2d", val=3.0))
    model.init_weights()
    assert abs(head.fc.weight.mean().item() - 1) < 1e-2 and head.fc.bias.eq(2).all()
    assert model.backbone.a.weight.eq(3).all()
    before = (head := LinearClsHead(10, 5, init_cfg=None)).fc.weight.clone()
    head.init_weights()
    assert torch.equal(head.fc.weight, before)


def test_losses():
    scores, labels = torch.randn(8, 5, requires_grad=True), torch.randint(0, 5, (8,))
    log_p = scores.log_softmax(1)
    hard = -log_p.gather(1, labels[:, None]).squeeze(1)
    soft = -(0.9 * log_p.gather(1, labels[:, None]).squeeze(1) + 0.1 * log_p.mean(1))
    torch.testing.assert_close(CrossEntropyLoss()(scores, labels), hard.mean())
    torch.testing.assert_close(CrossEntropyLoss(reduction="none", loss_weight=2.0)(scores, labels), 2 * hard)
    torch.testing.assert_close(CrossEntropyLoss(label_smoothing=0.1)(scores, labels), soft.mean())
    torch.testing.assert_close(
        LabelSmoothLoss(0.1, num_classes=5, reduction="sum")(scores, labels), soft.sum()
    )
    weight = [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = F.cross_entropy(scores, labels, weight=torch.tensor(weight))
    weighted = CrossEntropyLoss(class_weight=weight)
    torch.testing.assert_close(weighted(scores, labels), expected)
    assert not weighted.state_dict()
    assert CrossEntropyLoss()(scores.bfloat16(), labels).dtype == torch.float32
    assert CrossEntropyLoss()(scores.double(), labels).dtype == torch.float64


def test_topk():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.5, 0.1], [0.2, 0.1, 0.3], [float("nan"), 0.0, 0.0]])
    labels = torch.tensor([1, 1, 1, 0])
    assert topk_correct(scores, labels, (1, 2, 3, 10)).tolist() == [1, 2, 3, 3]
    assert accuracy(scores, labels).item() == 25
    assert [a.item() for a in accuracy(scores, labels, (1, 2))] == [25, 50]
    assert topk_correct(scores[:0], labels[:0]).tolist() == [0]
    assert accuracy(scores[:0], labels[:0]).item() == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearClsHead(0, 5), ValueError, "num_classes: got 0"),
        (lambda: LinearClsHead(5, "5"), ValueError, "in_channels: got '5'"),
        (lambda: LinearClsHead(5, 5, topk=(0,)), AssertionError, r"topk: got \(0,\)"),
        (lambda: LinearClsHead(5, 5, loss=dict(type="CrossEntropyLos")), KeyError, "CrossEntropyLoss"),
        (lambda: classifier(in_channels=6), ValueError, r"head\.in_channels: got 6, wanted 5"),
        (lambda: classifier(depth=6), TypeError, "depth"),
        (lambda: classifier().extract_feat(torch.ones(1, 3, 4, 4), "head"), ValueError, "stage: got 'head'"),
        (lambda: GlobalAveragePooling(4), AssertionError, "dim: got 4"),
        (lambda: GlobalAveragePooling()(torch.ones(2, 3)), ValueError, r"got shape \(2, 3\), wanted 4"),
        (lambda: LinearClsHead(3, 5)(torch.ones(2, 4)), ValueError, r"got shape \(2, 4\), wanted \[N, 5\]"),
        (lambda: CrossEntropyLoss(label_smoothing=2.0), ValueError, r"label_smoothing: got 2\.0"),
        (lambda: CrossEntropyLoss(reduction="avg"), ValueError, "reduction: got 'avg'"),
        (lambda: LabelSmoothLoss(0.1, mode="classy_vision"), ValueError, "mode: got 'classy_vision'"),
        (lambda: CrossEntropyLoss()(torch.ones(2, 3), torch.ones(3).long()), ValueError, r"wanted integers \[2\]"),
        (lambda: CrossEntropyLoss()(torch.ones(2, 3), torch.ones(2)), ValueError, "labels: got torch.float32"),
        (lambda: topk_correct(torch.ones(2), torch.ones(2).long()), ValueError, r"scores: got .*\[N, classes\]"),
        (lambda: topk_correct(torch.ones(2, 2), torch.ones(2).long(), (0,)), ValueError, r"topk: got \(0,\)"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
