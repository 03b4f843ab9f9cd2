"""The conditions all tests run under.

- Eight simulated CPU devices, so that every shipped mesh can be built.
- No implicit dtype or rank promotion.
- Annotations of the whole package, shapes included, are checked at run time. The check
  of a signature is made once, however often a function within a function is defined.
- Programs are compiled to plain code, which is quick, and each but once a session.
- Garbage is collected seldom: traced programs are many objects, few of them in cycles.
- Random tests draw the same cases in every run. A wider search draws others, and ten
  times as many: `pytest -n 2 -m "slow or not slow" --hypothesis-profile=search`
- T5X is imported from the folders that the environment variable T5X_SRC names: those
  of t5x, airio and jestimator, joined as in PATH. It may be installed instead.
"""

import atexit
import functools
import gc
import mmap
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import hypothesis
import jaxlib


def _known_to_xla(flag):
    """Whether the installed XLA has the flag: of one that it lacks it dies."""
    for library in Path(jaxlib.__file__).parent.rglob("*.so"):
        with (
            open(library, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            # The name of a flag is a text of C; one that was given up is only reserved.
            if content.find(flag.encode() + b"\0") >= 0:
                return True
    return False


# Workers and other child processes inherit what the first process sets.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _flags = {
        "xla_force_host_platform_device_count": "8",
        # Most of the time of tests is compilation; so it takes a third.
        "xla_backend_optimization_level": "0",
        "xla_cpu_use_fusion_emitters": "false",
        # Each part of a program takes its own start of the compiler.
        "xla_cpu_parallel_codegen_split_count": "1",
    }
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", "")]
        + [f"--{name}={value}" for name, value in _flags.items() if _known_to_xla(name)]
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _compiled = tempfile.mkdtemp(prefix="vit22b_compiled_")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# A torch built for CUDA brings triton, which crashes once TensorFlow is loaded.
sys.modules.setdefault("triton", None)

_T5X = [path for path in os.environ.get("T5X_SRC", "").split(os.pathsep) if path]
sys.path.extend(path for path in _T5X if path not in sys.path)

import beartype  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import optax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


_jaxtyped, _checks = jaxtyping.jaxtyped, {}


def _check_of(function):
    """What beartype makes of an empty function that jaxtyping made of a signature."""
    code = function.__code__
    key = (
        (function.__module__, function.__qualname__),
        (code.co_varnames, code.co_argcount, code.co_kwonlyargcount, code.co_flags),
        len(function.__defaults__ or ()),
        tuple(function.__kwdefaults__ or ()),
        tuple(function.__annotations__.items()),
    )
    if key not in _checks:
        _checks[key] = beartype.beartype(function)
    return _checks[key]


def _jaxtyped_once(*, typechecker):
    """jaxtyping's decorator, as its import hook writes it above every definition."""

    def decorated(target):
        # Without annotations there is nothing to check.
        if isinstance(target, types.FunctionType) and not target.__annotations__:
            return target
        return _jaxtyped(target, typechecker=_check_of)

    return decorated


jaxtyping.jaxtyped = _jaxtyped_once
jaxtyping.install_import_hook("vit22b_transfer", "beartype.beartype")

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption(
        "--update-goldens",
        action="store_true",
        help="write tests/testdata/goldens/ anew instead of comparing with it",
    )


def _lenient(function):
    """The same optax function, running under JAX's standard dtype promotion.

    optax computes such things as `0.9 ** count` with an integer count, which strict
    promotion refuses. What a factory returns (a transformation, a schedule) runs
    later, so that is wrapped as well.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            result = function(*args, **kwargs)
        if isinstance(result, optax.GradientTransformation):
            return result._replace(
                init=_lenient(result.init), update=_lenient(result.update)
            )
        if isinstance(result, types.FunctionType) and _is_optax(result):
            return _lenient(result)
        return result

    wrapped.lenient = True
    return wrapped


def _is_optax(function):
    return function.__module__.startswith("optax.") and not hasattr(function, "lenient")


for _name, _value in list(vars(optax).items()):
    if isinstance(_value, types.FunctionType) and _is_optax(_value):
        setattr(optax, _name, _lenient(_value))
