#!/usr/bin/env bash
# Installs rayemb and its pinned dependencies into the current Python: install.sh cpu|gpu [more arguments to pip]
# One recipe for the image (Dockerfile) and for the virtual machines (aws.yaml), so that they cannot drift apart.
set -euo pipefail

flavour=${1:-}
case "$flavour" in
cpu | gpu) shift ;;
*)
    echo "usage: install.sh cpu|gpu [more arguments to pip]; got '${flavour}'" >&2
    exit 2
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A copy, because the build writes beside pyproject.toml, and a mounted tree may belong to somebody else.
cp -R "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/rayemb" "$work"

if [ "$flavour" = cpu ]; then
    # torch's builds without CUDA (2.x.y+cpu, which satisfy the pin and win over 2.x.y) are in its own index only.
    cp "$root/constraints.txt" "$work"
    set -- --extra-index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" "$@"
else
    # The pins come from a machine without a GPU: they lack only the
    # FAISS for it.
    cp "$root/constraints.txt" "$work"
    echo "faiss-gpu-cu12==1.14.1.post1" >>"$work/constraints.txt"
fi

python -m pip install --no-cache-dir --constraint "$work/constraints.txt" "$@" "$work[$flavour]"
