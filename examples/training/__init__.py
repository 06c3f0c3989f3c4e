"""What `examples/train.py` is made of.

settings    command line and config file become one checked config
transforms, data, loading      images: files or arrays to batches
optim       optimizer and learning-rate schedule from mmcls-style configs
runtime     devices, processes, random seeds
checkpoint  everything a killed run needs to go on to the same numbers
engine      one training step, evaluation
run         epochs, logs, checkpoints
compare     BN beside FusedBN from the same seed
memory      what a step needs
progress, report, plots        bars; header, tables and CSV files; pictures
"""
