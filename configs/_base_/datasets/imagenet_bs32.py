# A folder for each class below train and val; --data imagefolder:DIR puts another folder in their place.
img_norm_cfg = dict(
    type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", size=224),
    dict(type="RandomFlip", flip_prob=0.5, direction="horizontal"),
    img_norm_cfg,
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", size=(256, -1)),
    dict(type="CenterCrop", crop_size=224),
    img_norm_cfg,
]
data = dict(
    samples_per_gpu=32,
    workers_per_gpu=4,
    train=dict(type="ImageFolder", data_prefix="data/imagenet/train", pipeline=train_pipeline),
    val=dict(type="ImageFolder", data_prefix="data/imagenet/val", pipeline=test_pipeline),
)
evaluation = dict(interval=1, metric="accuracy")
