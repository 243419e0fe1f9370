#!/bin/sh
# Makes .venv for one device: sh requirements/install.sh PYTHON cpu|gpu   (called by `make setup`)
set -eu
cd "$(dirname "$0")/.."
python=$1 device=$2 log=.venv/setup.log list=requirements/$2.txt start=$(date +%s)

fail() {
    echo "set-up: error: $*" >&2
    exit 1
}

# step NAME COMMAND...: one line with the time it took; the end of the log if it fails.
step() {
    name=$1 begun=$(date +%s)
    shift
    printf '  %s ... ' "$name"
    echo "--- $name: $*" >>$log
    if "$@" >>$log 2>&1; then
        echo "$(($(date +%s) - begun)) s"
    else
        printf 'failed\n\n' && tail -n 20 $log >&2
        fail "could not install $name (the whole log: $log)"
    fi
}

# On a machine that has the CPU build in pip's configuration, pip finds it. PyPI does not have it;
# uv knows where PyTorch keeps it.
cpu_torch() {
    .venv/bin/pip install --no-deps "torch==$1+cpu" ||
        { echo "pip has no torch $1+cpu; asking uv" && uv --torch-backend=cpu "torch==$1"; }
}

uv() {
    # The lists are complete, so nothing is resolved and nothing else can slip in.
    # Byte code now: without it, where Python may not write it later, every process would start half a minute later.
    .venv/bin/uv pip install --python .venv/bin/python --no-progress --no-deps --compile-bytecode "$@"
}

case $device in cpu | gpu) ;; *) fail "DEVICE is cpu or gpu, not '$device'" ;; esac
version=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) ||
    fail "there is no working '$python' here; name a Python 3.11 to 3.13: make setup PYTHON=python3.11"
case $version in
3.11.* | 3.12.* | 3.13.*) ;;
*) fail "'$python' is Python $version; Python 3.11 to 3.13 is needed: make setup PYTHON=python3.11" ;;
esac

# The devices' packages cannot share an environment, and one left half done is not worth keeping.
[ -e ".venv/ready-$device" ] || rm -rf .venv
rm -f .venv/ready-*
mkdir -p .venv
: >$log
echo "set-up: Python $version, device $device, into .venv (a few minutes the first time)"

step "virtual environment" "$python" -m venv .venv
step "uv" .venv/bin/pip install --no-deps -c $list uv
# uv remembers Pythons by their path: of an environment that was half removed while it looked, it remembers that there
# is none, and would install into the Python below.
.venv/bin/uv pip show --quiet --python .venv/bin/python uv 2>/dev/null ||
    fail "uv takes .venv for no environment: rm -rf $(.venv/bin/uv cache dir)/interpreter-*, then again"
# uv does not read pip's configuration; a mirror that is set there must serve uv as well.
mirror=$(.venv/bin/pip config list | sed -n "s/^.*\.index-url='\(.*\)'$/\1/p" | head -n 1)
[ -z "$mirror" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$mirror}"
if [ "$device" = cpu ]; then
    torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' $list)
    step "torch $torch, CPU build" cpu_torch "$torch"
fi
step "$(grep -c == $list) packages" uv --build-constraints $list -r $list
step "countdown_kd itself, editable" uv --no-build-isolation -e .
touch ".venv/ready-$device"
echo "set-up: done in $(($(date +%s) - start)) s"
