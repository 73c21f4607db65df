#!/usr/bin/env bash
# Measures all six strategies on the GPUs at hand, without a network; arguments are key=value of measure_gpu.py.
#
#   PYTHON=/path/to/python   takes that environment as it is; NO_ENV=1 the python on PATH; else env.sh finds one or makes it
#   WHEELS=folder            takes all wheels of that folder before (pip --no-index) and changes no environment
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
if [ -z "${PYTHON:-}" ] && [ -z "${NO_ENV:-}" ]; then
  source "$root/env.sh" || exit 1
fi
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
  site="$root/runs/measure_gpu/site"
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$site:$PYTHONPATH"
fi
exec "$PYTHON" "$root/strategies/measure_gpu.py" "$@"
