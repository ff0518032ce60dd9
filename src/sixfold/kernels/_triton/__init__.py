"""Triton kernels and the device functions they share; kernels/*/triton.py launch them."""

import triton

OLDEST = (3, 6)


def _check_version(version: str) -> None:
    """Refuse a Triton that cannot compile the kernels, such as torch 2.6 brings.

    Raises:
        ImportError: It is too old, so that the backend counts as missing.
    """
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(
            f"the kernels need Triton {needed} or later, found {version}: upgrade torch, which "
            "brings one"
        )


_check_version(triton.__version__)
