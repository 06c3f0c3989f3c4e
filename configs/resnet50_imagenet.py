# ResNet-50 on ImageNet or any folder of images in its layout, 256 images a step:
#   torchrun --nproc-per-node 8 examples/train.py configs/resnet50_imagenet.py \
#       --data imagefolder:DIR --amp bf16 --channels-last
# With other numbers of processes or images, scale the learning rate with the images of a step.
_base_ = [
    "_base_/models/resnet50.py",
    "_base_/datasets/imagenet_bs32.py",
    "_base_/schedules/imagenet_bs256.py",
]
checkpoint_config = dict(interval=1, step_interval=2000)
log_config = dict(interval=50)
