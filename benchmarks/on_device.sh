#!/usr/bin/env bash
# What to run where an accelerator is at hand, in under nine minutes: tests, a step's cost, files on its ONNX Runtime,
# accuracy.
#
#     bash benchmarks/on_device.sh OUT [CKPT CIFAR10_FOLDER]       # DEVICE=cpu QUICK=1: a try on the CPU
#
# OUT gets a log of each part, its exit status and the runs. A part that fails does not stop the others.
set -u
out=$1 ckpt=${2:-} data=${3:-}
device=${DEVICE:-cuda} python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

part() {  # name, seconds, command
    local name=$1 limit=$2
    shift 2
    local begun=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - begun)) s" | tee -a "$out/parts.txt"
}

step=(--rounds 30)
[ -n "${QUICK:-}" ] && step=(--rounds 1 --batch 8 --forms none --precisions fp32)

part tests 120 env BRFX_TEST_DEVICE="$device" "$python" -m pytest tests/test_device.py -q -p no:cacheprovider
part step 180 "$python" benchmarks/device_step.py --device "$device" "${step[@]}"
if [ "$device" = cuda ] && [ -n "$ckpt" ]; then
    part nccl 60 "$python" -m torch.distributed.run --nproc-per-node 1 -m brfx_cli quantize --model resnet20 \
        --data digits --qat-epochs 1 --limit-batches 4 --device cuda --output-dir "$out/nccl" \
        --ckpt "$ckpt"
fi
if [ -n "$ckpt" ]; then
    more=(--qat-epochs 30 --batch-size 256)
    [ -n "${QUICK:-}" ] && more=(--qat-epochs 1 --limit-batches 1 --batch-size 8 --compile off)
    for seed in 0 1 2; do  # side by side
        part "w2a2-seed$seed" 240 "$python" -m brfx_cli quantize --model resnet20 --ckpt "$ckpt" --data "$data" \
            --bits 2 --lambda-br 0 --lambda-br-act 0 --seed "$seed" --device "$device" "${more[@]}" \
            --output-dir "$out/w2a2-seed$seed" &
    done
    wait
fi
cat "$out/parts.txt"
