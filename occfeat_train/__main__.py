"""``python -m occfeat_train``, for torchrun."""

from occfeat_train.cli import main

main(prog_name="occfeat-train")
