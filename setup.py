"""Package layout that pyproject.toml cannot say: `m3i_kernels` lives under `kernels/`.

`kernels/` itself is not a package on purpose: PyPI has a distribution called `kernels`, which
transformers imports when it finds one.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["m3i_scale", "m3i_scale.*"]),
        *(find_packages(where="kernels", include=["m3i_kernels", "m3i_kernels.*"])),
    ],
    package_dir={"m3i_kernels": "kernels/m3i_kernels"},
)
