# Finds the Python environment or makes it, once; sourced by every run.sh and by run_tests.sh.
#
# The active environment (venv, conda, or the python on PATH) is used as it is where it satisfies the ranges of
# pyproject.toml. Otherwise env_setup.py makes .venv beside this file from constraints.txt, and that is used from
# then on. Afterwards PYTHON is the interpreter to call. By hand: source env.sh && "$PYTHON" program.py
#
#   OWN_VENV=1           use .venv whatever is active
#   TORCH_BUILD=cuda     install torch with CUDA although no GPU is seen here (cpu: without, although one is)

_env_say() { printf 'env.sh: %s\n' "$*" >&2; }

# Sets PYTHON to the active interpreter and returns 0 if it satisfies pyproject.toml; else says what it lacks.
_env_active() {
  local python lacks="" named="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [ -n "${OWN_VENV:-}" ] || [ "${VIRTUAL_ENV:-}" = "$_env_root/.venv" ]; then return 1; fi
  for python in "$named/bin/python" "$named/Scripts/python.exe" "$named/python.exe" python python3; do
    case "$python" in
      */*) if [ -z "$named" ] || [ ! -x "$python" ]; then continue; fi ;;
    esac
    lacks="$("$python" "$_env_root/env_setup.py" check ${ENV_EXTRAS:-} 2>/dev/null)"
    case $? in
      0) PYTHON="$python"
         case "$python" in */*) export PATH="$(dirname -- "$python"):$PATH" ;; esac
         # Programs find yardstick without an installation into an environment that is not ours.
         export PYTHONPATH="$_env_root${PYTHONPATH:+:$PYTHONPATH}"
         return 0 ;;
      3) break ;;                         # a Python that lacks packages; any other code: none, broken or too old
    esac
  done
  if [ -n "$named" ]; then
    _env_say "using .venv; the active environment $named lacks ${lacks:-Python 3.11 or newer}"
  fi
  return 1
}

# Sets PYTHON to the interpreter of .venv and returns 0 if that stands complete for today's constraints.txt.
_env_venv() {
  local bin="$_env_root/.venv/bin"
  if [ -d "$_env_root/.venv/Scripts" ]; then bin="$_env_root/.venv/Scripts"; fi
  "$bin/python" "$_env_root/env_setup.py" ready >/dev/null 2>&1 || return 1
  PYTHON="$bin/python"
  export VIRTUAL_ENV="$_env_root/.venv" PATH="$bin:$PATH"
  unset PYTHONHOME
}

# Makes .venv from the first Python that runs (a pyenv shim may not), is 3.11 or newer and has the venv module.
_env_make() {
  local python old="" bare=""
  for python in python3 python python3.13 python3.12 python3.11 python3.14; do
    "$python" -c 'import sys
if sys.version_info < (3, 11): sys.exit(3)
try: import ensurepip, venv
except ImportError: sys.exit(4)' >/dev/null 2>&1
    case $? in
      0) "$python" "$_env_root/env_setup.py" make; return ;;
      3) old="$old $python is $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')," ;;
      4) bare="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" ;;
    esac
  done
  if [ -n "$bare" ]; then
    _env_say "Python has no venv module here: install it (Debian, Ubuntu: apt-get install $bare), and start again."
  elif [ -n "$old" ]; then
    _env_say "Python is too old:${old%,}; 3.11 or newer is needed. Install one (apt, brew, pyenv, conda) so that" \
             "python3, or python3.11 to python3.14, is found on PATH, and start again."
  else
    _env_say "no Python is found on PATH. Install Python 3.11 or newer (Debian, Ubuntu: apt-get install python3" \
             "python3-venv; macOS: brew install python) and start again."
  fi
  return 1
}

_env_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" >/dev/null 2>&1 && pwd)"
export TOKENIZERS_PARALLELISM=false       # ranks are forked; without it tokenizers warns of its threads each time
if ! _env_active && ! _env_venv; then
  _env_make || return 1
  _env_venv || { _env_say "$_env_root/.venv was made and cannot be used: remove it and start again."; return 1; }
fi
export PYTHON
