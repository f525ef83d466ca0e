"""``python forked.py N MODULE ARGUMENTS``: a module in N processes, with the environment in which
torchrun starts them, but forked from one that has imported everything: most of their time."""

import os
import runpy
import socket
import sys

import torch._dynamo  # noqa: F401
import transformers.models.resnet.modeling_resnet  # noqa: F401

import occfeat_train.cli
import occfeat_train.train  # noqa: F401


def main(world, module, *arguments):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world}
    for rank in range(int(world)):
        if not os.fork():
            own = same | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in own.items()})
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
    if any([os.wait()[1] for _ in range(int(world))]):
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
