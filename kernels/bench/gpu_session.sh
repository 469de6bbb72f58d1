#!/usr/bin/env bash
# One session on a machine with a GPU: the tests natively, then every benchmark; raw rows and logs
# go to the folder given as the first argument.
#
#     bash kernels/bench/gpu_session.sh results_folder [python]
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_session.sh results_folder [python]}" && cd "$1" && pwd)
python=${2:-python}
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
run=("$python" kernels/bench/run.py --out "$out")
failed=0

step() {
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name failed with $code"; failed=1; }
}

nvidia-smi >"$out/device.txt" 2>&1 || rocminfo >"$out/device.txt" 2>&1
"$python" -m pip list >"$out/packages.txt" 2>&1

step tests "$python" -m pytest tests/kernels -q -p no:cacheprovider --timeout 600 \
    --confcutdir tests/kernels
step block_mix "${run[@]}" --op block_mix --batch 512
step photometric "${run[@]}" --op photometric --batch 512
step tune "$python" kernels/bench/tune.py --out "$out"
# The compiled reference takes long to build, so it is measured where it matters most.
others=(triton "triton deterministic" "reference eager" "official DCNv3" "official DCNv4")
step dcnv3 "${run[@]}" --op dcnv3 --implementations "${others[@]}"
step dcnv3_plain "${run[@]}" --op dcnv3_plain --problems H --implementations "${others[@]}"
mkdir -p "$out/compiled"
step dcnv3_compiled "${run[@]}" --op dcnv3 --problems "H 192" --out "$out/compiled" \
    --implementations triton "reference compiled"
# The training step of InternImage-H at the largest of these micro-batches that fits the memory.
for images in 256 128 64 32; do
    echo "== training step, $images images"
    timeout 420 "$python" benchmarks/step.py --config configs/pretrain_internimage_h.yaml \
        --micro-batch "$images" --steps 10 --profile 1 --out "$out" 2>&1 |
        tee "$out/training_step_$images.log" | tail -n 40
    code=${PIPESTATUS[0]}
    [ "$code" -eq 3 ] || break # 3: out of memory
done
[ "$code" -eq 0 ] || { echo "== training step failed with $code"; failed=1; }
exit $failed
