# ResNet-50 on random images that already lie on the device: throughput and memory, not accuracy.
#   python examples/train.py configs/resnet50_synthetic.py --compare --amp bf16 --channels-last
_base_ = ["_base_/models/resnet50.py", "_base_/schedules/imagenet_bs256.py"]
normalize = dict(type="Normalize", mean=[127.5] * 3, std=[73.9] * 3)
data = dict(
    samples_per_gpu=32,
    workers_per_gpu=0,
    train=dict(type="Synthetic", image_size=224, num_classes=1000, length=640, pipeline=[normalize]),
    val=dict(type="Synthetic", image_size=224, num_classes=1000, length=64, pipeline=[normalize]),
)
lr_config = dict(_delete_=True, policy="fixed", warmup="linear", warmup_iters=20, warmup_ratio=0.01)
runner = dict(max_epochs=2)
log_config = dict(interval=5)
compare = dict(reference_steps=5)
