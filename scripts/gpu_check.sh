#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, the gpu tests, then compute-sanitizer over the random calls.
# Environment: PYTHON; BUILD=0 uses the libraries that lie in fxsparse/; SANITIZE=0 leaves compute-sanitizer out.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [[ ${BUILD:-1} == 1 ]]; then
  "$PYTHON" setup.py build_ext --inplace
fi
"$PYTHON" setup.py -q egg_info # torch.compile finds the backend by its entry point
PYTHONPATH=. "$PYTHON" -m pytest -q -ra --durations=5 tests/gpu tests/test_cuda_registration.py

if [[ ${SANITIZE:-1} == 1 ]]; then
  # Without torch's cache every tensor is an allocation of its own, so that reading past its end is seen. Only our
  # kernels are instrumented: torch's would take minutes.
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name kns=fxsparse \
      --error-exitcode 9 "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/gpu/test_cuda_kernels.py \
      tests/gpu/test_cuda_tiled.py tests/gpu/test_cuda_region.py \
      -k "random_calls or unpack_and_repack or strided_arguments or every_step or (pool_by_themselves and 24-0.3)"
  done
fi
