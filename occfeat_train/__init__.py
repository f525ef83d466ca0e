"""Trainer of occfeat: pretraining and finetuning from a targets store alone."""

__version__ = "0.1.0"
