# ResNet-18 with the CIFAR stem on your own small images, such as CIFAR's 32 x 32 saved as files:
#   python examples/train.py configs/resnet18_small_images.py --data imagefolder:DIR
# DIR has train/ and val/ with a folder for each class, or the class folders themselves; the head takes on their number.
_base_ = ["_base_/models/resnet18_cifar.py"]
normalize = dict(type="Normalize", mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7])
data = dict(
    samples_per_gpu=128,
    workers_per_gpu=2,
    train=dict(
        type="ImageFolder",
        data_prefix="data/small_images/train",
        pipeline=[
            dict(type="Resize", size=32),
            dict(type="RandomCrop", size=32, padding=4),
            dict(type="RandomFlip", flip_prob=0.5, direction="horizontal"),
            normalize,
        ],
    ),
    val=dict(
        type="ImageFolder",
        data_prefix="data/small_images/val",
        pipeline=[dict(type="Resize", size=32), normalize],
    ),
)
optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
lr_config = dict(policy="CosineAnnealing", min_lr=0, warmup="linear", warmup_iters=200, warmup_ratio=0.01)
runner = dict(type="EpochBasedRunner", max_epochs=30)
