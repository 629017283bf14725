#!/usr/bin/env bash
# Container start: finds the weights, fetches or builds them if that was asked for, and runs the
# command that was given (the worker) as a user without rights. docs/deploy.md has the layouts.
set -euo pipefail

home=${SCAIL_HOME:-/opt/scail}
volume=${SCAIL_VOLUME:-/runpod-volume}
read -ra archs <<< "${SCAIL_ARCH:?is set by the image}"
cache=$volume/huggingface-cache/hub

say() { printf 'entrypoint: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
# of several architectures of an image leaves that of this machine's GPU, all where no GPU tells
narrow() {
  local here
  [[ ${#archs[@]} -gt 1 ]] || return 0
  here=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null) || return 0
  here=sm${here%%$'\n'*}
  here=${here/./}
  if [[ " ${archs[*]} " == *" $here "* ]]; then archs=("$here"); fi
}
# tells if a place has a package of any kind, in packages/KIND/ARCH or packages/ARCH, that this engine
# reads: one of schema 1 is to be built again
has_package() {
  local arch manifest
  for arch in "${archs[@]}"; do
    for manifest in "$1"/packages/{*/,}"$arch"/manifest.json; do
      if [[ -f $manifest && $(head -c 13 "$manifest") != '{"schema": 1,' ]]; then return 0; fi
    done
  done
  return 1
}
# prints where weights may be: baked into the image, in the host's model cache, on the volume
places() {
  printf '%s\n' "$home/weights"
  if [[ -n ${WEIGHTS_REPO:-} ]]; then
    compgen -G "$cache/models--${WEIGHTS_REPO//\//--}/snapshots/*" || true
  fi
  printf '%s\n' "$volume"
}

fetch() { # downloads the repository, which has packages/KIND/ARCH and models, to the folder $1
  local include=() arch
  for arch in "${archs[@]}"; do
    include+=(--include "packages/*/$arch/*" --include "packages/$arch/*")
  done
  say "fetching $WEIGHTS_REPO to $1"
  HF_HOME=/tmp/huggingface hf download "$WEIGHTS_REPO" --revision "${WEIGHTS_REVISION:-main}" \
    "${include[@]}" --include "models/*" --local-dir "$1" >&2
  has_package "$1" ||
    fail "$WEIGHTS_REPO has no packages/KIND/${archs[*]} of this engine. Upload one."
}

build() { # builds a package onto the volume, with the kernels that the image brought
  [[ -d $volume ]] || fail "SCAIL_CHECKPOINT is built onto a network volume. Attach one."
  say "building a package for ${archs[*]} of $SCAIL_CHECKPOINT below $volume/packages, once"
  local files=() loras=() file arch
  IFS=, read -ra files <<< "${SCAIL_LORA:-}"
  for file in "${files[@]}"; do loras+=(--lora "$file"); done
  for arch in "${archs[@]}"; do
    SCAIL_STATE=$home/build python build_engine.py --arch "$arch" \
      --checkpoint "$SCAIL_CHECKPOINT" "${loras[@]}" --out "$volume/packages" >&2
  done
}

find_weights() { # sets place
  while IFS= read -r place; do
    if has_package "$place"; then return; fi
  done < <(places)
  place=$volume
  if [[ -n ${WEIGHTS_REPO:-} ]]; then
    [[ -d $volume ]] || place=$home/weights
    fetch "$place"
  elif [[ -n ${SCAIL_CHECKPOINT:-} ]]; then
    build
  else
    say "no package for ${archs[*]} in: $(places | paste -sd ' '). The worker will say what to do."
  fi
}

# The image build bakes weights with this very function.
if [[ ${1:-} == fetch ]]; then
  fetch "$home/weights"
  exit
fi

if [[ -z ${SCAIL_PACKAGE:-} ]]; then
  narrow
  find_weights
  export SCAIL_PACKAGE=$place/packages
  [[ -n ${SCAIL_MODELS:-} || ! -d $place/models ]] || export SCAIL_MODELS=$place/models
fi
say "packages in $SCAIL_PACKAGE, models in ${SCAIL_MODELS:-$volume/models}"
unset HF_TOKEN # the worker has no use for it
export HF_HUB_OFFLINE=1

if [[ $(id -u) == 0 ]]; then
  drop=(setpriv --reuid=scail --regid=scail --init-groups --no-new-privs)
  if [[ ! -e $SCAIL_PACKAGE ]] || "${drop[@]}" test -r "$SCAIL_PACKAGE" -a -x "$SCAIL_PACKAGE"; then
    exec "${drop[@]}" "$@"
  fi
  say "only root may read $SCAIL_PACKAGE, so the worker stays root. chmod -R a+rX it."
fi
exec "$@"
