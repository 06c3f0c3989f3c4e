# ResNet-18 with the CIFAR stem on scikit-learn's handwritten digits (8 x 8 grey), made for a CPU with two cores.
# Run with --compare it trains with BN and with FusedBN and asks both for the accuracy below.
model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet_CIFAR",
        depth=18,
        in_channels=1,
        stem_channels=32,
        base_channels=32,
        strides=(1, 1, 2, 2),
        norm_cfg=dict(type="FusedBN"),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead", num_classes=10, in_channels=256, loss=dict(type="CrossEntropyLoss"), topk=(1,)
    ),
)
normalize = dict(type="Normalize", mean=[77.8], std=[95.8])
data = dict(
    samples_per_gpu=64,
    workers_per_gpu=0,
    train=dict(
        type="Digits",
        split="train",
        test_fraction=0.2,
        split_seed=0,
        pipeline=[dict(type="RandomCrop", size=8, padding=1), normalize],
    ),
    val=dict(type="Digits", split="test", test_fraction=0.2, split_seed=0, pipeline=[normalize]),
)
# 22 steps make an epoch. The warm-up takes two, so that over the first one, where --compare holds the losses of every
# step against float64, rounding errors do not grow yet: at full learning rate they double with every step or two.
optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
lr_config = dict(
    policy="CosineAnnealing", by_epoch=False, min_lr=0, warmup="linear", warmup_iters=44, warmup_ratio=0.02
)
runner = dict(type="EpochBasedRunner", max_epochs=15)
compare = dict(min_accuracy=97.0)
seed = 0
