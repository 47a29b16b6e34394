#!/usr/bin/env bash
# Builds and pushes the image of a commit.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=../pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/../pod.sh"
# shellcheck source=gke.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke.sh"

USAGE="\
xpk/build_image.sh --image REGISTRY/NAME [--commit C] [options]

Builds tpu_scripts/xpk/Dockerfile from the files of one commit and pushes it as
REGISTRY/NAME:COMMIT (twelve digits).

  --image I                   without a tag, such as europe-docker.pkg.dev/P/iv2/iv2_jax
  --commit C                  default: HEAD. Uncommitted changes are not taken along
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  gcloud auth configure-docker europe-docker.pkg.dev     # once
  xpk/build_image.sh --image europe-docker.pkg.dev/P/iv2/iv2_jax"

parse "image commit" "$@"
need image
[[ "${IMAGE##*/}" != *:* ]] || die "$EXIT_USAGE" "--image $IMAGE has a tag; leave it out, the commit becomes the tag"
EXTRAS=""
pin_commit
need_tools docker git tar
TAG="$IMAGE:${COMMIT:0:12}"
FOLDER="${TMPDIR:-/tmp}/iv2_jax-image-${COMMIT:0:12}"
run rm -rf "$FOLDER"
run mkdir -p "$FOLDER"
run git -C "$REPO_ROOT" archive "--output=$FOLDER.tar" "$COMMIT"
run tar -xf "$FOLDER.tar" -C "$FOLDER"
# TPU VMs are x86-64; a laptop may not be.
run docker build --platform=linux/amd64 "--file=$FOLDER/tpu_scripts/xpk/Dockerfile" "--tag=$TAG" "$FOLDER" ||
  die "$EXIT_FAILED" "the image could not be built"
run docker push "$TAG" ||
  die "$EXIT_FAILED" "$TAG could not be pushed; logged in? gcloud auth configure-docker ${IMAGE%%/*}"
run rm -rf "$FOLDER" "$FOLDER.tar"
[[ -n "$DRY_RUN" ]] || printf '%s\n' "$TAG"
