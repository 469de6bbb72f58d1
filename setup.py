"""Package layout that pyproject.toml cannot say.

The configurations lie beside the package in a checkout, and inside it when it is installed
(m3i_scale/config/shipped.py). `m3i_kernels` lives under `kernels/`, which is not a package on
purpose: PyPI has a distribution called `kernels`, which transformers imports when it finds one.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["m3i_scale", "m3i_scale.*"]),
        "m3i_scale.configs",
        *(find_packages(where="kernels", include=["m3i_kernels", "m3i_kernels.*"])),
    ],
    package_dir={"m3i_scale.configs": "configs", "m3i_kernels": "kernels/m3i_kernels"},
)
