#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with a GPU, in under 9 minutes and without network.
#   bash benchmarks/gpu.sh [OUT]        needs python3 (or $PYTHON) with torch, setuptools and pytest; nvcc
# Writes OUT/<card>.json, OUT/<card>.png and OUT/log/*; OUT is benchmarks/results by default. If src/fasttricks/lib
# already has a libfasttricks_cuda.so, say from a wheel, it is used. A failed part does not stop the later ones; the
# exit status is then 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
mkdir -p "$out/log"
export PYTHONPATH=$PWD/src:$PWD/tests PYTHONUNBUFFERED=1
failed=()

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/log/$name.txt" 2>&1; then
    echo "$name: passed in $((SECONDS - start)) s"
  else
    echo "$name: FAILED (exit $?) after $((SECONDS - start)) s; the end of its output:"
    tail -n 25 "$out/log/$name.txt"
    failed+=("$name")
  fi
}

arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || {
  echo "gpu.sh: the torch of $python finds no GPU"
  exit 1
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
if [ ! -e src/fasttricks/lib/libfasttricks_cuda.so ]; then
  FASTTRICKS_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch part build 180 "$python" setup.py -q build_ext --inplace
fi
"$python" -m fasttricks.info | tee "$out/log/info.txt"

# the tests of the ops on CUDA tensors, with each backend
ops="tests/test_bn_relu.py tests/test_avgpool_conv1x1.py tests/test_sgd.py tests/test_sgd_check.py tests/test_nn_batchnorm.py"
part tests 150 "$python" -m pytest -q -x --maxfail=20 -k "on_card" -p no:cacheprovider $ops tests/test_optim_devices.py
part fast_paths 60 "$python" benchmarks/fast_paths.py
# plans for one multiprocessor: small tensors take the paths of large ones, in one launch, with all or a part of a tensor
# on the chip, and in several
FASTTRICKS_TEST_SM_COUNT=1 part one_sm 40 "$python" benchmarks/fast_paths.py --small
FASTTRICKS_TEST_SM_COUNT=1 FASTTRICKS_TEST_SHARED_BYTES=61440 part some_shared 40 "$python" benchmarks/fast_paths.py --small
FASTTRICKS_TEST_SM_COUNT=1 FASTTRICKS_TEST_SHARED_BYTES=0 part no_shared 40 "$python" benchmarks/fast_paths.py --small
part triton 100 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider tests/test_triton_*.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for check in memcheck racecheck synccheck; do # only our kernels: their mangled names contain the namespace
    part "$check" 25 "$sanitizer" --tool "$check" --kernel-name kns=fasttricks --error-exitcode 1 \
      "$python" tests/wheel_smoke.py cuda
    FASTTRICKS_TEST_SM_COUNT=1 part "$check-one_launch" 25 "$sanitizer" --tool "$check" --kernel-name kns=fasttricks \
      --error-exitcode 1 "$python" benchmarks/fast_paths.py --small
    FASTTRICKS_TEST_SM_COUNT=1 FASTTRICKS_TEST_SHARED_BYTES=0 part "$check-several" 25 "$sanitizer" --tool "$check" \
      --kernel-name kns=fasttricks --error-exitcode 1 "$python" benchmarks/fast_paths.py --small
  done
else
  echo "compute-sanitizer: not on this machine"
fi
# for what card.py predicts beside what it measures
PYTHONPATH=$PWD:$PYTHONPATH part planners 100 "$python" tests/emulator/emulated.py plans
part card 200 "$python" benchmarks/card.py --out "$out"
cat "$out/log/card.txt"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
