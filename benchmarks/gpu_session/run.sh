#!/usr/bin/env bash
# Ten minutes on one GPU: is it right, how fast is it, where does the time go.
#
#     bash benchmarks/gpu_session/run.sh OUT [--wheels FOLDER] [--cubins FOLDER] [--rehearse]
#                                            [--only PART,PART] [--python PROGRAM] [--seconds TOTAL]
#
# The parts and their time limits stand at the end. Each writes rows (OUT/rows.jsonl) and a log
# (OUT/session.log) as it goes; one that fails or is stopped does not keep the next from running.
# OUT/raw.tar.gz has everything else. At the end: a table, and OUT/report.md with plots.
# --rehearse runs the same on a CPU in a small form: `make gpu-session-rehearsal`. Its exit code is 1
# where a part failed or did not end in time, as on a machine that does much else.
# $M3I_COMMIT names the commit where the tree is a copy without .git.
# --cubins: DCNv3's matrix kernels, which need Triton 3.8, compiled where there is one by
# `python kernels/bench/matrix_check.py --compile FOLDER` from the same sources.
#
# The machine needs Python 3.12 with torch 2.11, triton 3.6, torchvision, transformers 5.17, timm,
# tokenizers, safetensors, pyarrow, fsspec, aiohttp, tensorboard, matplotlib, pillow, tqdm, pytest,
# pytest-timeout, pytest-xdist, hypothesis, msgpack, ninja, psutil, py-cpuinfo, scikit-image,
# scikit-learn and scipy, and no network.
# The rest comes as wheels, 5 MiB, fetched where there is a network:
#
#     mkdir .whl
#     python3.12 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
#         --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#         --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl \
#         pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 \
#         typing-extensions==4.16.0 webdataset==1.0.2 braceexpand==0.1.7 einops==0.8.2 \
#         faster-coco-eval==1.8.0
#     # Two have no wheel; both build to py3-none-any. DS_BUILD_OPS=0: nothing is compiled here.
#     DS_BUILD_OPS=0 python3.12 -m pip wheel --no-deps -w .whl deepspeed==0.19.8 hjson==3.1.0
set -uo pipefail

out= wheels= cubins= only= total= python=python3 rehearse=0
while [ $# -gt 0 ]; do
    case $1 in
        --wheels | --cubins | --only | --python | --seconds)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
        --wheels) wheels=$2; shift ;;
        --cubins) cubins=$2; shift ;;
        --only) only=$2; shift ;;
        --python) python=$2; shift ;;
        --seconds) total=$2; shift ;;
        --rehearse) rehearse=1 ;;
        -*) echo "error: there is no option $1; see the head of $0" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
[ -n "$out" ] || { echo "usage: run.sh OUT [--wheels FOLDER] [--rehearse]; see its head" >&2; exit 2; }
[ -z "$wheels" ] || compgen -G "$wheels/*.whl" >/dev/null ||
    { echo "error: there is no wheel in $wheels; the head of $0 says how to fetch them" >&2; exit 2; }
[ -z "$cubins" ] || [ -f "$cubins/manifest.json" ] ||
    { echo "error: there are no kernels in $cubins; matrix_check.py --compile makes them" >&2; exit 2; }
parts=setup,tests,transfer,audit,step,host,matrix,depthwise,dcnv3
for name in ${only//,/ }; do
    [[ ",$parts," == *",$name,"* ]] ||
        { echo "error: there is no part $name; there are $parts" >&2; exit 2; }
done
total=${total:-$((rehearse ? 1800 : 595))}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$(mkdir -p "$out" && cd "$out" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)
[ -z "$cubins" ] || cubins=$(cd "$cubins" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
started=$(date +%s)
: >"$out/rows.jsonl"
: >"$out/session.log"
mkdir -p "$work/raw"
ln -s "$out/rows.jsonl" "$work/raw/rows.jsonl"

# DS_ACCELERATOR follows engine.device. The caches are this machine's own, and empty.
unset DS_ACCELERATOR
export M3I_SESSION=$work/raw M3I_REHEARSE=$rehearse PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=$work/triton HF_HUB_OFFLINE=1
# DeepSpeed's CPU Adam, compiled once; a killed compilation leaves a lock in the usual folder.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$work/extensions}
export OMP_NUM_THREADS=$((rehearse ? 1 : 4))
PYTHONPATH="$here:$root:$root/kernels:$root/kernels/bench:$root/tests:$root/benchmarks"
[ -z "$wheels" ] || PYTHONPATH="$work/site:$PYTHONPATH"
export PYTHONPATH
cd "$root"

# Without setup there would be no wheels to import.
wanted() { [ -z "$only" ] || [[ ",$only${wheels:+,setup}," == *",$1,"* ]]; }

# part NAME SECONDS COMMAND...: one part under its limit and what is left of the whole.
part() {
    local name=$1 limit=$2 begun code outcome seconds
    shift 2
    wanted "$name" || return 0
    local left=$((total - $(date +%s) + started))
    [ "$limit" -le "$left" ] || limit=$((left > 0 ? left : 0))
    begun=$(date +%s.%N)
    if [ "$limit" -lt 3 ]; then
        code=124
        echo "no time was left" >"$work/raw/$name.log"
    else
        echo "== $name, at most $limit s"
        LIMIT=$limit timeout --kill-after=4 "$limit" "$@" >"$work/raw/$name.log" 2>&1
        code=$?
    fi
    case $code in 0) outcome=ok ;; 124 | 137) outcome=timeout ;; *) outcome=failed ;; esac
    seconds=$(awk "BEGIN { print $(date +%s.%N) - $begun }")
    printf '{"part": "parts", "name": "%s", "seconds": %.1f, "limit": %d, "outcome": "%s", "exit_code": %d}\n' \
        "$name" "$seconds" "$limit" "$outcome" "$code" >>"$out/rows.jsonl"
    {
        printf '\n===== %s: %s after %.1f s\n' "$name" "$outcome" "$seconds"
        tail -c 200000 "$work/raw/$name.log"
    } >>"$out/session.log" 2>&1
    [ "$outcome" = ok ] || tail -n 12 "$work/raw/$name.log" | cut -c1-300
    echo "== $name $outcome after $seconds s"
    tar -C "$work" --exclude '*.pt' --exclude '*.safetensors' --exclude '*.trace.json.gz' \
        --exclude '*.tar' -czhf "$work/$name.tar.gz" raw 2>/dev/null
    mv "$work/$name.tar.gz" "$out/raw.tar.gz"
}

setup() {
    if [ -n "$wheels" ]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" \
            "$wheels"/*.whl || return 1
    fi
    "$python" "$here/environment.py"
}
export -f setup
export wheels cubins python work here

# The limits on a GPU; a rehearsal may find its two cores busy.
slow=$((rehearse ? 6 : 1))
part setup $((20 * slow)) bash -c setup
# These are about being right, and take no times: side by side.
{
    part tests $((100 * slow)) bash -c 'exec "$python" "$here/kernel_tests.py" "$LIMIT"'
    part transfer $((150 * slow)) bash -c 'exec "$python" "$here/transfer.py" "$LIMIT"'
} &
part audit $((130 * slow)) "$python" "$here/audit.py" &
wait
part step $((250 * slow)) bash -c 'exec "$python" "$here/training_step.py" "$LIMIT" ${cubins:+"$cubins"}'
part host $((90 * slow)) bash -c 'exec "$python" "$here/host.py" "$LIMIT"'
# Interpreted in a rehearsal, native on a GPU.
export TRITON_INTERPRET=$rehearse
part matrix $((30 * slow)) bash -c 'exec "$python" "$here/matrix.py" "$LIMIT" ${cubins:+"$cubins"}'
part depthwise $((45 * slow)) "$python" "$here/depthwise.py"
part dcnv3 $((70 * slow)) "$python" "$here/kernel_bench.py"
echo
timeout $((40 * slow)) "$python" "$here/report.py" "$out"
code=$?
# A session has found what it has found; a rehearsal that did not come through is an error.
[ "$rehearse" = 0 ] || ! grep -q '"part": "parts".*"outcome": "[ft]' "$out/rows.jsonl" || code=1
exit "$code"
