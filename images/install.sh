#!/bin/sh
# Installs requirements into /opt/venv, at the versions of constraints.txt: install.sh "PACKAGES TO LEAVE OUT" REQUIREMENT...
# PACKAGE_INDEX and TORCH_INDEX (beside it, for torch and what torch needs) name other package indexes. Leaves no
# installer and no cache behind.
set -eu
here=$(dirname "$0")
export VIRTUAL_ENV=/opt/venv UV_CACHE_DIR=/cache UV_LINK_MODE=copy UV_NATIVE_TLS=1
[ -z "${PACKAGE_INDEX:-}" ] || export PIP_INDEX_URL="$PACKAGE_INDEX" UV_DEFAULT_INDEX="$PACKAGE_INDEX"
[ -z "${TORCH_INDEX:-}" ] || export UV_INDEX="$TORCH_INDEX" UV_INDEX_STRATEGY=unsafe-best-match

python3 -m venv /tmp/installer
/tmp/installer/bin/pip install --quiet --no-cache-dir --disable-pip-version-check uv==0.13.9
[ -d /opt/venv ] || /tmp/installer/bin/uv venv --quiet --python python3 /opt/venv
printf '%s\n' $1 > /tmp/excludes
shift
/tmp/installer/bin/uv pip install --compile-bytecode --constraints "$here/constraints.txt" --excludes /tmp/excludes "$@"
rm -r /tmp/installer /tmp/excludes
