#!/usr/bin/env bash
# Build the sdist and the wheel, look into both, install the wheel outside the checkout and run the demo from it.
#
#     bash benchmarks/release_check.sh
#     TORCH_FROM=.venv bash benchmarks/release_check.sh    # what brfx needs comes from that environment: no downloads
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ -z ${TORCH_FROM:-} ]] || python=$(realpath -s "$TORCH_FROM")/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From a clean copy, so that nothing untracked gets in.
git archive --prefix=brfx/ HEAD | tar -x -C "$work"
"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check build
"$work/build/bin/python" -m build --outdir "$work/dist" "$work/brfx" >"$work/build.log" || { cat "$work/build.log"; exit 1; }
(cd "$work" && "$work/build/bin/python" brfx/benchmarks/release_contents.py brfx dist)

"$python" -m venv "$work/venv"
if [[ -n ${TORCH_FROM:-} ]]; then
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    ours=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$site" >"$ours/from_another.pth" # behind the wheel's own files on sys.path, and its .pth files are not read
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$work"/dist/*.whl
else
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$(echo "$work"/dist/*.whl)[onnx,demo]"
fi

cd "$work"
run() { echo "\$ brfx $*"; "$work/venv/bin/brfx" "$@"; }
"$work/venv/bin/python" - "$work/venv" <<'EOF'
import sys
import brfx, brfx_cli
for module in (brfx, brfx_cli):
    assert module.__file__.startswith(sys.argv[1]), f"{module.__name__} is not the wheel's: {module.__file__}"
EOF
run recipes
run train --model resnet20 --data digits --epochs "${FP32_EPOCHS:-8}" --output-dir demo/fp32
run quantize --model resnet20 --data digits --ckpt demo/fp32/best.pth --bits 2 --qat-epochs "${QAT_EPOCHS:-12}" \
    --output-dir demo/w2a2
run verify demo/w2a2/model.pt demo/w2a2/model.onnx --data digits
echo "The wheel installs, trains, quantizes and exports."
