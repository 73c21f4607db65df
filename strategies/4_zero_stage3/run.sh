#!/usr/bin/env bash
# Finds or makes the environment, then trains with the config.json beside this file; arguments are key=value.
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd)"
source "$root/env.sh" || exit 1
exec "$PYTHON" "$root/real_model_example.py" strategy=zero3 "$@"
