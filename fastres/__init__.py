"""ResNets on fused kernels: convolution, batch norm, ReLU and residual addition, forward and backward.

import fastres
backbone = fastres.ResNet(depth=50)                              # mmcls's arguments and state-dict keys
norm = fastres.FusedBatchNorm2d(64, relu=True)                   # in a model of your own
model = fastres.build_classifier(dict(type="ImageClassifier", backbone=dict(type="ResNet", depth=18), ...))
"""

from fastres import functional
from fastres._allocator import keep_memory
from fastres._folding import forget as forget_folded
from fastres._registry import (
    ACTIVATION_LAYERS,
    CONV_LAYERS,
    MODELS,
    NORM_LAYERS,
    Registry,
    build_activation_layer,
    build_backbone,
    build_classifier,
    build_conv_layer,
    build_head,
    build_loss,
    build_model,
    build_neck,
    build_norm_layer,
)
from fastres._version import __version__
from fastres.checkpoints import export_state_dict, load_checkpoint
from fastres.classifier import GlobalAveragePooling, ImageClassifier, LinearClsHead
from fastres.convert import FuseReport, channels_last_, fuse_, unfuse_
from fastres.deploy import fold
from fastres.functional import backend, get_backend, record_routes
from fastres.graphs import GraphRunner
from fastres.initialize import BaseModule
from fastres.models import ResNet
from fastres.modules import (
    BasicBlock,
    Bottleneck,
    DropPath,
    FusedBatchNorm2d,
    FusedSyncBatchNorm,
    ResLayer,
    convert_sync_batchnorm,
    get_expansion,
)
from fastres.variants import ResNet_CIFAR, ResNetV1c, ResNetV1d, ResNeXt, SEResNet

__all__ = [
    "ACTIVATION_LAYERS",
    "CONV_LAYERS",
    "MODELS",
    "NORM_LAYERS",
    "BaseModule",
    "BasicBlock",
    "Bottleneck",
    "DropPath",
    "FuseReport",
    "FusedBatchNorm2d",
    "FusedSyncBatchNorm",
    "GlobalAveragePooling",
    "GraphRunner",
    "ImageClassifier",
    "LinearClsHead",
    "Registry",
    "ResLayer",
    "ResNeXt",
    "ResNet",
    "ResNetV1c",
    "ResNetV1d",
    "ResNet_CIFAR",
    "SEResNet",
    "__version__",
    "backend",
    "build_activation_layer",
    "build_backbone",
    "build_classifier",
    "build_conv_layer",
    "build_head",
    "build_loss",
    "build_model",
    "build_neck",
    "build_norm_layer",
    "channels_last_",
    "convert_sync_batchnorm",
    "export_state_dict",
    "fold",
    "forget_folded",
    "functional",
    "fuse_",
    "get_backend",
    "get_expansion",
    "keep_memory",
    "load_checkpoint",
    "record_routes",
    "unfuse_",
]
