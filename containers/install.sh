#!/bin/bash
# Install the project into a new environment, from the lock file: what both images are made by.
#
#   containers/install.sh PREFIX     run in the root of the repository; PYTHON is the interpreter

set -euo pipefail
prefix=${1:?name the folder of the environment}
"${PYTHON:-python3}" -m venv "$prefix"
"$prefix/bin/python" -m pip install --no-cache-dir --quiet --upgrade pip
"$prefix/bin/python" -m pip install --no-cache-dir --quiet --requirement requirements/lock.txt
"$prefix/bin/python" -m pip install --no-cache-dir --quiet --no-deps .
"$prefix/bin/python" -m m3i_scale.cli --version
