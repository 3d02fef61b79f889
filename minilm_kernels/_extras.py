"""Imports of optional dependencies, with an error that names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Extra -> modules of its packages.
EXTRAS = {
    "hf": ("transformers", "safetensors", "tokenizers", "huggingface_hub"),
    "distill": ("transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy", "tqdm", "yaml"),
    "trainer": ("transformers", "safetensors", "tokenizers", "huggingface_hub", "accelerate"),
    "data": ("datasets", "pyarrow"),
    "sentence-transformers": ("sentence_transformers", "transformers", "accelerate", "datasets"),
    "evaluate": (
        "sentence_transformers",
        "sklearn",
        "scipy",
        "model2vec",
        "skeletoken",
        "torchmetrics",
        "matplotlib",
        "transformers",
        "accelerate",
        "datasets",
        "numpy",
        "tqdm",
        "yaml",
    ),
    "mteb": ("mteb",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trl": ("trl", "transformers", "accelerate", "datasets"),
}


@contextmanager
def optional_imports(extra: str, feature: str) -> Iterator[None]:
    """Names the extra in the error if an import in the block fails because a package of the extra is missing.

    If blocks are nested, the error names the extra of the outermost block. Other import errors are not changed.

    Args:
        extra: a key of `EXTRAS`.
        feature: the subject of the error message, for example "student_config".

    Raises:
        ImportError: a package of the extra is not installed.

    Example:
        >>> from minilm_kernels._extras import optional_imports
        >>> with optional_imports("hf", "student_config"):
        ...     import no_such_package
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: No module named 'no_such_package'
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[extra]:
            raise
        raise ImportError(
            f'{feature} requires {package}, which is not installed: pip install "minilm_kernels[{extra}]"', name=package
        ) from error
