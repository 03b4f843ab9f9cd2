"""Gin files as T5X's launchers read them, in this process."""

# pyright: reportMissingImports=false
import contextlib
import importlib
import os
import sys

import gin
import gin_files
import t5x
from gin import config as gin_config
from t5x import gin_utils

# Job of a gin file of ours -> the function of T5X that its launcher calls.
LAUNCHED = {
    "train": "t5x.train.train",
    "finetune": "t5x.train.train",
    "eval": "t5x.eval.evaluate",
    "infer": "t5x.infer.infer",
}
PATHS = ["", str(gin_files.ROOT), os.path.dirname(*t5x.__path__)]


@contextlib.contextmanager
def parsed(job, files, bindings=()):
    """The launcher of a job, its arguments bound by gin, as `python -m` leaves it."""
    module, _, name = LAUNCHED[job].rpartition(".")
    launched = getattr(importlib.import_module(module), name)
    main = sys.modules["__main__"]
    # What a launcher defines, gin files reach as `__main__`.
    defined = {n: v for n, v in vars(sys.modules[module]).items() if callable(v)}
    before = {name: vars(main)[name] for name in defined.keys() & vars(main).keys()}
    vars(main).update(defined)
    readers = list(gin_config._FILE_READERS)
    gin.clear_config()
    try:
        configurable = gin.configurable(launched)
        with gin.unlock_config():
            gin_utils.parse_gin_flags(
                PATHS,
                [f"gin_configs/runs/t5x_{job}.gin", *map(str, files)],
                list(bindings),
            )
        yield configurable
    finally:
        gin.clear_config()
        gin_config._FILE_READERS[:] = readers
        for name in defined:
            del vars(main)[name]
        vars(main).update(before)
