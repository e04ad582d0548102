"""Packages of the distribution; everything else about it is in pyproject.toml.

``triton_kernels/`` lies at the top of the repository but is installed inside ``xattn_kernels``,
because a top-level package of that name belongs to another project that inference servers look for.
"""

from setuptools import find_packages, setup

setup(
    # Not in pyproject.toml, where setuptools before 77 and after it want different spellings.
    license="Apache-2.0",
    packages=[*find_packages(include=["xattn_kernels*"]), "xattn_kernels.triton_kernels"],
    package_dir={"xattn_kernels.triton_kernels": "triton_kernels"},
)
