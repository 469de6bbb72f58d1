#!/bin/bash
# Install what tests/slurm needs, on Debian and Ubuntu, where this may be done; else say why not.
# The packages' own services are not used and are left stopped.
set -euo pipefail

for program in munged slurmctld slurmd sbatch; do
    PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || missing=$program
done
if [[ -z ${missing:-} ]]; then
    echo "Slurm is installed"
elif ! command -v apt-get > /dev/null; then
    echo "no $missing and no apt-get: the tests of slurm/ will be skipped"
elif (( EUID != 0 )); then
    echo "no $missing and not root: the tests of slurm/ will be skipped"
else
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # Services must not start while they are unpacked: this machine may be no cluster of its own.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod +x $policy
        trap 'rm -f $policy' EXIT
    fi
    apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge
fi
