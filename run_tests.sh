#!/usr/bin/env bash
# Runs the tests: bash run_tests.sh [all] [arguments of pytest]; "all" adds those that take minutes.
# From any directory; paths among the arguments are meant from the root of the checkout.
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)"
cd -- "$root" || exit 1
ENV_EXTRAS=dev
source ./env.sh || exit 1

wanted=""
if [ "${1:-}" = all ]; then shift; else wanted="not slow"; fi
if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then wanted="${wanted:+$wanted and }not gpu"; fi
exec "$PYTHON" -m pytest -m "$wanted" --durations=15 "$@"
