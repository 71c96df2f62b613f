#!/usr/bin/env bash
# Runs the CPU operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the checkout.
# Environment: PYTHON. Arguments go to pytest instead of "tests/ops".
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | tar --null -cT - | tar -x -C "$copy"
cd "$copy"
# Vectors are read from addresses aligned as their elements, on purpose, and row pointers may leave a padded plane.
FXSPARSE_WITHOUT_CUDA=1 \
  FXSPARSE_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize=alignment,pointer-overflow -fno-sanitize-recover=undefined -g1 -O1" \
  "$PYTHON" setup.py -q build_ext --inplace > /dev/null
# Python itself leaks, and its libraries come before ours. How long an import takes says nothing here.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
  "$PYTHON" -m pytest -q -x -p no:cacheprovider \
  --deselect tests/ops/test_library.py::test_importing_starts_no_cuda_and_costs_under_50_ms "${@:-tests/ops}"
